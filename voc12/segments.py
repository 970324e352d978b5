"""Makes class-agnostic segments of a data set's images with SAM, for the refiner sam: DIR/Segments/ID.json.

    pip install -r requirements-sam.txt
    python -m voc12.segments --root my_photos
    python -m voc12.segments --root VOCdevkit/VOC2012 --list train_aug --model facebook/sam-vit-huge --shard 0/4

Uses the mask generation of the transformers library, which fetches the weights by the model's name; without a way to
the internet give the folder of a downloaded model. A second call makes only what is missing. The exit status is 1 if
an image failed, 2 if the call was refused before any work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image

from misc import commandline, distributed
from misc.checked import Checked, Count, Fraction, Range
from misc.files import atomic, store
from misc.files.ids import checked_id
from misc.files.images import read_image
from misc.files.segments import segments_file, write_segments
from misc.image.pixels import resize_image, truncated_size
from misc.loop.each import EachFailed, WorkerDied, each
from voc12.catalog import Catalog, load_data_sets, open_catalog

FOLDER = "Segments"
"""Below the data set's root; the default of --segments."""


@dataclass(frozen=True)
class SegmentOptions(Checked):
    """What is made, of which images."""

    root: Path
    """Folder of the data set."""
    data: str | None = None
    """Data set: a name of --data of run_sample.py. Default: voc12 where there is a folder JPEGImages, else folder."""
    list: str | None = None
    """A list of the data set, or a file of one. Default: all images."""
    model: str = "facebook/sam-vit-base"
    """Name of a SAM on the Hugging Face hub, or the folder of a downloaded one."""
    out: Path | None = None
    """Where the files go. Default: ROOT/Segments."""
    long_side: Count = 1024
    """Larger images are shrunk to this long side first, as SAM does itself; their segments are of the smaller size,
    which readers resize. Pixels."""
    points: Count = 32
    """Points a side of the grid that SAM is asked at."""
    batch: Count = 64
    """Points at a time: memory."""
    quality: Fraction = 0.88
    """Masks whose quality SAM estimates below this are left out."""
    stability: Fraction = 0.95
    """Masks are left out that change more than this when they are cut a little higher or lower."""
    shard: str = "0/1"
    """i/n: only the i-th of n parts of the images (independent jobs, i from 0)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    workers: Annotated[int, Range(least=0)] = 2
    """Images that are read ahead."""

    def part(self) -> tuple[int, int]:
        """(i, n) from ``shard``. Raises ValueError if it has another form."""
        return distributed.parse_shard(self.shard)

    def catalog(self) -> Catalog:
        """The data set."""
        name = self.data or ("voc12" if (self.root / "JPEGImages").is_dir() else "folder")
        if name not in load_data_sets():
            raise ValueError(f"--data {name}: there is no such data set. There are: {', '.join(load_data_sets())}.")
        return open_catalog(name, self.root)

    def settings(self) -> dict[str, Any]:
        """What decides the segments, as JSON has it."""
        named = ("model", "long_side", "points", "quality", "stability")
        return {name: getattr(self, name) for name in named}


def make_segments(options: SegmentOptions) -> None:
    """Make the segments of every image that has none.

    Raises:
        WrongCall: no such data set or list, transformers or the model can't be had, or the folder holds segments made
            with other settings. EachFailed: some images failed.
    """
    out = options.out or options.root / FOLDER
    record = out / ".made_by.json"
    with commandline.before_work((ValueError, OSError)):
        part, catalog = options.part(), options.catalog()
        ids = list(catalog.images) if options.list is None else catalog.ids(options.list)
        there = store.read_json(record, dict) if record.exists() else options.settings()
        if there != options.settings():
            told = f"{out} holds segments made with {there}, now it is {options.settings()}"
            raise ValueError(f"{told}: give another --out.")
        device = distributed.start(options.device)
        generator = load_generator(options.model, device)
    if distributed.is_main():
        atomic.remove_leftovers([out])
        store.write_json(record, options.settings())

    def prepare(image_id: str) -> np.ndarray:
        image = read_image(catalog.image_path(image_id))
        factor = options.long_side / max(image.shape[:2])
        return resize_image(image, truncated_size(image.shape[:2], factor)) if factor < 1 else image

    def work(image_id: str, image: np.ndarray) -> None:
        masks = find_masks(generator, image, options)
        write_segments(out / f"{checked_id(image_id)}.json", masks, image.shape[:2], options.settings())

    def done(image_id: str) -> bool:
        try:
            return bool(segments_file(out, image_id))
        except FileNotFoundError:
            return False

    each("segments", ids, work, prepare=prepare, done=done, workers=options.workers, part=part)
    distributed.say(f"files: {out}/*.json")


def load_generator(model: str, device: torch.device) -> Any:
    """transformers' mask generation with a SAM; ValueError with the remedy where that can't be had."""
    try:
        from transformers import pipeline
    except ImportError:
        raise ValueError(
            "SAM is run by the library transformers, which is not installed: pip install -r requirements-sam.txt"
        ) from None
    try:
        return pipeline("mask-generation", model=model, device=device)
    except Exception as error:  # no connection, another kind of model, a damaged file: each has an error of its own
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(
            f"--model {model} can't be loaded ({cause}). Is there a way to the internet? If not, give the folder of a "
            "downloaded model (config.json, preprocessor_config.json, model.safetensors)."
        ) from error


def find_masks(generator: Any, image: np.ndarray, options: SegmentOptions) -> list[np.ndarray]:
    """Masks (H, W) bool of an image (H, W, 3) uint8; none where no mask is good enough."""
    found = generator(
        Image.fromarray(image), points_per_batch=options.batch, points_per_crop=options.points,
        pred_iou_thresh=options.quality, stability_score_thresh=options.stability,
    )  # fmt: skip
    return [np.asarray(mask, bool) for mask in found["masks"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""

    def work() -> None:
        make_segments(tyro.cli(SegmentOptions, args=argv, prog="python -m voc12.segments", description=__doc__))
        distributed.stop()

    return commandline.command(
        work, (ValueError, OSError, EachFailed, WorkerDied), "start the same command again to continue."
    )


if __name__ == "__main__":
    sys.exit(main())
