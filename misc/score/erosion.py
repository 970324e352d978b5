"""Erosion of masks before scoring, as in SemFormer's published script for its CAMs (semformer.md section 10)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from misc.score.metrics import Confusion, ThresholdCurve, mask_at


def erode(mask: np.ndarray, side: int) -> np.ndarray:
    """Erode the region of every label, background included, by a square of odd ``side``: (H, W) uint8 -> the same
    shape. Pixels left in no region become background. The image border does not erode a region.
    """
    square = np.ones((side, side), np.uint8)
    return np.where(cv2.erode(mask, square) == cv2.dilate(mask, square), mask, np.uint8(0))


class ErodedCurve(ThresholdCurve):
    """Threshold curve of masks that are eroded after thresholding. It makes one mask per threshold, in one pass over
    the images.

    Args:
        num_classes_with_background: n. thresholds: T background scores. side: of the eroding square, odd.
    """

    def __init__(self, num_classes_with_background: int, thresholds: Sequence[float], side: int) -> None:
        super().__init__(num_classes_with_background, thresholds)
        self.side = side
        self.matrices = [Confusion(num_classes_with_background) for _ in thresholds]

    def add(self, truth: np.ndarray, keys: np.ndarray, maps: np.ndarray) -> None:
        """Count one image, arguments and errors as in ``ThresholdCurve``."""
        empty = np.zeros(np.shape(truth), np.uint8)
        for threshold, matrix in zip(self.thresholds, self.matrices, strict=True):
            matrix.add(truth, erode(mask_at((keys, maps), threshold), self.side) if len(keys) else empty)

    def merge(self, other: ThresholdCurve) -> ErodedCurve:
        """Add the counts of ``other`` (from another part of the images); returns self."""
        if not isinstance(other, ErodedCurve) or other.side != self.side:
            raise ValueError("only curves of the same erosion can be merged")
        super().merge(other)
        for mine, theirs in zip(self.matrices, other.matrices, strict=True):
            mine.merge(theirs)
        return self

    def confusion(self, i: int) -> Confusion:
        """The confusion matrix at ``thresholds[i]``."""
        return self.matrices[i]
