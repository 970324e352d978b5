"""Hostile files of other frameworks: MXNet, Caffe, safetensors and PyTorch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import numpy as np

from scripts.hostile.cases import Bench, HostileFile
from scripts.hostile.formats import pickled_code

VGG_FLAGS = ["--cam.network.backbone", "vgg16", "--cam.network.vgg16.width", "0.0625"]
_SOME = {"arg:conv1a_weight": np.ones((8, 3, 3, 3), np.float32), "arg:bn7_gamma": np.ones(16, np.float32)}


def mxnet(arrays: dict[str, np.ndarray] = _SOME, count: int | None = None) -> bytes:
    """A .params file; ``count``: the number of arrays that it claims."""
    out = struct.pack("<QQQ", 0x112, 0, len(arrays) if count is None else count)
    for array in arrays.values():
        out += struct.pack("<Ii", 0xF993FAC9, 0) + struct.pack(f"<I{array.ndim}q", array.ndim, *array.shape)
        out += struct.pack("<iii", 1, 0, 0) + array.astype("<f4").tobytes()
    names = b"".join(struct.pack("<Q", len(n)) + n.encode() for n in arrays)
    return out + struct.pack("<Q", len(arrays)) + names


def mxnet_files() -> dict[str, bytes]:
    """Hostile .params files."""
    good = mxnet()

    def instead(old: bytes, new: bytes) -> bytes:
        return good.replace(old, new, 1)

    eight, kind, dense = struct.pack("<q", 8), struct.pack("<iii", 1, 0, 0), struct.pack("<Ii", 0xF993FAC9, 0)
    name = struct.pack("<Q", 17)
    return {
        "2^60 arrays": mxnet(count=2**60),
        "10^7 arrays": mxnet(count=10**7),
        "shape 2^40": instead(eight, struct.pack("<q", 2**40)),
        "shape 0": instead(eight, struct.pack("<q", 0)),
        "shape -8": instead(eight, struct.pack("<q", -8)),
        "name of 2^62": instead(name, struct.pack("<Q", 2**62)),
        "name of 2^31": instead(name, struct.pack("<Q", 2**31)),
        "names not UTF-8": instead(b"arg:conv1a_weight", b"\xff" * 17),
        "type 77": instead(kind, struct.pack("<iii", 1, 0, 77)),
        "sparse": instead(dense, struct.pack("<Ii", 0xF993FAC9, 1)),
        "names missing": good[:-60],
        "NaN": mxnet({k: v * np.nan for k, v in _SOME.items()}),
        "only the magic number": good[:8],
        "one name changed": instead(b"arg:bn7_gamma", b"arg:bn7_gammb"),
        "good but of another network": good,
    }


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _blob(shape: tuple[int, ...] | list[int], values: bytes) -> bytes:
    return _field(7, _field(1, b"".join(map(_varint, shape)))) + _field(5, values)


def _layer(name: bytes, *blobs: bytes, kind: bytes = b"Convolution") -> bytes:
    return _field(100, _field(1, name) + _field(2, kind) + b"".join(_field(7, b) for b in blobs))


_ONES = np.ones(24, "<f4").tobytes()


def caffe(*layers: bytes) -> bytes:
    """A .caffemodel of these layers; without any: one small convolution."""
    return _field(1, b"VGG") + (
        b"".join(layers) or _layer(b"conv1_1", _blob((4, 3, 2, 1), _ONES), _blob((4,), _ONES[:16]))
    )


def caffe_files() -> dict[str, bytes]:
    """Hostile .caffemodel files."""
    return {
        "good but of another network": caffe(),
        "shape 2^62": caffe(_layer(b"conv1_1", _blob((2**62, 2**62), _ONES))),
        "shape too large": caffe(_layer(b"c", _blob((4, 3, 2, 9), _ONES))),
        "no end of a number": caffe(b"\xff" * 40),
        "field longer than the file": b"\x0a" + _varint(2**40) + b"x",
        "name not UTF-8": caffe(_layer(b"\xff\xfe", _blob((24,), _ONES))),
        "name a number": caffe(_field(100, _field(1, 7) + _field(7, _blob((24,), _ONES)))),
        "blob a number": caffe(_field(100, _field(1, b"x") + _field(7, 7))),
        "blob without values": caffe(_layer(b"c", _blob((4,), b""))),
        "values of 3 bytes": caffe(_layer(b"c", _blob((4,), b"abc"))),
        "five blobs": caffe(_layer(b"c", *[_blob((24,), _ONES)] * 5)),
        "BatchNorm of one blob": caffe(_layer(b"c", _blob((24,), _ONES), kind=b"BatchNorm")),
        "layer a number": caffe(_field(100, 7)),
        "1000 groups deep": b"\x0a" + _varint(1) + b"x" + b"\x0b" * 1000,
        "a million empty layers": caffe(_field(100, b"") * 1_000_000),
        "shape of two million numbers": caffe(_layer(b"c", _blob([1] * 2_000_000, _ONES[:4]))),
    }


def safetensors(header: object = None, body: bytes = bytes(16), size: int | None = None) -> bytes:
    """A .safetensors file; ``size``: the length of the header that it claims."""
    good = {"conv1a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    text = header if isinstance(header, bytes) else json.dumps(good if header is None else header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def safetensors_files() -> dict[str, bytes]:
    """Hostile .safetensors files."""

    def one(**changes: object) -> bytes:
        return safetensors({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}})

    return {
        "good but of another network": safetensors(),
        "header of 2^62 bytes": safetensors(size=2**62),
        "header no JSON": safetensors(b"{"),
        "header a list": safetensors([1]),
        "100000 brackets": safetensors(b"[" * 100000),
        "offsets outside": one(data_offsets=[0, 2**40]),
        "offsets backwards": one(data_offsets=[16, 0]),
        "shape 2^40": one(shape=[2**40, 2**40]),
        "shape negative": one(shape=[-2, -2]),
        "type unknown": one(dtype="EVIL"),
        "NaN": safetensors(body=np.full(4, np.nan, "<f4").tobytes()),
        "cut": safetensors()[:20],
    }


def checkpoint_cases(bench: Bench) -> Iterator[HostileFile]:
    """Start weights in the files of other frameworks."""
    kinds: dict[str, tuple[dict[str, bytes], list[str]]] = {
        "params": (mxnet_files(), []),
        "caffemodel": (caffe_files(), VGG_FLAGS),
        "safetensors": (safetensors_files(), []),
        "pth": ({"bare pickle with code": pickled_code(), "a tar": b"\0" * 257 + b"ustar" + bytes(300)}, []),
    }
    for suffix, (files, flags) in kinds.items():
        name = f"w.{suffix}"
        for label, data in files.items():
            argv = [*bench.start, *flags, "--cam.weights", name]
            yield HostileFile(f".{suffix}", label, "run_sample.py", argv, bench.in_start(name, data), "refuse", name)
