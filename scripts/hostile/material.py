"""What the tortured commands work on: a tiny sample set as people bring it, and the settings of a tiny run."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image
from pycocotools import mask as rle

TINY_FLAGS = """
--preset sample --machine.device cpu --machine.checkpoint-every 1 --overlays
--cam.network.resnet38.width 0.0625 --cam.network.dropout 0.3 --cam.fit.steps 6 --cam.fit.batch-size 4
--cam.augment.crop 48 --cam.infer.scales 1.0
--aff.network.resnet38.width 0.0625 --aff.fit.steps 4 --aff.fit.batch-size 4 --aff.augment.crop 48 --aff.walk.logt 2
--aff.label.crf.iterations 1
--seg.network.resnet38.width 0.0625 --seg.fit.steps 4 --seg.fit.batch-size 4 --seg.augment.crop 48
--seg.infer.scales 1.0 --seg.infer.crf.iterations 1
""".split()
"""Settings with which ``seam`` runs all its steps in seconds."""


SAMPLE_FLAGS, SAMPLE = "--sample.images 6 --sample.val 3 --sample.classes 2".split(), "data/sample-6-3-2-seed0"
"""The generated set of that run, and the folder in which it puts it."""
PLAIN_RUN = ["seam", *SAMPLE_FLAGS, *TINY_FLAGS, "--out", "run", "--machine.workers", "0"]
"""Arguments of run_sample.py: a whole tiny run."""


def names_of_classes(sample: Path) -> list[str]:
    """Names of a sample set's classes."""
    return (sample / "classes.txt").read_text().split()


def list_of(sample: Path, split: str) -> list[str]:
    """Ids of a list of a sample set."""
    return (sample / f"ImageSets/Segmentation/{split}.txt").read_text().split()


def make_folder(root: Path, sample: Path, masks: bool) -> None:
    """The sample set as a folder of one's own images."""
    (root / "images").mkdir(parents=True)
    names = names_of_classes(sample)
    lines = ["file,classes"]
    for path in sorted((sample / "JPEGImages").glob("*.jpg")):
        shutil.copy(path, root / "images")
        tree = ET.parse(sample / "Annotations" / f"{path.stem}.xml")
        present = sorted({str(o.findtext("name")) for o in tree.iter("object")}, key=names.index)
        lines.append(f"{path.name},{';'.join(present)}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    if masks:
        shutil.copy(sample / "classes.txt", root)
        shutil.copytree(sample / "SegmentationClass", root / "masks")


def make_devkit(cwd: Path, sample: Path) -> None:
    """The sample set as VOC's folder ``voc``; all training masks but two are SBD's .mat files in ``sbd``."""
    shutil.copytree(sample, cwd / "voc", ignore=shutil.ignore_patterns("sample.json", "Saliency"))
    (cwd / "sbd" / "cls").mkdir(parents=True)
    train = list_of(sample, "train")
    (cwd / "voc/ImageSets/Segmentation/train.txt").write_text("\n".join(train[:2]) + "\n")
    for name in train[2:]:
        path = cwd / "voc" / "SegmentationClass" / f"{name}.png"
        mask = np.array(Image.open(path))
        mask[mask == 255] = 0
        path.unlink()
        scipy.io.savemat(cwd / "sbd" / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": mask}})


def make_coco(root: Path, sample: Path) -> None:
    """The sample set as COCO 2014: polygons, compressed and plain run lengths in turn."""
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": 3 * i + 1, "name": n} for i, n in enumerate(names_of_classes(sample))]
    for split, year in (("train", "train2014"), ("val", "val2014")):
        (root / year).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, name in enumerate(list_of(sample, split), 1 + 1000 * (split == "val")):
            file = f"COCO_{year}_{number:012d}.jpg"
            shutil.copy(sample / "JPEGImages" / f"{name}.jpg", root / year / file)
            mask = np.array(Image.open(sample / "SegmentationClass" / f"{name}.png"))
            images.append({"id": number, "file_name": file, "height": mask.shape[0], "width": mask.shape[1]})
            for value in map(int, np.unique(mask[(mask > 0) & (mask < 255)])):
                form = len(annotations) % 3
                annotations.append({
                    "id": 100 * number + value, "image_id": number, "iscrowd": int(form == 2), "bbox": [0, 0, 1, 1],
                    "category_id": 3 * (value - 1) + 1, "area": 1.0, "segmentation": _outline(mask == value, form),
                })  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{year}.json").write_text(json.dumps(content))


def _outline(where: np.ndarray, form: int) -> Any:
    """An object (H, W) bool as COCO writes it: 0 a polygon (its box), 1 compressed run lengths, 2 plain ones."""
    size = list(where.shape)
    if form == 0:
        ys, xs = np.nonzero(where)
        left, right, top, bottom = int(xs.min()), int(xs.max()) + 1, int(ys.min()), int(ys.max()) + 1
        return [[float(v) for v in (left, top, right, top, right, bottom, left, bottom)]]
    if form == 1:
        coded = rle.encode(np.asfortranarray(where.astype(np.uint8)))
        return {"size": size, "counts": coded["counts"].decode()}
    flat = where.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
    return {"size": size, "counts": np.diff(np.concatenate([[0], edges])).tolist()}
