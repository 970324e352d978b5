"""Caffe ``.caffemodel`` files: protobuf read by hand (deeplab.md section C.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from net.foreign.pytorch import State

# field of NetParameter that holds the layers -> fields of a layer: name, type, blobs.
# 100 is today's format; 2 is that of 2014/15 (V1LayerParameter), whose types are numbers.
_CAFFE_LAYERS = {100: (1, 2, 7), 2: (4, 5, 6)}
_CAFFE_INNER_PRODUCT = (b"InnerProduct", 14)


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The variable-length integer at ``position`` and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("not a protobuf message")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protobuf message; strings, messages and packed numbers come as raw bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("not a protobuf message")
        if position + length > len(data):
            raise ValueError("a field is longer than the message")
        yield tag >> 3, data[position : position + length]
        position += length


def _blob(data: memoryview) -> Tensor:
    """One BlobProto; its shape is field 7, or in older files num, channels, height, width in 1 to 4."""
    shape: list[int] | None = None
    legacy = [1, 1, 1, 1]
    values = np.empty(0, "<f4")
    for number, value in _fields(data):
        if number == 7:
            shape = [dim for _, dims in _fields(value) for dim in _dims(dims)]
        elif 1 <= number <= 4:
            legacy[number - 1] = value
        elif number == 5:
            values = np.frombuffer(value, "<f4")
    return torch.from_numpy(values.reshape(legacy if shape is None else shape).copy())


def _dims(value: int | memoryview) -> list[int]:
    """Numbers of a repeated integer field, packed or one by one."""
    if isinstance(value, int):
        return [value]
    dims, position = [], 0
    while position < len(value):
        dim, position = _varint(value, position)
        dims.append(dim)
    return dims


def _layer(kind: bytes | int, name: str, blobs: list[Tensor], batch_norm: str | None) -> State:
    """The tensors of a layer by their PyTorch names. ``batch_norm``: the layer before, if it is a BatchNorm."""
    if not blobs:
        return {}
    if kind == b"BatchNorm":
        mean, variance, factor = blobs
        divisor = factor.item() or math.inf  # Caffe itself uses statistics of 0 if the factor is 0
        return {
            f"{name}.running_mean": mean.flatten() / divisor,
            f"{name}.running_var": variance.flatten() / divisor,
            f"{name}.num_batches_tracked": torch.tensor(0),
        }
    if kind == b"Scale":  # carries the weight and bias of the BatchNorm before it
        name = batch_norm or name
    elif kind in _CAFFE_INNER_PRODUCT:
        blobs[0] = blobs[0].reshape(blobs[0].shape[-2:])
    if len(blobs) > 2:
        raise ValueError(f"layer {name} has {len(blobs)} blobs, weight and bias were expected")
    tensors = {f"{name}.weight": blobs[0]}
    if len(blobs) == 2:
        tensors[f"{name}.bias"] = blobs[1].flatten()  # older files: (1, 1, 1, n)
    return tensors


def read_caffe(path: Path) -> State:
    """A caffemodel: {"LAYER.weight", "LAYER.bias"} and running statistics. deeplab.md section C.5."""
    state: State = {}
    batch_norm = None
    for number, layer in _fields(memoryview(path.read_bytes())):
        if number not in _CAFFE_LAYERS:
            continue
        name_field, type_field, blob_field = _CAFFE_LAYERS[number]
        name, kind, blobs = "", b"", []
        for part, value in _fields(layer):
            if part == name_field:
                name = bytes(value).decode()
            elif part == type_field:
                kind = value if isinstance(value, int) else bytes(value)
            elif part == blob_field:
                blobs.append(_blob(value))
        state.update(_layer(kind, name, blobs, batch_norm))
        batch_norm = name if kind == b"BatchNorm" else None
    if not state:
        raise ValueError("no layer in it has weights")
    return state
