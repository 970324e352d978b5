"""The pipeline of data sets of boxes, from end to end on a tiny set: steps, files, figures, hidden tags, parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import NEEDS_BROWSER, check_page
from running import digests

import run_sample
from misc.files import store
from misc.files.runfolder import RunFolder
from misc.score import wsol
from step import localise, report
from step.lib import parsing
from step.lib.config import open_job, recorded_config
from step.lib.report import box_part, gallery, judge
from voc12.generated.sets import generate

TINY = """
--machine.workers 0 --machine.device cpu --machine.amp off --cam.weights none
--cam.network.deit.image-size 48 --cam.network.deit.width 24 --cam.network.deit.depth 2
--cam.fit.steps 3 --cam.fit.batch-size 4 --cam.augment.square 56 --cam.augment.crop 48
--cam.infer.scales 48 --cam.boxes.side 64 --cam.boxes.interval 0.05
""".split()
FIGURES = ("Cls Top-1", "Cls Top-5", "Loc Top-1", "Loc Top-5", "GT-Known", "MaxBoxAcc", "MaxBoxAccV2", "PxAP")


def arguments(data: Path, out: Path, *flags: str) -> list[str]:
    return ["tscam", "--data", "cub200", "--root", str(data), "--out", str(out), *TINY, *flags]


def run(data: Path, out: Path, *flags: str) -> int:
    return run_sample.main(arguments(data, out, *flags))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cub") / "set"
    generate(root, images=8, val=5, classes=6, seed=0, long_side=(64, 90), layout="cub")
    return root


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert run(data, out) == 0
    return out


@pytest.mark.slow
def test_boxes_take_three_steps(finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    assert list(record["steps"]) == ["train_cam", "localise", "report"]
    made = {path.name for path in finished.iterdir()}
    assert {"box", "report.html", "pictures.png"} <= made and not {"cam", "label", "seg"} & made
    assert {p.stem for p in (finished / "box").iterdir()} == {f"2026_{i:06d}" for i in range(1, 6)}


@pytest.mark.slow
@NEEDS_BROWSER
def test_a_browser_shows_the_page_of_boxes(finished: Path) -> None:
    pytest.importorskip("vl_convert")
    assert "<h2>Boxes of val</h2>" in (finished / "report.html").read_text()
    check_page(finished / "report.html")


def test_empty_maps_are_told(out: Path) -> None:
    job = open_job(recorded_config(RunFolder(out)))
    before = [finding.title for finding in box_part.find_box_findings(job)]
    files = sorted((out / "box").iterdir())
    for path in files[:3]:  # of 5
        found = store.read_arrays(path)
        store.write_arrays(path, **{**found, "score": np.zeros_like(found["score"])})
    told, *others = box_part.find_box_findings(job)
    assert told.title == "Most maps are empty" not in before and [finding.title for finding in others] == before
    assert "In 3 of 5 images" in told.texts[0] and "--cam.fit.steps" in told.texts[0]
    card = gallery.box_card(judge.RunImages.of(job.catalog, job.run), files[0].stem)
    assert card.facts[2:] == ["the map is empty, and so is its box"]


def test_every_figure_is_recorded_with_what_it_rests_on(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = json.loads((finished / "scores.json").read_text())
    assert list(scores) == [f"boxes: {name}" for name in FIGURES]
    for name in FIGURES:
        score = scores[f"boxes: {name}"]
        assert 0 <= score["value"] <= 100 and score["images"] == 5 and score["split"] == "val"
        assert score["start_weights"] == "random"
        assert score["precision"] == {"training": "float32", "inference": "float32"}
        assert score["tags"] == ("none" if name.startswith(("Cls", "Loc")) else "true class")
    fixed = [n for n in FIGURES if scores[f"boxes: {n}"]["threshold_choice"] == "fixed"]
    assert fixed == ["Loc Top-1", "Loc Top-5", "GT-Known"] and scores["boxes: GT-Known"]["threshold"] == 0.1
    assert scores["boxes: MaxBoxAcc"]["threshold_choice"] == "searched on val itself"
    assert sum(scores["boxes: Loc Top-1"]["errors"].values()) == pytest.approx(100)
    table = report.score_table(scores)
    assert f"boxes: GT-Known     {scores['boxes: GT-Known']['value']:.2f} %" in table
    page = (finished / "report.html").read_text()
    assert "<h2>Boxes of val</h2>" in page and "MaxBoxAccV2" in page and "Confusion" not in page
    assert "Worst class: " in page and "overlap of the true class" in page
    assert "no true masks" not in page  # none are asked for


@pytest.mark.slow
def test_recorded_boxes_are_those_of_the_maps(finished: Path, data: Path) -> None:
    """Each file agrees with the evaluation of its own boxes."""
    for path in (finished / "box").iterdir():
        found = store.read_arrays(path)
        target = int(open_job(parsing.parse(arguments(data, finished))).catalog.tags(path.stem).argmax())
        verdict = wsol.judge_boxes(found["best"], found["boxes"], found["known"], target, found["truth"])
        assert {k: v.item() for k, v in found.items() if k in vars(verdict)} == pytest.approx(vars(verdict))
        assert len(found["best"]) == 5 and found["overlap"].shape == (2, 20) and found["pixels"].sum() == 64 * 64
        # the map that is kept is that of the best class: its box can be found in it again
        again = wsol.contour_boxes(found["score"], 0.1)
        assert again[0][again[1].argmax()].tolist() == found["boxes"][0].tolist()


def test_true_tags_change_nothing_of_what_is_found_without_them(data: Path, finished: Path, tmp_path: Path) -> None:
    own, out = shutil.copytree(data, tmp_path / "own"), shutil.copytree(finished, tmp_path / "out")
    labels = own / "image_class_labels.txt"
    lines = [line.split() for line in labels.read_text().splitlines()]
    labels.write_text("".join(f"{number} {int(label) % 6 + 1}\n" for number, label in lines))
    assert run(own, out, "--steps", "localise", "--redo", "--force") == 0
    changed = 0
    for path in (finished / "box").iterdir():
        before, after = store.read_arrays(path), store.read_arrays(out / "box" / path.name)
        for name in ("best", "boxes", "score"):
            np.testing.assert_array_equal(before[name], after[name])
        changed += not np.array_equal(before["overlap"], after["overlap"])
    assert changed


def test_maps_are_asked_for_without_a_hint_at_the_true_class(data: Path, tmp_path: Path) -> None:
    """Even a method whose maps depend on which others are asked for is told the true class for GT-Known only."""
    job = open_job(parsing.parse(arguments(data, tmp_path)))
    asked: list[list[int]] = []

    def maps(classes: np.ndarray) -> list[torch.Tensor]:
        asked.append(classes.tolist())
        return [torch.rand(1, len(classes), 6, 6)]

    logits = np.array([0.0, 9, 3, 5, 4, 2])
    localise.localise(job, logits, maps, 0, np.array([[1, 2, 30, 40]]), None, (64, 80))
    assert asked == [[1, 2, 3, 4, 5], [0]]


def test_boxes_follow_their_classes(data: Path, tmp_path: Path) -> None:
    """Maps come in the order of the classes, boxes in that of the scores."""
    job = open_job(parsing.parse(arguments(data, tmp_path)))

    def maps(classes: np.ndarray) -> list[torch.Tensor]:
        made = torch.zeros(1, len(classes), 64, 64)
        for place, number in enumerate(classes):
            made[0, place, 10:20, 8 * number : 8 * number + 8] = 1
        return [made]

    logits = np.array([0.0, 9, 3, 5, 4, 2])
    found = localise.localise(job, logits, maps, 3, np.array([[24, 10, 31, 19]]), None, (64, 64))
    assert found["best"].tolist() == [1, 3, 4, 2, 5]
    assert found["boxes"][:, 0].tolist() == [8 * c for c in found["best"]]
    assert found["known"].tolist() == [24, 10, 32, 20]
    assert not found["loc_top1"] and found["loc_top5"] and found["gt_known"] and not found["pixels"].any()


@pytest.mark.slow
def test_parts_are_scored_when_all_are_there(data: Path, finished: Path, out: Path) -> None:
    shutil.rmtree(out / "box")
    RunFolder(out).forget("localise")
    for part in ("0/2", "1/2"):
        assert run(data, out, "--steps", "localise", "--shard", part) == 0
        assert not RunFolder(out).scores()
    assert run(data, out) == 0
    assert json.loads((out / "scores.json").read_text()) == json.loads((finished / "scores.json").read_text())
    assert digests(out, "box/*") == digests(finished, "box/*")


@pytest.mark.slow
def test_the_next_step_is_the_pipelines(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, tmp_path / "out", "--steps", "train_cam") == 0
    assert "--steps localise" in capsys.readouterr().out


def test_localise_needs_a_data_set_of_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path / "voc", images=4, val=2, classes=2, long_side=(64, 70))
    flags = ("--data", "voc12", "--steps", "localise")
    assert run(tmp_path / "voc", tmp_path / "out", *flags) == 2
    assert "voc12 has no boxes to compare with: localise runs on data sets that have" in capsys.readouterr().err


@pytest.mark.slow
def test_crt_trains_on_boxes_in_its_form_on_cub(data: Path, tmp_path: Path) -> None:
    """Two optimisers and no tiles."""
    flags = """--data cub200 --machine.workers 0 --machine.device cpu --steps train_cam localise
    --cam.network.cnn.width 0.125 --cam.network.transformer.image-size 48 --cam.network.transformer.width 24
    --cam.network.transformer.depth 1 --cam.network.no-tiles --cam.network.rounds 1 --cam.network.loss cross_entropy
    --cam.network.agreement-size grid --cam.network.optimisers two --cam.fit.steps 3 --cam.fit.batch-size 4
    --cam.fit.schedule step --cam.augment.order square crop flip normalize --cam.augment.square 56 --cam.augment.crop 48
    --cam.infer.scales 48 --cam.infer.square --cam.infer.resize bilinear --cam.infer.no-flip
    --cam.infer.normalise minmax --cam.boxes.side 64 --cam.boxes.interval 0.1""".split()
    assert run_sample.main(["crt", "--root", str(data), "--out", str(tmp_path / "crt"), *flags]) == 0
    scores = json.loads((tmp_path / "crt" / "scores.json").read_text())
    assert list(scores) == [f"boxes: {name}" for name in FIGURES]


@pytest.mark.slow
def test_the_epoch_of_the_best_boxes_is_kept_and_rated_as_it_is_scored(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path, "--cam.selection", "val_boxes", "--cam.fit.epochs", "3") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    score = scores["boxes: GT-Known"]
    rating = score["selection_rating"]
    assert score["selection"] == "val_boxes" and rating["selected"] >= rating["last"]
    assert score["value"] == pytest.approx(100 * rating["selected"])
    last = scores["boxes: GT-Known, last weights"]
    assert last["value"] == pytest.approx(100 * rating["last"]) and last["selection"] == "last"
    second = scores["boxes: Loc Top-1, weights of the best Loc Top-1"]
    assert second["selection"] == "val_boxes, by Loc Top-1"
    assert second["value"] == pytest.approx(100 * second["selection_rating"]["selected"])
    assert second["value"] >= max(scores[f"boxes: Loc Top-1{end}"]["value"] for end in ("", ", last weights"))
    assert len(scores) == 3 * len(FIGURES)
    assert run(data, tmp_path, "--cam.selection", "val_boxes", "--cam.fit.epochs", "3", "--steps", "localise") == 0


def test_selection_by_boxes_needs_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path / "voc", images=4, val=2, classes=2, seed=0, long_side=(64, 90))
    flags = ["--root", str(tmp_path / "voc"), "--out", str(tmp_path / "run"), "--steps", "train_cam"]
    assert run_sample.main(["psa", *flags, "--cam.selection", "val_boxes", "--machine.device", "cpu"]) == 2
    assert "no boxes" in capsys.readouterr().err and not list(tmp_path.glob("run/weights/*"))
