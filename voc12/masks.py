"""What true masks say against tags: objects drawn as 255, and classes in another order than classes.txt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from misc.files.ids import image_suffixes
from misc.files.images import read_mask, read_size
from misc.image.labels import IGNORE
from voc12.lists import shorten
from voc12.tags import DataError

if TYPE_CHECKING:
    from voc12.catalog import Catalog


_ARRAYS = {".npy", ".npz", ".mat", ".json", ".nii"}
"""Endings of other files in which tools keep masks."""


def is_foreign_mask(path: str) -> bool:
    """Whether a file among the masks is one in a format that is not read, by its ending."""
    return PurePosixPath(path.lower().removesuffix(".gz")).suffix in (image_suffixes() | _ARRAYS) - {".png"}


def compare_masks(catalog: Catalog, ids: Sequence[str], workers: int = 4) -> tuple[list[str], list[str]]:
    """Read the masks of images and hold them against the images' tags; unreadable masks and tags are passed over, other
    checks tell of them.

    Returns (problems, notes), a sentence or two each: masks of images with tags that hold 0 and 255 only (a note where
    the data set hides objects under 255 and other masks show classes), masks with classes that the tags lack, and
    others that lack classes of the tags (but where the data set hides objects).
    """

    def values(image_id: str) -> tuple[str, np.ndarray, np.ndarray] | None:
        path = catalog.mask_path(image_id)
        if path is None:
            return None
        try:
            return image_id, np.flatnonzero(np.bincount(read_mask(path).ravel(), minlength=256)), catalog.tags(image_id)
        except (ValueError, OSError):
            return None

    with ThreadPoolExecutor(max(1, workers)) as pool:
        read = [found for found in pool.map(values, ids) if found is not None]
    from_masks = catalog.tag_source == "masks"
    hidden, differing, names, drawn = [], [], Counter[str](), False
    undrawn, lost = [], Counter[str]()
    for image_id, present, tags in read:
        classes = present[(present > 0) & (present <= catalog.num_classes)] - 1
        drawn |= len(classes) > 0
        only_ignored = present[-1] == IGNORE and not ((present > 0) & (present < IGNORE)).any()
        is_hidden = only_ignored and (tags.any() or from_masks)
        if is_hidden:
            hidden.append(image_id)
        lacking = [catalog.classes[c] for c in classes if not tags[c]]
        if lacking:
            differing.append(image_id)
            names.update(lacking)
        elif not is_hidden and not catalog.hides_objects:
            absent = [catalog.classes[c] for c in np.flatnonzero(tags) if c not in classes]
            undrawn += [image_id] if absent else []
            lost.update(absent)
    problems, notes = [], []
    if hidden:
        told = (
            f"{len(hidden)} of {len(read)} masks hold only the values 0 and 255 ({shorten(hidden)}), and 255 means not "
            "scored. If 255 is the object, write its class (1 for the first) instead."
        )
        may_be = (catalog.hides_objects or from_masks) and drawn
        (notes if may_be else problems).append(told)
    if differing:
        shown = shorten([f"{name} ({count})" for name, count in names.most_common()])
        notes.append(
            f"In {len(differing)} of {len(read)} images the mask has classes that the tags lack: {shown} "
            f"({shorten(differing)}). Is classes.txt in the order of the mask values?"
        )
    if undrawn:
        shown = shorten([f"{name} ({count})" for name, count in lost.most_common()])
        notes.append(
            f"In {len(undrawn)} of {len(read)} images the mask lacks classes that are tagged: {shown} "
            f"({shorten(undrawn)}). Is every object drawn, and 1 (not 0) the value of the first class?"
        )
    return problems, notes


def check_claimed_size(image: Path, size: tuple[int, int]) -> None:
    """Hold the height and width that annotations claim for an image against its file's head, before a mask of that size
    is drawn; DataError where they differ."""
    real = read_size(image)
    if real != size:
        turned = " If its EXIF orientation turns it, save it upright." if real == size[::-1] else ""
        raise DataError(
            f"{image} is {real[0]} x {real[1]} pixels high and wide, its annotations are of an image of {size[0]} x "
            f"{size[1]}. Put the right image in its place, or export again.{turned}"
        )


def tell_foreign_masks(paths: Sequence[str]) -> str:
    """A sentence on files that lie among the masks and are not read."""
    folder = paths[0].rpartition("/")[0]
    return (
        f"{folder}/ holds {len(paths)} files that are not PNG and are not read ({shorten(paths)}): save masks "
        "as PNG (JPEG changes the values)."
    )
