"""A folder of one's own images: ``--data folder --root DIR`` (docs/your_data.md).

    DIR/images/         images of any format that Pillow reads, in sub-folders too; without this folder the images are
                        those that labels.csv names, relative to DIR
    DIR/labels.csv      file,class1;class2  or one column a class (voc12/table.py)
    DIR/classes.txt     names of the classes in the order of their mask values; left out: taken from labels.csv
    DIR/masks/          optional: ID.png, palette or grey, 0 background, 1..C classes, 255 ignored
    DIR/splits/         optional: train.txt, val.txt, ..., one image a line

The id of an image is its path below images/ without the ending. Names may hold spaces and any letters: they are
compared in Unicode's composed form, whichever form the file system and the table have.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from misc.files.ids import checked_id, composed, image_suffixes, strip_image_suffix, walk_files
from voc12 import tags as tags_of
from voc12.catalog import Catalog, data_set
from voc12.lists import SHOWN, NoSuchList
from voc12.masks import is_foreign_mask, tell_foreign_masks
from voc12.table import Table, read_table
from voc12.tags import DataError


@data_set("folder")
class FolderCatalog(Catalog):
    """The layout above. Tags come from labels.csv; without that from the masks (classes.txt is needed then).

    Lists are the files in splits/. With neither train.txt nor val.txt there, they are made up: ``train``, every image
    with tags, ``val``, every image without (or all, where all have tags), and ``all``.

    Raises DataError for a folder that does not exist or has neither labels.csv nor masks, and for a damaged table.
    """

    image_folders: tuple[str, ...] = ("images",)
    """Below the root; names of images may be relative to one of these or to the root."""
    mask_folders: tuple[str, ...] = ("masks",)
    """Below the root."""

    def __init__(self, name: str, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"The data folder {root} does not exist: give --root DIR, the folder with images and tags.")
        table, listed = root / "labels.csv", root / "classes.txt"
        for path in (table, listed):
            if os.path.lexists(path) and not path.is_file():
                raise DataError(f"{path} is no file: put a file in its place, or remove it.")
        classes = tags_of.read_classes(listed) if listed.is_file() else None
        self.classes_are_listed = classes is not None
        self.root = root
        self._prefixes = tuple(f"{folder}/" for folder in self.image_folders if (root / folder).is_dir())
        if table.is_file():
            self.table = read_table(table, classes, self.id_of_cell)
        elif classes is None or not any((root / folder).is_dir() for folder in self.mask_folders):
            raise DataError(self._needs(root))
        else:
            self.table = Table(classes, {}, {})
        super().__init__(name, root, self.table.classes, "labels.csv" if table.is_file() else "masks")

    @property
    def classes_are_guessed(self) -> bool:
        """Where there is no classes.txt."""
        return not self.classes_are_listed

    def _needs(self, root: Path) -> str:
        """What to say of a folder without tags."""
        return (
            f"{root} has no labels.csv: write one with a line 'file,class1;class2' for every image. (Tags can be read "
            "from masks/ID.png too: that takes a classes.txt, one class name a line.)"
        )

    def id_of_cell(self, written: str) -> str:
        """Id of an image from its file as the table has it: the whole cell, spaces included; ValueError for one that
        leaves the folder."""
        path = composed(written.strip()).replace("\\", "/")
        if os.path.isabs(path):  # perhaps below the root
            for form in (os.path.abspath(self.root), os.path.realpath(self.root)):
                path = path.removeprefix(f"{composed(str(form))}/")
        image_id = checked_id(strip_image_suffix(path).removeprefix("./"))
        return next((image_id[len(p) :] for p in self._prefixes if image_id.startswith(p)), image_id)

    def named_list(self, split: str) -> list[str]:
        """splits/SPLIT.txt, or where it has neither train.txt nor val.txt one of the three lists that are made up."""
        folder = self.root / "splits"
        if (folder / f"{split}.txt").is_file():
            return self.read_list(folder / f"{split}.txt")
        there = sorted(p.stem for p in folder.glob("*.txt"))
        if not {"train", "val"} & set(there) and split in ("train", "val", "all"):
            tagged = list(self.table.tags) if self.tag_source == "labels.csv" else sorted(self.masks)
            known = set(tagged)
            rest = sorted(i for i in self.images if i not in known)
            ids = {"train": tagged, "val": rest or tagged, "all": tagged + rest}[split]
            if ids:
                return ids
        foreign = self.foreign_masks() if self.tag_source == "masks" else []
        if foreign:
            raise NoSuchList(f"There is no list {split!r}: {tell_foreign_masks(foreign)}")
        listed = ", ".join(there) or "none"
        if not {"train", "val"} & set(there):
            listed += "; train, val and all are made up"
        raise NoSuchList(
            f"There is no list {split!r} in {folder} (there: {listed}). "
            "Name one of these, give the path of a list file (one image a line), or put the list there."
        )

    def index_images(self) -> dict[str, str]:
        """The image folders in one pass; then what labels.csv names elsewhere, one pass over each folder it names.

        Raises DataError where several files have one id and labels.csv does not say which is meant.
        """
        found: dict[str, list[str]] = {}
        for folder in self.image_folders:
            for path in walk_files(self.root, folder):
                if PurePosixPath(path).suffix.lower() in image_suffixes():
                    found.setdefault(strip_image_suffix(path[len(folder) + 1 :]), []).append(path)
        listing = cache(lambda folder: _listing(self.root, folder))
        for image_id, written in self.table.files.items():
            paths = found.get(image_id, [])
            if len(paths) != 1:  # not in an image folder, or there more than once
                name = composed(written.replace("\\", "/")).removeprefix("./")
                exact = [p for p in paths if f"/{composed(p)}".endswith(f"/{name}")]
                folder, _, file = name.rpartition("/")
                named = listing(folder).get(file, []) or listing(folder).get(strip_image_suffix(file), [])
                if exact or named:
                    found[image_id] = exact or named
        several = [paths for paths in found.values() if len(paths) > 1]
        if several:
            shown = "; ".join([" and ".join(sorted(p)) for p in several[:SHOWN]] + ["..."] * (len(several) > SHOWN))
            raise DataError(
                f"{len(several)} images of {self.root} have a file too many ({shown}): "
                "masks are named after the image without its ending. Remove or rename one of each, or name the right "
                "one with its ending in labels.csv."
            )
        return {image_id: paths[0] for image_id, paths in found.items()}

    def index_masks(self) -> dict[str, str]:
        """The mask folders in one pass; PNG only."""
        return {
            strip_image_suffix(path[len(folder) + 1 :]): path
            for folder in self.mask_folders
            for path in walk_files(self.root, folder)
            if path.lower().endswith(".png")
        }

    def foreign_masks(self) -> list[str]:
        """Masks of other formats in the mask folders."""
        return [p for folder in self.mask_folders for p in walk_files(self.root, folder) if is_foreign_mask(p)]

    def read_tags(self, image_id: str) -> np.ndarray:
        """(C,) float32; DataError for an image that has no line in labels.csv (no mask, where tags come from those)."""
        if self.tag_source == "masks":
            return self.tags_from_mask(image_id)
        if image_id not in self.table.tags:
            raise DataError(f"{self.root / 'labels.csv'} has no line for it (no object: write '{image_id},').")
        return self.table.tags[image_id]

    def check(self, split: str, *, need_tags: bool = True, **needs: Any) -> list[str]:
        """As for every data set; and what is made up for want of a file is said."""
        warnings = super().check(split, need_tags=need_tags, **needs)
        if split in ("train", "val", "all") and not (self.root / "splits" / f"{split}.txt").is_file():
            warnings.append(self.tell_made_up(split))
        if need_tags and not self.classes_are_listed:
            warnings.append(
                f"There is no classes.txt: mask value n is the n-th of {', '.join(self.classes[:SHOWN])}"
                f"{', ...' * (self.num_classes > SHOWN)} (from labels.csv, where a name misspelt would be one more)."
            )
        return warnings

    def tell_made_up(self, split: str) -> str:
        """What stands in for a list that is not there, and which others are there."""
        seen = " They are the training images themselves: put lists into splits/, or run python -m voc12.prepare "
        seen += "folder --val-share 0.2, to test on others."
        same = split == "val" and self.ids("val") == self.ids("train")
        there = ", ".join(sorted(path.name for path in (self.root / "splits").glob("*.txt")))
        others = f" (there: {there})" if there else ""
        told = f"splits/ has no train.txt and no val.txt{others}: {_MADE_UP[split]}."
        return f"{told}{seen if same else ''}"


_MADE_UP = {
    "train": "every image that has tags is trained on",
    "val": "the images without tags are predicted (all, where all have tags)",
    "all": "all images are taken",
}


def _listing(root: Path, folder: str) -> dict[str, list[str]]:
    """Files of one folder by name and by name without ending, both in composed Unicode: paths below ``root``."""
    listed: dict[str, list[str]] = {}
    if not (root / folder).is_dir():
        return listed
    with os.scandir(root / folder) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            for name in {composed(entry.name), strip_image_suffix(entry.name)}:
                listed.setdefault(name, []).append(path)
    return listed
