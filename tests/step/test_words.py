"""What a run says of itself: whether anything was trained, whether its results mean anything, what could be tried."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from net import registry
from step import STEPS
from step.lib.config import Config, Job, default_config, open_job
from step.lib.report import story
from step.lib.report.story import MEANINGLESS

registry.load_methods()
METHODS = sorted(registry.SEEDS)


def job_of(cfg: Config, data: Path, out: Path) -> Job:
    return open_job(dataclasses.replace(cfg, data="voc12", root=data, run=out, long_side=0))


def without_updates(cfg: Config) -> Config:
    """The configuration with no training in its CAM network, which it takes as it is."""
    fit = dataclasses.replace(cfg.cam.fit, steps=0)
    return dataclasses.replace(cfg, cam=dataclasses.replace(cfg.cam, fit=fit, selection="last"))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_learns_without_updates(method: str, data: Path, tmp_path: Path) -> None:
    cfg = default_config(method, "sample")
    trained = job_of(cfg, data, tmp_path)
    assert trained.cfg.cam.is_trained == ("learned" in story.tell_run(trained)) == (method != "clipes")
    frozen = job_of(without_updates(cfg), data, tmp_path)
    if len(cfg.cam.phases()) == 1:
        told = story.tell_run(frozen)
        assert "learned" not in told and f"without any mask and without training, {method} " in told
        assert "train" not in STEPS[0].tell(frozen).replace("nothing is trained", "")
        assert STEPS[0].tell(frozen).endswith("nothing is trained")
    if trained.cfg.cam.is_trained:
        assert STEPS[0].tell(trained) == "train the CAM network from tags"


def test_a_released_network_is_not_trained_and_texts_are_encoded(data: Path, tmp_path: Path) -> None:
    job = job_of(default_config("clipes", "photos"), data, tmp_path)
    assert STEPS[0].tell(job) == "encode the classes' texts: nothing is trained"
    assert STEPS[3].tell(job) == STEPS[3].does  # a refiner without a training
    cfg = default_config("seam", "sample")
    cfg = dataclasses.replace(cfg, cam=dataclasses.replace(cfg.cam, released="seam.pth"))
    assert "released checkpoint" in STEPS[0].tell(job_of(cfg, data, tmp_path))


@pytest.mark.parametrize("method, weights", [("clipes", "none"), ("clipes", "pretrained"), ("seam", "none")])
def test_the_page_says_first_that_random_frozen_weights_mean_nothing(
    method: str, weights: str, data: Path, tmp_path: Path
) -> None:
    cfg = default_config(method, "sample")
    job = job_of(dataclasses.replace(cfg, cam=dataclasses.replace(cfg.cam, weights=weights)), data, tmp_path)
    job.run.begin(job.cfg.recorded(), {}, {}, force=True)
    page = story.make_page(job, ["no masks"])
    start = MEANINGLESS.partition(":")[0]
    assert (start in page) == (method == "clipes" and weights == "none")
    assert start not in page or page.index(start) < page.index("How good it is")
