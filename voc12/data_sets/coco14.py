"""MS-COCO 2014: ``--data coco14 --root DIR`` (evaluation.md section 4), prepared once by

    python -m voc12.prepare coco14 --root DIR

    DIR/train2014, DIR/val2014          images (or DIR/images/train2014 ...)
    DIR/annotations/instances_*.json    read by the preparation only
    DIR/labels.csv, classes.txt         tags and the 80 classes
    DIR/splits/                         train, val: all images; train_tagged, val_tagged: those with an object
    DIR/SegmentationClass/{train2014,val2014}/ID.png    masks; ready-made ones of other groups are read too
"""

from __future__ import annotations

from pathlib import Path

from voc12.catalog import data_set
from voc12.data_sets.folder import FolderCatalog
from voc12.tags import DataError

YEAR_FOLDERS = {"train": "train2014", "val": "val2014"}
"""Folder of images, and part of the JSON's name, by list."""


@data_set("coco14")
class Coco14Catalog(FolderCatalog):
    """The layout above, as ``voc12.prepare`` leaves it; DataError where that has not been run."""

    hides_objects = True
    image_folders = tuple(f"{above}{year}" for above in ("", "images/") for year in YEAR_FOLDERS.values())
    mask_folders = tuple(f"SegmentationClass/{year}" for year in YEAR_FOLDERS.values())

    def __init__(self, name: str, root: Path) -> None:
        prepared = (root / "labels.csv", root / "classes.txt", root / "splits")
        if root.is_dir() and not all(path.exists() for path in prepared):
            raise DataError(self._needs(root))
        super().__init__(name, root)

    def _needs(self, root: Path) -> str:
        return f"COCO in {root} is not prepared: run python -m voc12.prepare coco14 --root {root} once."
