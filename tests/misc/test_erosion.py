"""misc/score/erosion.py beside a plain form; curves of eroded masks."""

from __future__ import annotations

import numpy as np
import pytest

from misc.score.erosion import ErodedCurve, erode
from misc.score.evaluate import evaluate_cams
from misc.score.metrics import Confusion, ThresholdCurve, mask_at

GRID = [0.2, 0.5, 0.8]
IDS = [f"im{i}" for i in range(5)]


def blocks(seed: int) -> np.ndarray:
    """A mask of rectangles."""
    rng, mask = np.random.default_rng(seed), np.zeros((23, 31), np.uint8)
    for label in (1, 2, 3, 1):
        top, left = rng.integers(0, 18, 2)
        mask[top : top + 9, left : left + 12] = label
    return mask


@pytest.mark.parametrize("side", [1, 3, 7])
def test_a_pixel_stays_where_all_around_it_are_of_its_class(side: int) -> None:
    for seed in range(3):
        mask, reach = blocks(seed), side // 2
        expected = np.zeros_like(mask)
        for y, x in np.ndindex(mask.shape):
            window = mask[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
            expected[y, x] = mask[y, x] if (window == mask[y, x]).all() else 0
        assert np.array_equal(erode(mask, side), expected)


def truth(name: str) -> np.ndarray:
    return blocks(int(name[2:]) + 10)


def cams(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "im2":
        return np.zeros(0, np.int64), np.zeros((0, 23, 31), np.float32)
    number = int(name[2:])
    shown = np.stack([blocks(number) == 1, blocks(number) == 3]).astype(np.float32)
    return np.array([0, 2]), shown * np.float32(0.3 + 0.1 * number)


def test_a_curve_counts_the_eroded_masks() -> None:
    scores = evaluate_cams(IDS, cams, truth, 4, GRID, erosion=3, progress=False)
    assert isinstance(scores.curve, ErodedCurve) and scores.to_dict("abcd", "train")["erosion"] == 3
    for index, threshold in enumerate(GRID):
        expected = Confusion(4)
        for name in IDS:
            expected.add(truth(name), erode(mask_at(cams(name), threshold), 3))
        np.testing.assert_array_equal(scores.curve.confusion(index).counts, expected.counts)
    plain = evaluate_cams(IDS, cams, truth, 4, GRID, progress=False)
    assert not isinstance(plain.curve, ErodedCurve) and plain.to_dict("abcd", "train")["erosion"] == 0
    assert not np.array_equal(plain.curve.mious(), scores.curve.mious())


def test_parts_add_up_and_other_curves_do_not() -> None:
    halves = [ErodedCurve(4, GRID, 3) for _ in range(2)]
    for number, name in enumerate(IDS):
        halves[number % 2].add(truth(name), *cams(name))
    whole = evaluate_cams(IDS, cams, truth, 4, GRID, erosion=3, progress=False).curve
    merged = halves[0].merge(halves[1])
    assert all(np.array_equal(merged.confusion(i).counts, whole.confusion(i).counts) for i in range(3))
    for other in (ErodedCurve(4, GRID, 5), ThresholdCurve(4, GRID)):
        with pytest.raises(ValueError, match="same erosion"):
            merged.merge(other)
