"""Metrics of masks and maps: streaming 64-bit counts, reduced to scores at the end; threshold curves in one pass.

Everything here works on arrays; misc/score/evaluate.py runs it over a set of images. Masks are (H, W) integers: 0
background, 1..n-1 classes, 255 (IGNORE) void; ``n`` counts the background.

How 255 is treated (stated with every score): in the truth the pixel is ignored; in a prediction it is *no class*, i.e.
a miss (false negative) of the true class and a false positive of none.

Sources: evaluation.md sections 1 and 2; boundary IoU: Cheng et al., "Boundary IoU", CVPR 2021, equation 2; average
precision of single objects: irnet.md section 11.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import cv2
import numpy as np

from misc.image.labels import IGNORE
from misc.score.objects import Instances

VOID_RULE = "no class: a miss (false negative) of the true class, a false positive of none"

Convention = Literal["counting", "nanmean", "ground-truth"]
"""The classes in the mean IoU (evaluation.md sections 1, 2). ``counting``: all; a class that occurs nowhere counts 0
(SEAM, MCTformer, AReAM). ``nanmean``: those in truth or prediction (MCTformer's and AReAM's segmentation, IRNet).
``ground-truth``: those in the truth (deeplab-pytorch)."""

Maps = tuple[np.ndarray, np.ndarray]
"""Class maps of an image: keys (K,) 0-based present classes, maps (K, H, W) float at the size of the truth."""

_C = TypeVar("_C", bound="ClassCounts")


def _labels(name: str, mask: np.ndarray) -> np.ndarray:
    """(H, W) integers in 0..255 as uint8; ValueError for anything else, so that no value can overflow into another."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0 or not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"{name} must be a non-empty (H, W) array of integers, it is {mask.dtype} {mask.shape}")
    if mask.dtype != np.uint8:
        if mask.min() < 0 or mask.max() > IGNORE:
            raise ValueError(f"{name} holds values {mask.min()}..{mask.max()}, a mask has 0..255 with void as 255")
        mask = mask.astype(np.uint8)
    return mask


def _check_values(name: str, occurs: np.ndarray, num_classes: int) -> None:
    """ValueError if a value outside 0..n-1 and 255 ``occurs`` ((256,) counts or booleans)."""
    bad = num_classes + np.flatnonzero(occurs[num_classes:IGNORE])
    if bad.size:
        raise ValueError(
            f"{name} holds the values {bad[:10].tolist()} outside 0..{num_classes - 1} and 255: "
            "give the number of classes of these masks (it counts the background), or masks with these classes"
        )


def _check_size(prediction: np.ndarray, truth: np.ndarray) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction has {prediction.shape[0]} x {prediction.shape[1]} pixels (height x width), truth has "
            f"{truth.shape[0]} x {truth.shape[1]}: make the prediction at the size of the image"
        )


def _joint(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Joint histogram of two checked uint8 masks: (n+1, n+1) int64, the last row and column count 255."""
    index = truth.astype(np.uint16) * 256 + prediction
    joint = np.bincount(index.ravel(), minlength=256 * 256).reshape(256, 256)
    _check_values("truth", joint.any(axis=1), num_classes)
    _check_values("prediction", joint.any(axis=0), num_classes)
    kept = np.r_[:num_classes, IGNORE]
    return joint[np.ix_(kept, kept)].astype(np.int64)


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole in float64, nan where whole is 0."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _nanmean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


class ClassCounts:
    """Pixel counts of (true class, predicted class) and the IoUs that follow; base of the two counters below.

    ``counts``: (n+1, n+1) int64, rows truth, columns prediction; index n is "no class".
    """

    def __init__(self, num_classes_with_background: int) -> None:
        if not 1 <= num_classes_with_background <= IGNORE:
            raise ValueError(f"number of classes (background included) is {num_classes_with_background}, not in 1..255")
        self.num_classes = num_classes_with_background
        self.counts = np.zeros((self.num_classes + 1, self.num_classes + 1), np.int64)

    def merge(self: _C, other: _C) -> _C:
        """Add the counts of ``other`` (from another part of the images); returns self."""
        if type(other) is not type(self) or other.num_classes != self.num_classes:
            raise ValueError("only counts of the same kind and number of classes can be merged")
        self.counts += other.counts
        return self

    @property
    def matrix(self) -> np.ndarray:
        """The confusion matrix proper: (n, n) int64, rows truth, columns prediction."""
        return self.counts[:-1, :-1]

    @property
    def hits(self) -> np.ndarray:
        """TP: (n,) int64, correctly predicted pixels of each class."""
        return self.matrix.diagonal()

    @property
    def truth_pixels(self) -> np.ndarray:
        """T: (n,) int64 true pixels of each class, those predicted as no class included."""
        return self.counts[:-1].sum(axis=1)

    @property
    def predicted_pixels(self) -> np.ndarray:
        """P: (n,) int64 pixels predicted as each class."""
        return self.counts[:, :-1].sum(axis=0)

    @property
    def union(self) -> np.ndarray:
        """T + P - TP: (n,) int64."""
        return self.truth_pixels + self.predicted_pixels - self.hits

    def iou(self, convention: Convention = "counting") -> np.ndarray:
        """IoU of every class, (n,) float64 in [0, 1]; nan where ``convention`` leaves the class out of the mean."""
        if convention == "counting":
            return self.hits / (self.union + 1e-10)  # evaluation.md section 1
        if convention == "nanmean":
            return _divide(self.hits, self.union)
        if convention == "ground-truth":
            return np.where(self.truth_pixels > 0, _divide(self.hits, self.union), np.nan)
        raise ValueError(f"convention is {convention!r}, not one of {get_args(Convention)}")

    def miou(self, convention: Convention = "counting") -> float:
        """Mean IoU in [0, 1]; nan if ``convention`` leaves out every class."""
        return _nanmean(self.iou(convention))


class Confusion(ClassCounts):
    """Streaming confusion matrix of masks (evaluation.md sections 1, 2); 255 as in the text at the top of this file."""

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image: ``truth`` and ``prediction`` (H, W) integers, 0..n-1 or 255.

        Raises ValueError, before anything is counted, for different sizes and for other values.
        """
        truth, prediction = _labels("truth", truth), _labels("prediction", prediction)
        _check_size(prediction, truth)
        self.counts[:-1] += _joint(truth, prediction, self.num_classes)[:-1]

    @property
    def precision(self) -> np.ndarray:
        """TP / (P + 1e-5), (n,) float64: a class never predicted has 0 (evaluation.md section 2)."""
        return self.hits / (self.predicted_pixels + 1e-5)

    @property
    def recall(self) -> np.ndarray:
        """TP / (T + 1e-5), (n,) float64: a class without true pixels has 0 (evaluation.md section 2)."""
        return self.hits / (self.truth_pixels + 1e-5)

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of the counted pixels that are correct; nan without pixels."""
        total = int(self.truth_pixels.sum())
        return int(self.hits.sum()) / total if total else math.nan

    @property
    def class_accuracy(self) -> float:
        """Mean of TP / T over the classes with true pixels."""
        return _nanmean(_divide(self.hits, self.truth_pixels))

    @property
    def frequency_weighted_iou(self) -> float:
        """Mean of the IoUs, weighted by each class's fraction of the true pixels; nan without pixels."""
        total = int(self.truth_pixels.sum())
        return float((self.truth_pixels / total * self.iou("counting")).sum()) if total else math.nan

    @property
    def false_positive(self) -> float:
        """Class mean of (P - TP) / union: over-activation (evaluation.md section 1)."""
        return float(((self.predicted_pixels - self.hits) / (self.union + 1e-10)).mean())

    @property
    def false_negative(self) -> float:
        """Class mean of (T - TP) / union: under-activation (evaluation.md section 1)."""
        return float(((self.truth_pixels - self.hits) / (self.union + 1e-10)).mean())


def boundary_band(labels: np.ndarray, dilation_ratio: float = 0.02) -> np.ndarray:
    """Pixels within d of the contour of their own class: (H, W) bool of uint8 ``labels`` (H, W).

    d = ``dilation_ratio`` x the diagonal, rounded, at least 1. The paper erodes every class's mask d times by a 3 x 3
    square with the outside of the image as background; this removes a pixel exactly if the square of side 2d + 1 around
    it contains another label or leaves the image. So one pass over the label map does it for all classes.
    """
    height, width = labels.shape
    d = max(1, round(dilation_ratio * math.hypot(height, width)))
    square = np.ones((2 * d + 1, 2 * d + 1), np.uint8)
    band = cv2.erode(labels, square) != cv2.dilate(labels, square)
    band[:d] = band[-d:] = True
    band[:, :d] = band[:, -d:] = True
    return band


class BoundaryConfusion(ClassCounts):
    """Boundary IoU: the IoU of the boundary bands of truth and prediction, counts summed over the images of the set.

    Ignored pixels (truth 255) are not counted. They are also set to no class in the prediction before its band is
    computed, so a prediction that is right at all other pixels has boundary IoU 1.
    """

    def __init__(self, num_classes_with_background: int, dilation_ratio: float = 0.02) -> None:
        super().__init__(num_classes_with_background)
        self.dilation_ratio = dilation_ratio

    def merge(self, other: BoundaryConfusion) -> BoundaryConfusion:
        """Add the counts of ``other``, as in the base class; the dilation ratios must be equal too."""
        if getattr(other, "dilation_ratio", None) != self.dilation_ratio:
            raise ValueError("only boundary counts of the same dilation ratio can be merged")
        return super().merge(other)

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image; arguments and errors as for ``Confusion.add``."""
        truth, prediction = _labels("truth", truth), _labels("prediction", prediction)
        _check_size(prediction, truth)
        prediction = np.where(truth == IGNORE, np.uint8(IGNORE), prediction)
        bands = [np.where(boundary_band(m, self.dilation_ratio), m, np.uint8(IGNORE)) for m in (truth, prediction)]
        self.counts += _joint(bands[0], bands[1], self.num_classes)


def _strongest(maps: Maps, num_classes: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The winning class of every pixel, the lower class in a tie.

    Returns keys (K,) ascending, position in them (H, W) uint8, score (H, W). K is at least 1 here.
    """
    keys, stack = np.asarray(maps[0]), np.asarray(maps[1])
    if keys.ndim != 1 or stack.ndim != 3 or len(keys) != len(stack):
        raise ValueError(f"keys {keys.shape} and maps {stack.shape} must be (K,) and (K, H, W)")
    if stack.dtype == np.float16:
        stack = stack.astype(np.float32)
    if stack.dtype not in (np.float32, np.float64) or np.isnan(stack).any():
        raise ValueError(f"maps must be floating point without nan, they are {stack.dtype}: make them anew")
    if len(set(keys.tolist())) != len(keys) or keys.min(initial=0) < 0:
        raise ValueError(f"keys {keys.tolist()} must be different 0-based classes")
    if keys.max(initial=0) >= (IGNORE if num_classes is None else num_classes) - 1:
        raise ValueError(
            f"keys {keys.tolist()} hold a class outside 0..{(num_classes or IGNORE) - 2} (background not counted): "
            "give the number of classes of these maps (it counts the background)"
        )
    order = np.argsort(keys)
    score, position = stack[order[0]], np.zeros(stack.shape[1:], np.uint8)
    for i in range(1, len(order)):
        better = stack[order[i]] > score
        position = np.maximum(position, better * np.uint8(i))
        score = np.maximum(score, stack[order[i]])
    return keys[order], position, score


def mask_at(maps: Maps, threshold: float) -> np.ndarray:
    """The mask that ``maps`` = (keys (K,), maps (K, H, W)) give at one background score: (H, W) uint8.

    Equal to the arg-max over [threshold, maps] in the maps' own precision: a class wins only above the threshold, the
    lower class wins a tie (evaluation.md section 1.2). Absent classes never win. K = 0 gives background.
    """
    if len(maps[0]) == 0:
        return np.zeros(np.shape(maps[1])[1:], np.uint8)
    keys, position, score = _strongest(maps)
    classes = (keys + 1).astype(np.uint8)
    return np.where(score > score.dtype.type(threshold), classes[position], np.uint8(0))


class ThresholdCurve:
    """Confusion matrices of CAMs at many background scores from ONE pass over the images (docs/design.md section 6).

    The strongest class of a pixel does not depend on the background score; only whether it wins does. So pixels are
    counted by (true class, strongest class, number of thresholds below its score). The matrix at a threshold is a sum
    of these counts, exactly that of ``mask_at`` and ``Confusion``, ties included.
    """

    BUCKETS = 256  # of the look-up below: one uint8

    def __init__(self, num_classes_with_background: int, thresholds: Sequence[float]) -> None:
        if not 2 <= num_classes_with_background <= IGNORE:
            raise ValueError(f"number of classes (background included) is {num_classes_with_background}, not in 2..255")
        self.num_classes = num_classes_with_background
        self.thresholds = np.asarray(thresholds, np.float64)
        t = self.thresholds
        if t.ndim != 1 or not t.size or not np.isfinite(t).all() or (np.diff(t) <= 0).any():
            raise ValueError("thresholds must be finite and ascending, at least one")
        self.counts = np.zeros((self.num_classes, self.num_classes - 1, len(t) + 1), np.int64)
        self._tables = {np.dtype(d): self._table(t.astype(d)) for d in (np.float32, np.float64)}

    def _bucket(self, values: np.ndarray, low: np.floating, scale: np.floating) -> np.ndarray:
        """uint8 bucket of each value; monotone in the value, which is all that ``_below`` needs."""
        with np.errstate(over="ignore"):
            return np.clip((values - low) * scale, 0, self.BUCKETS - 1).astype(np.uint8)

    def _table(self, t: np.ndarray) -> tuple[np.floating, np.floating, np.ndarray, np.ndarray]:
        """low, scale, number of thresholds in lower buckets (256,) int32, thresholds in the bucket (c, 256) or inf."""
        span = t[-1] - t[0]
        low, scale = t[0], t.dtype.type((self.BUCKETS - 1) / span if span > 0 else 1)
        bucket = self._bucket(t, low, scale)
        below = np.searchsorted(bucket, np.arange(self.BUCKETS)).astype(np.int32)
        inside = np.full((np.bincount(bucket).max(), self.BUCKETS), np.inf, t.dtype)
        inside[np.arange(len(t)) - below[bucket], bucket] = t
        return low, scale, below, inside

    def _below(self, score: np.ndarray) -> np.ndarray:
        """np.searchsorted(thresholds, score): how many thresholds are below each score, (H, W) int32.

        Several times as fast: thresholds in lower buckets are certainly below, and only those in the score's own bucket
        are compared. Exact: it compares in the score's precision, as the plain arg-max does.
        """
        low, scale, below, inside = self._tables[score.dtype]
        bucket = self._bucket(score, low, scale)
        count = cv2.LUT(bucket, below)
        for edges in inside:
            count += score > cv2.LUT(bucket, edges)
        return count

    def add(self, truth: np.ndarray, keys: np.ndarray, maps: np.ndarray) -> None:
        """Count one image: ``truth`` (H, W) in 0..n-1 or 255, ``keys`` (K,) 0-based classes, ``maps`` (K, H, W).

        Maps are compared in their own precision (float16 as float32). K = 0 is background at every threshold; ``maps``
        is not used then. Raises ValueError, before anything is counted, for sizes, values, classes or nan that don't
        fit.
        """
        truth = _labels("truth", truth)
        if len(keys) == 0:
            pixels = np.bincount(truth.ravel(), minlength=256)
            _check_values("truth", pixels, self.num_classes)
            self.counts[:, 0, 0] += pixels[: self.num_classes]
            return
        keys, position, score = _strongest((keys, maps), self.num_classes)
        _check_size(score, truth)
        bins = self.counts.shape[2]
        index = (truth.astype(np.int32) * len(keys) + position) * bins + self._below(score)  # (H, W)
        found = np.bincount(index.ravel(), minlength=256 * len(keys) * bins).reshape(256, len(keys), bins)
        _check_values("truth", found.any(axis=(1, 2)), self.num_classes)
        self.counts[:, keys] += found[: self.num_classes]

    def merge(self, other: ThresholdCurve) -> ThresholdCurve:
        """Add the counts of ``other`` (from another part of the images); returns self."""
        if other.num_classes != self.num_classes or not np.array_equal(other.thresholds, self.thresholds):
            raise ValueError("only curves of the same classes and thresholds can be merged")
        self.counts += other.counts
        return self

    def confusion(self, i: int) -> Confusion:
        """The confusion matrix at ``thresholds[i]``."""
        i = range(len(self.thresholds))[i]
        result = Confusion(self.num_classes)
        result.counts[:-1, 1:-1] = self.counts[:, :, i + 1 :].sum(axis=2)
        result.counts[:-1, 0] = self.counts[:, :, : i + 1].sum(axis=(1, 2))
        return result

    def mious(self, convention: Convention = "counting") -> np.ndarray:
        """mIoU at every threshold, (T,) float64 in [0, 1]."""
        return np.array([self.confusion(i).miou(convention) for i in range(len(self.thresholds))])

    def best(self, convention: Convention = "counting") -> tuple[float, float]:
        """(threshold, mIoU) of the first maximum over the whole curve (no early stop: evaluation.md section 1.3)."""
        mious = self.mious(convention)
        i = int(np.argmax(mious))
        return float(self.thresholds[i]), float(mious[i])


class InstancePrecision:
    """VOC's average precision of single objects by mask IoU, at several IoUs (irnet.md section 11).

    A detection matches the true object of its class that it overlaps most, if that IoU is reached; a second detection
    of the same object is a false positive. Area under the monotone envelope, not the 11 points of VOC 2007.
    """

    def __init__(self, num_classes: int, ious: Sequence[float] = (0.5, 0.7)) -> None:
        """num_classes: number of foreground classes."""
        self.num_classes = num_classes
        self.ious = tuple(ious)
        self.objects = np.zeros(num_classes, np.int64)
        """Number of true objects of each class."""
        self._found: dict[int, list[tuple[float, tuple[bool, ...]]]] = defaultdict(list)

    def add(self, truth: Instances, found: Instances) -> None:
        """Count one image. Raises ValueError, before anything is counted, for different sizes and unknown classes."""
        if len(truth.masks) and len(found.masks):
            _check_size(found.masks[0], truth.masks[0])
        for name, instances in (("truth", truth), ("prediction", found)):
            strange = [c for c in instances.classes.tolist() if not 0 <= c < self.num_classes]
            if strange:
                raise ValueError(f"an object of the {name} has the class {strange[0]} of 0..{self.num_classes - 1}")
        self.objects += np.bincount(truth.classes, minlength=self.num_classes)
        for label in np.unique(found.classes).tolist():
            self._found[label] += self._match(truth.masks[truth.classes == label], found, label)

    def _match(self, objects: np.ndarray, found: Instances, label: int) -> list[tuple[float, tuple[bool, ...]]]:
        """Scores of a class's detections, highest first, and whether each is a hit at each IoU."""
        chosen = np.flatnonzero(found.classes == label)
        chosen = chosen[np.argsort(found.scores[chosen], kind="stable")[::-1]]
        scores = found.scores[chosen].tolist()
        if not len(objects):
            return [(score, (False,) * len(self.ious)) for score in scores]
        a = found.masks[chosen].reshape(len(chosen), -1).astype(np.float32)  # (R, N)
        b = objects.reshape(len(objects), -1).astype(np.float32)  # (T, N)
        both = a @ b.T  # (R, T) pixels, exact up to 2^24
        iou = both / np.maximum(a.sum(1)[:, None] + b.sum(1) - both, 1)
        nearest = iou.argmax(axis=1)
        taken: list[set[int]] = [set() for _ in self.ious]
        result = []
        for row, (score, at) in enumerate(zip(scores, nearest.tolist(), strict=True)):
            hits = tuple(
                bool(iou[row, at] >= least) and at not in used for least, used in zip(self.ious, taken, strict=True)
            )
            for least, used in zip(self.ious, taken, strict=True):
                if iou[row, at] >= least:
                    used.add(at)
            result.append((score, hits))
        return result

    def merge(self, other: InstancePrecision) -> InstancePrecision:
        """Add the detections of ``other`` (from another part of the images); returns self."""
        if (other.num_classes, other.ious) != (self.num_classes, self.ious):
            raise ValueError("only precisions of the same classes and IoUs can be merged")
        self.objects += other.objects
        for label, found in other._found.items():
            self._found[label] += found
        return self

    def average_precision(self, at: int = 0) -> np.ndarray:
        """Average precision of every class at ``ious[at]``: (C,) float64 in [0, 1], nan for classes without true
        objects."""
        return np.array([self._area(label, at) for label in range(self.num_classes)])

    def _area(self, label: int, at: int) -> float:
        if not self.objects[label]:
            return math.nan
        found = self._found.get(label, [])
        order = np.argsort([score for score, _ in found], kind="stable")[::-1]
        hits = np.array([found[i][1][at] for i in order], np.int64)
        right = hits.cumsum()
        precision = np.concatenate([[0], right / np.arange(1, len(hits) + 1), [0]])
        recall = np.concatenate([[0], right / self.objects[label], [1]])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        return float((np.diff(recall) * envelope[1:]).sum())

    def mean(self, at: int = 0) -> float:
        """Mean over the classes with true objects; nan if there are none."""
        return _nanmean(self.average_precision(at))
