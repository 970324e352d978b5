"""Single objects of an image: masks with a class and a score, their files, and how a data set's objects are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from misc.files import store
from misc.image.labels import IGNORE

_SHOWN = 254
"""Most objects that one palette picture can tell apart."""


@dataclass(frozen=True)
class Instances:
    """R objects of one image; they may overlap.

    masks (R, H, W) bool; classes (R,) int64, 0-based; scores (R,) float32, how sure each one is (1 for true objects).
    """

    masks: np.ndarray
    classes: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError where masks, classes and scores do not belong together."""
        count = len(self.masks)
        if self.masks.ndim != 3 or self.masks.dtype != bool or {len(self.classes), len(self.scores)} != {count}:
            raise ValueError(
                f"masks {self.masks.shape} {self.masks.dtype} must be (R, H, W) bool, with as many classes "
                f"({len(self.classes)}) and scores ({len(self.scores)})"
            )

    @classmethod
    def none(cls, size: tuple[int, int]) -> Instances:
        """No object in an image of (H, W) pixels."""
        return cls(np.zeros((0, *size), bool), np.zeros(0, np.int64), np.zeros(0, np.float32))

    def picture(self) -> np.ndarray:
        """What a person looks at, and the layout of VOC's SegmentationObject: (H, W) uint8, 0 background, objects
        numbered from 1 by falling score. Of overlapping ones the better is in front; those of score 0 are left out."""
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
    """Read what ``write_instances`` wrote; FileNotFoundError, ValueError for a damaged file or another kind."""
    stored = store.read_arrays(path)
    if not {"masks", "classes", "scores", "size"} <= stored.keys():
        raise ValueError(f"{path} holds no instances: it has {sorted(stored)}, not masks, classes, scores and size.")
    width = int(stored["size"][1])
    masks = np.unpackbits(stored["masks"], axis=-1, count=width).astype(bool)  # (R, H, W)
    return Instances(masks, stored["classes"], stored["scores"])


def true_instances(objects: np.ndarray, classes: np.ndarray) -> Instances:
    """The objects of a data set in VOC's layout (irnet.md section 11).

    Args:
        objects: (H, W) uint8, SegmentationObject: 0 background, one value an object, 255 ignore.
        classes: (H, W) uint8, SegmentationClass of the same image.

    Returns:
        the objects by ascending value; an object's class is the smallest that its pixels have in ``classes``.

    Raises ValueError where the two differ in size or an object has no class.
    """
    if objects.shape != classes.shape:
        raise ValueError(f"the masks of objects {objects.shape} and of classes {classes.shape} differ in size")
    values = [value for value in np.unique(objects) if value not in (0, IGNORE)]
    found = []
    for value in values:
        inside = classes[(objects == value) & (classes > 0) & (classes != IGNORE)]
        if not len(inside):
            raise ValueError(f"object {value} of the mask of objects has no class in the mask of classes")
        found.append(int(inside.min()) - 1)
    masks = np.array([objects == value for value in values], bool).reshape(len(values), *objects.shape)
    return Instances(masks, np.array(found, np.int64), np.ones(len(values), np.float32))
