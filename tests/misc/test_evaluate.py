"""misc/score/evaluate.py: sets of images from callables, problems gathered, the record of a score."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from misc.score.evaluate import EvaluationError, evaluate_cams, evaluate_masks
from misc.score.metrics import VOID_RULE, BoundaryConfusion, Confusion, ThresholdCurve, mask_at

N = 4
IDS = [f"im{i}" for i in range(9)]


def _rng(name: str, salt: int) -> np.random.Generator:
    return np.random.default_rng([int(name[2:]), salt])


def truth(name: str) -> np.ndarray:
    """Sizes differ from image to image."""
    size = (12 + int(name[2:]), 17)
    return _rng(name, 0).choice(np.array([0, 1, 2, 3, 255], np.uint8), size)


def masks(name: str) -> np.ndarray:
    return np.where(_rng(name, 1).random(truth(name).shape) < 0.7, truth(name), 1).astype(np.uint8)


def cams(name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([0, 2]), _rng(name, 2).random((2, *truth(name).shape), np.float32)


def no_background(name: str) -> np.ndarray | None:
    return None if name == "im3" else masks(name)


def broken(name: str) -> np.ndarray:
    if name == "im2":
        raise FileNotFoundError("im2 is not there")
    return masks(name)[:-1] if name == "im7" else masks(name)


def test_masks() -> None:
    confusion, boundary = Confusion(N), BoundaryConfusion(N)
    for name in IDS:
        confusion.add(truth(name), masks(name))
        boundary.add(truth(name), masks(name))
    scores = evaluate_masks(IDS, masks, truth, N, progress=False)
    np.testing.assert_array_equal(scores.confusion.counts, confusion.counts)
    assert scores.boundary is not None and scores.images == 9
    np.testing.assert_array_equal(scores.boundary.counts, boundary.counts)


def test_searched_threshold_scores_the_masks_at_the_best() -> None:
    grid = [0.0, 0.3, 0.6, 0.9]
    scores = evaluate_cams(IDS, cams, truth, N, grid, progress=False)
    assert isinstance(scores.curve, ThresholdCurve) and scores.boundary is not None
    per_threshold = []
    for t in grid:
        fixed = evaluate_cams(IDS, cams, truth, N, [t], progress=False)
        assert fixed.curve is None and fixed.threshold == t
        per_threshold.append(fixed.confusion.miou())
    best = grid[int(np.argmax(per_threshold))]
    assert scores.threshold == best and scores.curve.mious().tolist() == per_threshold
    at_best = evaluate_masks(IDS, lambda name: mask_at(cams(name), best), truth, N, progress=False)
    for other in (scores, evaluate_cams(IDS, cams, truth, N, grid, boundary=False, progress=False)):
        np.testing.assert_array_equal(other.confusion.counts, at_best.confusion.counts)
    np.testing.assert_array_equal(scores.boundary.counts, at_best.boundary.counts)


def test_convention_chooses_the_threshold() -> None:
    """A false class at the lower threshold costs nothing when counting, and a third of the mean with nanmean."""
    maps = np.zeros((2, 1, 20))
    maps[0, 0, :10] = [0.9] * 6 + [0.3] * 4
    maps[1, 0, 19] = 0.2
    expected = np.array([[1] * 10 + [0] * 10], np.uint8)
    chosen = {
        convention: evaluate_cams(
            ["a"], lambda _: (np.array([0, 1]), maps), lambda _: expected, 3, [0.1, 0.5], convention=convention
        ).threshold
        for convention in ("counting", "nanmean")
    }
    assert chosen == {"counting": 0.1, "nanmean": 0.5}


def test_no_prediction_is_background() -> None:
    scores = evaluate_masks(IDS, no_background, truth, N, progress=False)
    confusion = Confusion(N)
    for name in IDS:
        confusion.add(truth(name), np.zeros_like(truth(name)) if name == "im3" else masks(name))
    np.testing.assert_array_equal(scores.confusion.counts, confusion.counts)
    for grid in ([0.2], [0.2, 0.4]):
        result = evaluate_cams(["im0"], lambda _: None, truth, N, grid, progress=False)
        assert result.confusion.predicted_pixels.tolist()[1:] == [0, 0, 0]
        assert result.confusion.matrix.sum() == (truth("im0") != 255).sum()


def test_problems_are_gathered_over_all_images() -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate_masks(IDS, broken, truth, N, progress=False)
    assert [name for name, _ in caught.value.problems] == ["im2", "im7"]
    assert "im2 is not there" in str(caught.value) and "18 x 17" in str(caught.value)


def test_long_lists_of_problems_are_cut_to_ten() -> None:
    error = EvaluationError([(f"im{i}", "bad") for i in range(13)])
    assert str(error).startswith("13 images") and "im9: bad" in str(error) and "im10" not in str(error)
    assert "3 more" in str(error)


def test_errors_of_the_program_are_not_taken_for_bad_images() -> None:
    with pytest.raises(ZeroDivisionError):
        evaluate_masks(IDS, lambda name: 1 // 0, truth, N, progress=False)
    with pytest.raises(ValueError, match="no images"):
        evaluate_masks([], masks, truth, N, progress=False)


def test_record_says_where_a_threshold_comes_from() -> None:
    names = ["background", "a", "b", "c"]
    fixed = evaluate_cams(IDS, cams, truth, N, [0.3], progress=False).to_dict(names, "val")
    searched = evaluate_cams(IDS, cams, truth, N, [0.3, 0.4], boundary=False, progress=False).to_dict(names, "val")
    plain = evaluate_masks(IDS, masks, truth, N, progress=False)
    record = plain.to_dict(names, "val")
    assert (fixed["threshold"], fixed["threshold_choice"], "curve" in fixed) == (0.3, "fixed", False)
    assert searched["threshold_choice"] == "searched on val"
    assert [point["threshold"] for point in searched["curve"]] == [0.3, 0.4]
    assert (record["threshold"], record["threshold_choice"], record["images"]) == (None, None, 9)
    assert record["void_predictions"] == VOID_RULE and record["unit"] == "percent"
    assert record["miou"] == pytest.approx(100 * plain.confusion.miou())
    assert [c["name"] for c in record["classes"]] == names
    assert record["classes"][2]["boundary_iou"] == pytest.approx(100 * plain.boundary.iou()[2])
    assert record["confusion"] == plain.confusion.matrix.tolist()
    assert "boundary_miou" not in searched and "boundary_iou" not in searched["classes"][0]
    with pytest.raises(ValueError):
        plain.to_dict(names[1:], "val")


def test_undefined_scores_are_null_in_json() -> None:
    scores = evaluate_masks(["a"], lambda _: np.zeros((3, 3), np.uint8), lambda _: np.zeros((3, 3), np.uint8), 2)
    record = scores.to_dict(["background", "x"], "val", "nanmean")
    assert record["classes"][1]["iou"] is None and record["miou"] == 100
    assert "NaN" not in json.dumps(record)


def tell_ctrl_c(folder: Path, name: str) -> np.ndarray:
    """A problem that says whether Ctrl-C reaches this process; waits until a second process has work too."""
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    raise ValueError("blocked" if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()) else "reached")


@pytest.mark.slow
def test_ctrl_c_reaches_no_process_that_counts(tmp_path: Path) -> None:
    """All of them, from their first moment on: the main process ends them."""
    with pytest.raises(EvaluationError) as told:
        evaluate_masks(IDS, partial(tell_ctrl_c, tmp_path), truth, N, workers=2, progress=False)
    assert [problem for _, problem in told.value.problems] == ["blocked"] * len(IDS)
    assert len(list(tmp_path.iterdir())) == 2
