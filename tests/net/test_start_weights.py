"""The start weights in the provenance of every score."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import TINY, make_set

import run_sample
from net import registry
from net.contract import Phase, SeedRecipe
from net.foreign import reading
from net.start_weights import PRETRAINED, StartWeights
from step.lib.scoring import start_weights


def test_start_weights_are_described_in_words() -> None:
    trained = SimpleNamespace(keeps_start_weights=False)
    cam = SeedRecipe(network=trained, weights="/far/away/resnet50.pth", init="imagenet")  # type: ignore[arg-type]
    assert start_weights(cam) == "imagenet (resnet50.pth)"
    for weights, init, told in (
        ("none", "coco", "random"), ("a/b.pth", "", "b.pth"), ("b.pth", "coco", "coco (b.pth)"),
        ("pretrained", "", "pretrained"), ("cam", "coco", "CAM network (from imagenet (resnet50.pth))"),
    ):  # fmt: skip
        assert start_weights(Phase(network=trained, weights=weights, init=init), cam) == told  # type: ignore[arg-type]


def test_start_weights_are_parsed_and_checked_before_any_work(tmp_path: Path) -> None:
    file, absent = tmp_path / "a.pth", tmp_path / "b.pth"
    file.write_bytes(b"weights")
    for text in ("none", "pretrained", str(file), f"{file},{file}"):
        StartWeights.parse(text).check("--cam.weights", absent)
    StartWeights.parse("cam").check("--seg.weights", None)  # it is to be trained yet
    refused = {"required": "give --aff.weights FILE", "cam": "Run train_cam first", f"{file},{absent}": "no such file"}
    for text, told in refused.items():
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            StartWeights.parse(text).check("--aff.weights", absent)
    for text in ("", "a.pth,", ",a.pth"):
        with pytest.raises(ValueError, match="is not possible"):
            StartWeights.parse(text)


def test_the_same_file_is_the_same_setting_wherever_it_lies(tmp_path: Path) -> None:
    files = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for file in files:
        file.write_bytes(b"weights")
    here, there = (StartWeights.parse(str(file)).identity() for file in files)
    assert here == there and "sha256" in here
    assert StartWeights.parse(f"{files[0]},gone.pth").identity() == f"{here},gone.pth"
    assert StartWeights.parse("cam").identity() == "cam"


@pytest.mark.parametrize("table", ["SEEDS", "REFINERS", "SEGMENTERS"])
def test_networks_whose_recipes_say_pretrained_name_timms_classifiers(table: str) -> None:
    registry.load_methods()
    for name, method in getattr(registry, table).items():
        published, sample = (method.recipes[preset] for preset in ("published", "sample"))
        published, sample = (r.cam if table == "SEEDS" else r for r in (published, sample))
        if getattr(published, "weights", None) == PRETRAINED and len(getattr(sample, "phases", tuple)()) < 2:
            names = sample.network.build(2, {}).pretrained_names()
            assert names and all(names), name


@pytest.mark.slow
def test_a_segmenter_that_starts_from_the_cam_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Puzzle-CAM and DeepLab v2 on the same ResNet, as the sample recipes have them."""
    data = make_set(tmp_path / "data")
    small = "network.resnet.width 0.125 fit.steps 2 fit.batch-size 4 augment.crop 64 infer.scales 1.0".split()
    flags = [f"--cam.{word}" if i % 2 == 0 else word for i, word in enumerate(small)]
    small = "network.width 0.125 fit.steps 2 fit.batch-size 4 augment.crop 64 infer.crf.iterations 1".split()
    flags += [f"--seg.{word}" if i % 2 == 0 else word for i, word in enumerate(small)]
    command = ["puzzlecam", "--root", str(data), "--out", str(tmp_path / "run"), "--machine.workers", "0", *flags]
    steps = ["train_cam", "train_seg", "infer_seg", "report"]
    assert run_sample.main([*command, "--masks", "truth", "--steps", *steps]) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["predictions (deeplabv2 trained on true masks)"]["start_weights"] == "CAM network (from random)"
    told = capsys.readouterr().out
    assert "3 images; start weights: CAM network (from random)" in told
    assert re.search(r"seg: starts from .*cam.pt: .*0 of another shape", told)
    assert re.search(r"score +mIoU .* start weights", told)


def test_weights_of_later_steps_are_tried_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged file, one of another network, and what can't be fetched."""
    data, file, other = make_set(tmp_path / "data"), tmp_path / "a.pth", tmp_path / "other.pth"
    file.write_bytes(b"PK\x03\x04 cut")
    torch.save({"some.weight": torch.zeros(3)}, other)
    monkeypatch.setattr(reading, "_is_cached", lambda repository, files: False)
    monkeypatch.setattr(reading, "_unreachable", lambda address: "no way out")
    pretrained = "--segmenter deeplabv2 --seg.network.form torchvision --seg.weights pretrained".split()
    for flags, told in (
        ([*TINY, "--seg.weights", str(file)], rf"--seg.weights: {file}: can't be read"),
        ([*TINY, "--aff.weights", str(other)], rf"--aff.weights: .*{other}"),
        ([*TINY, "--aff.released", str(other)], rf"--aff.released: {other}: "),
        ([*TINY[: TINY.index("--seg.weights")], *pretrained], "--seg.weights: timm's weights .*be reached .no way out"),
    ):
        assert run_sample.main(["psa", "--root", str(data), "--out", str(tmp_path / "run"), *flags]) == 2
        assert re.search(told, capsys.readouterr().err)
        assert not (tmp_path / "run").exists()
