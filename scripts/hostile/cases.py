"""A hostile input: a file in its place, the command that reads it, and what is expected of it."""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from scripts.hostile.material import (
    PLAIN_RUN,
    SAMPLE,
    SAMPLE_FLAGS,
    make_coco,
    make_devkit,
    make_folder,
    names_of_classes,
)  # fmt: skip

ONE, THIRD = "2025_000001", "2025_000003"
"""A training image; one whose mask is SBD's in ``make_devkit``."""
USUAL_LIMIT = 20.0
"""Seconds after which a command hangs."""

Data = bytes | Callable[[Path], None]
"""Bytes of a file, or what makes it at a path."""
Build = Callable[[Path], None]
"""Lays a hostile file and all that its command needs into an empty folder."""
Must = Literal["any", "refuse", "accept"] | Callable[[Path], str]
"""any: refused by name or taken; refuse, accept; a function: what is wrong in the folder where it was taken, or ""."""


@dataclass(frozen=True)
class HostileFile:
    """One hostile input."""

    kind: str
    name: str
    script: str
    argv: list[str]
    build: Build
    must: Must = "any"
    victim: str = ""
    """Text that a refusal must hold: the name of the hostile file, as a rule."""
    limit: float = USUAL_LIMIT
    heavy: bool = False
    """Takes long or makes large files: not for a quick round."""


def put(path: Path, data: Data) -> None:
    """Put a file in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(data):
        data(path)
        return
    if path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(data)


def _copied(source: Path, target: Path) -> None:
    """A tree of links to a folder's files: a hostile file replaces a link, never what it points to."""
    shutil.copytree(source, target, copy_function=lambda a, b: Path(b).symlink_to(a))


def rewind(run: Path, step: str) -> None:
    """Make a finished run one whose steps from ``step`` on are not done."""
    makes = {
        "train_cam": ["weights/cam.pt"], "make_cam": ["cam"], "make_aff_label": ["aff_label"],
        "train_aff": ["weights/aff.pt"], "random_walk": ["label", "label_overlay"], "train_seg": ["weights/seg.pt"],
        "infer_seg": ["seg", "seg_overlay"], "report": ["report.html", "pictures.png"],
    }  # fmt: skip
    record = json.loads((run / "run.json").read_text())
    for name in list(makes)[list(makes).index(step) :]:
        record["steps"].pop(name, None)
        for path in (run / made for made in makes[name]):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    put(run / "run.json", json.dumps(record).encode())


class Bench:
    """A finished tiny run, and the places where a hostile file is put."""

    prepare_folder = ["folder", "--root", "photos", "--workers", "0"]
    prepare_voc = ["voc12", "--root", "voc", "--sbd", "sbd", "--workers", "0"]
    prepare_coco = ["coco14", "--root", "coco", "--workers", "0"]
    machine = ["--machine.device", "cpu", "--machine.workers", "0"]
    predict = ["in", "--weights", "seg.pt", "--out", "out", *machine, "--fast"]
    predict_tags = ["in", "--run", "run", "--out", "out", *machine, "--fast", "--refine", "threshold"]
    evaluate = ["--list", "d/ImageSets/Segmentation/train.txt", "--gt-dir", "d/SegmentationClass", "--num-classes", "3",
                "--json", "o.json"]  # fmt: skip
    evaluate_masks = [*evaluate, "--predict-dir", "label"]
    evaluate_maps = [*evaluate, "--predict-dir", "cam", "--type", "npz", "--curve", "--step", "0.1"]
    run = PLAIN_RUN
    start = ["psa", *SAMPLE_FLAGS, *machine, "--steps", "train_cam", "--out", "new", "--cam.fit.steps", "1",
             "--cam.fit.batch-size", "2", "--cam.augment.crop", "48",
             "--cam.network.resnet38.width", "0.0625"]  # fmt: skip

    def __init__(self, base: Path, rng: random.Random):
        self.base, self.rng = base, rng
        self.sample = base / SAMPLE
        self.names = names_of_classes(self.sample)
        self.tag = self.names[0]
        self.photo = (self.sample / "JPEGImages" / f"{ONE}.jpg").read_bytes()
        self.mask_file = (self.sample / "SegmentationClass" / f"{ONE}.png").read_bytes()
        with Image.open(io.BytesIO(self.photo)) as image:
            self.width, self.height = image.size
            self.pixels = image.convert("RGB").copy()
        self.mask = np.array(Image.open(io.BytesIO(self.mask_file)))

    @functools.cached_property
    def coco_file(self) -> bytes:
        """The sample set's training images as COCO's JSON."""
        if not (self.base / "coco").exists():
            make_coco(self.base / "coco", self.sample)
        return (self.base / "coco/annotations/instances_train2014.json").read_bytes()

    def made(self, name: str) -> bytes:
        """A file of the finished run."""
        return (self.base / "run" / name).read_bytes()

    def in_folder(self, place: str, data: Data, *, masks: bool = True, remove: str = "", edit: Build | None = None) -> Build:  # noqa: E501
        """A file of a folder of one's own photos."""

        def build(cwd: Path) -> None:
            make_folder(cwd / "photos", self.sample, masks=masks)
            if remove:
                (cwd / "photos" / remove).unlink()
            put(cwd / "photos" / place, data)
            if edit is not None:
                edit(cwd / "photos")

        return build

    def in_predict(self, place: str, data: Data, weights: Data | None = None) -> Build:
        """An image (or the weights) that predict.py is given, beside a good image."""

        def build(cwd: Path) -> None:
            put(cwd / "in" / place, data)
            shutil.copy(self.sample / "JPEGImages" / "2025_000002.jpg", cwd / "in")
            put(cwd / "seg.pt", self.made("weights/seg.pt") if weights is None else weights)

        return build

    def in_tagged(self, data: Data, also: Build | None = None) -> Build:
        """The CAM network of a run that predict.py --tags is given."""

        def build(cwd: Path) -> None:
            put(cwd / "in/a.jpg", self.photo)
            put(cwd / "run/weights/cam.pt", data)
            if also is not None:
                also(cwd)

        return build

    def in_evaluation(self, place: str, data: Data, also: Build | None = None) -> Build:
        """A file that evaluation.py reads: below d (the set), cam or label."""

        def build(cwd: Path) -> None:
            _copied(self.sample, cwd / "d")
            _copied(self.base / "run" / "cam", cwd / "cam")
            _copied(self.base / "run" / "label", cwd / "label")
            put(cwd / place, data)
            if also is not None:
                also(cwd)

        return build

    def in_run(self, place: str, data: Data, step: str = "") -> Build:
        """A file of a run whose steps from ``step`` on are not done."""

        def build(cwd: Path) -> None:
            (cwd / "data").symlink_to(self.base / "data")
            shutil.copytree(self.base / "run", cwd / "run")
            if step:
                rewind(cwd / "run", step)
            put(cwd / "run" / place, data)

        return build

    def in_voc(self, place: str, data: Data) -> Build:
        """A file of VOC's folder or of SBD's."""

        def build(cwd: Path) -> None:
            make_devkit(cwd, self.sample)
            put(cwd / place, data)

        return build

    def in_coco(self, data: Data) -> Build:
        """The annotations of COCO's training images."""

        def build(cwd: Path) -> None:
            make_coco(cwd / "coco", self.sample)
            put(cwd / "coco/annotations/instances_train2014.json", data)

        return build

    def in_start(self, file: str, data: Data) -> Build:
        """Start weights of a new run."""

        def build(cwd: Path) -> None:
            (cwd / "data").symlink_to(self.base / "data")
            put(cwd / file, data)

        return build
