"""Refiners without training in a run: steps 3 and 4 are not there, pseudo masks are made and scored all the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from running import make_set

import run_sample
from misc.files.images import read_mask
from step import select


def run(data: Path, out: Path, *flags: str) -> int:
    """Exit status of CLIP-ES' sample recipe, which has a plain refiner and nothing to train."""
    common = ["--root", str(data), "--out", str(out), "--machine.workers", "0", "--machine.device", "cpu"]
    return run_sample.main(["clipes", *common, *flags])


def test_the_steps_of_the_affinity_network_are_not_there() -> None:
    names = [step.name for step in select((), "plain_masks")]
    assert names == ["train_cam", "make_cam", "random_walk", "train_seg", "infer_seg", "report"]


def test_pseudo_masks_without_an_affinity_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = make_set(tmp_path / "data"), tmp_path / "run"
    flags = ("--aff.walk.background", "constant", "--aff.walk.crf.iterations", "1")
    sure = ("--aff.ignore-below", "0.6")
    assert run(data, out, *flags, *sure, "--steps", "1-5") == 0
    told = capsys.readouterr().out
    assert "train_aff: does not apply: the refiner crf is not trained." in told
    assert not (out / "aff_label").exists() and not (out / "weights" / "aff.pt").exists()
    masks = [read_mask(path) for path in (out / "label").glob("*.png")]
    assert len(masks) == 8 and any((mask == 255).any() for mask in masks)
    score = json.loads((out / "scores.json").read_text())["pseudo masks after the walk"]
    assert score["refiner"] == "crf" and score["ignore_below"] == 0.6
    assert "these results mean nothing" in score["start_weights"]
    assert run(data, out, *flags, *sure, "--steps", "train_aff") == 1
    assert "the refiner crf is not trained" in capsys.readouterr().err
    # without the cut the same masks, and no pixel without a class
    assert run(data, tmp_path / "all", *flags, "--cams", str(out), "--steps", "5") == 0
    for path in (tmp_path / "all" / "label").glob("*.png"):
        whole, cut = read_mask(path), read_mask(out / "label" / path.name)
        assert not (whole == 255).any() and np.array_equal(np.where(cut == 255, whole, cut), whole)
