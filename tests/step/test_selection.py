"""--cam.selection: the epoch that is best by tags or by pixel labels is kept beside the last one."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import arguments, make_set

import run_sample
from misc.files.images import read_mask
from misc.image.pixels import resize_mask
from net.registry import SEEDS
from step.lib import parsing
from step.lib.config import default_config, open_job
from step.train_cam import average_precision, binary_precision, scored_masks, tag_precision, train_miou


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "voc", images=6, val=3)


@pytest.mark.parametrize(
    ("scores", "present", "wanted"),
    [
        ([0.9, 0.1, 0.5, 0.3], [1, 0, 0, 0], 1.0),
        ([0.9, 0.1, 0.5, 0.3], [0, 0, 1, 1], (1 / 2 + 2 / 3) / 2),
        ([0.9, 0.1, 0.5, 0.3], [0, 1, 0, 0], 1 / 4),
        ([-3.0, -1.0, -2.0, -9.0], [0, 1, 1, 0], 1.0),
    ],
)
def test_average_precision_of_one_image(scores: list[float], present: list[int], wanted: float) -> None:
    assert average_precision(np.array(scores), np.array(present, bool)) == pytest.approx(wanted)


def own(method: str, data: Path, folder: Path) -> list[str]:
    """The command line of a method's own sample recipe."""
    place = ["--root", str(data), "--out", str(folder / "run")]
    return [method, *place, "--machine.device", "cpu", "--machine.workers", "0"]


@pytest.mark.parametrize("found", list(itertools.product([0, 1], repeat=4)))
def test_average_precision_of_yes_and_no_is_that_of_two_ranks(found: tuple[int, ...]) -> None:
    present, yes = np.array([1, 1, 0, 1], bool), np.array(found, bool)
    wanted, recall = 0.0, 0.0
    for chosen in (yes, yes | True) if yes.any() else (yes | True,):  # those of score 1, then of 1 and 0
        now = (chosen & present).sum() / 3
        wanted, recall = wanted + (now - recall) * present[chosen].mean(), now
    assert binary_precision(yes, present) == pytest.approx(wanted)


def test_the_autoencoder_is_rated_by_its_class_scores_on_squashed_images(data: Path, tmp_path: Path) -> None:
    cfg = parsing.parse(own("semformer", data, tmp_path))
    job, (_, phase), seen = open_job(cfg), cfg.cam.phases()[0], []

    class Scorer:
        normalisation = "imagenet"

        def score_classes(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(images.shape))
            tags = job.catalog.tags(job.catalog.ids("train")[len(seen) - 1])
            return torch.tensor([[0.7, *(0.2 + 0.45 * tags)]])

    assert tag_precision(job, phase, Scorer(), torch.device("cpu")) == 1  # between 0.2 and 0.65
    side = phase.augment.crop
    assert set(seen) == {(1, 3, side, side)} and 0 < len(seen) <= 6


def test_pixel_labels_rate_the_published_maps_of_the_corner(data: Path, tmp_path: Path) -> None:
    cfg = parsing.parse(own("puzzlecam", data, tmp_path))
    job = open_job(cfg)
    masks, side = scored_masks(job), cfg.cam.augment.crop

    class Knowing:
        normalisation = "imagenet"
        selection_thresholds = (0.1, 0.3)

        def __init__(self) -> None:
            self.ids = iter(masks.items())

        def selection_maps(self, images: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
            _, path = next(self.ids)
            truth = np.zeros((side, side), np.uint8)
            corner = read_mask(path)[:side, :side]
            truth[: corner.shape[0], : corner.shape[1]] = corner
            assert images.shape == (1, 3, side, side) and not images[..., corner.shape[0] :, :].any()
            small = resize_mask(truth, (14, 14))
            return 5 * torch.tensor(np.stack([small == c + 1 for c in range(job.catalog.num_classes)]))[None].float()

    class Empty(Knowing):
        def selection_maps(self, images: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
            return 0 * super().selection_maps(images, tags)

    knowing, empty = (train_miou(job, network, masks, torch.device("cpu")) for network in (Knowing(), Empty()))
    assert knowing == pytest.approx(1) and empty < 0.5
    # of six images a batch of four is rated: the others would not fit
    batches = replace(job, cfg=replace(cfg, cam=replace(cfg.cam, fit=replace(cfg.cam.fit, batch_size=4))))
    some = Knowing()
    assert train_miou(batches, some, masks, torch.device("cpu")) <= 1 and len(list(some.ids)) == 2


def test_puzzlecam_s_published_selection_rates_the_rectified_maps_of_the_whole_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = parsing.parse(own("puzzlecam", tmp_path, tmp_path)).cam.network.build(2, {}).eval()
    images, tags = torch.randn(2, 3, 64, 64), torch.ones(2, 2)
    with torch.no_grad():
        wanted = network.classifier(network.model(images)).relu()
        assert torch.equal(network.selection_maps(images, tags), wanted) and wanted.any()


def test_a_selection_by_tags_needs_the_scored_list(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cam.caae.selection", "train_tags", "--score-list", "nothing", "--steps", "train_cam"]
    assert run_sample.main([*own("semformer", data, tmp_path), *flags]) == 2
    assert "nothing" in capsys.readouterr().err and not list(tmp_path.glob("run/weights/*"))


@pytest.mark.parametrize(
    ("selection", "more", "told"),
    [
        ("val_tags", ["--val-list", "nothing"], "--cam.selection val_tags needs the tags of the list nothing"),
        ("train_miou", [], "--cam.selection train_miou needs the masks of the list train"),
        ("val_boxes", [], "has no boxes to compare with"),
    ],
)
def test_what_a_selection_needs_is_asked_for_before_any_work(
    selection: str, more: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_set(tmp_path / "voc", images=6, val=3)
    shutil.rmtree(data / "SegmentationClass")
    flags = ["--cam.selection", selection, "--steps", "train_cam", *more]
    assert run_sample.main(arguments(data, tmp_path / "run", *flags)) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_published_selections_look_at_tags_alone() -> None:
    semformer = default_config("semformer", "published").cam
    assert semformer.caae.selection == "train_tags" and semformer.selection == "last"
    assert SEEDS["semformer"].selection_thresholds == pytest.approx(np.arange(0.01, 1, 0.01))
    assert SEEDS["puzzlecam"].selection_thresholds == (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
    assert default_config("aream_mctformer", "published").cam.selection == "val_tags"
    for method in ("aream_conformer", "semformer", "puzzlecam", "mctformer", "crt"):
        assert default_config(method, "published").cam.selection == "last"


def test_a_selection_without_a_number_is_recorded_as_the_last_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step.train_cam.val_map", lambda *_: float("nan"))
    flags = ["--cam.selection", "val_tags", "--cam.fit.epochs", "1", "--cam.fit.steps", "1", "--steps", "1-2"]
    assert run_sample.main(arguments(data, tmp_path / "run", *flags)) == 0
    score = json.loads((tmp_path / "run" / "scores.json").read_text())["CAM"]
    assert score["selection"] == "last (val_tags was no number in any epoch)"
    assert score["selection_rating"] == {"last": None}


@pytest.mark.slow
def test_the_best_epoch_on_the_tags_of_val_is_kept_and_both_ratings_are_recorded(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rated = iter([0.4, 0.9, 0.7])
    monkeypatch.setattr("step.train_cam.val_map", lambda *_: next(rated))
    flags = ["--cam.selection", "val_tags", "--cam.fit.epochs", "3", "--cam.fit.steps", "3", "--steps", "1-2"]
    out = tmp_path / "run"
    assert run_sample.main(arguments(data, out, *flags)) == 0
    scores = json.loads((out / "scores.json").read_text())
    score, last = scores["CAM"], scores["CAM, last weights"]
    assert score["selection"] == "val_tags" and score["selection_rating"] == {"last": 0.7, "selected": 0.9}
    assert last["selection"] == "last" and last["selection_rating"] == {"last": 0.7}
    assert capsys.readouterr().out.count("the best so far") == 2
    # each score is of the maps of its own weights, which differ
    assert last["curve"] != score["curve"] and last["images"] == score["images"]
    assert {p.name for p in (out / "weights").iterdir()} == {"cam.pt", "cam.last.pt"}
    assert len(list((out / "cam_last").iterdir())) == len(list((out / "cam").iterdir()))
    page = [*flags[:-2], "--steps", "report"]
    assert run_sample.main(arguments(data, out, *page)) == 0
    assert "CAM, last weights" in (out / "report.html").read_text()
    # a run on the same CAMs has both scores; --redo removes both kinds of maps
    other = tmp_path / "other"
    assert run_sample.main(arguments(data, other, *flags, "--cams", str(out))) == 0
    assert "CAM, last weights" in json.loads((other / "scores.json").read_text())
    (out / "cam_last" / "left.npz").write_bytes(b"")
    assert run_sample.main(arguments(data, out, *flags[:-1], "2", "--redo")) == 0
    assert not (out / "cam_last" / "left.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["val_tags", "train_miou", "val_boxes"])
def test_a_released_network_is_not_selected_again(selection: str, data: Path, tmp_path: Path) -> None:
    """It is taken as it is; nothing is asked of lists, masks and boxes, and its scores don't say that it was
    selected here."""
    network = open_job(parsing.parse(arguments(data, tmp_path))).cfg.cam.network.build(2, {})
    torch.save(network.state_dict(), tmp_path / "released.pth")
    flags = ["--cam.selection", selection, "--cam.released", str(tmp_path / "released.pth"), "--val-list", "nothing"]
    assert run_sample.main(arguments(data, tmp_path / "run", *flags, "--steps", "1-2")) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert list(scores) == ["CAM"] and scores["CAM"]["selection"] == "that of its authors"
    assert {p.name for p in (tmp_path / "run" / "weights").iterdir()} == {"cam.pt"}


@pytest.mark.slow
def test_it_rates_by_the_class_scores_and_needs_tags_of_val(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cam.selection", "val_tags", "--steps", "train_cam", "--cam.fit.steps", "1", "--cam.fit.epochs", "1"]
    assert run_sample.main(arguments(data, tmp_path / "one", *flags)) == 0
    assert "val_map of the epoch" in capsys.readouterr().out
    assert run_sample.main(arguments(data, tmp_path / "two", *flags, "--val-list", "nothing")) == 2
    assert "--cam.selection val_tags" in capsys.readouterr().err and not (tmp_path / "two" / "weights").exists()
