"""labelme: its JSON files (shapes, or flags as tags), and the folder that ``labelme2voc`` writes."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from misc.files.ids import composed
from misc.files.schema import Each, Number
from misc.image.labels import IGNORE
from voc12.export import (
    Export,
    ExportedImage,
    NamedPicture,
    PictureFinder,
    all_classes,
    export_format,
    find_pictures,
    masked_images,
    named_by_path,
    need,
    read_annotations,
)  # fmt: skip
from voc12.tags import DataError, read_class_names

_POINT = Number(-1e6, 1e6)
_SHAPE = {"label": str, "points": [[_POINT]], "?shape_type": str}
_FILE = {
    "shapes": [_SHAPE], "imagePath": str, "imageHeight": Number(1, 65535, whole=True),
    "imageWidth": Number(1, 65535, whole=True), "?flags": Each(bool),
}  # fmt: skip
_AREAS = ("polygon", "rectangle", "circle", "mask")


@export_format("labelme", "labelme's JSON files (shapes; flags are tags), or the folder that labelme2voc writes")
def read_labelme(source: Path) -> Export:
    """Shapes without an area (points, lines) give a tag, and then the image has no mask."""
    if (source / "class_names.txt").is_file():
        return _voc_folder(source)
    files = [path for path in sorted(source.rglob("*.json")) if not path.name.startswith(".")]
    need(files, f"{source} holds neither labelme's JSON files nor class_names.txt, which labelme2voc writes.")
    contents = {path: read_annotations(path, _FILE) for path in files}
    labels = source / "labels.txt"
    occurring = {name for content in contents.values() for name in _names(content)}
    classes = read_class_names(labels) if labels.exists() else all_classes(occurring, source)
    strange = sorted(occurring - set(classes))
    if strange:
        raise DataError(f"{labels} lacks {strange[0]!r}, which is drawn: add it, or mend the shape's label.")
    find = PictureFinder(source)
    images: list[ExportedImage] = []
    without = 0
    named = [NamedPicture(content["imagePath"], (path.parent,)) for path, content in contents.items()]
    pictures = find(named, files[0] if len(files) == 1 else source)
    find.check()
    for (path, content), file in zip(contents.items(), pictures, strict=True):
        assert file is not None  # checked
        shapes = content["shapes"]
        drawn = bool(shapes) and all(shape.get("shape_type", "polygon") in _AREAS for shape in shapes)
        without += bool(shapes) and not drawn
        names = tuple(name for name in classes if name in _names(content))
        mask = _Mask(path, content, classes) if drawn else None
        images.append(ExportedImage(file, named_by_path(source, file), names, mask=mask))
    notes = find.notes()
    if without:
        notes.append(f"{without} images have shapes without an area: they get tags and no mask.")
    return Export(classes, images, tuple(notes))


def _names(content: dict[str, Any]) -> set[str]:
    """Classes of a file: labels of its shapes, and flags that are set."""
    names = [shape["label"] for shape in content["shapes"]]
    names += [name for name, is_set in (content.get("flags") or {}).items() if is_set]
    return {composed(n.strip()) for n in names if n.strip() and _value_of(n, ()) is None}


def _value_of(label: str, classes: Sequence[str]) -> int | None:
    """Mask value of a label; None where it is no class."""
    label = composed(label.strip())
    special = {"background": 0, "ignore": IGNORE}.get(label.strip("_").lower() if label.startswith("_") else "")
    return special if special is not None else classes.index(label) + 1 if label in classes else None


@dataclass(frozen=True)
class _Mask:
    path: Path
    content: dict[str, Any]
    classes: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.content["imageHeight"], self.content["imageWidth"]

    def __call__(self) -> np.ndarray:
        mask = np.zeros(self.size, np.uint8)
        for shape in self.content["shapes"]:
            value = _value_of(shape["label"], self.classes)
            points = np.array(shape["points"], np.float64)
            if value is None or points.ndim != 2 or points.shape[1] != 2:
                raise DataError(f"{self.path}: the shape {shape['label']!r} has no points of x and y. Draw it again.")
            _draw(mask, shape, points, value, self.path)
        return mask


def _draw(mask: np.ndarray, shape: dict[str, Any], points: np.ndarray, value: int, path: Path) -> None:
    kind = shape.get("shape_type", "polygon")
    least = {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2}[kind]
    if len(points) < least:
        raise DataError(f"{path}: a {kind} of {shape['label']!r} has {len(points)} points, {least} are needed.")
    (x1, y1), (x2, y2) = points[0], points[1]
    if kind == "circle":  # its centre and a point on it
        turns = np.linspace(0, 2 * math.pi, 72)
        radius = math.hypot(x2 - x1, y2 - y1)
        points = np.stack([x1 + radius * np.cos(turns), y1 + radius * np.sin(turns)], 1)
    elif kind == "rectangle":
        points = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    elif kind == "mask":  # a small picture of the object at its first point
        inside = _small_mask(shape, path, mask.size)
        top, left = round(max(0, y1)), round(max(0, x1))
        place = mask[top : top + inside.shape[0], left : left + inside.shape[1]]
        place[inside[: place.shape[0], : place.shape[1]]] = value
        return
    cv2.fillPoly(mask, [np.round(points).astype(np.int32)], value)


def _small_mask(shape: dict[str, Any], path: Path, largest: int) -> np.ndarray:
    """(h, w) bool of the picture in a shape of type mask, which has at most ``largest`` pixels."""
    try:
        data = base64.b64decode(str(shape.get("mask")), validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size[0] * image.size[1] > largest:
                raise ValueError(f"it is {image.size[1]} x {image.size[0]} pixels high and wide, more than the image")
            return np.array(image.convert("L")) > 0
    except (binascii.Error, ValueError, OSError, SyntaxError) as error:
        raise DataError(f"{path}: the mask of {shape['label']!r} cannot be read ({error}): draw it again.") from None


def _voc_folder(source: Path) -> Export:
    """labelme2voc's folder: JPEGImages, class_names.txt, and masks in SegmentationClassPNG or SegmentationClass."""
    classes = read_class_names(source / "class_names.txt")
    pictures = [path for path in find_pictures(source) if path.startswith("JPEGImages/")]
    need(pictures, f"{source} has class_names.txt and no image in JPEGImages: export it again by labelme2voc.")
    return Export(classes, masked_images(source, classes, pictures, ["SegmentationClassPNG", "SegmentationClass"]))
