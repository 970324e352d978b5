"""What loading a checkpoint accepts and refuses, and the wrappings that are found in the wild."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_foreign import same
from torch import nn
from training import snapshot

from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors


class Net(nn.Module):
    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc8 = nn.Conv2d(4, classes, 1, bias=False)
        self.f8_3 = nn.Conv2d(4, 2, 1, bias=False)


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


def test_own_renaming() -> None:
    state = {"conv.weight": torch.randn(4, 3, 1, 1), "fc8.weight": torch.randn(2, 4)}
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
