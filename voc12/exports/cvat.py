"""CVAT: ``annotations.xml`` of "CVAT for images", and the folder of "Segmentation mask" with ``labelmap.txt``."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from misc.files.ids import composed
from misc.files.images import LARGEST_MEGAPIXELS
from misc.files.labelmap import read_labelmap
from voc12.export import (
    SPLITS,
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
)  # fmt: skip
from voc12.tags import DataError, checked_classes, parse_xml, read_xml_file

_LARGEST = 512 << 20
_AREAS = ("polygon", "mask", "ellipse")


@export_format("cvat", "CVAT: annotations.xml ('CVAT for images'), or the folder of 'Segmentation mask' (labelmap.txt)")
def read_cvat(source: Path) -> Export:
    """Tags of images and labels of shapes are classes; an image with boxes or lines gets no mask."""
    if source.is_dir() and (source / "labelmap.txt").is_file():
        return _mask_folder(source)
    path = source if source.is_file() else source / "annotations.xml"
    if not path.is_file():
        raise DataError(f"{source} holds neither annotations.xml nor labelmap.txt: export from CVAT again.")
    root = read_xml_file(path, parse_xml, _LARGEST)
    entries = list(root.iter("image"))
    need(entries, f"{path} has no image: export 'CVAT for images' (of videos, its frames).")
    listed = [composed((e.findtext("name") or "").strip()) for e in root.iter("label") if e.find("name") is not None]
    used = {_label(e, path) for image in entries for e in image}
    if listed:
        classes = checked_classes([n for n in listed if n.lower() != "background"], lambda n: f"{path}, label {n}")
    else:
        classes = all_classes(used, path)
    strange = sorted(used - set(classes) - {"background"})
    if strange:
        raise DataError(f"{path} uses the label {strange[0]!r}, which its list of labels lacks: export it again.")
    folder = path.parent
    find = PictureFinder(folder)
    images: list[ExportedImage] = []
    boxed = 0
    files = find([NamedPicture(entry.get("name") or "") for entry in entries], path)
    find.check()
    for entry, file in zip(entries, files, strict=True):
        assert file is not None  # checked
        shapes = [e for e in entry if e.tag != "tag"]
        drawn = bool(shapes) and all(e.tag in _AREAS for e in shapes)
        boxed += bool(shapes) and not drawn
        names = tuple(c for c in classes if c in {_label(e, path) for e in entry})
        mask = _Mask(_size(entry, path), _drawings(entry, shapes, classes, path)) if drawn else None
        split = SPLITS.get((entry.get("subset") or "").lower(), "")
        images.append(ExportedImage(file, named_by_path(folder, file), names, split, mask))
    notes = find.notes()
    if boxed:
        notes.append(f"{boxed} images have shapes without an outline (boxes, lines): they get tags and no mask.")
    return Export(classes, images, tuple(notes))


def _label(element: ET.Element, path: Path) -> str:
    label = element.get("label")
    if not label:
        raise DataError(f"{path}: a {element.tag} has no label. Export it again.")
    return composed(label.strip())


def _size(entry: ET.Element, path: Path) -> tuple[int, int]:
    try:
        size = int(entry.get("height") or ""), int(entry.get("width") or "")
        if min(size) < 1 or size[0] * size[1] > LARGEST_MEGAPIXELS * 1e6:
            raise ValueError
        return size
    except ValueError:
        raise DataError(f"{path}: the image {entry.get('name')!r} has no possible height and width.") from None


@dataclass(frozen=True)
class _Drawing:
    """A shape: its kind, mask value, and numbers: points of a polygon, run lengths and box of a mask, or cx, cy, rx, ry
    and degrees, clockwise, of an ellipse."""

    kind: str
    value: int
    numbers: tuple[float, ...]
    box: tuple[int, ...] = ()


def _drawings(
    entry: ET.Element, shapes: list[ET.Element], classes: tuple[str, ...], path: Path
) -> list[_Drawing]:
    """The shapes of an image in the order of their layers; DataError for one whose numbers are none."""
    height, width = _size(entry, path)
    drawings: list[_Drawing] = []
    try:
        for e in sorted(shapes, key=lambda e: int(e.get("z_order") or 0)):
            label = _label(e, path)
            value = classes.index(label) + 1 if label in classes else 0
            if e.tag == "polygon":
                points = tuple(float(v) for p in (e.get("points") or "").split(";") for v in p.split(","))
                if len(points) < 6 or len(points) % 2:
                    raise ValueError("a polygon of fewer than three points")
                drawings.append(_Drawing(e.tag, value, points))
            elif e.tag == "ellipse":
                sides = tuple(float(e.get(k) or "") for k in ("cx", "cy", "rx", "ry"))
                drawings.append(_Drawing(e.tag, value, (*sides, float(e.get("rotation") or 0))))
            else:
                box = tuple(int(e.get(k) or "") for k in ("left", "top", "width", "height"))
                runs = tuple(float(int(v)) for v in (e.get("rle") or "").split(","))
                if min(runs) < 0 or sum(runs) != box[2] * box[3] or min(box) < 0:
                    raise ValueError("a mask whose run lengths do not add up to its box")
                if sum(runs) > height * width:
                    raise ValueError("a mask whose box has more pixels than the image")
                drawings.append(_Drawing(e.tag, value, runs, box))
            far = 1e6 if e.tag in ("polygon", "ellipse") else math.inf  # run lengths add up to the box
            if not all(abs(v) < far for v in drawings[-1].numbers):
                raise ValueError("a shape far outside the image")
    except (ValueError, OverflowError) as error:
        raise DataError(f"{path}, image {entry.get('name')!r}: {error}. Export it again.") from None
    return drawings


@dataclass(frozen=True)
class _Mask:
    size: tuple[int, int]
    drawings: list[_Drawing]

    def __call__(self) -> np.ndarray:
        mask = np.zeros(self.size, np.uint8)
        for drawing in self.drawings:
            n = drawing.numbers
            if drawing.kind == "polygon":
                cv2.fillPoly(mask, [np.round(np.reshape(n, (-1, 2))).astype(np.int32)], drawing.value)
            elif drawing.kind == "ellipse":
                centre, radii = (round(n[0]), round(n[1])), (max(0, round(n[2])), max(0, round(n[3])))
                cv2.ellipse(mask, centre, radii, n[4], 0, 360, drawing.value, -1)
            else:
                left, top, width, height = drawing.box
                inside = np.repeat(np.arange(len(n)) % 2 == 1, np.array(n, np.int64)).reshape(height, width)
                place = mask[top : top + height, left : left + width]
                place[inside[: place.shape[0], : place.shape[1]]] = drawing.value
        return mask


def _mask_folder(source: Path) -> Export:
    """"Segmentation mask": SegmentationClass in the colours of labelmap.txt; the tags are what the masks hold."""
    try:
        classes = read_labelmap(source / "labelmap.txt").classes
    except ValueError as error:
        raise DataError(str(error)) from None
    pictures = [path for path in find_pictures(source) if path.startswith("JPEGImages/")]
    need(pictures, f"{source} has labelmap.txt and no image in JPEGImages: export from CVAT with 'Save images'.")
    return Export(classes, masked_images(source, classes, pictures, ["SegmentationClass"]))
