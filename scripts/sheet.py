"""One setting of a recipe at several values, in a picture: ``python -m scripts.sheet METHOD --field F --values V...``.

Takes the flags of run_sample.py with which the run was made, and does not change the run folder. Fields:

    background                the CAMs at constant background scores (needs make_cam)
    aff.label.NAME            affinity labels, by any numeric label setting of the refiner (needs make_cam)
    aff.walk.NAME             pseudo masks, by any numeric walk setting of the refiner (needs train_aff)

Writes a picture with one row per image: the image, its CAM, then one column per value (unknown pixels hatched). Prints
for every value what needs no true masks: how many of the tags have pixels in the mask, and the fractions of foreground
and unknown pixels; also the mIoU if the data set has masks (docs/your_data.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro

from misc import commandline, distributed
from misc.config import override
from misc.files import store
from misc.files.camfiles import read_cam
from misc.files.images import png_bytes, read_image, read_mask
from misc.image import draw
from misc.image.cam import Cam
from misc.image.labels import IGNORE
from misc.image.picture import Picture
from misc.precision import autocast
from misc.score.metrics import Confusion, mask_at
from misc.tables import ResultTable
from net.contract import AffinityNetwork
from step import plan
from step.lib import parsing
from step.lib.config import Job, open_job
from step.lib.networks import load_network
from voc12.lists import pick_evenly

MakeMask = Callable[[np.ndarray, Cam, float], np.ndarray]
"""image (H, W, 3) uint8, its CAMs at its size, value of the field -> mask (H, W) uint8, 255 unknown."""

LEAST = 0.005
"""A class counts as found if it has this fraction of the image's pixels in the mask."""


@dataclass
class Tally:
    """Statistics of the masks of one value."""

    tags: int = 0
    found: int = 0
    shares: list[tuple[float, float]] = field(default_factory=list)
    confusion: Confusion | None = None

    def add(self, mask: np.ndarray, keys: np.ndarray, truth: np.ndarray | None) -> None:
        """Count a mask of an image with the tags ``keys`` (K,), 0-based."""
        self.tags += len(keys)
        self.found += sum((mask == key + 1).mean() >= LEAST for key in keys)
        self.shares.append((float(((mask > 0) & (mask < IGNORE)).mean()), float((mask == IGNORE).mean())))
        if truth is not None and self.confusion is not None:
            self.confusion.add(truth, mask)

    def cells(self) -> tuple[str, ...]:
        """Tags kept, foreground, unknown and, if there are true masks, mIoU, in percent."""
        foreground, unknown = 100 * np.mean(self.shares, axis=0)
        kept = 100 * self.found / max(1, self.tags)
        miou = () if self.confusion is None else (f"{100 * self.confusion.miou():.2f}",)
        return (f"{kept:.1f}", f"{foreground:.1f}", f"{unknown:.1f}", *miou)


def maker(job: Job, name: str, device: torch.device) -> MakeMask:
    """The function that makes the mask of an image at a value of the field ``name``. Raises ValueError for another
    field."""
    if name == "background":
        return lambda image, cam, value: mask_at((cam.keys, cam.maps), value)
    part, _, number = name.removeprefix("aff.").partition(".")
    if part not in ("label", "walk") or not number:
        raise ValueError(f"--field {name}: give background, or a numeric setting of aff.label or aff.walk.")
    options = getattr(job.cfg.aff, part)
    override(options, {number: 0.5})  # its error lists the fields
    whole = isinstance(_current(options, number), int)

    def changed(value: float) -> object:
        return override(options, {number: int(value) if whole and float(value).is_integer() else value})

    if part == "label":
        method = job.refine_method()
        return lambda image, cam, value: method.make_label(image, cam, changed(value))[0]
    network = load_network(job, "aff", job.cfg.aff, device)
    assert isinstance(network, AffinityNetwork)

    def walk(image: np.ndarray, cam: Cam, value: float) -> np.ndarray:
        if not len(cam.keys):
            return np.zeros(image.shape[:2], np.uint8)
        picture = Picture.of_rgb(image, network.normalisation).to(device)
        with torch.inference_mode(), autocast(job.cfg.machine, device):
            scores = network.refine(picture, cam, changed(value))  # (K + 1, H, W)
        return np.array([0, *(cam.keys + 1)], np.uint8)[scores.argmax(0)]

    return walk


def _current(options: object, dotted: str) -> object:
    for name in dotted.split("."):
        options = getattr(options, name)
    return options


def sheet_arguments(
    method: tyro.conf.Positional[str] = "seam",
    field: str = "background",
    values: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    images: tuple[str, ...] = (),
    rows: int = 4,
    count: int = 100,
    height: int = 120,
    sheet: Path = Path("sheet.png"),
) -> tuple[str, str, tuple[float, ...], tuple[str, ...], int, int, int, Path]:
    """Compare several values of one setting of a recipe. Flags that are not listed here are those of run_sample.py.

    Args:
        method: Method, as for run_sample.py.
        field: background, aff.label.NAME or aff.walk.NAME.
        values: Values of the field.
        images: Ids of the images shown. Default: images at equal distances in the training list.
        rows: Number of images shown if none are named.
        count: Number of images, at equal distances in the training list, in the printed table.
        height: Height of each image in the picture. Pixels.
        sheet: Path of the picture.
    """
    return method, field, values, images, rows, count, height, sheet


def main(argv: Sequence[str]) -> int:
    """Command line. Returns the exit status."""
    return commandline.command(lambda: draw_sheet(argv), plan.PROBLEMS)


def draw_sheet(argv: Sequence[str]) -> None:
    """Draw the sheet, and print the table."""
    prog = "python -m scripts.sheet"
    found, flags = commandline.parse_options(sheet_arguments, argv, prog=prog, return_unknown_args=True)
    method, name, values, images, rows, count, height, sheet = found
    try:
        cfg = parsing.parse([method, *flags])
        job, device = open_job(cfg), distributed.start(cfg.machine.device)
        make = maker(job, name, device)
        ids = job.train_ids()
        shown, counted = list(images) or pick_evenly(ids, rows), pick_evenly(ids, count)
        scored = all(job.catalog.mask_path(i) is not None for i in counted)
        classes = job.catalog.num_classes + 1
        tallies = {v: Tally(confusion=Confusion(classes) if scored else None) for v in values}
        pictures: dict[str, list[np.ndarray]] = {}
        for image_id in dict.fromkeys([*shown, *counted]):
            image, cam = read_image(job.catalog.image_path(image_id)), read_cam(job.run.cam(image_id)).at_image_size()
            truth = read_mask(job.catalog.mask_path(image_id)) if scored and image_id in counted else None
            strongest = cam.maps.max(0) if len(cam.keys) else np.zeros(image.shape[:2], np.float32)
            row = [draw.titled(image, image_id, height), draw.titled(draw.heat(image, strongest), "CAM", height)]
            for value in values:
                mask = make(image, cam, value)
                if image_id in counted:
                    tallies[value].add(mask, cam.keys, truth)
                row.append(draw.titled(draw.overlay(image, mask), f"{value:g}", height))
            if image_id in shown:
                pictures[image_id] = row
        drawn = draw.framed([cell for i in shown for cell in pictures[i]], 2 + len(values))
        store.write_bytes(sheet, png_bytes(drawn))
    finally:
        distributed.stop()
    print(f"{name}, {len(counted)} images of {job.train_list}, in percent")
    head = ("value", "tags kept", "foreground", "unknown", *(("mIoU",) if scored else ()))
    table = ResultTable(head, [(f"{v:g}", *tally.cells()) for v, tally in tallies.items()], numbers=range(len(head)))
    print(table.markdown())
    print(f"picture: {sheet}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
