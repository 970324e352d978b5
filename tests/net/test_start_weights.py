"""What every score says about the weights that its network was trained from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from running import make_set

import run_sample
from net.contract import Phase, SeedRecipe
from step.lib.scoring import start_weights


def test_start_weights_are_told_in_words() -> None:
    cam = SeedRecipe(network=None, weights="/far/away/resnet50.pth", init="imagenet")  # type: ignore[arg-type]
    assert start_weights(cam) == "imagenet (resnet50.pth)"
    for weights, init, told in (
        ("none", "coco", "random"), ("a/b.pth", "", "b.pth"), ("b.pth", "coco", "coco (b.pth)"),
        ("pretrained", "", "pretrained"), ("cam", "coco", "CAM network (from imagenet (resnet50.pth))"),
    ):  # fmt: skip
        assert start_weights(Phase(network=None, weights=weights, init=init), cam) == told  # type: ignore[arg-type]


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
    assert "3 images; trained from CAM network (from random)" in told
    assert re.search(r"seg: starts from .*cam.pt: .*0 of another shape", told)
    assert re.search(r"score +mIoU .* trained from", told)
