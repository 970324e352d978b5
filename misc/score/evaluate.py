"""Scores a set of images with misc/score/metrics.py; used by the steps and by ``evaluation.py``.

Images come from callables, id -> array, so nothing here depends on where masks and maps are stored. All images are
checked before problems are reported, and a set with a problem gets no score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from misc.image.labels import holds_only_ignored
from misc.loop.pool import in_workers
from misc.loop.progress import Progress
from misc.score.erosion import ErodedCurve, erode
from misc.score.metrics import (
    VOID_RULE,
    BoundaryConfusion,
    Confusion,
    Convention,
    InstancePrecision,
    Maps,
    ThresholdCurve,
    mask_at,
)
from misc.score.objects import Instances


class EvaluationError(ValueError):
    """Some images could not be scored, so there is no score. ``problems``: (id, cause and remedy), in list order."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        lines = [f"{name}: {text}" for name, text in problems[:10]]
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        super().__init__("\n".join([f"{len(problems)} images can't be scored:", *lines, *more]))


@dataclass
class Scores:
    """Result of ``evaluate_masks`` and ``evaluate_cams``."""

    confusion: Confusion
    """Pixel counts of the masks; for a curve those at its best threshold."""
    boundary: BoundaryConfusion | None
    """Pixel counts of the boundary bands of the same masks, if requested."""
    images: int
    """Number of images counted."""
    threshold: float | None = None
    """Background score of the maps; None for masks."""
    curve: ThresholdCurve | None = None
    """The threshold curve, if ``threshold`` was searched on these images; None if it was given, and for masks."""
    erosion: int = 0
    """Side of the square that eroded the masks cut from the maps; 0: no erosion."""
    only_ignored: int = 0
    """Images whose true mask holds 0 and 255 only: nothing of them but background is scored."""

    def to_dict(self, names: Sequence[str], split: str, convention: Convention = "counting") -> dict[str, Any]:
        """All scores and their provenance, for JSON: scores in PERCENT, undefined ones None.

        ``names`` (n,) of the classes, background first; ``split`` names the images (a searched threshold says so).
        """
        confusion, boundary = self.confusion, self.boundary
        columns = {"iou": confusion.iou(convention), "precision": confusion.precision, "recall": confusion.recall}
        means = {
            "miou": confusion.miou(convention),
            "mean_precision": confusion.precision.mean(),
            "mean_recall": confusion.recall.mean(),
            "pixel_accuracy": confusion.pixel_accuracy,
            "class_accuracy": confusion.class_accuracy,
            "frequency_weighted_iou": confusion.frequency_weighted_iou,
            "false_positive": confusion.false_positive,
            "false_negative": confusion.false_negative,
        }
        if boundary is not None:
            columns["boundary_iou"] = boundary.iou(convention)
            means["boundary_miou"] = boundary.miou(convention)
        chosen = "fixed" if self.curve is None else f"searched on {split}"
        result: dict[str, Any] = {
            "images": self.images,
            "split": split,
            "threshold": self.threshold,
            "threshold_choice": None if self.threshold is None else chosen,
            "erosion": self.erosion,
            "void_predictions": VOID_RULE,
            "truths_of_0_and_255": self.only_ignored,
            "convention": convention,
            "unit": "percent",
            **{key: _percent(value) for key, value in means.items()},
            "classes": [
                {"index": i, "name": name, **{key: _percent(column[i]) for key, column in columns.items()}}
                for i, (name, _) in enumerate(zip(names, columns["iou"], strict=True))
            ],
            "confusion": confusion.matrix.tolist(),
            "predicted_void": confusion.counts[:-1, -1].tolist(),
        }
        if self.curve is not None:
            curve = zip(self.curve.thresholds.tolist(), self.curve.mious(convention), strict=True)
            result["curve"] = [{"threshold": t, "miou": _percent(value)} for t, value in curve]
        return result


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else 100 * float(value)


@dataclass(frozen=True)
class _Job:
    """The work of one process; all its parts are picklable."""

    read: Callable[[str], tuple[np.ndarray, ...]]
    """id -> arguments of the counters' ``add``."""
    counters: Callable[[], list[Any]]
    """() -> empty counters."""

    def count(self, ids: Sequence[str]) -> tuple[list[Any], list[tuple[str, str]]]:
        """Counters over ``ids``, and (id, text) of every image that has a problem."""
        counters, problems = self.counters(), []
        for name in ids:
            try:
                arguments = self.read(name)
                for counter in counters:
                    counter.add(*arguments)
            except (ValueError, OSError) as error:
                problems.append((name, str(error)))
        return counters, problems

    def count_all(self, ids: Sequence[str], workers: int, progress: bool) -> list[Any]:
        """Merged counters over all ``ids``; raises EvaluationError if any of them had a problem."""
        if not ids:
            raise ValueError("no images to evaluate")
        size = max(1, min(32, len(ids) // (4 * max(1, workers))))
        chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
        total, problems = self.counters(), []
        with ExitStack() as stack:
            counted: Iterator[Any]
            if workers > 1:  # spawned, not forked: safe beside threads and accelerators
                outcomes = stack.enter_context(closing(in_workers(self.count, chunks, workers, "spawn")))
                counted = (outcome.result() for outcome in outcomes)
            else:
                counted = map(self.count, chunks)
            hidden = None if progress else True  # None: shown on terminals only
            bar = stack.enter_context(Progress(total=len(ids), unit="image", disable=hidden))
            for chunk, (counters, faults) in zip(chunks, counted, strict=True):
                total = [a.merge(b) for a, b in zip(total, counters, strict=True)]
                problems += faults
                bar.update(len(chunk))
        if problems:
            raise EvaluationError(problems)
        return total


def _read_mask(predict: Callable[[str], np.ndarray | None], truth: Callable[[str], np.ndarray], name: str):
    expected, mask = truth(name), predict(name)
    return expected, np.zeros_like(expected) if mask is None else mask


def _read_maps(cams: Callable[[str], Maps | None], truth: Callable[[str], np.ndarray], name: str):
    expected, maps = truth(name), cams(name)
    return expected, *(((), ()) if maps is None else maps)


def _cut(cams: Callable[[str], Maps | None], threshold: float, erosion: int, name: str) -> np.ndarray | None:
    maps = cams(name)
    if maps is None:
        return None
    return erode(mask_at(maps, threshold), erosion) if erosion else mask_at(maps, threshold)


class _OnlyIgnored:
    """Counts the true masks, and the predicted ones, that hold 0 and 255 only: often an object drawn as 255."""

    def __init__(self) -> None:
        self.images = self.truths = self.predictions = 0

    def add(self, truth: np.ndarray, *prediction: np.ndarray) -> None:
        """One image: its masks, or its true mask, keys and maps."""
        self.images += 1
        self.truths += holds_only_ignored(truth)
        self.predictions += len(prediction) == 1 and holds_only_ignored(prediction[0])

    def merge(self, other: _OnlyIgnored) -> _OnlyIgnored:
        """The counts of both."""
        total = _OnlyIgnored()
        total.images, total.truths = self.images + other.images, self.truths + other.truths
        total.predictions = self.predictions + other.predictions
        return total

    def check(self, shown: np.ndarray) -> None:
        """ValueError where no class is drawn at all; ``shown`` (n, n) pixels, rows: true class, columns: predicted."""
        for what, count, drawn in (
            ("true masks", self.truths, shown[1:].sum()), ("predicted masks", self.predictions, shown[:, 1:].sum()),
        ):  # fmt: skip
            if count and not drawn:
                raise ValueError(
                    f"no class is in the {what}: {count} of {self.images} hold only the values 0 and 255, and "
                    f"255 means "
                    "not scored. If 255 is the object, write its class (1 for the first) instead."
                )


def _mask_counters(num_classes: int, boundary: bool) -> list[Any]:
    return [Confusion(num_classes), _OnlyIgnored()] + ([BoundaryConfusion(num_classes)] if boundary else [])


def _curve_counters(num_classes: int, thresholds: tuple[float, ...], erosion: int) -> list[Any]:
    curve = ErodedCurve(num_classes, thresholds, erosion) if erosion else ThresholdCurve(num_classes, thresholds)
    return [curve, _OnlyIgnored()]


def evaluate_masks(
    ids: Sequence[str],
    predict: Callable[[str], np.ndarray | None],
    truth: Callable[[str], np.ndarray],
    num_classes: int,
    *,
    boundary: bool = True,
    workers: int = 1,
    progress: bool = True,
) -> Scores:
    """Score masks.

    ``predict(id)`` and ``truth(id)`` give (H, W) integers, 0..n-1 or 255; a prediction None counts as background
    everywhere. ``num_classes`` n counts the background. ``workers`` > 1: that many processes, the callables must
    pickle. Raises EvaluationError after all images were checked; it names those that can't be read or don't fit.
    """
    job = _Job(partial(_read_mask, predict, truth), partial(_mask_counters, num_classes, boundary))
    confusion, ignored, *rest = job.count_all(ids, workers, progress)
    ignored.check(confusion.matrix)
    return Scores(confusion, rest[0] if rest else None, len(ids), only_ignored=ignored.truths)


def evaluate_cams(
    ids: Sequence[str],
    cams: Callable[[str], Maps | None],
    truth: Callable[[str], np.ndarray],
    num_classes: int,
    thresholds: Sequence[float],
    *,
    convention: Convention = "counting",
    erosion: int = 0,
    boundary: bool = True,
    workers: int = 1,
    progress: bool = True,
) -> Scores:
    """Score class maps at a given background score, or at the one of several with the best mIoU on these images.

    ``cams(id)`` gives (keys (K,) 0-based classes, maps (K, H, W)), or None for background everywhere. One threshold is
    *fixed*. Several are *searched* and give a curve in one pass; ``boundary`` then takes a second pass, at the best
    one. ``erosion``: every region of the cut maps is eroded by a square of this odd side (published for SemFormer's
    CAMs: 7, semformer.md section 10), which makes one mask per threshold and image; 0: none. Other arguments and errors
    as for ``evaluate_masks``.
    """
    curve, best = None, float(thresholds[0])
    if len(thresholds) > 1:
        job = _Job(partial(_read_maps, cams, truth), partial(_curve_counters, num_classes, tuple(thresholds), erosion))
        curve, ignored = job.count_all(ids, workers, progress)
        best, _ = curve.best(convention)
        if not boundary:
            at = curve.thresholds.tolist().index(best)
            ignored.check(curve.confusion(at).matrix)
            return Scores(curve.confusion(at), None, len(ids), best, curve, erosion, ignored.truths)
    cut = partial(_cut, cams, best, erosion)
    scores = evaluate_masks(ids, cut, truth, num_classes, boundary=boundary, workers=workers, progress=progress)
    return replace(scores, threshold=best, curve=curve, erosion=erosion)


@dataclass
class InstanceScores:
    """Result of ``evaluate_instances``."""

    precision: InstancePrecision
    """Detections matched with true objects."""
    images: int
    """Number of images counted."""

    def to_dict(self, names: Sequence[str], split: str) -> dict[str, Any]:
        """Scores in PERCENT for JSON, undefined ones None: ap50 (and one for each further IoU) as the mean over classes
        and per class. ``names`` (C,) of the foreground classes; ``split`` names the images."""
        keys = [f"ap{round(100 * iou)}" for iou in self.precision.ious]
        columns = {key: self.precision.average_precision(at) for at, key in enumerate(keys)}
        return {
            "images": self.images,
            "split": split,
            "threshold": None,
            "threshold_choice": None,
            "unit": "percent",
            **{key: _percent(self.precision.mean(at)) for at, key in enumerate(keys)},
            "objects": int(self.precision.objects.sum()),
            "classes": [
                {"index": i + 1, "name": name, **{key: _percent(column[i]) for key, column in columns.items()}}
                for i, name in enumerate(names)
            ],
        }


def _read_instances(predict: Callable[[str], Instances], truth: Callable[[str], Instances], name: str):
    return truth(name), predict(name)


def evaluate_instances(
    ids: Sequence[str],
    predict: Callable[[str], Instances],
    truth: Callable[[str], Instances],
    num_classes: int,
    *,
    workers: int = 1,
    progress: bool = True,
) -> InstanceScores:
    """Score single objects by VOC's average precision at mask IoU 0.5 and 0.7 (irnet.md section 11).

    ``predict(id)`` and ``truth(id)`` give an image's objects; ``num_classes`` does not count the background. Other
    arguments and errors as for ``evaluate_masks``.
    """
    job = _Job(partial(_read_instances, predict, truth), partial(_instance_counters, num_classes))
    (precision,) = job.count_all(ids, workers, progress)
    return InstanceScores(precision, len(ids))


def _instance_counters(num_classes: int) -> list[Any]:
    return [InstancePrecision(num_classes)]
