"""PASCAL VOC 2012: ``--data voc12 --root DIR`` (evaluation.md section 3), and the generated sample set in its layout.

    DIR/JPEGImages/ID.jpg, Annotations/ID.xml, SegmentationClass/ID.png, SegmentationObject/ID.png
    DIR/SegmentationClassAug/ID.png         masks out of SBD (``python -m voc12.prepare voc12`` makes them)
    DIR/ImageSets/Segmentation/LIST.txt     one id a line
    DIR/classes.txt                         only where the classes are not VOC's 20
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from misc.files.ids import IMAGE_SUFFIXES, IdReader, composed, file_of_id, walk_files
from misc.files.labelmap import read_labelmap
from voc12 import tags as tags_of
from voc12.catalog import Catalog, data_set
from voc12.lists import NoSuchList
from voc12.masks import is_foreign_mask
from voc12.table import read_table
from voc12.tags import DataError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""PASCAL VOC's classes in the order of their mask values 1 to 20 (evaluation.md 3.2)."""


@data_set("voc12", "sample")
class VocCatalog(Catalog):
    """VOC 2012's layout: JPEGImages, ImageSets/Segmentation, and what there is of Annotations, SegmentationClass,
    SegmentationClassAug, SegmentationObject, ``classes.txt`` and ``labels.csv``.

    Classes are VOC's 20 unless ``classes.txt`` names others, or labelme's ``class_names.txt`` or CVAT's
    ``labelmap.txt``
    does. Tags come from ``labels.csv`` (``voc12.prepare`` writes
    one); without that from Annotations; without these from the masks. Masks of SegmentationClass go before those of
    SegmentationClassAug.

    Raises DataError where ``root`` is no such folder, nor a parent of one as the official archive has it.
    """

    def __init__(self, name: str, root: Path) -> None:
        root = find_voc_root(root)
        classes, self.classes_from = _classes(root)
        self._table: dict[str, np.ndarray] = {}
        if (root / "labels.csv").is_file():
            source = "labels.csv"
            known = _index_folder(root, "JPEGImages", IMAGE_SUFFIXES)
            self._table = read_table(root / "labels.csv", classes, IdReader(known, roots=[root])).tags
        elif _holds_file(root / "Annotations", ".xml"):
            source = "Annotations"
        else:
            source = "masks"
        super().__init__(name, root, classes, source)
        self.hides_objects = self.classes == VOC_CLASSES

    def named_list(self, split: str) -> list[str]:
        """The list ImageSets/Segmentation/SPLIT.txt; train_aug and trainaug are one name."""
        folder = self.root / "ImageSets" / "Segmentation"
        spellings = ("train_aug", "trainaug") if split in ("train_aug", "trainaug") else (split,)
        for spelling in spellings:
            if (folder / f"{spelling}.txt").is_file():
                return self.read_list(folder / f"{spelling}.txt")
        there = ", ".join(sorted(p.stem for p in folder.glob("*.txt"))) or "none"
        if there == "default":
            there += ", which CVAT writes: copy it to train.txt and val.txt and share the images out"
        raise NoSuchList(
            f"There is no list {split!r} in {folder} (there: {there}). Name one of these, give the path of a list "
            "file (one image id a line), or put the list there."
        )

    def index_images(self) -> dict[str, str]:
        """JPEGImages in one pass; where an id has several files, the suffix that comes first in IMAGE_SUFFIXES."""
        return _index_folder(self.root, "JPEGImages", IMAGE_SUFFIXES)

    def doubled_images(self) -> list[str]:
        """Images that share their id with one of another ending, which is taken in their place."""
        taken = set(self.images.values())
        return [
            path for path in walk_files(self.root, "JPEGImages")
            if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES and path not in taken
        ]  # fmt: skip

    def index_masks(self) -> dict[str, str]:
        """SegmentationClass, and SegmentationClassAug for the ids that the former lacks."""
        return {
            **_index_folder(self.root, "SegmentationClassAug", (".png",)),
            **_index_folder(self.root, "SegmentationClass", (".png",)),
        }

    def foreign_masks(self) -> list[str]:
        """Masks of other formats in SegmentationClass and SegmentationClassAug."""
        folders = ("SegmentationClass", "SegmentationClassAug")
        return [path for folder in folders for path in walk_files(self.root, folder) if is_foreign_mask(path)]

    def index_objects(self) -> dict[str, str]:
        """Masks in SegmentationObject."""
        return _index_folder(self.root, "SegmentationObject", (".png",))

    def annotation_path(self, image_id: str) -> Path:
        """The XML file of an image."""
        return file_of_id(self.root / "Annotations", image_id, ".xml")

    def read_tags(self, image_id: str) -> np.ndarray:
        """(C,) float32 from the data set's one source of tags; DataError where it has none for this image."""
        if self.tag_source == "Annotations":
            names = tags_of.read_xml(self.annotation_path(image_id))
            strange = [name for name in names if name not in self.classes]
            if strange:
                self._strange[image_id] = strange
            return tags_of.encode_tags(names, self.classes)
        if self.tag_source == "labels.csv":
            if image_id not in self._table:
                raise DataError(f"{self.root / 'labels.csv'} has no line for it (no object: write '{image_id},').")
            return self._table[image_id]
        if image_id not in self.masks:
            raise DataError("neither Annotations nor labels.csv nor a mask tells its classes.")
        return self.tags_from_mask(image_id)


def _classes(root: Path) -> tuple[tuple[str, ...], str]:
    """Class names of a folder and the file they are from ("" for VOC's own): classes.txt, or what labelme
    (class_names.txt) and CVAT (labelmap.txt) write in its place."""
    if (root / "classes.txt").is_file():
        return tags_of.read_classes(root / "classes.txt"), "classes.txt"
    if (root / "labelmap.txt").is_file():
        try:
            return read_labelmap(root / "labelmap.txt").classes, "labelmap.txt"
        except ValueError as error:
            raise DataError(str(error)) from None
    if (root / "class_names.txt").is_file():
        return tags_of.read_class_names(root / "class_names.txt"), "class_names.txt"
    return VOC_CLASSES, ""


def find_voc_root(root: Path) -> Path:
    """The folder of VOC's layout: ``root``, or below it where the official archive has it; DataError without one."""
    tried = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    for folder in tried:
        if (folder / "JPEGImages").is_dir():
            return folder
    state = "" if root.is_dir() else " (which does not exist)"
    raise DataError(
        f"No data set in VOC's layout in {root}{state}: looked for {', '.join(str(t / 'JPEGImages') for t in tried)}. "
        "Give the folder that holds JPEGImages, ImageSets and the masks."
    )


def _holds_file(folder: Path, suffix: str) -> bool:
    return folder.is_dir() and any(entry.name.lower().endswith(suffix) for entry in os.scandir(folder))


def _index_folder(root: Path, folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """{id: path below root} of the files below a folder with one of the suffixes; earlier suffixes win."""
    rank = {suffix: number for number, suffix in enumerate(suffixes)}
    found: dict[str, tuple[int, str]] = {}
    for path in walk_files(root, folder):
        stem, suffix = os.path.splitext(path[len(folder) + 1 :])
        place, stem = rank.get(suffix.lower()), composed(stem)
        if place is not None and (stem not in found or place < found[stem][0]):
            found[stem] = (place, path)
    return {stem: path for stem, (_, path) in found.items()}
