"""The contract of a data set: its images, tags and masks, as the steps see them.

To add a data set, add one file in voc12/data_sets: a subclass of Catalog, registered by a decorator.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from misc.files.ids import IdReader
from misc.files.images import read_mask
from misc.files.segments import SUFFIXES
from voc12 import tags as tags_of
from voc12.lists import NoSuchList, is_list_file, pick_evenly, read_list, shorten
from voc12.masks import compare_masks, tell_foreign_masks
from voc12.tags import DataError

_CHUNK = 128
_MASKS_LOOKED_AT = 32
"""True masks that are held against the tags before a run; voc12.prepare takes all."""

DATA_SETS: dict[str, type[Catalog]] = {}
"""Classes of data sets by the names that the command line knows; filled by ``load_data_sets``."""

_Class = TypeVar("_Class", bound="type[Catalog]")


def data_set(*names: str) -> Callable[[_Class], _Class]:
    """Register a data set under its names on the command line; it is created from the name and its root folder."""

    def add(cls: _Class) -> _Class:
        for name in names:
            if name in DATA_SETS:
                raise ValueError(f"Two data sets are called {name!r}: {DATA_SETS[name].__name__} and {cls.__name__}.")
            DATA_SETS[name] = cls
        return cls

    return add


def load_data_sets() -> dict[str, type[Catalog]]:
    """Import every file of voc12/data_sets, which fills DATA_SETS; returns it."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "data_sets")]):
        importlib.import_module(f"voc12.data_sets.{module.name}")
    return DATA_SETS


def open_catalog(data: str, root: Path) -> Catalog:
    """The data set ``data`` (a name in DATA_SETS) in folder ``root``; DataError says what is missing."""
    known = load_data_sets()
    if data not in known:
        raise DataError(f"There is no data set {data!r}; known: {', '.join(known)}.")
    return known[data](data, Path(root))


class Catalog(ABC):
    """A data set. Its files are looked up in one pass over the folders, so ``check`` is quick for any number of images.

    Attributes:
        name: of the data set, as on the command line.
        root: its folder.
        classes: names of the foreground classes; mask value c + 1 is class c.
        tag_source: where tags come from, in words.
        aim: what a run predicts: masks, or (one class per image) boxes.
    """

    aim: Literal["masks", "boxes"] = "masks"
    hides_objects: bool = False
    """Whether the data set's masks may have 255 on whole objects (VOC's difficult ones, COCO's crowds)."""

    def __init__(self, name: str, root: Path, classes: Iterable[str], tag_source: str) -> None:
        self.name = name
        self.root = root
        self.classes = tuple(classes)
        self.tag_source = tag_source
        self._rows: dict[str, np.ndarray] = {}
        self._strange: dict[str, list[str]] = {}

    @property
    def classes_are_guessed(self) -> bool:
        """Whether the classes are simply the names that occur, so that one misspelt would be one more."""
        return False

    # Implemented by each data set.
    @abstractmethod
    def named_list(self, split: str) -> list[str]:
        """Ids of a split by its name; NoSuchList where there is no such split, listing those there are."""

    @abstractmethod
    def index_images(self) -> Mapping[str, str]:
        """All images: {id: path below ``root``}, found without opening each file."""

    @abstractmethod
    def index_masks(self) -> Mapping[str, str]:
        """All true masks: {id: path below ``root``}."""

    def index_objects(self) -> Mapping[str, str]:
        """All masks of single objects there are, in the form of VOC's SegmentationObject: {id: path below ``root``}; a
        data set has none unless it says so."""
        return {}

    @abstractmethod
    def read_tags(self, image_id: str) -> np.ndarray:
        """(C,) float32 tags of an image, read anew; DataError where they are missing or damaged."""

    def boxes(self, image_id: str) -> np.ndarray:
        """True boxes of an image, all of its class: (n, 4) int64 in pixels, x0, y0, x1, y1; DataError where there are
        none."""
        raise DataError(f"{self.name} has no boxes to compare with: localise runs on data sets that have, as cub200.")

    def region(self, image_id: str) -> np.ndarray | None:
        """The object's mask, if a data set of boxes has one: (H, W) uint8, 1 object, 0 background, 255 ignored."""
        return None

    # Used by the steps.
    @property
    def num_classes(self) -> int:
        """Number of foreground classes C."""
        return len(self.classes)

    @cached_property
    def images(self) -> Mapping[str, str]:
        """``index_images``, looked up once."""
        return self.index_images()

    @cached_property
    def masks(self) -> Mapping[str, str]:
        """``index_masks``, looked up once."""
        return self.index_masks()

    @cached_property
    def objects(self) -> Mapping[str, str]:
        """``index_objects``, looked up once."""
        return self.index_objects()

    def ids(self, split: str) -> list[str]:
        """Image ids of a split, in the order of the list.

        Args:
            split: name of a list of the data set (``train``), or path of a list file (has a ``/`` or ends in .txt).

        Raises DataError: no such list (NoSuchList), an empty one, an id twice.
        """
        if is_list_file(split):
            return self.read_list(Path(split))
        return self.named_list(split)

    def read_list(self, path: Path) -> list[str]:
        """Ids of a list file, in its order; NoSuchList where it does not exist, DataError for a damaged one."""
        return read_list(path, IdReader(self.images, roots=[self.root]))

    def has_list(self, split: str) -> bool:
        """Whether there is such a list; DataError for one that is there and damaged."""
        try:
            return bool(self.ids(split))
        except NoSuchList:
            return False

    def default_train_list(self) -> str:
        """The list that networks are trained on unless another is named: train_aug where there is one, else train."""
        return "train_aug" if self.has_list("train_aug") else "train"

    def image_path(self, image_id: str) -> Path:
        """File of an image; DataError for an id without one."""
        if image_id not in self.images:
            raise DataError(f"There is no image {image_id!r} in {self.root}: add it, or take it off the list.")
        return self.root / self.images[image_id]

    def mask_path(self, image_id: str) -> Path | None:
        """File of the true mask of an image, None where there is none."""
        return self.root / self.masks[image_id] if image_id in self.masks else None

    def object_path(self, image_id: str) -> Path | None:
        """File of the mask of an image's single objects, None where there is none."""
        return self.root / self.objects[image_id] if image_id in self.objects else None

    def tags_from_mask(self, image_id: str) -> np.ndarray:
        """(C,) float32, the classes in the true mask of an image; DataError where there is none, or a damaged one."""
        path = self.mask_path(image_id)
        if path is None:
            raise DataError("no mask tells its classes, nor anything else.")
        try:
            return tags_of.tags_from_mask(read_mask(path), self.num_classes)
        except DataError as error:
            raise DataError(f"Mask {path} {error} List them in classes.txt, or replace the mask.") from None

    def tags(self, image_id: str) -> np.ndarray:
        """Tags of an image: (C,) float32 of 0 and 1, kept and read-only; DataError where there are none."""
        row = self._rows.get(image_id)
        if row is None:
            row = self.read_tags(image_id)
            row.setflags(write=False)
            self._rows[image_id] = row
        return row

    def keep_tags(self, image_id: str, row: np.ndarray) -> None:
        """Take (C,) float32 tags for those of an image, instead of what would be read."""
        row.setflags(write=False)
        self._rows[image_id] = row

    def foreign_masks(self) -> list[str]:
        """Files in the folders of masks that are no PNG and hence not read: paths below ``root``; a data set looks for
        none unless it says so."""
        return []

    def fingerprint(self, split: str) -> str:
        """sha256 (hex) over class names, ids in order, and tags: two runs with the same one had the same data list."""
        ids = self.ids(split)
        failures = self._read_all_tags(ids)
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for image_id in ids:
            digest.update(b"\0" + image_id.encode() + b"\0")
            digest.update(b"?" if image_id in failures else self.tags(image_id).astype(np.uint8).tobytes())
        return digest.hexdigest()

    def check(
        self,
        split: str,
        *,
        need_masks: bool = False,
        need_tags: bool = True,
        need_boxes: bool = False,
        saliency: Path | None = None,
        segments: Path | None = None,
    ) -> list[str]:
        """Check before any work starts that everything a step will read of a split exists.

        Args:
            split: as for ``ids``.
            need_masks: whether every image must have a true mask.
            need_tags: whether every image must have (possibly empty) tags.
            need_boxes: whether every image must have a true box.
            saliency: folder in which every image must have a saliency map ID.png; None: none is needed.
            segments: folder in which every image must have a file of segments (misc/files/segments.py), likewise.

        Returns:
            Warnings, one sentence or two each.

        Raises:
            DataError: with all problems at once, the first ten images of each, and what to do.
        """
        ids = self.ids(split)
        problems: list[str] = []
        warnings: list[str] = []
        missing = [i for i in ids if i not in self.images]
        if missing:
            problems.append(f"{len(missing)} have no image file ({shorten(missing)}). Add them, or shorten the list.")
        unmasked = [i for i in ids if i not in self.masks] if need_masks else []
        if unmasked:
            problems.append(f"{len(unmasked)} have no mask ({shorten(unmasked)}). Add the masks, or use another list.")
        if need_boxes:
            for image_id in ids:
                self.boxes(image_id)  # an error of its own
        if saliency is not None:
            there = {path.stem for path in saliency.glob("*.png")}
            unseen = [i for i in ids if i not in there]
            if unseen:
                problems.append(
                    f"{len(unseen)} have no saliency map ID.png in {saliency} ({shorten(unseen)}). Give the folder "
                    "that holds them all: --saliency DIR."
                )
        if segments is not None:
            bare = [i for i in ids if not any((segments / f"{i}{suffix}").is_file() for suffix in SUFFIXES)]
            if bare:
                problems.append(
                    f"{len(bare)} have no segments in {segments} ({shorten(bare)}). Make them by python -m "
                    f"voc12.segments --root {self.root}, or give the folder that holds them all: --segments DIR."
                )
        if need_tags:
            failures = self._read_all_tags(ids)
            if failures:
                causes = shorten([f"{i}: {cause}" for i, cause in failures.items()], "\n    ")
                problems.append(f"{len(failures)} have no readable tags (from {self.tag_source}):\n    {causes}")
            empty = [i for i in ids if i not in failures and not self.tags(i).any()]
            if empty and len(empty) == len(ids):
                problems.append(
                    f"no image has a tag (from {self.tag_source}). Are these the right class names: "
                    f"{shorten(self.classes)}?"
                )
            elif empty:
                warnings.append(f"{len(empty)} images have no tag ({shorten(empty)}): taken as background only.")
            strange = Counter(name for i in ids for name in self._strange.get(i, ()))
            if strange:
                shown = shorten([f"{name!r} ({count})" for name, count in strange.most_common()])
                warnings.append(f"Objects whose names are no class are passed over: {shown}.")
            masked = [i for i in ids if i in self.masks and i not in failures]
            wrong, told = compare_masks(self, pick_evenly(masked, _MASKS_LOOKED_AT))
            problems += wrong
            warnings += told
        foreign = self.foreign_masks()
        if foreign:
            warnings.append(tell_foreign_masks(foreign))
        if problems:
            lines = "\n  ".join(problems)
            raise DataError(f"{self.name} in {self.root}, list {split!r}: of {len(ids)} images\n  {lines}")
        return warnings

    def _read_all_tags(self, ids: Iterable[str]) -> dict[str, str]:
        """Read the tags that are not known yet; returns {id: cause} of those that failed."""
        failures: dict[str, str] = {}

        def read(chunk: list[str]) -> None:
            for image_id in chunk:
                try:
                    self.tags(image_id)
                except (ValueError, OSError) as error:
                    failures[image_id] = str(error)

        unread = [i for i in ids if i not in self._rows]
        chunks = [unread[i : i + _CHUNK] for i in range(0, len(unread), _CHUNK)]
        with ThreadPoolExecutor() as pool:  # tens of thousands of small files: waiting for the disk is what takes time
            list(pool.map(read, chunks))
        return {i: failures[i] for i in unread if i in failures}
