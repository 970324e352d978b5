"""misc/score/metrics.py against plain forms: counts, conventions, the threshold curve, boundary IoU."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from misc.score.metrics import BoundaryConfusion, Confusion, ThresholdCurve, boundary_band, mask_at


def random_masks(seed: int, n: int, size: tuple[int, int], block: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Truth with 255 and a prediction that is right in most places; blocks, so that there are insides and contours."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice([*range(n), 255], (size[0] // block + 1, size[1] // block + 1))
    truth = np.kron(coarse, np.ones((block, block), int))[: size[0], : size[1]].astype(np.uint8)
    wrong = rng.random(size) < 0.2
    return truth, np.where(wrong | (truth == 255), rng.integers(0, n, size), truth).astype(np.uint8)


def plain_counts(truth: np.ndarray, prediction: np.ndarray, n: int) -> np.ndarray:
    """(n+1, n+1), the last column: predicted as 255."""
    counts = np.zeros((n + 1, n + 1), np.int64)
    for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if t != 255:
            counts[t, n if p == 255 else p] += 1
    return counts


def random_maps(seed: int, keys: list[int], size: tuple[int, int], dtype: type) -> np.ndarray:
    """Maps full of ties: steps of 0.01 as the thresholds have, negative values among them."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-20, 80, (len(keys), *size)) / 100).astype(dtype)


def plain_mask(keys: list[int], maps: np.ndarray, t: float, n: int) -> np.ndarray:
    """evaluation.md section 1.2: arg-max over n channels, zeros for absent classes, channel 0 the background score."""
    stack = np.zeros((n, *maps.shape[1:]), maps.dtype)
    stack[0] = t
    for key, values in zip(keys, maps, strict=True):
        stack[key + 1] = values
    return stack.argmax(0).astype(np.uint8)


def test_confusion_is_the_plain_count() -> None:
    confusion, expected = Confusion(6), np.zeros((7, 7), np.int64)
    for seed, size in enumerate([(20, 31), (17, 12), (1, 40)]):
        truth, prediction = random_masks(seed, 6, size)
        prediction[0, ::3] = 255
        confusion.add(truth, prediction)
        expected += plain_counts(truth, prediction, 6)
    assert confusion.counts.dtype == np.int64
    np.testing.assert_array_equal(confusion.counts, expected)
    np.testing.assert_array_equal(confusion.matrix, expected[:6, :6])
    np.testing.assert_array_equal(confusion.truth_pixels, expected.sum(1)[:6])


def test_void_prediction_is_a_miss_and_no_false_positive() -> None:
    confusion = Confusion(2)
    confusion.add(np.array([[1, 1, 1, 1, 0, 255]], np.uint8), np.array([[1, 1, 1, 255, 0, 255]], np.uint8))
    np.testing.assert_allclose(confusion.iou(), [1, 3 / 4])
    np.testing.assert_allclose(confusion.precision, [1, 1], atol=1e-4)
    np.testing.assert_allclose(confusion.recall, [1, 3 / 4], atol=1e-4)
    assert confusion.pixel_accuracy == 4 / 5


def test_conventions_differ_in_absent_classes_only() -> None:
    # class 1: right half the time; class 2: predicted only; class 3: nowhere
    confusion = Confusion(4)
    confusion.add(np.array([[0, 0, 0, 0, 1, 1]]), np.array([[0, 0, 0, 0, 1, 2]]))
    np.testing.assert_allclose(confusion.iou("counting"), [1, 0.5, 0, 0])
    np.testing.assert_allclose(confusion.iou("nanmean"), [1, 0.5, 0, math.nan])
    np.testing.assert_allclose(confusion.iou("ground-truth"), [1, 0.5, math.nan, math.nan])
    assert confusion.miou("counting") == pytest.approx(1.5 / 4)
    assert confusion.miou("nanmean") == pytest.approx(1.5 / 3)
    assert confusion.miou("ground-truth") == pytest.approx(1.5 / 2)
    assert confusion.miou() == confusion.miou("counting")
    assert confusion.class_accuracy == pytest.approx(0.75)
    assert confusion.frequency_weighted_iou == pytest.approx(4 / 6 * 1 + 2 / 6 * 0.5)
    assert confusion.false_positive == pytest.approx((0 + 0 + 1 + 0) / 4)
    assert confusion.false_negative == pytest.approx((0 + 0.5 + 0 + 0) / 4)
    with pytest.raises(ValueError, match="ground-truth"):
        confusion.iou("mean")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_all_void_truth_counts_nothing() -> None:
    confusion, boundary, curve = Confusion(3), BoundaryConfusion(3), ThresholdCurve(3, [0.1, 0.2])
    truth, prediction = np.full((8, 9), 255, np.uint8), np.ones((8, 9), np.uint8)
    confusion.add(truth, prediction)
    boundary.add(truth, prediction)
    curve.add(truth, np.array([1]), np.ones((1, 8, 9), np.float32))
    assert confusion.counts.sum() == 0 and curve.counts.sum() == 0 and boundary.union.sum() == 0
    assert confusion.miou() == 0 and math.isnan(confusion.miou("nanmean")) and math.isnan(confusion.pixel_accuracy)
    assert math.isnan(boundary.miou("nanmean")) and math.isnan(confusion.frequency_weighted_iou)


def test_counts_beyond_32_bits_stay_exact() -> None:
    truth, prediction = random_masks(0, 3, (30, 40))
    confusion, curve = Confusion(3), ThresholdCurve(3, [0.0, 0.3])
    maps = random_maps(1, [0, 1], (30, 40), np.float32)
    confusion.add(truth, prediction)
    curve.add(truth, np.array([0, 1]), maps)
    once, once_curve, iou = confusion.counts.copy(), curve.confusion(1).counts.copy(), confusion.iou()
    for _ in range(30):  # doubling: 2^30 x 1,200 pixels, about 10^12
        confusion.merge(confusion)
        curve.merge(curve)
    confusion.add(truth, prediction)
    curve.add(truth, np.array([0, 1]), maps)
    expected = [[value * (2**30 + 1) for value in row] for row in once.tolist()]
    assert confusion.counts.tolist() == expected and max(map(max, expected)) > 2**31
    assert curve.confusion(1).counts.tolist() == [[v * (2**30 + 1) for v in row] for row in once_curve.tolist()]
    np.testing.assert_allclose(confusion.iou(), iou, rtol=1e-9)
    assert (confusion.union > 0).all()


def test_errors_name_values_and_sizes_and_count_nothing() -> None:
    good = np.zeros((4, 5), np.uint8)
    for counter in (Confusion(3), BoundaryConfusion(3)):
        with pytest.raises(ValueError, match=r"prediction holds the values \[3\]"):
            counter.add(good, good + 3)
        with pytest.raises(ValueError, match=r"prediction holds the values \[3\]"):  # wrong even where truth is void
            Confusion(3).add(np.where(np.eye(4, 5) > 0, np.uint8(255), good), good + 3 * np.eye(4, 5, dtype=np.uint8))
        with pytest.raises(ValueError, match=r"truth holds the values \[7\]"):
            counter.add(good + 7, good)
        with pytest.raises(ValueError, match="4 x 6 .*4 x 5"):
            counter.add(good, np.zeros((4, 6), np.uint8))
        with pytest.raises(ValueError, match="-1"):
            counter.add(good.astype(int) - 1, good)
        with pytest.raises(ValueError, match="256"):
            counter.add(good, good.astype(int) + 256)
        with pytest.raises(ValueError, match="float"):
            counter.add(good, good.astype(float))
        assert counter.counts.sum() == 0
    with pytest.raises(ValueError, match="255"):
        Confusion(256)
    with pytest.raises(ValueError, match="merged"):
        Confusion(3).merge(Confusion(4))
    with pytest.raises(ValueError, match="merged"):
        BoundaryConfusion(3).merge(BoundaryConfusion(3, 0.01))


def test_merge_and_pickle() -> None:
    whole, parts = Confusion(4), [Confusion(4), Confusion(4)]
    for i in range(4):
        pair = random_masks(i, 4, (10, 11))
        whole.add(*pair)
        parts[i % 2].add(*pair)
    merged = pickle.loads(pickle.dumps(parts[0])).merge(parts[1])
    np.testing.assert_array_equal(merged.counts, whole.counts)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("keys", [[2], [0, 3], [4, 1, 0]])
def test_curve_is_the_plain_evaluation_at_every_threshold(dtype: type, keys: list[int]) -> None:
    n, thresholds = 6, [i / 100 for i in range(60)]
    curve = ThresholdCurve(n, thresholds)
    images = []
    for seed in range(2):
        truth, _ = random_masks(seed, n, (19, 23))
        images.append((truth, random_maps(seed, keys, truth.shape, dtype)))
        curve.add(truth, np.array(keys), images[-1][1])
    ties = 0
    for i, t in enumerate(thresholds):
        plain = Confusion(n)
        for truth, maps in images:
            mask = plain_mask(keys, maps, t, n)
            np.testing.assert_array_equal(mask_at((np.array(keys), maps), t), mask)
            plain.add(truth, mask)
            ties += int((maps == dtype(t)).sum())
        np.testing.assert_array_equal(curve.confusion(i).counts, plain.counts)
    assert ties > 100  # scores that equal a threshold were really there
    mious = [curve.confusion(i).miou() for i in range(60)]
    assert curve.best() == (thresholds[int(np.argmax(mious))], max(mious))


def test_curve_of_other_thresholds() -> None:
    """Crowded, far apart, negative, single ones, and infinite scores: the look-up of the bins stays exact."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0, 2, 400), [np.inf, -np.inf, 3e38, -3e38, 0.0, -0.0]]).astype(np.float32)
    crowded = [-1.5, -1.5 + 1e-9, -1.0, 0.0, 1e-12, 1e6]
    for thresholds in ([0.3], crowded, np.linspace(-0.5, 0.5, 700), [0.1, 0.1 + 1e-7]):
        tied = np.asarray(thresholds, np.float32)
        maps = np.concatenate([scores, tied, np.nextafter(tied, np.float32(9)), np.nextafter(tied, np.float32(-9))])
        maps = maps.reshape(1, 1, -1)
        curve = ThresholdCurve(2, thresholds)
        curve.add(np.ones((1, maps.size), np.uint8), np.array([0]), maps)
        expected = [int((maps > np.float32(t)).sum()) for t in thresholds]
        assert [int(curve.confusion(i).matrix[1, 1]) for i in range(len(thresholds))] == expected
        assert {int(curve.confusion(i).matrix[1].sum()) for i in range(len(thresholds))} == {maps.size}


def test_curve_takes_the_first_maximum_past_a_local_one() -> None:
    # class 1 where the score is above 0.5, a stretch at 0.1 makes a local maximum, thresholds 0.5 and 0.6 tie
    score = np.array([[0.05] * 2 + [0.1] * 1 + [0.3] * 6 + [0.9] * 8])
    truth = np.array([[0] * 2 + [1] * 1 + [0] * 6 + [1] * 8])
    curve = ThresholdCurve(2, [0.0, 0.07, 0.2, 0.5, 0.6])
    curve.add(truth, np.array([0]), score[None])
    mious = curve.mious()
    assert mious[1] > mious[0] and mious[2] < mious[1] and mious[3] == mious[4] > mious[1]
    assert curve.best() == (0.5, mious[3])


def test_curve_without_classes_is_background_and_float16_is_read() -> None:
    truth = np.array([[0, 1, 1, 255]], np.uint8)
    curve = ThresholdCurve(3, [0.2, 0.4])
    curve.add(truth, np.zeros(0, int), np.zeros((0, 1, 4), np.float32))
    for i in range(2):
        np.testing.assert_array_equal(curve.confusion(i).matrix, [[1, 0, 0], [2, 0, 0], [0, 0, 0]])
    curve.add(truth, np.array([0]), np.array([[[0.1, 0.3, 0.5, 0.9]]], np.float16))
    np.testing.assert_array_equal(curve.confusion(0).matrix, [[2, 0, 0], [2, 2, 0], [0, 0, 0]])
    np.testing.assert_array_equal(curve.confusion(-1).matrix, [[2, 0, 0], [3, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(mask_at((np.zeros(0, int), np.zeros((0, 2, 3))), 0.1), np.zeros((2, 3)))


def test_curve_errors() -> None:
    curve, truth, ones = ThresholdCurve(3, [0.1]), np.zeros((2, 2), np.uint8), np.ones((1, 2, 2), np.float32)
    for text, keys, maps, mask in [
        ("outside 0..1 ", [2], ones, truth),
        ("different", [1, 1], np.ones((2, 2, 2)), truth),
        ("different", [-1], ones, truth),
        ("nan", [0], ones * np.nan, truth),
        ("floating", [0], ones.astype(int), truth),
        ("2 x 3 .*2 x 2", [0], np.ones((1, 2, 3)), truth),
        (r"\(K,\)", [0, 1], ones, truth),
        (r"truth holds the values \[3\]", [0], ones, truth + 3),
        (r"truth holds the values \[3\]", [], ones[:0], truth + 3),
    ]:
        with pytest.raises(ValueError, match=text):
            curve.add(mask, np.array(keys, int), maps)
    assert curve.counts.sum() == 0
    for thresholds in ([], [0.2, 0.1], [0.1, 0.1], [0.1, math.nan]):
        with pytest.raises(ValueError, match="ascending"):
            ThresholdCurve(3, thresholds)
    with pytest.raises(ValueError, match="merged"):
        curve.merge(ThresholdCurve(3, [0.2]))


def plain_boundary(mask: np.ndarray, ratio: float) -> np.ndarray:
    """The paper's mask_to_boundary: the mask without its d-fold 3 x 3 erosion; outside of the image is background."""
    d = max(1, int(round(ratio * np.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2))))
    return mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=d, border_value=0)


@pytest.mark.parametrize(("size", "ratio"), [((40, 61), 0.02), ((60, 33), 0.05), ((9, 8), 0.02), ((5, 60), 0.1)])
def test_boundary_iou_is_the_plain_form_of_the_paper(size: tuple[int, int], ratio: float) -> None:
    n, boundary = 4, BoundaryConfusion(4, ratio)
    common, union = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for seed in range(3):
        truth, prediction = random_masks(seed, n, size, block=13)
        prediction = np.where(np.random.default_rng(seed).random(size) < 0.9, np.roll(truth, 1, 1), prediction)
        boundary.add(truth, prediction)
        valid = truth != 255
        for c in range(n):
            t = plain_boundary((truth == c) & valid, ratio)
            p = plain_boundary((prediction == c) & valid, ratio)
            common[c] += (t & p).sum()
            union[c] += (t | p).sum()
    assert boundary.counts.dtype == np.int64
    np.testing.assert_array_equal(boundary.hits, common)
    np.testing.assert_array_equal(boundary.union, union)
    np.testing.assert_allclose(boundary.iou(), common / (union + 1e-10))


def test_boundary_iou_sees_contours_and_forgives_the_ignored_rim() -> None:
    truth = np.zeros((80, 100), np.uint8)
    truth[20:60, 20:70] = 1
    rim = truth.copy()
    rim[18:62, 18:22] = 255
    whatever = np.where(rim == 255, np.random.default_rng(0).integers(0, 2, rim.shape), truth)
    boundary = BoundaryConfusion(2)
    boundary.add(rim, whatever)
    np.testing.assert_allclose(boundary.iou(), 1)
    shifted, area, edge = np.roll(truth, 2, 1), Confusion(2), BoundaryConfusion(2)
    area.add(truth, shifted)
    edge.add(truth, shifted)
    assert edge.iou()[1] < 0.8 < area.iou()[1]


def test_boundary_band_of_a_plain_image_is_its_frame() -> None:
    band = boundary_band(np.zeros((50, 120), np.uint8))  # 0.02 x 130 = 2.6: 3 pixels
    assert band[:3].all() and band[-3:].all() and band[:, :3].all() and band[:, -3:].all()
    assert not band[3:-3, 3:-3].any()
