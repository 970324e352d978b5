"""Refiners without training in a run: steps 3 and 4 are not there, pseudo masks are made and scored all the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import make_set

import predict
import run_sample
from misc.files.camfiles import read_cam
from misc.files.images import read_image, read_mask
from misc.files.store import read_model
from net.seed.clipes import Clipes
from step import select


def run(data: Path, out: Path, *flags: str) -> int:
    """Exit status of CLIP-ES' sample recipe, which has a plain refiner and nothing to train."""
    common = ["--root", str(data), "--out", str(out), "--machine.workers", "0", "--machine.device", "cpu"]
    return run_sample.main(["clipes", *common, *flags])


def test_the_steps_of_the_affinity_network_are_not_there() -> None:
    names = [step.name for step in select((), "plain_masks")]
    assert names == ["train_cam", "make_cam", "random_walk", "train_seg", "infer_seg", "report"]


@pytest.mark.slow
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
    texts = score["texts"]
    assert texts["source"] == "default" and len(texts["background"]) == 25 and texts["templates"]
    names = read_model(out / "weights" / "cam.pt")[1]["classes"]
    assert texts["classes"] == {name: name.replace("_", " ") for name in names}
    assert run(data, out, *flags, *sure, "--steps", "train_aff") == 2
    assert "the refiner crf is not trained" in capsys.readouterr().err
    # without the cut the same masks, and no pixel without a class
    assert run(data, tmp_path / "all", *flags, "--cams", str(out), "--steps", "5") == 0
    for path in (tmp_path / "all" / "label").glob("*.png"):
        whole, cut = read_mask(path), read_mask(out / "label" / path.name)
        assert not (whole == 255).any() and np.array_equal(np.where(cut == 255, whole, cut), whole)


@pytest.mark.slow
def test_a_background_score_found_from_all_cams_waits_for_all_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_set(tmp_path / "data")
    for rule, waits in (("otsu", True), ("constant", False)):
        out = tmp_path / rule
        assert run(data, out, "--aff.walk.background", rule, "--shard", "0/2", "--steps", "1-5") == 0
        assert ("random_walk: needs all 2 parts" in capsys.readouterr().out) == waits == (not (out / "label").exists())


@pytest.mark.slow
def test_segments_choose_their_classes_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = make_set(tmp_path / "data"), tmp_path / "run"
    flags = ("--refiner", "sam", "--aff.walk.threshold", "0.4", "--steps", "1-5")
    assert run(data, out, *flags) > 0
    told = " ".join(capsys.readouterr().err.split())
    assert "8 have no segments in" in told and f"python -m voc12.segments --root {data}" in told
    assert not (out / "cam").exists()
    (tmp_path / "segments").mkdir()
    for path in (data / "JPEGImages").glob("*.jpg"):
        halves = np.zeros(read_image(path).shape[:2], np.uint8)
        halves[: len(halves) // 2], halves[len(halves) // 2 :] = 1, 2
        Image.fromarray(halves).save(tmp_path / "segments" / f"{path.stem}.png")
    given = ("--segments", str(tmp_path / "segments"))
    assert run(data, out, *flags, *given) == 0
    changed = 0
    for path in (out / "label").glob("*.png"):
        mask, cam = read_mask(path), read_cam(out / "cam" / f"{path.stem}.npz")
        halves = read_mask(tmp_path / "segments" / path.name)
        first = np.concatenate([np.full((1, *mask.shape), 0.4), cam.maps]).argmax(0)
        first = np.array([0, *(cam.keys + 1)])[first]
        for half in (1, 2):
            inside = halves == half
            if len(set(mask[inside].tolist())) > 1:
                assert np.array_equal(mask[inside], first[inside])
            else:
                changed += len(set(first[inside].tolist())) > 1
    assert changed > 0
    score = json.loads((out / "scores.json").read_text())["pseudo masks after the walk"]
    assert score["refiner"] == "sam"
    # new images: the run's refiner needs their segments
    image, tag = str(data / "JPEGImages" / f"{path.stem}.jpg"), (data / "classes.txt").read_text().split()
    words = [image, "--run", str(out), "--tags", ",".join(tag[key] for key in cam.keys), "--out", str(tmp_path / "new"),
             "--machine.device", "cpu"]  # fmt: skip
    assert predict.main(words) > 0 and "give --segments DIR" in capsys.readouterr().err
    assert predict.main([*words, *given]) == 0
    assert np.array_equal(read_mask(tmp_path / "new" / "masks" / path.name), mask)


@pytest.mark.slow
def test_other_words_for_classes_or_other_classes_are_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make_set(tmp_path / "data"), tmp_path / "run"
    first, second = (data / "classes.txt").read_text().split()
    (data / "texts.csv").write_text(f"{first},round thing\n", encoding="utf-8")
    assert run(data, out, "--steps", "1") == 0
    assert json.loads((out / "run.json").read_text())["data"]["texts"] == {first: "round thing"}
    assert run(data, out, "--steps", "2") == 0
    for words in (f"{first},another thing\n", f"{first},round thing\n{second},x\n", ""):
        (data / "texts.csv").write_text(words, encoding="utf-8")
        capsys.readouterr()
        assert run(data, out, "--steps", "5") > 0
        told = capsys.readouterr().err
        assert f"data.texts: {{'{first}': 'round thing'}} there" in told and "Use another --out folder" in told
        assert run(data, tmp_path / "other", "--cams", str(out), "--steps", "5") > 0
        assert "its CAMs have other settings or data" in capsys.readouterr().err
    assert not (out / "label").exists()
    (data / "texts.csv").write_text(f"{first},round thing\n", encoding="utf-8")
    (data / "classes.txt").write_text(f"{second}\n{first}\n", encoding="utf-8")
    assert run(data, out, "--steps", "5") > 0 and "data.train" in capsys.readouterr().err
    # step 1 again
    assert run(data, tmp_path / "new", "--steps", "1") == 0


@pytest.mark.slow
def test_images_of_equal_size_are_computed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = make_set(tmp_path / "data"), tmp_path / "run"
    for path in (data / "JPEGImages").glob("*.jpg"):
        Image.open(path).resize((64, 48)).save(path)
    for path in (data / "SegmentationClass").glob("*.png"):
        Image.open(path).resize((64, 48), Image.Resampling.NEAREST).save(path)
    assert run(data, out, "--steps", "1-2") == 0
    counts: list[int] = []
    real = Clipes.cam

    def counted(self: Clipes, images: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        counts.append(len(images))
        return real(self, images, tags)

    monkeypatch.setattr(Clipes, "cam", counted)
    assert run(data, tmp_path / "three", "--steps", "2", "--machine.images", "3", "--cams", str(out)) == 0
    assert not counts  # the maps are there
    assert run(data, tmp_path / "again", "--steps", "1-2", "--machine.images", "3") == 0
    assert 3 in counts and sum(n for n in counts if n > 1) >= 6
    for path in (out / "cam").glob("*.npz"):
        one, several = read_cam(path), read_cam(tmp_path / "again" / "cam" / path.name)
        assert np.array_equal(one.keys, several.keys)
        np.testing.assert_allclose(several.maps, one.maps, atol=2e-3)  # files are float16
