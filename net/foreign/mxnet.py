"""MXNet ``.params`` files, such as the ImageNet weights of ResNet38 (seam.md section 2.1)."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from net.foreign.pytorch import State

MXNET_LIST = 0x112
_MXNET_V1, _MXNET_V2 = 0xF993FAC8, 0xF993FAC9
_MXNET_TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4"}
_MXNET_STATISTICS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}
_MXNET_RESNET38 = re.compile(
    r"(?:arg|aux):(?P<kind>res|bn)(?P<stage>\d)(?:a|b(?P<block>\d+))_(?P<branch>branch\w+?)_"
    r"(?P<value>weight|gamma|beta|moving_mean|moving_var)"
)


def read_mxnet(path: Path) -> State:
    """An MXNet NDArray list, all three record versions: {"arg:NAME" or "aux:NAME": tensor}. seam.md section 2.1."""
    data, position = path.read_bytes(), 0

    def take(kinds: str) -> tuple[int, ...]:
        nonlocal position
        values = struct.unpack_from(f"<{kinds}", data, position)
        position += struct.calcsize(f"<{kinds}")
        return values

    def tensor() -> Tensor:
        nonlocal position
        (version,) = take("I")
        dimension = "Q"
        if version == _MXNET_V2:
            storage, ndim = take("iI")
            if storage != 0:
                raise ValueError(f"sparse array (storage type {storage})")
        elif version == _MXNET_V1:
            (ndim,) = take("I")
        else:  # the oldest version has no magic number: its first field is the number of dimensions
            ndim, dimension = version, "I"
        if not 1 <= ndim <= 8:
            raise ValueError(f"array record with {ndim} dimensions")
        shape = take(dimension * ndim)
        _, _, flag = take("iii")  # the device that the array was on, its type
        if flag not in _MXNET_TYPES:
            raise ValueError(f"array of unknown type {flag}")
        array = np.frombuffer(data, _MXNET_TYPES[flag], math.prod(shape), position)
        position += array.nbytes
        return torch.from_numpy(array.reshape(shape).copy())

    _, _, count = take("QQQ")
    tensors = [tensor() for _ in range(count)]
    (names,) = take("Q")
    if names != count:
        raise ValueError(f"{count} arrays but {names} names")
    state = {}
    for value in tensors:
        (length,) = take("Q")
        state[take(f"{length}s")[0].decode()] = value
    return state


def resnet38_from_mxnet(name: str) -> str | None:
    """Name of a tensor of the ImageNet ``.params`` file -> its name in ResNet38; None for the 1000-class layer.

    Other names are returned unchanged (and are then reported as unexpected). seam.md section 2.1.
    """
    if name.startswith("arg:linear1000_"):
        return None
    if name == "arg:conv1a_weight":
        return "conv1a.weight"
    _, _, last = name.partition(":bn7_")
    if last in _MXNET_STATISTICS:
        return f"bn7.{_MXNET_STATISTICS[last]}"
    match = _MXNET_RESNET38.fullmatch(name)
    if match is None:
        return name
    block = f"b{match['stage']}" + (f"_{match['block']}" if match["block"] else "")
    layer = {"res": "conv", "bn": "bn"}[match["kind"]]
    return f"{block}.{layer}_{match['branch']}.{_MXNET_STATISTICS.get(match['value'], match['value'])}"
