"""Masks eroded before they are scored: what SemFormer's published script does to its CAMs (semformer.md section 10)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from misc.score.metrics import Confusion, ThresholdCurve, mask_at


def erode(mask: np.ndarray, side: int) -> np.ndarray:
    """Every label's region, the background's too, eroded by a square of odd ``side``; pixels that are left in no region
    become background: (H, W) uint8 -> the same. What is outside the image counts as inside.
    """
    square = np.ones((side, side), np.uint8)
    return np.where(cv2.erode(mask, square) == cv2.dilate(mask, square), mask, np.uint8(0))


class ErodedCurve(ThresholdCurve):
    """The curve of masks that are eroded after they are cut: every mask has to be made, in one pass over the images.

    Args:
        num_classes_with_background: n. thresholds: T background scores. side: of the square.
    """

    def __init__(self, num_classes_with_background: int, thresholds: Sequence[float], side: int) -> None:
        super().__init__(num_classes_with_background, thresholds)
        self.side = side
        self.matrices = [Confusion(num_classes_with_background) for _ in thresholds]

    def add(self, truth: np.ndarray, keys: np.ndarray, maps: np.ndarray) -> None:
        """Counts one image, arguments and errors as in ``ThresholdCurve``."""
        empty = np.zeros(np.shape(truth), np.uint8)
        for threshold, matrix in zip(self.thresholds, self.matrices, strict=True):
            matrix.add(truth, erode(mask_at((keys, maps), threshold), self.side) if len(keys) else empty)

    def merge(self, other: ThresholdCurve) -> ErodedCurve:
        """Adds the counts of ``other`` (from another part of the images); returns self."""
        if not isinstance(other, ErodedCurve) or other.side != self.side:
            raise ValueError("only curves of the same erosion can be merged")
        super().merge(other)
        for mine, theirs in zip(self.matrices, other.matrices, strict=True):
            mine.merge(theirs)
        return self

    def confusion(self, i: int) -> Confusion:
        """The confusion matrix at ``thresholds[i]``."""
        return self.matrices[i]
