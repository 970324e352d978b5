"""Boxes from localisation maps, and their scores: Top-1, Top-5, GT-Known, MaxBoxAcc, PxAP (wsol.md 6 to 8).

Plain arrays. Maps, boxes and true boxes lie on one square grid of ``side`` pixels; a box is [x0, y0, x1, y1]. Two
published protocols stand side by side, with their small differences: TS-CAM's (a fixed threshold; a box may end one
past the last pixel) and wsolevaluation's (all thresholds; boxes end at the last pixel).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

IOUS = (0.3, 0.5, 0.7)
"""IoU thresholds of MaxBoxAccV2; MaxBoxAcc uses the middle one."""
_BEST = 5

ERRORS = ("right", "class", "several", "part", "more", "wrong")
"""Kinds of a top-1 box (wsol.md section 7): correct; wrong class; contains several true objects; part of the object;
more than the object; elsewhere."""


def stretch_map(scores: np.ndarray) -> np.ndarray:
    """(H, W) -> the same shape, scaled from minimum and maximum to 0 and 1; a constant map or one with NaN becomes 0.

    (Published: for a constant map TS-CAM gives NaN, wsolevaluation zeros; wsol.md sections 6 and 8.)
    """
    scores = scores - scores.min()
    top = scores.max()
    return scores / top if top > 0 else np.zeros_like(scores)  # NaN is not above 0 either


def resize_map(scores: np.ndarray, side: int, kind: Literal["bilinear", "bicubic"] = "bilinear") -> np.ndarray:
    """Resize a map (h, w) to the grid, then ``stretch_map``: (side, side) of the same type."""
    interpolation = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}[kind]
    return stretch_map(cv2.resize(scores, (side, side), interpolation=interpolation))


def to_levels(scores: np.ndarray) -> np.ndarray:
    """Scores (H, W) in [0, 1] -> uint8 0 .. 255, truncated."""
    return (scores * 255).astype(np.uint8)


def contour_boxes(grey: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounding rectangles of all contours, outer and inner, of the pixels above a fraction of the maximum.

    Args:
        grey: (H, W) uint8.
        threshold: foreground is what is greater than int(threshold * maximum).

    Returns:
        boxes (n, 4) int64 with x1 = x + w and y1 = y + h, one past the last pixel; areas (n,) of the contours'
        polygons, which are not pixel counts. n may be 0.
    """
    foreground = (grey > int(threshold * grey.max())).astype(np.uint8)
    contours = cv2.findContours(foreground, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[-2]  # OpenCV 3 returns three
    rectangles = np.array([cv2.boundingRect(c) for c in contours], np.int64).reshape(-1, 4)  # x, y, w, h
    boxes = np.concatenate([rectangles[:, :2], rectangles[:, :2] + rectangles[:, 2:]], 1)
    return boxes, np.array([cv2.contourArea(c) for c in contours])


def fixed_box(scores: np.ndarray, threshold: float) -> np.ndarray:
    """TS-CAM's box of a map (side, side) in [0, 1]: (4,) int64, of the contour with the largest area, the first one in
    a tie; [0, 0, 1, 1] if there is no contour."""
    boxes, areas = contour_boxes(to_levels(scores), threshold)
    return boxes[areas.argmax()] if len(boxes) else np.array([0, 0, 1, 1])


def all_boxes(grey: np.ndarray, threshold: float) -> tuple[np.ndarray, int]:
    """wsolevaluation's boxes of an 8-bit map: (n, 4) int64, which end at the last pixel, and the index of the one with
    the largest contour. A single [0, 0, 0, 0] if there is no contour."""
    boxes, areas = contour_boxes(grey, threshold)
    if not len(boxes):
        return np.zeros((1, 4), np.int64), 0
    height, width = grey.shape
    return np.minimum(boxes, [width, height, width - 1, height - 1]), int(areas.argmax())


def scaled_boxes(boxes: np.ndarray, size: tuple[int, int], side: int, clip: bool) -> np.ndarray:
    """True boxes in image pixels on the grid: (n, 4) of an image of ``size`` (H, W) -> (n, 4) int64, truncated.

    ``clip``: clip to 0 .. side - 1 (TS-CAM: wsol.md section 4); else unchanged (wsolevaluation: section 8).
    """
    extent = np.array([size[1], size[0]] * 2, np.float64)
    if not clip:
        return (boxes * side / extent).astype(np.int64)
    scaled = boxes / extent * side
    return np.concatenate([np.maximum(scaled[:, :2], 0), np.minimum(scaled[:, 2:], side - 1)], 1).astype(np.int64)


def box_overlaps(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intersections and areas in pixels, last pixel included: (n, 4), (m, 4) -> (n, m), (n, 1), (1, m)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    inside = (high - low + 1).clip(min=0).prod(2)  # (n, m)
    area, other = ((b[:, 2:] - b[:, :2] + 1).prod(1) for b in (boxes, others))
    return inside, area[:, None], other[None]


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair: (n, 4), (m, 4) -> (n, m) float64."""
    inside, area, other = box_overlaps(boxes, others)
    return inside / (area + other - inside)


# ------------------------------------------------------------------------------------- a fixed threshold (section 7)


@dataclass(frozen=True)
class Verdict:
    """The scores of one image, each 0 or 1 (``iou`` in [0, 1])."""

    cls_top1: bool
    """The class of the highest logit is the true one."""
    cls_top5: bool
    """The true class is among the five highest logits."""
    loc_top1: bool
    """cls_top1, and the box of that class's map overlaps a true box by more than half."""
    loc_top5: bool
    """The same for any of the five highest classes, each with the box of its own map."""
    gt_known: bool
    """The box of the true class's map overlaps a true box by half or more (here ≥, above >: published)."""
    iou: float
    """Best overlap (IoU) of that box with a true box."""
    error: str
    """Kind of the top-1 box, one of ERRORS."""


def best_classes(logits: np.ndarray) -> np.ndarray:
    """The five classes (or all, if there are fewer) with the highest of the (C,) logits, highest first."""
    return np.argsort(-logits, kind="stable")[:_BEST]


def judge_boxes(best: np.ndarray, boxes: np.ndarray, known: np.ndarray, target: int, truth: np.ndarray) -> Verdict:
    """Compare the boxes of an image with the truth.

    Args:
        best: (k,) ``best_classes``. boxes: (k, 4) the boxes of their maps.
        known: (4,) the box of the true class's map.
        target: the true class. truth: (n, 4) true boxes, n ≥ 1.
    """
    overlap = box_iou(boxes, truth).max(1)  # (k,)
    hit = (best == target) & (overlap > 0.5)
    at_target = float(box_iou(known[None], truth).max())
    return Verdict(
        cls_top1=bool(best[0] == target), cls_top5=bool((best == target).any()),
        loc_top1=bool(hit[0]), loc_top5=bool(hit.any()), gt_known=at_target >= 0.5, iou=at_target,
        error=_error(bool(best[0] == target), boxes[:1], truth),
    )  # fmt: skip


def _error(right_class: bool, box: np.ndarray, truth: np.ndarray) -> str:
    """Kind of a top-1 box (1, 4); the order of the tests matters."""
    if not right_class:
        return "class"
    inside, area, others = box_overlaps(box, truth)
    share = (inside / (area + others - inside))[0]
    best = share.argmax()
    covered = (inside / others)[0]  # (n,) of the true boxes
    if share[best] > 0.5:
        return "right"
    if (covered > 0.3).sum() > 1:
        return "several"
    if inside[0, best] / area[0, 0] > 0.5:
        return "part"
    return "more" if covered[best] >= 0.7 else "wrong"


# ------------------------------------------------------------------------------------- all thresholds (section 8)


def list_thresholds(interval: float) -> np.ndarray:
    """Thresholds from 0, included, to 1, excluded: (T,)."""
    return np.arange(0, 1, interval)


def best_overlaps(scores: np.ndarray, taus: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Best IoU of an image's boxes with its true boxes at each threshold.

    Args:
        scores: (side, side) in [0, 1], the map of the true class.
        taus: (T,).
        truth: (n, 4).

    Returns:
        (2, T) float64: for the largest contour only, and for all contours.
    """
    grey = to_levels(scores)
    known: dict[int, tuple[float, float]] = {}  # many thresholds give the same 8-bit level
    columns = []
    for tau in taus:
        level = int(tau * grey.max())
        if level not in known:
            boxes, largest = all_boxes(grey, float(tau))
            share = box_iou(boxes, truth).max(1)  # (n,)
            known[level] = float(share[largest]), float(share.max())
        columns.append(known[level])
    return np.array(columns).T


def box_accuracy(overlap: np.ndarray) -> np.ndarray:
    """Percentage of correct images: best overlaps (N, T) at each threshold -> (3, T), one row per entry of IOUS."""
    return 100 * np.stack([(overlap >= least).mean(0) for least in IOUS])


def max_box_acc(overlap: np.ndarray, taus: np.ndarray) -> tuple[float, float]:
    """MaxBoxAcc in percent from the overlaps (N, T) of the largest contours, and the first threshold that gives it."""
    curve = box_accuracy(overlap)[IOUS.index(0.5)]
    return float(curve.max()), float(taus[curve.argmax()])


def max_box_acc_v2(overlap: np.ndarray) -> float:
    """MaxBoxAccV2 in percent from the overlaps (N, T) of all contours; each entry of IOUS has its own best
    threshold."""
    return float(box_accuracy(overlap).max(1).mean())


def region_on_grid(region: np.ndarray, side: int) -> np.ndarray:
    """The object's mask resized to the grid: (H, W) uint8 -> (side, side), nearest."""
    return cv2.resize(region, (side, side), interpolation=cv2.INTER_NEAREST)


def region_histograms(scores: np.ndarray, region: np.ndarray, taus: np.ndarray) -> np.ndarray:
    """Histograms of the scores of object and background pixels: (2, T + 2) int64.

    Args:
        scores: (side, side) in [0, 1].
        region: (side, side) uint8: 1 object, 0 background, 255 ignored.
        taus: (T,); the bins go from each to the next, then from the last to 1, 1 to 2, 2 to 3.
    """
    edges = [*taus, 1.0, 2.0, 3.0]
    return np.stack([np.histogram(scores[region == kind], edges)[0] for kind in (1, 0)])


def pxap(histograms: np.ndarray) -> float:
    """PxAP in percent from ``region_histograms`` (2, T + 2) summed over all images. NaN without object pixels."""
    hits, misses = (h[::-1].cumsum() for h in histograms.astype(np.float64))
    if not hits[-1]:
        return float("nan")
    found = hits + misses
    precision = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
    return float(100 * (precision[1:] * np.diff(hits / hits[-1])).sum())


# ------------------------------------------------------------------------------------- a set of images


def summarise_verdicts(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Means over images in percent, under their published names."""
    names = {
        "Cls Top-1": "cls_top1", "Cls Top-5": "cls_top5", "Loc Top-1": "loc_top1", "Loc Top-5": "loc_top5",
        "GT-Known": "gt_known",
    }  # fmt: skip
    return {name: 100 * float(np.mean([getattr(v, key) for v in verdicts])) for name, key in names.items()}


def error_shares(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Fraction of each kind of ERRORS among the top-1 boxes, in percent."""
    kinds = [v.error for v in verdicts]
    return {kind: 100 * kinds.count(kind) / len(kinds) for kind in ERRORS}
