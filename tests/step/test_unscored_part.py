"""What the page of a run without true masks warns of."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from browser import NEEDS_BROWSER, check_page

from misc.files.images import read_mask, write_mask
from misc.files.runfolder import RunFolder
from net import registry
from step.lib.config import default_config, open_job, recorded_config
from step.lib.report import judge, story
from step.lib.report.unscored_part import find_odd_shares, tell_odd_shares

registry.load_methods()


def judged(share: float, stage: str = judge.PSEUDO, tags: tuple[int, ...] | None = (0,)) -> judge.Judgement:
    return judge.Judgement("i", tags, {}, frozenset(tags or ()), {stage: share})


def job_of(folder: Path, method: str = "seam", preset: str = "sample", **names: str) -> Any:
    return SimpleNamespace(cfg=default_config(method, preset, **names), run=RunFolder(folder))


def test_half_of_the_masks_decide() -> None:
    assert tell_odd_shares([0.9, 0.95, 0.3, 0.5]) == "object" and tell_odd_shares([0.0, 0.01, 0.3]) == "background"
    assert tell_odd_shares([0.9, 0.3, 0.0]) == "either" and tell_odd_shares([0.9, 0.9, 0.9, 0.0]) == "object"
    assert tell_odd_shares([0.9, 0.3, 0.5]) == tell_odd_shares([0.3] * 4) == tell_odd_shares([]) == ""


def test_the_warning_tells_shares_and_what_to_try(tmp_path: Path) -> None:
    job = job_of(tmp_path, refiner="crf")
    (seen,) = find_odd_shares(job, {"train": [judged(0.9), judged(0.98), judged(0.4)], "val": [judged(0.3)]})
    assert seen.title == "Nearly all object: pseudo masks of train" and not seen.calm
    assert seen.texts[0].replace("\u00a0", " ").startswith(
        "More than 85 % of the pixels are an object in 2 of 3 images, less than 2 % in 0; the mean is 76.0 %."
    )
    assert "stronger: a larger --aff.walk.threshold (it is 0.30), with --cams" in seen.texts[1]
    (seen,) = find_odd_shares(job_of(tmp_path, refiner="psa"), {"train": [judged(0.01)] * 2})
    assert seen.title.startswith("Nearly all background")
    assert "weaker: a larger --aff.walk.alpha (it is " in seen.texts[1]
    (seen,) = find_odd_shares(job_of(tmp_path, "irn_cam", "photos"), {"train": [judged(0.9)]})
    assert "--aff.walk.background constant and a larger --aff.walk.threshold, with" in seen.texts[1]  # no CAMs are left
    (seen,) = find_odd_shares(job, {"train": [judged(0.99), judged(0.0), judged(0.4)]})
    assert seen.title.startswith("Nearly all object or nearly all background") and "--cam.fit.epochs" in seen.texts[1]
    # images that show no object; CAMs, whose cut is for show, before pseudo masks
    assert not find_odd_shares(job, {"train": [judged(0.0, tags=()), judged(0.3)]})
    both = judge.Judgement("i", (0,), {}, frozenset({0}), {judge.CAM_MASK: 0.99, judge.PSEUDO: 0.4})
    assert not find_odd_shares(job, {"train": [both]})
    (seen,) = find_odd_shares(job, {"train": [judged(0.99, judge.CAM_MASK)]})
    assert seen.title == "Nearly all object: CAM of train" and "scripts.sheet" in seen.texts[1]


def test_predictions_follow_their_pseudo_masks_or_want_a_longer_training(tmp_path: Path) -> None:
    job, wrong = job_of(tmp_path), [judged(0.99, judge.PREDICTION)]
    (seen,) = find_odd_shares(job, {"val": wrong})
    assert "--seg.fit.epochs" in seen.texts[1]
    _, seen = find_odd_shares(job, {"train": [judged(0.99)], "val": wrong})
    assert "they are what it was trained on" in seen.texts[1]
    (seen,) = find_odd_shares(job_of(tmp_path, "toco", "published"), {"val": wrong})
    assert "--cam.fit.steps" in seen.texts[1] and "(--cam.network.high, --cam.network.low)" in seen.texts[1]


@pytest.mark.parametrize("name", sorted(registry.REFINERS))
def test_every_refiner_has_a_background_to_change(name: str, tmp_path: Path) -> None:
    for preset in registry.REFINERS[name].recipes:
        assert default_config("seam", preset if preset == "sample" else "published", name).aff.walk.background


@pytest.mark.slow
def test_the_page_warns(own: Path, out: Path) -> None:
    shutil.rmtree(own / "SegmentationClass")
    (out / "scores.json").unlink()
    for folder, value in (("label", 1), ("seg", 0)):
        for path in (out / folder).glob("*.png"):
            write_mask(path, np.full_like(read_mask(path), value))
    job = open_job(recorded_config(RunFolder(out), own))
    page = html.unescape(re.sub("</?span[^>]*>", "", story.make_page(job, ["no masks"])))
    assert "Nearly all object: pseudo masks of train" in page and "Nearly all background: predictions of val" in page
    assert "a smaller --aff.walk.alpha (it is " in page and "they are what it was trained on" in page


@pytest.mark.slow
@NEEDS_BROWSER
def test_a_browser_shows_a_page_without_truth(own: Path, out: Path) -> None:
    pytest.importorskip("vl_convert")
    shutil.rmtree(own / "SegmentationClass")
    (out / "scores.json").unlink()
    page = story.make_page(open_job(recorded_config(RunFolder(out), own)), ["no masks"])
    assert "What can be said without true masks" in page and "data-score" not in page
    (out / "report.html").write_text(page, encoding="utf-8")
    check_page(out / "report.html")
