"""Boxes from maps and their metrics, on maps and boxes whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from misc.score import wsol

SIDE = 40


def bright(*rectangles: tuple[int, int, int, int, float]) -> np.ndarray:
    """A map, 0 but for rectangles (x0, y0, x1, y1, value), ends outside."""
    scores = np.zeros((SIDE, SIDE), np.float32)
    for x0, y0, x1, y1, value in rectangles:
        scores[y0:y1, x0:x1] = value
    return scores


def test_the_box_is_that_of_the_largest_contour_above_the_threshold() -> None:
    scores = bright((3, 5, 20, 11, 0.3), (30, 30, 36, 37, 1.0))
    assert wsol.fixed_box(scores, 0.2).tolist() == [3, 5, 20, 11]
    assert wsol.fixed_box(scores, 0.5).tolist() == [30, 30, 36, 37]
    # a ring is as large as its outline
    ring = bright((2, 2, 14, 14, 1.0), (4, 4, 12, 12, 0.0), (20, 20, 31, 31, 1.0))
    assert wsol.fixed_box(ring, 0.1).tolist() == [2, 2, 14, 14]


def test_the_two_protocols_end_a_box_at_the_border_differently() -> None:
    scores = bright((10, 20, SIDE, SIDE, 1.0))
    assert wsol.fixed_box(scores, 0.1).tolist() == [10, 20, SIDE, SIDE]
    boxes, largest = wsol.all_boxes(wsol.to_levels(scores), 0.1)
    assert boxes.tolist() == [[10, 20, SIDE - 1, SIDE - 1]] and largest == 0


def test_a_map_without_a_contour_has_the_published_boxes() -> None:
    nothing = wsol.stretch_map(np.full((SIDE, SIDE), 3.0))
    assert not nothing.any()
    assert wsol.fixed_box(nothing, 0.1).tolist() == [0, 0, 1, 1]
    assert wsol.all_boxes(wsol.to_levels(nothing), 0.1)[0].tolist() == [[0, 0, 0, 0]]
    assert not wsol.stretch_map(np.full((3, 3), np.nan)).any()


def test_the_threshold_is_relative_to_the_maximum_and_strict() -> None:
    grey = np.zeros((SIDE, SIDE), np.uint8)
    grey[5:10, 5:10], grey[5:10, 20:30] = 100, 50
    assert len(wsol.contour_boxes(grey, 0.49)[0]) == 2
    assert len(wsol.contour_boxes(grey, 0.5)[0]) == 1  # 50 is not above int(0.5 * 100)


def test_overlap_counts_both_ends_of_a_box() -> None:
    box = np.array([[0, 0, 9, 9]])
    others = np.array([[0, 0, 9, 9], [5, 0, 14, 9], [10, 0, 19, 9], [40, 40, 50, 50]])
    assert wsol.box_iou(box, others)[0] == pytest.approx([1, 1 / 3, 0, 0])


def test_true_boxes_come_to_the_grid() -> None:
    box = np.array([[-2, 10, 508, 410]])
    assert wsol.scaled_boxes(box, (375, 500), 224, clip=True).tolist() == [[0, 5, 223, 223]]
    assert wsol.scaled_boxes(box, (375, 500), 224, clip=False).tolist() == [[0, 5, 227, 244]]


@pytest.mark.parametrize(
    "best, boxes, flags",
    [
        ([1, 2], [[0, 0, 19, 19], [0, 0, 39, 39]], (1, 1, 1, 1)),  # all right
        ([1, 2], [[20, 20, 39, 39], [0, 0, 19, 19]], (1, 1, 0, 0)),  # the right class, elsewhere
        ([2, 1], [[0, 0, 19, 19], [0, 0, 19, 19]], (0, 1, 0, 1)),  # second best
        ([2, 0], [[0, 0, 19, 19], [0, 0, 19, 19]], (0, 0, 0, 0)),  # a good box of a wrong class counts nothing
    ],
)
def test_top1_and_top5_need_class_and_box(best: list[int], boxes: list[list[int]], flags: tuple[int, ...]) -> None:
    truth = np.array([[0, 0, 19, 19]])
    verdict = wsol.judge_boxes(np.array(best), np.array(boxes), truth[0], 1, truth)
    assert (verdict.cls_top1, verdict.cls_top5, verdict.loc_top1, verdict.loc_top5) == flags
    assert verdict.gt_known and verdict.iou == 1


def test_half_an_overlap_is_enough_for_gt_known_only() -> None:
    truth, half = np.array([[0, 0, 19, 19]]), np.array([[0, 0, 19, 9]])
    verdict = wsol.judge_boxes(np.array([1]), half, half[0], 1, truth)
    assert verdict.iou == 0.5 and verdict.gt_known and not verdict.loc_top1


@pytest.mark.parametrize(
    "box, truth, kind",
    [
        ([0, 0, 19, 19], [[0, 0, 19, 19]], "right"),
        ([5, 5, 10, 10], [[0, 0, 19, 19]], "part"),
        ([0, 0, 39, 39], [[0, 0, 19, 19]], "more"),
        ([20, 20, 39, 39], [[0, 0, 19, 19]], "wrong"),
        ([0, 0, 39, 39], [[0, 0, 9, 39], [30, 0, 39, 39]], "several"),
    ],
)
def test_kinds_of_errors(box: list[int], truth: list[list[int]], kind: str) -> None:
    found = np.array([box])
    assert wsol.judge_boxes(np.array([1]), found, found[0], 1, np.array(truth)).error == kind
    assert wsol.judge_boxes(np.array([0]), found, found[0], 1, np.array(truth)).error == "class"


def test_the_best_classes_come_in_order_and_ties_by_number() -> None:
    assert wsol.best_classes(np.array([1, 5, 5, 0, 2, 9, 3.0])).tolist() == [5, 1, 2, 6, 4]
    assert wsol.best_classes(np.array([1.0, 2])).tolist() == [1, 0]


def test_each_overlap_has_its_own_threshold_in_v2_and_all_contours_count() -> None:
    # the object is the smaller bright part: only all contours find it; its box is right above 0.3 alone
    scores = bright((0, 0, 40, 12, 0.3), (5, 20, 15, 30, 1.0), (5, 20, 15, 40, 0.3), (5, 20, 15, 30, 1.0))
    truth, taus = np.array([[5, 20, 14, 29]]), wsol.list_thresholds(0.1)
    single, multi = wsol.best_overlaps(scores, taus, truth)
    assert single[1] < 0.1 and multi[1] == pytest.approx(11 * 11 / (11 * 21) * 100 / 121, rel=0.1)
    assert single[5] == multi[5] == pytest.approx(100 / 121)  # boxes end one later than the truth
    score, at = wsol.max_box_acc(single[None], taus)
    assert score == 100 and at == pytest.approx(0.3)
    overlap = np.array([[0.4, 0.6], [0.8, 0.2]])  # images x thresholds
    assert wsol.max_box_acc(overlap, taus)[0] == 50
    assert wsol.max_box_acc_v2(overlap) == pytest.approx((100 + 50 + 50) / 3)


def test_pxap_of_a_perfect_and_of_a_blind_map() -> None:
    region = np.zeros((SIDE, SIDE), np.uint8)
    region[:, :10], region[:, 10:12] = 1, 255
    taus = wsol.list_thresholds(0.05)
    perfect = (region == 1).astype(np.float64)
    perfect[:, 10:12] = 1  # not counted
    assert wsol.pxap(wsol.region_histograms(perfect, region, taus)) == pytest.approx(100)
    blind = np.full((SIDE, SIDE), 0.3)
    assert wsol.pxap(wsol.region_histograms(blind, region, taus)) == pytest.approx(100 * 10 / 38)
    assert np.isnan(wsol.pxap(np.zeros((2, 5))))
    assert wsol.region_histograms(perfect, region, taus).sum() == SIDE * 38
