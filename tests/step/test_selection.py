"""--cam.selection val_tags: the epoch with the best mAP on the validation tags is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from running import arguments, make_set

import run_sample
from step.lib.config import default_config
from step.train_cam import average_precision


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


def test_published_selections_look_at_tags_alone() -> None:
    assert default_config("aream_mctformer", "published").cam.selection == "val_tags"
    for method in ("aream_conformer", "semformer", "puzzlecam", "mctformer", "crt"):
        assert default_config(method, "published").cam.selection == "last"


def test_the_best_epoch_on_the_tags_of_val_is_kept_and_both_ratings_are_recorded(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rated = iter([0.4, 0.9, 0.7])
    monkeypatch.setattr("step.train_cam.val_map", lambda *_: next(rated))
    flags = ["--cam.selection", "val_tags", "--cam.fit.epochs", "3", "--cam.fit.steps", "3", "--steps", "1-2"]
    assert run_sample.main(arguments(data, tmp_path / "run", *flags)) == 0
    score = json.loads((tmp_path / "run" / "scores.json").read_text())["CAM"]
    assert score["selection"] == "val_tags" and score["selection_rating"] == {"last": 0.7, "selected": 0.9}
    assert capsys.readouterr().out.count("the best so far") == 2


def test_it_rates_by_the_class_scores_and_needs_tags_of_val(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cam.selection", "val_tags", "--steps", "train_cam", "--cam.fit.steps", "1", "--cam.fit.epochs", "1"]
    assert run_sample.main(arguments(data, tmp_path / "one", *flags)) == 0
    assert "epoch score" in capsys.readouterr().out
    assert run_sample.main(arguments(data, tmp_path / "two", *flags, "--val-list", "nothing")) == 1
    assert "--cam.selection val_tags" in capsys.readouterr().err and not (tmp_path / "two" / "weights").exists()
