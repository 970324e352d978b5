"""Tags and masks from COCO's ``instances_*.json`` (evaluation.md section 4): the rules of ReCAM, 64-bit safe.

Mask value = rank of the category id (1..80 for COCO 2014, whose ids run to 90 with gaps). Tags: all categories among an
image's annotations, crowds included unless asked otherwise. Masks: annotations in the order of the file, later objects
over earlier ones, crowds left out (background) or ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle

from misc.files.images import LARGEST_MEGAPIXELS
from misc.files.runlengths import read_run_lengths, region_of_runs
from misc.files.schema import Number, find_fault
from misc.files.store import check_file
from misc.image.labels import IGNORE
from voc12.tags import DataError, checked_classes

Crowds = Literal["background", "ignore"]


@dataclass
class CocoAnnotations:
    """What one file says.

    Attributes:
        classes: category names in the order of their ids.
        values: {category id: mask value}.
        files: {image number: file name, with folders as it is written}, in ascending order of the numbers.
        sizes: {image number: (H, W)}.
        objects: {image number: its annotations in the order of the file}; images without any are not in it.
        left_out: categories that no annotation has and that are no classes: the background, and one that is the
            supercategory of all others, as Roboflow writes it.
    """

    classes: tuple[str, ...]
    values: dict[int, int]
    files: dict[int, str]
    sizes: dict[int, tuple[int, int]]
    objects: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def names(self, number: int, crowds: bool = True) -> list[str]:
        """Classes of an image, each once, in the order of the classes."""
        present = {self.values[o["category_id"]] for o in self.objects.get(number, ()) if crowds or not o["iscrowd"]}
        return [self.classes[value - 1] for value in sorted(present)]

    def mask(self, number: int, crowds: Crowds = "background") -> np.ndarray:
        """(H, W) uint8 mask of an image: 0 background, 1..C, 255 where a crowd is ignored and no object covers it.

        Raises DataError for a segmentation that is none, and for an image too large to be read.
        """
        height, width = self.sizes[number]
        if height * width > LARGEST_MEGAPIXELS * 1e6:
            raise DataError(f"{self.files[number]}: {height} x {width} pixels are too many, no such image is read.")
        mask = np.zeros((height, width), np.uint8)
        crowd_first = sorted(self.objects.get(number, ()), key=lambda o: not o["iscrowd"])  # stable: file order stays
        for thing in crowd_first:
            if thing["iscrowd"] and crowds == "background":
                continue
            value = IGNORE if thing["iscrowd"] else self.values[thing["category_id"]]
            mask[_region(thing, height, width)] = value
        return mask


def _region(thing: dict[str, Any], height: int, width: int) -> np.ndarray:
    """(H, W) bool of an annotation: polygons, or run lengths, compressed or not."""
    shape = thing.get("segmentation")
    where = f"annotation {thing.get('id')} of image {thing['image_id']}"
    if shape in (None, []):
        return np.zeros((height, width), bool)  # only a box is known
    if not isinstance(shape, (list, dict)):
        raise DataError(f"{where}: its segmentation is a {type(shape).__name__}, not polygons or run lengths.")
    if isinstance(shape, dict) and shape.get("size") != [height, width]:
        raise DataError(f"{where}: its run lengths are of size {shape.get('size')}, the image is {height} x {width}.")
    if isinstance(shape, list):
        if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in shape):
            raise DataError(f"{where}: a polygon is a list of x and y in turn, at least three points.")
        # the decoder draws every step of an outline, far outside the image too
        fault = find_fault(shape, [[Number(-_FAR * max(height, width), _FAR * max(height, width))]], "segmentation")
        if fault:
            raise DataError(f"{where}: {fault} (the image is {height} x {width}).")
        coded = rle.merge(rle.frPyObjects(shape, height, width))
        return rle.decode(coded).astype(bool)
    try:
        return region_of_runs(read_run_lengths(shape.get("counts"), height, width), height, width)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


_FAR = 10
"""Sides of the image that a polygon may reach beyond it."""


def read_coco_annotations(path: Path) -> CocoAnnotations:
    """Read an instances file as a whole (COCO's train2014 takes some GB of memory while it is read).

    Raises DataError for a missing or damaged file, one of another kind (captions, keypoints ...), an annotation of an
    unknown image or category, an image twice.
    """
    try:
        check_file(path)  # before it is opened: a pipe would be waited for
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: put COCO's annotations there, or say --annotations DIR.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): unpack or download it again.") from None
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in lists):
        raise DataError(f"{path} is no instances file: it lacks one of the lists {', '.join(lists)}.")
    fault = find_fault({name: content[name] for name in lists}, _INSTANCES)
    if fault:
        raise DataError(f"{path} is no instances file: {fault}.")
    try:
        return _collect(path, content)
    except KeyError as error:
        raise DataError(f"{path} is no instances file: an entry lacks {error}.") from None


_ID = Number(-(2**63), 2**63, whole=True)
_SIDE = Number(1, 65535, whole=True)
_INSTANCES = {
    "images": [{"id": _ID, "file_name": str, "height": _SIDE, "width": _SIDE}],
    "annotations": [{"image_id": _ID, "category_id": _ID, "?iscrowd": Number(0, 1)}],
    "categories": [{"id": _ID, "name": str}],
}


def _is_no_class(category: dict[str, Any], categories: list[dict[str, Any]]) -> bool:
    """Whether a category is the background or stands over all others."""
    over = [c.get("supercategory") for c in categories if c is not category]
    return category["name"].strip("_ ").lower() == "background" or (bool(over) and set(over) == {category["name"]})


def _collect(path: Path, content: dict[str, Any]) -> CocoAnnotations:
    categories = sorted(content["categories"], key=lambda c: c["id"])
    used = {thing["category_id"] for thing in content["annotations"]}
    idle = [c for c in categories if c["id"] not in used and _is_no_class(c, categories)]
    categories = [c for c in categories if c not in idle]
    classes = checked_classes([c["name"] for c in categories], lambda n: f"{path}, category {n}")
    values = {c["id"]: rank for rank, c in enumerate(categories, 1)}
    files: dict[int, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for image in sorted(content["images"], key=lambda i: i["id"]):
        if image["id"] in files:
            raise DataError(f"{path}: image {image['id']} comes twice.")
        files[image["id"]] = image["file_name"]
        sizes[image["id"]] = (int(image["height"]), int(image["width"]))
    found = CocoAnnotations(classes, values, files, sizes, left_out=tuple(c["name"] for c in idle))
    for thing in content["annotations"]:
        where = f"{path}: annotation {thing.get('id')}"
        if thing["image_id"] not in files:
            raise DataError(f"{where} is of image {thing['image_id']}, which the file does not list.")
        if thing["category_id"] not in values:
            raise DataError(f"{where} is of category {thing['category_id']}, which the file does not list.")
        kept = {k: thing.get(k) for k in ("id", "image_id", "category_id", "segmentation")}
        found.objects.setdefault(thing["image_id"], []).append({**kept, "iscrowd": bool(thing.get("iscrowd", 0))})
    return found
