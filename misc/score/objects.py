"""Single objects of an image: masks with class and score, their files, and the true objects of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from misc.files import store
from misc.image.labels import IGNORE

_SHOWN = 254
"""Largest number of objects in one palette picture."""


@dataclass(frozen=True)
class Instances:
    """R objects of one image; they may overlap.

    masks (R, H, W) bool; classes (R,) int64, 0-based; scores (R,) float32, confidence (1 for true objects).
    """

    masks: np.ndarray
    classes: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError if masks, classes and scores do not match."""
        count = len(self.masks)
        if self.masks.ndim != 3 or self.masks.dtype != bool or {len(self.classes), len(self.scores)} != {count}:
            raise ValueError(
                f"masks {self.masks.shape} {self.masks.dtype} must be (R, H, W) bool, with as many classes "
                f"({len(self.classes)}) and scores ({len(self.scores)})"
            )

    @classmethod
    def none(cls, size: tuple[int, int]) -> Instances:
        """Instances without any object, for an image of (H, W) pixels."""
        return cls(np.zeros((0, *size), bool), np.zeros(0, np.int64), np.zeros(0, np.float32))

    def picture(self) -> np.ndarray:
        """A palette picture in the layout of VOC's SegmentationObject: (H, W) uint8, 0 background, objects numbered
        from 1 by decreasing score. Where objects overlap, the higher score is in front. Objects of score 0 are left
        out."""
        best = [i for i in np.argsort(-self.scores, kind="stable")[:_SHOWN] if self.scores[i] > 0]
        picture = np.zeros(self.masks.shape[1:], np.uint8)
        for number, i in reversed(list(enumerate(best, 1))):
            picture[self.masks[i]] = number
        return picture


def write_instances(path: Path, instances: Instances) -> None:
    """Write ``instance/ID.npz``: masks as bits along their rows, classes, scores, size (H, W); atomically."""
    store.write_arrays(
        path,
        masks=np.packbits(instances.masks, axis=-1),
        classes=instances.classes.astype(np.int64),
        scores=instances.scores.astype(np.float32),
        size=np.array(instances.masks.shape[1:], np.int64),
    )


def read_instances(path: Path) -> Instances:
    """Read what ``write_instances`` wrote; raises FileNotFoundError, and ValueError for a damaged file or one of
    another kind."""
    stored = store.read_arrays(path)
    if not {"masks", "classes", "scores", "size"} <= stored.keys():
        raise ValueError(f"{path} holds no instances: it has {sorted(stored)}, not masks, classes, scores and size.")
    width = int(stored["size"][1])
    masks = np.unpackbits(stored["masks"], axis=-1, count=width).astype(bool)  # (R, H, W)
    return Instances(masks, stored["classes"], stored["scores"])


def true_instances(objects: np.ndarray, classes: np.ndarray) -> Instances:
    """The objects of a data set in VOC's layout (irnet.md section 11).

    Args:
        objects: (H, W) uint8, SegmentationObject: 0 background, one value per object, 255 ignored.
        classes: (H, W) uint8, SegmentationClass of the same image.

    Returns:
        the objects by ascending value; the class of an object is the smallest among its pixels in ``classes``.

    Raises ValueError if the two differ in size or an object has no class.
    """
    if objects.shape != classes.shape:
        raise ValueError(f"the object mask {objects.shape} and the class mask {classes.shape} differ in size")
    values = [value for value in np.unique(objects) if value not in (0, IGNORE)]
    found = []
    for value in values:
        inside = classes[(objects == value) & (classes > 0) & (classes != IGNORE)]
        if not len(inside):
            raise ValueError(f"object {value} of the object mask has no class in the class mask")
        found.append(int(inside.min()) - 1)
    masks = np.array([objects == value for value in values], bool).reshape(len(values), *objects.shape)
    return Instances(masks, np.array(found, np.int64), np.ones(len(values), np.float32))
