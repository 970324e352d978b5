"""Foreign checkpoints: every file format, damage, names."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from net.backbone.resnet38 import ResNet38, ResNet38Options
from net.backbone.vgg16 import VGG16, VGG16Options
from net.foreign.loading import load_tensors
from net.foreign.mxnet import resnet38_from_mxnet
from net.foreign.reading import read_tensors

GOLDEN = Path(__file__).parents[1] / "golden"


# ------------------------------------------------------------------ writers of the foreign formats


def mxnet_file(arrays: dict[str, np.ndarray], version: int) -> bytes:
    """An NDArray list in record version 0, 1 or 2."""
    flags = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4}
    out = struct.pack("<QQQ", 0x112, 0, len(arrays))
    for array in arrays.values():
        if version == 2:
            out += struct.pack("<Ii", 0xF993FAC9, 0)
        elif version == 1:
            out += struct.pack("<I", 0xF993FAC8)
        out += struct.pack(f"<I{array.ndim}{'I' if version == 0 else 'q'}", array.ndim, *array.shape)
        out += struct.pack("<iii", 1, 0, flags[array.dtype.name]) + array.tobytes()
    out += struct.pack("<Q", len(arrays))
    for name in arrays:
        out += struct.pack("<Q", len(name)) + name.encode()
    return out


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def caffe_blob(array: np.ndarray) -> bytes:
    shape = field(1, b"".join(varint(n) for n in array.shape))
    return field(7, shape) + field(5, array.astype("<f4").tobytes())


def caffe_layer(name: str, kind: str, *blobs: np.ndarray) -> bytes:
    body = field(1, name.encode()) + field(2, kind.encode()) + field(3, b"bottom") + field(10, 1)
    return field(100, body + b"".join(field(7, caffe_blob(blob)) for blob in blobs))


def v1_layer(name: str, kind: int, *blobs: np.ndarray) -> bytes:
    """A layer of the 2014/15 format: numbered types, blobs of four dimensions."""
    body = field(2, b"bottom") + field(4, name.encode()) + field(5, kind)
    for blob in blobs:
        shape = (1,) * (4 - blob.ndim) + blob.shape
        dims = b"".join(field(i + 1, n) for i, n in enumerate(shape))
        body += field(6, dims + field(5, blob.astype("<f4").tobytes()))
    return field(2, body)


def write(folder: Path, data: bytes, name: str = "weights.bin") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "arg:conv1a_weight": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "aux:bn7_moving_var": rng.standard_normal(5),
        "arg:half": rng.standard_normal((2, 3)).astype(np.float16),
        "arg:bytes": rng.integers(0, 255, (2, 2), dtype=np.uint8),
        "arg:ints": rng.integers(-9, 9, 7, dtype=np.int32),
    }


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"conv.weight": torch.randn(4, 3, 1, 1), "fc8.weight": torch.randn(2, 4)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize("version", [0, 1, 2])
def test_mxnet_versions_and_types(tmp_path: Path, arrays: dict[str, np.ndarray], version: int) -> None:
    read = read_tensors(write(tmp_path, mxnet_file(arrays, version)))
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(read[name].numpy(), array)


def test_mxnet_refuses_sparse_arrays(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    data = bytearray(mxnet_file(arrays, 2))
    data[28] = 1  # storage type of the first record
    with pytest.raises(ValueError, match="sparse"):
        read_tensors(write(tmp_path, bytes(data)))


def test_caffemodel_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((4, 3, 3, 3)), rng.standard_normal(4)
    mean, variance, gamma, beta = rng.standard_normal((4, 4))
    dense = rng.standard_normal((2, 300))
    data = field(1, b"a network") + field(8, b"") + b"".join([
        caffe_layer("data", "Input"),
        caffe_layer("conv1_1", "Convolution", kernel, bias),
        caffe_layer("bn1", "BatchNorm", mean, variance, np.array([4.0])),
        caffe_layer("scale1", "Scale", gamma, beta),
        caffe_layer("bn2", "BatchNorm", mean, variance, np.array([0.0])),
        caffe_layer("relu", "ReLU"),
        caffe_layer("lone", "Scale", gamma),
        caffe_layer("fc", "InnerProduct", dense),
    ])  # fmt: skip
    read = read_tensors(write(tmp_path, data))
    expected = {
        "conv1_1.weight": kernel, "conv1_1.bias": bias,
        "bn1.running_mean": mean / 4, "bn1.running_var": variance / 4, "bn1.num_batches_tracked": 0,
        "bn1.weight": gamma, "bn1.bias": beta,
        "bn2.running_mean": 0 * mean, "bn2.running_var": 0 * mean, "bn2.num_batches_tracked": 0,
        "lone.weight": gamma, "fc.weight": dense,
    }  # fmt: skip
    assert list(read) == list(expected)
    for name, value in expected.items():
        assert read[name].shape == np.shape(value)
        np.testing.assert_allclose(read[name].numpy(), value, rtol=1e-6, atol=1e-7)


def test_caffemodel_of_the_old_format(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernel, bias, dense = rng.standard_normal((4, 3, 3, 3)), rng.standard_normal(4), rng.standard_normal((2, 5))
    layers = v1_layer("conv1_1", 4, kernel, bias) + v1_layer("relu", 18) + v1_layer("fc", 14, dense, bias)
    data = field(1, b"old") + layers
    read = read_tensors(write(tmp_path, data))
    for name, value in {"conv1_1.weight": kernel, "conv1_1.bias": bias, "fc.weight": dense, "fc.bias": bias}.items():
        assert read[name].shape == value.shape, name
        np.testing.assert_allclose(read[name].numpy(), value, rtol=1e-6)
    assert len(read) == 4


def test_caffemodel_of_the_golden_case(tmp_path: Path) -> None:
    """The small file of the golden folder, renamed by the golden table of DeepLab v2's layer names."""
    names = json.loads((GOLDEN / "deeplabv2_caffe_names.json").read_text())["names_voc12_msc"]
    with np.load(GOLDEN / "caffemodel_parse.npz") as case:
        read = read_tensors(write(tmp_path, case["caffemodel"].tobytes()))
        renamed = {}
        for name, value in read.items():
            layer, part = name.rsplit(".", 1)
            if "res075" not in name and "res05" not in name:
                renamed[f"{names[layer]}.{part}"] = value
        assert set(renamed) == {name.removeprefix("out/") for name in case if name.startswith("out/")}
        for name, value in renamed.items():
            np.testing.assert_allclose(value.numpy(), case[f"out/{name}"], rtol=1e-6, atol=1e-6)


def test_vgg16_caffemodel_fits_as_it_is(tmp_path: Path) -> None:
    net = VGG16(VGG16Options(width=0.125))
    values = {name: torch.randn(value.shape) for name, value in net.state_dict().items()}
    layers = dict.fromkeys(name.split(".")[0] for name in values)
    data = b"".join(
        caffe_layer(layer, "Convolution", values[f"{layer}.weight"].numpy(), values[f"{layer}.bias"].numpy())
        for layer in layers
    )
    report = load_tensors(net, write(tmp_path, data))
    assert same(dict(net.state_dict()), values) and not report.missing and not report.unexpected


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: OrderedDict(s),
        lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"state_dict": {f"module.{name}": value for name, value in s.items()}, "arch": "resnet"},
        lambda s: {f"_orig_mod.module.{name}": value for name, value in s.items()},
        lambda s: {**s, "epoch": 3},
    ],
    ids=["bare", "ordered", "model", "state_dict", "wrappers", "epoch"],
)
def test_torch_files(tmp_path: Path, state: dict[str, Tensor], zipped: bool, wrap: Callable[[dict], object]) -> None:
    path = tmp_path / "w.whatever"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    assert same(read_tensors(path), state)


def test_prefix_stays_where_only_some_names_have_it(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["module.weight"] = torch.ones(2)
    torch.save(state, tmp_path / "w.pth")
    assert same(read_tensors(tmp_path / "w.pth"), state)


def test_safetensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    files = pytest.importorskip("safetensors.torch")
    files.save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    read = read_tensors(tmp_path / "w.pth")
    assert same(dict(sorted(read.items())), state)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_objects_are_never_unpickled(tmp_path: Path, state: dict[str, Tensor], kind: str) -> None:
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    content = {"state_dict": state, "extra": Bomb(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"extra": Bomb(trace)}, protocol=4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"w\.pth.*never unpickled.*torch\.save"):
        read_tensors(path)
    assert not trace.exists()


def torch_bytes(tmp_path: Path, zipped: bool) -> bytes:
    torch.save({"a": torch.zeros(50), "b": torch.zeros(3)}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    return (tmp_path / "x").read_bytes()


def safetensors_bytes() -> bytes:
    return pytest.importorskip("safetensors.torch").save({"a": torch.zeros(50), "b": torch.zeros(3)})


@pytest.mark.parametrize("kind", ["mxnet0", "mxnet1", "mxnet2", "caffe", "caffe_v1", "zip", "legacy", "safetensors"])
def test_truncated_files_are_refused_with_a_remedy(tmp_path: Path, arrays: dict[str, np.ndarray], kind: str) -> None:
    kernel = np.ones((4, 3, 3, 3))
    data = {
        "mxnet0": lambda: mxnet_file(arrays, 0),
        "mxnet1": lambda: mxnet_file(arrays, 1),
        "mxnet2": lambda: mxnet_file(arrays, 2),
        "caffe": lambda: caffe_layer("conv1", "Convolution", kernel),
        "caffe_v1": lambda: v1_layer("conv1", 4, kernel),
        "zip": lambda: torch_bytes(tmp_path, True),
        "legacy": lambda: torch_bytes(tmp_path, False),
        "safetensors": safetensors_bytes,
    }[kind]()
    read_tensors(write(tmp_path, data))
    for length in {0, 1, 9, 20, 30, len(data) // 3, len(data) // 2, len(data) - 5, len(data) - 1}:
        with pytest.raises(ValueError, match=r"weights\.bin.*(download it again|torch\.save)"):
            read_tensors(write(tmp_path, data[:length]))


@pytest.mark.parametrize(
    "data",
    [b"", b"<!DOCTYPE html><html>", b"\n<html>", b"random text", bytes(range(256)), b"PK\x03\x04 no zip", b"\x80\x02."],
)
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"weights\.bin.*(download it again|torch\.save)"):
        read_tensors(write(tmp_path, data))


def test_files_without_tensors_and_absent_files(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no tensors"):
        read_tensors(tmp_path / "w.pth")
    torch.save([torch.zeros(2)], tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        read_tensors(tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        read_tensors(tmp_path / "absent.pth")


# ------------------------------------------------------------------ names


def test_resnet38_rename_table() -> None:
    case = json.loads((GOLDEN / "resnet38_mxnet_params.json").read_text())
    assert {old: resnet38_from_mxnet(old) for old in case["rename_table"]} == case["rename_table"]
    assert resnet38_from_mxnet("arg:linear1000_weight") is None
    assert resnet38_from_mxnet("arg:linear1000_bias") is None
    for strange in ("arg:res2a_branch9z_foo", "bn2a_branch2a_gamma", "arg:fc_weight"):
        assert resnet38_from_mxnet(strange) == strange


@pytest.mark.slow
def test_resnet38_loads_a_params_file(tmp_path: Path) -> None:
    """Recognised by its telltale key, into a backbone that owns the names and one that is a part."""
    net = ResNet38(ResNet38Options(width=0.125))
    table = json.loads((GOLDEN / "resnet38_mxnet_params.json").read_text())["rename_table"]
    own = net.state_dict()
    rng = np.random.default_rng(0)
    arrays = {old: rng.random(tuple(own[new].shape), np.float32) for old, new in table.items()}
    arrays["arg:linear1000_weight"] = np.zeros((10, 4), np.float32)
    path = write(tmp_path, mxnet_file(arrays, 0))
    whole = nn.Module()
    whole.backbone = ResNet38(ResNet38Options(width=0.125))
    for target in (net, whole.backbone):
        report = load_tensors(target, path)
        assert len(report.loaded) == 191 and not report.missing and not report.unexpected
        for old, new in table.items():
            np.testing.assert_array_equal(target.state_dict()[new].numpy(), arrays[old])
    with pytest.raises(ValueError, match=r"backbone\.conv1a\.weight"):
        load_tensors(whole, path)
