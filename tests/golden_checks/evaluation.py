"""Golden cases of the evaluator: ``evaluation`` and ``metrics_confusion`` (evaluation.md sections 1 and 2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from misc.score.evaluate import evaluate_cams, evaluate_masks
from misc.score.metrics import Confusion, ThresholdCurve


def _num_classes(case: Any) -> int:
    """From "constructor": "21 classes"."""
    return int(case.meta["constructor"].split()[0])


def check_evaluation(case: Any) -> None:
    """Curve of CAMs, one threshold of it, and masks; scores in percent."""
    n, classes = _num_classes(case), case.meta["input"]["classes"]
    ids = [str(i) for i in range(case.meta["input"]["images"])]

    def truth(name: str) -> np.ndarray:
        return case.input(f"gt_{name}")

    def cams(name: str) -> tuple[np.ndarray, np.ndarray]:
        maps = case.input(f"cam_{name}").astype(np.float32) / np.float32(65535)
        return np.array(classes[int(name)]), maps

    thresholds = [i / 100 for i in range(case.meta["outputs"]["curve"]["shape"][0])]
    scores = evaluate_cams(ids, cams, truth, n, thresholds, boundary=False, progress=False)
    assert isinstance(scores.curve, ThresholdCurve)
    case.check("curve", 100 * scores.curve.mious())
    assert scores.threshold == case.meta["best_threshold_first_maximum"]
    for name in case.meta["outputs"]:  # iou_026: background score 0.26
        if name.startswith("iou_") and name != "iou_png":
            at = int(name.removeprefix("iou_"))
            case.check(name, 100 * scores.curve.confusion(at).iou())
            fixed = evaluate_cams(ids, cams, truth, n, [at / 100], boundary=False, progress=False)
            case.check(name, 100 * fixed.confusion.iou())

    png = evaluate_masks(ids, lambda name: case.input(f"pred_{name}"), truth, n, progress=False).confusion
    case.check("iou_png", 100 * png.iou())
    case.check("miou_png", 100 * png.miou())
    case.check("fp_png", 100 * png.false_positive)
    case.check("fn_png", 100 * png.false_negative)


def check_metrics_confusion(case: Any) -> None:
    """The confusion matrix and everything drawn from it; an undefined IoU is recorded as -1."""
    confusion = Confusion(_num_classes(case))
    for truth, prediction in zip(case.input("gt"), case.input("pred"), strict=True):
        confusion.add(truth, prediction)
    case.check("confusion", confusion.matrix)
    case.check("iou", np.nan_to_num(confusion.iou("nanmean"), nan=-1))
    case.check("miou", confusion.miou("nanmean"))
    case.check("precision", confusion.precision)
    case.check("recall", confusion.recall)
    case.check("mean_precision", confusion.precision.mean())
    case.check("mean_recall", confusion.recall.mean())
    case.check("pixel_acc", confusion.pixel_accuracy)
    case.check("class_acc", confusion.class_accuracy)
    case.check("fwiou", confusion.frequency_weighted_iou)
