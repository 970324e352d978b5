"""What a run says of itself: whether anything was trained, whether its results mean anything, what could be tried."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from misc import commandline
from misc.files import store
from misc.files.runfolder import RunFolder
from net import registry
from net.model import describe_network
from net.names import OWN
from step import STEPS
from step.lib.config import Config, Job, default_config, open_job
from step.lib.networks import build_network
from step.lib.parsing import parse, tell_preset
from step.lib.report import box_part, judge, story, unscored_part
from step.lib.report.story import MEANINGLESS
from step.lib.scoring import class_texts

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


@pytest.mark.parametrize("method", METHODS)
def test_a_run_says_what_its_preset_makes_of_real_images(method: str, tmp_path: Path) -> None:
    first, *more = tell_preset(parse([method, "--data", "folder", "--root", str(tmp_path)]))
    presets = registry.SEEDS[method].recipes
    if "photos" in presets:
        assert first == f"{method}, preset photos" and not more
    else:
        assert first.startswith(f"{method}, preset sample: tiny networks from random weights") and "no masks" in first
        real = next(name for name in ("photos", "published") if name in presets)
        (note,) = more
        fetched = registry.SEEDS[method].recipes[real].cam.start.word == "pretrained"
        assert f"--preset {real} " in note and ("fetched" in note) == fetched != ("--cam.weights FILE" in note)
    told = tell_preset(default_config(method, "sample"))
    assert told == [f"{method}, preset sample"]  # the generated set is what it is for


def test_scores_say_by_what_words_classes_were_known(data: Path, tmp_path: Path) -> None:
    for method in ("seam", "clipes"):
        job = job_of(default_config(method, "sample"), data, tmp_path / method)
        assert class_texts(job) == {}  # there is no network yet
        network = build_network(job, job.cfg.cam)
        description = describe_network("cam", method, "sample", {}, job.catalog.classes, network)
        store.write_model(job.run.weights("cam"), network.state_dict(), description)
        told = class_texts(job)
        if method == "seam":
            assert told == {}
            continue
        names = job.catalog.classes
        assert told["texts"]["source"] == "default" and len(told["texts"]["background"]) == 25
        assert told["texts"]["classes"] == {name: name.replace("_", " ") for name in names}
        job.run.add_score("CAM", {"split": "train", "images": 1, "tags": "true tags", **told})
        assert job.run.scores()["CAM"]["texts"] == told["texts"]
        file = tmp_path / "words.csv"
        file.write_text(f"{names[0]},some words\n")
        job = dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, texts=file))
        assert class_texts(job)["texts"]["source"] == "words.csv"


# ---------------------------------------------------------------------------------------------- advice


def advised(cfg: Config, room: Path) -> Iterator[str]:
    """All that the page tells to try in a run of this configuration."""
    job = SimpleNamespace(cfg=cfg, run=RunFolder(room), aim="boxes", catalog=SimpleNamespace(
        ids=lambda _: ["a"], has_list=lambda _: True, classes=("one",), tags=lambda _: np.ones(1)
    ), listed=lambda _: ["a"])  # fmt: skip
    for shares in ([0.99] * 2, [0.0] * 2, [0.99, 0.0]):
        for stages in ((judge.CAM_MASK,), (judge.PSEUDO,), (judge.PREDICTION,), (judge.PSEUDO, judge.PREDICTION)):
            judged = {
                stage: [judge.Judgement("a", (0,), {}, frozenset({0}), {stage: share}) for share in shares]
                for stage in stages
            }
            for finding in unscored_part.find_odd_shares(job, judged):
                yield from finding.texts
    for finding in box_part.find_box_findings(job):
        yield from finding.texts


def configurations(method: str) -> Iterator[Config]:
    """Every preset, with its own refiner and segmenter, and as sample with every refiner; also released and frozen."""
    cls = registry.SEEDS[method]
    for preset in cls.recipes:
        cfg = default_config(method, preset)
        yield cfg
        yield without_updates(cfg)
        yield dataclasses.replace(cfg, cam=dataclasses.replace(cfg.cam, released="x.pth"))
    for refiner in registry.REFINERS:
        yield default_config(method, "sample", refiner)
    yield default_config(method, "sample", segmenter="deeplabv2")


@pytest.mark.parametrize("method", METHODS)
def test_every_advised_flag_exists_in_the_method_and_acts(method: str, tmp_path: Path) -> None:
    empty = {"score": np.zeros((2, 2)), "gt_known": False, "iou": 0.0, "error": "wrong"}
    store.write_arrays(RunFolder(tmp_path).box("a"), **{name: np.asarray(value) for name, value in empty.items()})
    for cfg in configurations(method):
        texts = sorted(set(advised(cfg, tmp_path)))
        if any("--aff.walk.background constant" in text for text in texts):
            walk = dataclasses.replace(cfg.aff.walk, background="constant")
            cfg = dataclasses.replace(cfg, aff=dataclasses.replace(cfg.aff, walk=walk))
        acting = {commandline.flag(path) for path, *_ in commandline.leaves(cfg, effective=True)} | {"--out"}
        for text in texts:
            told = re.findall(r"--[\w.-]*\w", text.replace("python -m scripts.sheet, --field", ""))
            assert set(told) <= acting, (cfg.preset, text)
            assert "..." not in text
            phases = {"cam": cfg.cam, "seg": cfg.seg}
            for flag in told:
                section, dot, rest = flag.removeprefix("--").partition(".")
                if rest.startswith(("fit.", "weights", "network.")) and dot:
                    assert phases[section].is_trained or (rest == "weights" and not phases[section].released), text
                if rest in ("fit.epochs", "fit.steps"):  # epochs do not count where updates are given
                    assert (rest == "fit.epochs") == (phases[section].fit.steps is None), text
            assert cfg.segmenter != OWN or "--seg.fit" not in text
