"""The generated sample set in VOC 2012's own layout, so that it is read like VOC.

voc12/generated/draw.py draws its pictures.

Deterministic: the same parameters give the same bytes, and a smaller set is a prefix of a larger one. In the layout of
CUB-200-2011 each picture shows one object, whose box is known.

    python -m voc12.generated OUT --images 240 --val 80 --classes 5 --seed 0
    python -m voc12.generated OUT --layout cub
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import tyro
from PIL import Image

from misc.files import atomic, store
from misc.image.draw import palette
from voc12.generated.draw import SPLIT_YEARS, DrawnPicture, draw_picture, draw_saliency
from voc12.generated.marks import MARKS, class_names

LAYOUTS: dict[str, Literal["voc", "cub"]] = {"sample": "voc", "sample_cub": "cub"}
"""Generated data sets by their name on the command line."""

FORMAT = 2  # raise it when the same parameters begin to give other pictures
JPEG_QUALITY = 90
SHORTEST = 64  # below this long side no mark is readable


def _annotation(name: str, picture: DrawnPicture) -> str:
    """The VOC annotation of a picture; boxes are of the seen pixels, 1-based, both ends included."""
    h, w = picture.instances.shape
    root = ET.Element("annotation")
    for key, text in (("folder", "VOC2012"), ("filename", f"{name}.jpg")):
        ET.SubElement(root, key).text = text
    size = ET.SubElement(root, "size")
    for key, value in (("width", w), ("height", h), ("depth", 3)):
        ET.SubElement(size, key).text = str(value)
    ET.SubElement(root, "segmented").text = "1"
    for number, (label, difficult) in enumerate(zip(picture.labels, picture.difficult, strict=True), 1):
        x, y, bw, bh = cv2.boundingRect((picture.instances == number).astype(np.uint8))
        thing = ET.SubElement(root, "object")
        cut = x == 0 or y == 0 or x + bw == w or y + bh == h
        ET.SubElement(thing, "name").text = MARKS[label - 1].name
        ET.SubElement(thing, "pose").text = "Unspecified"
        ET.SubElement(thing, "truncated").text = str(int(cut))
        ET.SubElement(thing, "difficult").text = str(int(difficult))
        box = ET.SubElement(thing, "bndbox")
        for key, value in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + bw), ("ymax", y + bh)):
            ET.SubElement(box, key).text = str(value)
    ET.indent(root, "\t")
    return ET.tostring(root, encoding="unicode") + "\n"


def _write(root: Path, name: str, picture: DrawnPicture, saliency: np.ndarray) -> None:
    """Write one picture's files below `root`; without syncing, as a set counts only once sample.json stands."""
    Image.fromarray(picture.rgb).save(root / "JPEGImages" / f"{name}.jpg", quality=JPEG_QUALITY)
    (root / "Annotations" / f"{name}.xml").write_bytes(_annotation(name, picture).encode())
    for folder, mask in zip(("SegmentationClass", "SegmentationObject"), picture.masks(), strict=True):
        image = Image.fromarray(mask)
        image.putpalette(palette().tobytes())
        image.save(root / folder / f"{name}.png")
    Image.fromarray(saliency).save(root / "Saliency" / f"{name}.png")


def _claim(root: Path, wanted: dict[str, object]) -> bool:
    """Take the folder for these parameters; True if the set is there, FileExistsError where anything else is."""
    remedy = "give another folder, or delete this one first"
    for record in (root / "sample.json", root / "sample.json.part"):
        if record.is_file():
            found = store.read_json(record, dict)
            if found != wanted:
                fields = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
                told = ", ".join(f"{k} is {found.get(k)}, asked for {wanted.get(k)}" for k in fields)
                raise FileExistsError(f"{root}: a sample set with other parameters ({told}); {remedy}")
            return record.suffix == ".json"
    # a lock, and what a killed process left half written, are not anything else
    if root.exists() and any(p.name != ".lock" and not p.name.endswith(atomic.SUFFIX) for p in root.iterdir()):
        raise FileExistsError(f"{root}: neither empty nor a sample set; {remedy}")
    return False


def generate(
    root: tyro.conf.Positional[Path],
    images: int = 240,
    val: int = 80,
    classes: int = 5,
    seed: int = 0,
    long_side: tuple[int, int] = (100, 160),
    layout: Literal["voc", "cub"] = "voc",
) -> None:
    """Write the sample set; a finished set of the same parameters is left as it is.

    In VOC 2012's layout writes JPEGImages, Annotations, SegmentationClass, SegmentationObject, ImageSets/Segmentation,
    Saliency (noisy object saliency, 8 bit, one channel), classes.txt (line n names class n); in CUB's images,
    segmentations, classes.txt, images.txt, image_class_labels.txt, train_test_split.txt, bounding_boxes.txt. Last
    sample.json, the parameters. An interrupted run is done again.

    Raises ValueError for impossible parameters and FileExistsError for a folder that holds anything else.

    Args:
        root: Folder to write to; made if need be.
        images: Number of training images, at least 1.
        val: Number of validation images (test images in CUB's layout), at least 1.
        classes: Number of classes, 1 to 14.
        seed: Seed, not negative; the same seed gives the same bytes.
        long_side: Least and greatest length of an image's longer side, pixels.
        layout: That of VOC 2012, for masks, or of CUB-200-2011, for boxes: one object an image.
    """
    names = class_names(classes)
    if min(images, val) < 1 or seed < 0:
        raise ValueError(
            f"images = {images}, val = {val}, seed = {seed}: at least one image a split and a seed of 0 or more"
        )
    if not SHORTEST <= long_side[0] <= long_side[1]:
        raise ValueError(f"long_side = {long_side}: give a smallest (>= {SHORTEST}) and a largest length")
    wanted = dict(
        images=images, val=val, classes=classes, seed=seed, long_side=list(long_side), format=FORMAT
    )
    if layout == "cub":
        wanted["layout"] = layout
    if _claim(root, wanted):
        return
    with atomic.locked(root / ".lock"):  # two commands may begin at once on a set that is not there yet
        if _claim(root, wanted):
            return
        atomic.remove_leftovers([root])
        store.write_json(root / "sample.json.part", wanted)
        if layout == "cub":
            _write_cub(root, {"train": images, "val": val}, names, seed, long_side)
        else:
            _write_voc(root, {"train": images, "val": val}, names, seed, long_side)
        os.replace(root / "sample.json.part", root / "sample.json")


def _write_voc(
    root: Path, counts: dict[str, int], names: Sequence[str], seed: int, long_side: tuple[int, int]
) -> None:
    """All files of VOC's layout but sample.json."""
    folders = ["JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject", "Saliency"]
    for folder in [*folders, "ImageSets/Segmentation"]:
        (root / folder).mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[str]] = {}
    for split, count in counts.items():
        lists[split] = [f"{SPLIT_YEARS[split]}_{index + 1:06d}" for index in range(count)]
        for index, name in enumerate(lists[split]):
            picture = draw_picture(seed, split, index, len(names), long_side)
            _write(root, name, picture, draw_saliency(seed, split, index, picture))
    lists["trainval"] = lists["train"] + lists["val"]
    for split, ids in lists.items():
        store.write_bytes(root / "ImageSets" / "Segmentation" / f"{split}.txt", "".join(f"{i}\n" for i in ids).encode())
    store.write_bytes(root / "classes.txt", "".join(f"{name}\n" for name in names).encode())


def _write_cub(
    root: Path, counts: dict[str, int], names: Sequence[str], seed: int, long_side: tuple[int, int]
) -> None:
    """All files of CUB's layout but sample.json; val pictures are the test images. Boxes are of the seen pixels."""
    folders = [f"{number:03}.{name}" for number, name in enumerate(names, 1)]
    for folder in folders:
        for kind in ("images", "segmentations"):
            (root / kind / folder).mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[str]] = {"classes": [f"{n} {folder}" for n, folder in enumerate(folders, 1)]}
    pairs = [(split, index) for split, count in counts.items() for index in range(count)]
    for number, (split, index) in enumerate(pairs, 1):
        picture = draw_picture(seed, split, index, len(names), long_side, single=True)
        label = picture.labels[0]
        path = f"{folders[label - 1]}/{SPLIT_YEARS[split]}_{index + 1:06d}"
        Image.fromarray(picture.rgb).save(root / "images" / f"{path}.jpg", quality=JPEG_QUALITY)
        seen = (picture.instances > 0).astype(np.uint8)
        Image.fromarray(seen * 255).save(root / "segmentations" / f"{path}.png")
        box = " ".join(f"{float(value):.1f}" for value in cv2.boundingRect(seen))
        columns = (("images", f"{path}.jpg"), ("image_class_labels", label),
                   ("train_test_split", int(split == "train")), ("bounding_boxes", box))  # fmt: skip
        for name, value in columns:
            lists.setdefault(name, []).append(f"{number} {value}")
    for name, lines in lists.items():
        store.write_bytes(root / f"{name}.txt", "".join(f"{line}\n" for line in lines).encode())
