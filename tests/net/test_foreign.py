"""Foreign checkpoints: every file format, damage, renaming, and what loading accepts and refuses."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pickle
import struct
import tarfile
import zipfile
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


# ------------------------------------------------------------------ loading


class Net(nn.Module):
    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc8 = nn.Conv2d(4, classes, 1, bias=False)
        self.f8_3 = nn.Conv2d(4, 2, 1, bias=False)


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_load_of_everything(tmp_path: Path) -> None:
    source, net = Net(), Net()
    torch.save({"model": {f"module.{n}": v for n, v in source.state_dict().items()}}, tmp_path / "w.pth")
    report = load_tensors(net, tmp_path / "w.pth")
    assert same(dict(net.state_dict()), dict(source.state_dict()))
    assert set(report.loaded) == set(net.state_dict()) and not report.missing and not report.wrong_shape
    assert "w.pth: 9 loaded, 0 missing, 0 unexpected" in str(report)


def test_old_files_lack_the_batch_counter() -> None:
    source, net = Net().state_dict(), Net()
    del source["bn1.num_batches_tracked"]
    assert not load_tensors(net, source).missing
    assert torch.equal(net.bn1.weight, source["bn1.weight"])


def test_head_may_be_missing_or_of_another_shape() -> None:
    source, net = Net(classes=7).state_dict(), Net(classes=20)
    del source["f8_3.weight"]
    source["old_head.weight"] = torch.zeros(2)
    before = snapshot(net)
    report = load_tensors(net, source, allow_missing=("fc8", "f8_*"))
    assert report.missing == ("f8_3.weight",) and report.unexpected == ("old_head.weight",)
    assert report.wrong_shape == {"fc8.weight": ((7, 4, 1, 1), (20, 4, 1, 1))}
    assert torch.equal(net.fc8.weight, before["fc8.weight"]) and torch.equal(net.conv1.weight, source["conv1.weight"])
    text = str(report)
    assert "\n" not in text and all(w in text for w in ("7 loaded", "f8_3.weight", "old_head.weight", "(7, 4, 1, 1)"))


def test_allowed_names_are_whole_parts() -> None:
    source, net = Net().state_dict(), Net()
    del source["fc8.weight"]
    for pattern in ("fc", "c8", "weight"):
        with pytest.raises(ValueError, match="fc8.weight"):
            load_tensors(net, source, allow_missing=(pattern,))
    assert load_tensors(net, source, allow_missing=("fc8.weight",)).missing == ("fc8.weight",)


def test_more_missing_than_the_head_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(7)), nn.Linear(2, 3))
    torch.save({"7.weight": torch.zeros(3, 2), "other": torch.zeros(1)}, tmp_path / "w.pth")
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"w\.pth: 14 tensors are missing: .* and 4 more.*other.*Only 7 may") as error:
        load_tensors(net, tmp_path / "w.pth", allow_missing=("7",))
    assert sum(f"{i}.{part}" in str(error.value) for i in range(7) for part in ("weight", "bias")) == 10
    assert same(snapshot(net), before)


def test_another_shape_outside_the_head_is_an_error_and_changes_nothing() -> None:
    source, net = Net().state_dict(), Net()
    source["conv1.bias"] = torch.zeros(9)
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"conv1\.bias \(9,\) for \(4,\)"):
        load_tensors(net, source, allow_missing=("fc8",))
    assert same(snapshot(net), before)


def test_nothing_in_common_is_an_error_even_where_all_may_be_missing() -> None:
    with pytest.raises(ValueError, match="none of its tensors"):
        load_tensors(Net(), {"something": torch.zeros(1)}, allow_missing=("*",))


def test_own_renaming(state: dict[str, Tensor]) -> None:
    net = nn.Conv2d(3, 4, 1, bias=False)
    table = {"conv.weight": "weight"}
    report = load_tensors(net, state, rename=table.get)
    assert torch.equal(net.weight, state["conv.weight"]) and not report.unexpected
    with pytest.raises(ValueError, match="become weight"):
        load_tensors(net, state, rename=lambda name: "weight")


# ------------------------------------------------------------------------------------------------ wrappings of others

TENSORS = {f"layer{i}.weight": torch.full((2, 2), float(i)) for i in range(6)}


@pytest.mark.parametrize(
    "wrapped",
    [
        {"model_state_dict": TENSORS, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        {"model_state": TENSORS, "epoch": 1},
        {"net": TENSORS},
        {"network": TENSORS},
        {"ema": TENSORS},
        {"weights_of_mine": TENSORS, "epoch": 3},  # the one nested dict of tensors
        {"state_dict": {f"backbone.{k}": v for k, v in TENSORS.items()}},
        {"state_dict": {f"model.{k}": v for k, v in TENSORS.items()}},
        {"model": {f"_orig_mod.module.{k}": v for k, v in TENSORS.items()}},
        {**{f"module.{k}": v for k, v in TENSORS.items()}, "step": torch.tensor(3)},
        {"state_dict": TENSORS, "best": np.float64(0.61), "iou": np.zeros(21), "name": np.str_("a")},
        {"model": TENSORS, "args": argparse.Namespace(path=Path("/x"), lr=0.1)},
        {"state_dict": TENSORS, "stats": collections.defaultdict(list), "when": datetime.datetime(2024, 1, 1)},
    ],
    ids=lambda wrapped: "-".join(list(wrapped)[:2]),
)
def test_wrappings_found_in_the_wild(wrapped: dict[str, object], tmp_path: Path) -> None:
    torch.save(wrapped, tmp_path / "file.pth")
    found = read_tensors(tmp_path / "file.pth")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], value) for name, value in TENSORS.items())


def test_of_several_networks_a_warning_names_the_one_used(tmp_path: Path) -> None:
    student = {name: value + 1 for name, value in TENSORS.items()}
    teacher = {f"module.backbone.{name}": value for name, value in TENSORS.items()}
    torch.save({"student": student, "teacher": teacher}, tmp_path / "file.pth")
    with pytest.warns(UserWarning, match="teacher, student: teacher is taken"):
        found = read_tensors(tmp_path / "file.pth")
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())


class Executes:
    """Runs a function when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": TENSORS, "args": argparse.Namespace(x=Executes())}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="never unpickled"):
        read_tensors(tmp_path / "file.pth")
    assert not (tmp_path / "executed").exists()


def test_what_is_no_checkpoint_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    for content, told in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "pointer of git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n  <html lang=en>", "web page"),
        (b"\x1f\x8b\x08\x00 and more than that", "gzip"),
        (b"BZh91AY&SY and more", "bzip2"),
        (b"\xfd7zXZ\x00 and more", "an xz archive"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=told):
            read_tensors(path)
    torch.save(TENSORS, tmp_path / "inner.pth")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "inner.pth", "weights/inner.pth")
    with pytest.raises(ValueError, match="ZIP archive that holds weights/inner.pth: unpack"):
        read_tensors(path)
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "inner.pth", "weights/inner.pth")
    with pytest.raises(ValueError, match="a tar archive that holds weights/inner.pth: unpack"):
        read_tensors(path)
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            tar.add(tmp_path / "inner.pth", name)
    with pytest.raises(ValueError, match="before 0.2"):
        read_tensors(path)
    torch.save({"state_dict": TENSORS}, tmp_path / "model_best.pth.tar")  # a common name of ordinary checkpoints
    assert read_tensors(tmp_path / "model_best.pth.tar").keys() == TENSORS.keys()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/constants.pkl", b"")
        archive.writestr("net/data.pkl", b"")
    with pytest.raises(ValueError, match="TorchScript") as error:
        read_tensors(path)
    assert "weights_only" not in str(error.value)
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, path)
    with pytest.raises(ValueError, match="its entries are epoch, optimizer"):
        read_tensors(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    module = nn.BatchNorm1d(3)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["running_var"][1] = value  # a buffer
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: running_var holds values that are not finite"):
        load_tensors(module, tmp_path / "w.pth")
    assert bool(module.running_var.isfinite().all())
