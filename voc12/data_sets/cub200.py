"""CUB-200-2011: birds with one class and one box per image (wsol.md section 4).

Folder: images/CLASS/NAME.jpg, and the lists images.txt, image_class_labels.txt, train_test_split.txt,
bounding_boxes.txt, classes.txt of lines "id value ..."; segmentations/CLASS/NAME.png in it or beside it serve PxAP.
(The published reader drops the last character of each line, a digit if the file has no final newline; this one does
not.)
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from misc.files.ids import checked_id, id_of_file
from misc.files.images import read_image
from misc.files.store import read_text
from voc12.catalog import Catalog, data_set
from voc12.lists import NoSuchList
from voc12.tags import DataError

_OBJECT = 127
"""Grey value of a segmentation above which a pixel belongs to the bird: most of five annotators marked it."""


@data_set("cub200", "sample_cub")
class CubCatalog(Catalog):
    """CUB-200-2011, or any folder in its layout. An image's id is its file name.

    Lists: train, test; val is another name of test, as the data set has no third part.

    Raises DataError where ``root`` is no such folder (nor holds a CUB_200_2011) or its lists do not fit together.
    """

    aim = "boxes"

    def __init__(self, name: str, root: Path) -> None:
        root = root if (root / "images.txt").is_file() else root / "CUB_200_2011"
        classes = [row[0] for row in _rows(root, "classes.txt", 1).values()]
        super().__init__(name, root, classes, "image_class_labels.txt")
        paths = {number: row[0] for number, row in _rows(root, "images.txt", 1).items()}
        names = {number: id_of_file(checked_id(path)) for number, path in paths.items()}
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            raise DataError(f"{root / 'images.txt'}: several images are called {twice[0]!r}. Give them other names.")
        labels, splits, boxes = (
            _rows(root, f"{what}.txt", width)
            for what, width in (("image_class_labels", 1), ("train_test_split", 1), ("bounding_boxes", 4))
        )
        self._paths = {names[n]: path for n, path in paths.items()}
        self._labels = {names[n]: _number(root, "image_class_labels.txt", labels, n)[0] - 1 for n in names}
        self._boxes = {names[n]: _number(root, "bounding_boxes.txt", boxes, n) for n in names}
        training = {n: _number(root, "train_test_split.txt", splits, n)[0] for n in names}
        self._lists = {
            "train": [name for n, name in names.items() if training[n] == 1],
            "test": [name for n, name in names.items() if training[n] == 0],
        }
        wrong = [i for i, label in self._labels.items() if not 0 <= label < len(classes)]
        if wrong:
            raise DataError(f"{root / 'image_class_labels.txt'}: {wrong[0]} has a class that classes.txt lacks.")

    def named_list(self, split: str) -> list[str]:
        """Images of train_test_split.txt: 1 is train, 0 test."""
        ids = self._lists.get("test" if split == "val" else split)
        if not ids:
            raise NoSuchList(f"There is no list {split!r} in {self.root}: CUB has train and test (also called val).")
        return ids

    def index_images(self) -> dict[str, str]:
        """Those that images.txt names and that are there, found in one pass over the folders."""
        there = {
            f"{folder.name}/{file.name}" if folder.is_dir() else folder.name
            for folder in _entries(self.root / "images")
            for file in (_entries(Path(folder)) if folder.is_dir() else [folder])
        }
        return {image_id: f"images/{path}" for image_id, path in self._paths.items() if path in there}

    def index_masks(self) -> dict[str, str]:
        """Empty: segmentations separate bird and background, not classes; see ``region``."""
        return {}

    def read_tags(self, image_id: str) -> np.ndarray:
        """(C,) float32, one of them 1."""
        if image_id not in self._labels:
            raise DataError(f"{self.root / 'images.txt'} does not name it.")
        tags = np.zeros(self.num_classes, np.float32)
        tags[self._labels[image_id]] = 1
        return tags

    def boxes(self, image_id: str) -> np.ndarray:
        """(1, 4) int64; x, y, width and height are truncated before they are added (wsol.md section 4)."""
        if image_id not in self._boxes:
            raise DataError(f"{self.root / 'bounding_boxes.txt'} has no box of {image_id!r}.")
        x, y, width, height = self._boxes[image_id]
        return np.array([[x, y, x + width, y + height]])

    def region(self, image_id: str) -> np.ndarray | None:
        """The bird where there is a segmentation: (H, W) uint8, 1 bird, 0 background."""
        for folder in (self.root, self.root.parent):  # the official archives leave it beside the images' folder
            path = (folder / "segmentations" / self._paths[image_id]).with_suffix(".png")
            if path.is_file():
                return (read_image(path)[..., 0] > _OBJECT).astype(np.uint8)
        return None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return list(entries)


def _rows(root: Path, name: str, width: int) -> dict[str, list[str]]:
    """Lines "id value ..." of a list: {id: values}; DataError for one that is missing, or another number of values."""
    path = root / name
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: give the folder of CUB-200-2011 that holds images, images.txt, classes.txt, "
            "image_class_labels.txt, train_test_split.txt and bounding_boxes.txt."
        )
    rows: dict[str, list[str]] = {}
    try:
        text = read_text(path, "List")
    except ValueError as error:
        raise DataError(str(error)) from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            key, *values = line.split(None, width)
            if len(values) != width or key in rows:
                raise DataError(f"{path}, line {number}: {line!r} is not an id of its own and {width} value(s).")
            rows[key] = [value.strip() for value in values]
    return rows


def _number(root: Path, name: str, rows: dict[str, list[str]], key: str) -> list[int]:
    """Values of an image as integers, truncated; DataError where they are missing or no numbers."""
    if key not in rows:
        raise DataError(f"{root / name} has no line for image {key} of images.txt.")
    try:
        return [int(float(value)) for value in rows[key]]
    except (ValueError, OverflowError):
        raise DataError(f"{root / name}: the line of image {key} holds no numbers: {' '.join(rows[key])!r}.") from None
