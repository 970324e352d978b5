"""Small files of data sets, and a set in VOC's layout as its user would bring it: as a folder, and as COCO."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from misc.files.images import read_mask, write_mask
from voc12.catalog import open_catalog


def write(path: Path, text: str) -> None:
    """Write a text file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def mask(path: Path, *values: int) -> None:
    """Write a 4 x 6 mask that begins with these values, else 0."""
    pixels = np.zeros((4, 6), np.uint8)
    pixels.flat[: len(values)] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(path, pixels)


def as_folder(voc_root: Path, out: Path) -> None:
    """A generated set as its user would bring it."""
    shutil.copytree(voc_root / "JPEGImages", out / "images")
    shutil.copytree(voc_root / "SegmentationClass", out / "masks")
    shutil.copytree(voc_root / "ImageSets/Segmentation", out / "splits")
    shutil.copy(voc_root / "classes.txt", out)
    data = open_catalog("voc12", voc_root)
    rows = [(f"{i}.jpg", [data.classes[c] for c in np.flatnonzero(data.tags(i))]) for i in data.ids("trainval")]
    (out / "labels.csv").write_text("file,classes\n" + "".join(f"{file},{';'.join(names)}\n" for file, names in rows))


def as_coco(voc_root: Path, out: Path) -> None:
    """The same as COCO: an instances JSON of run lengths, categories with gaps between their ids."""
    data = open_catalog("voc12", voc_root)
    for split in ("train", "val"):
        (out / f"{split}2014").mkdir(parents=True)
        images, objects = [], []
        for image_id in data.ids(split):
            shutil.copy(data.image_path(image_id), out / f"{split}2014")
            mask, number = read_mask(data.mask_path(image_id)), int(image_id.replace("_", ""))
            images.append({"id": number, "file_name": f"{image_id}.jpg", "height": mask.shape[0],
                           "width": mask.shape[1]})  # fmt: skip
            for value in np.unique(mask[(mask > 0) & (mask < 255)]):
                coded = rle.encode(np.asfortranarray((mask == value).astype(np.uint8)))
                shape = {"size": coded["size"], "counts": coded["counts"].decode()}
                objects.append({"id": len(objects), "image_id": number, "category_id": 7 * int(value), "iscrowd": 0,
                                "segmentation": shape})  # fmt: skip
        categories = [{"id": 7 * n, "name": name} for n, name in enumerate(data.classes, 1)]
        content = {"images": images, "annotations": objects, "categories": categories}
        (out / "annotations").mkdir(exist_ok=True)
        (out / f"annotations/instances_{split}2014.json").write_text(json.dumps(content))
