"""Masks of new images, without a list, a data set or ground truth.

A segmentation network needs only its weights file:

  python predict.py photos/ --weights runs/seam-sample/weights/seg.pt --out masks

A CAM network needs the classes in the images:

  python predict.py a.jpg b.jpg --run runs/seam-sample --tags "dog,person" --out maps

Export of the segmentation network:

  python predict.py --weights runs/seam-sample/weights/seg.pt --export onnx --out models

Results: masks/ID.png (palette PNG: 0 background, then the classes; predict.json lists them), overlays/ID.jpg, with
--tags maps/ID.npz and maps/ID_CLASS.jpg. Images are rotated as their EXIF data says, transparency is dropped, and of an
animation the first frame is used. An image that can't be read is reported, and the others are processed. A second call
makes only the files that are missing or older than their image.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see run_sample.py

import sys
from pathlib import Path

from misc import commandline

if __name__ == "__main__" and (answered := commandline.answer_early(Path(__file__), sys.argv[1:])) is not None:
    sys.exit(answered)  # before PyTorch is imported, which takes seconds

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
import tyro

from misc import distributed
from misc.config import Machine
from misc.files.imagefiles import find_images
from misc.files.runfolder import RunFolder
from misc.loop.each import EachFailed, WorkerDied
from net.contract import Segmenter, SingleStage
from net.export import export_onnx
from net.model import Model, load_model, predicts_masks
from step.lib.inference import settle_walk
from step.lib.new_images import Refinement, ResultFolder, map_images, segment_images


@dataclass(frozen=True)
class Options:
    """Options: images, networks and results."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Image files, folders (searched recursively) and globs; in folders and globs only files that end in jpg, jpeg,
    png, bmp, webp, tif, tiff or gif."""
    weights: Path | None = None
    """Weights file of a trained segmentation network (weights/seg.pt of a run, or weights/cam.pt of a method that
    predicts masks itself)."""
    run: Annotated[Path | None, tyro.conf.arg(aliases=["--run-folder"])] = None
    """Run folder: use its segmentation network, or with --tags its CAM network and refiner. Under torchrun write
    --run-folder, because torchrun has its own option --run."""
    out: Path = Path("predictions")
    """Folder for the results."""
    tags: str | None = None
    """Classes in the images, separated by commas: use the run's CAM network and make maps of these classes."""
    refine: Refinement = "auto"
    """With --tags, how the mask is made. walk: random walk by the run's refiner. crf: dense CRF over the maps and the
    background score. threshold: background score only. auto: the walk if the run has a trained refiner, else the
    CRF."""
    threshold: float | None = None
    """With --tags and without a walk: the background score in [0, 1]. Default: the best one on the run's scored list,
    else 0.3."""
    probabilities: bool = False
    """Also write probabilities/ID.npz: probabilities (classes + 1, h, w) float16 at the size of the network's input,
    and the image size."""
    fast: bool = False
    """One scale, no mirror image, no CRF: many times as fast, a little less accurate."""
    max_megapixels: float | None = None
    """Larger images are downscaled to this for the network; masks keep the image's size. 0: never. Default: six times
    the area of the training crops (for 448 pixels: 1.2), as far larger objects than in training are not recognised."""
    redo: bool = False
    """Make the masks of these images again."""
    export: Literal["onnx"] | None = None
    """Export the segmentation network to OUT/NAME.onnx instead (one scale, no CRF; any batch size, height and width;
    normalisation included), and compare it with PyTorch."""
    machine: Machine = field(default_factory=Machine)
    """Devices, processes, precision."""

    def __post_init__(self) -> None:
        """Raises ValueError for impossible combinations of options."""
        if (self.weights is None) == (self.run is None):
            raise ValueError("Give either --weights FILE or --run RUNFOLDER.")
        if self.tags is not None and (self.run is None or self.export):
            raise ValueError("--tags needs a CAM network: give --run RUNFOLDER, and no --export.")
        if bool(self.images) == bool(self.export):
            raise ValueError("Give images, or --export onnx without images.")
        if not (0 <= (self.max_megapixels or 0) and 0 <= (self.threshold or 0) <= 1):
            raise ValueError("--max-megapixels must be 0 or more, --threshold in [0, 1].")

    def network_file(self) -> Path:
        """Weights file of the segmentation network, or of a CAM network that predicts masks itself if the run has no
        other. Raises FileNotFoundError if it has neither."""
        if self.weights is not None:
            return self.weights
        assert self.run is not None
        run = RunFolder(self.run)
        path, own = run.weights("seg"), run.weights("cam")
        if not path.exists():
            if own.exists() and predicts_masks(own):
                return own
            raise FileNotFoundError(
                f"{self.run} has no trained segmentation network ({path}). Run its steps up to train_seg, or give "
                "--tags to make masks with its CAM network."
            )
        return path


def export(options: Options) -> None:
    """Write the ONNX file."""
    model = load_model(options.network_file(), "seg")
    assert isinstance(model.network, Segmenter | SingleStage)
    path = options.out / f"{options.network_file().stem}.onnx"
    difference = export_onnx(model.network, path, model.classes, model.recipe.infer.align_corners)
    print(f"{model.method}, {len(model.classes)} classes: differs from PyTorch by at most {difference:.1e} of the "
          f"largest logit\nfiles: {path}")  # fmt: skip


def predict(options: Options, device: torch.device) -> None:
    """Make the masks."""
    images = find_images(options.images, leave_out=options.out)
    folder = ResultFolder(options.out, options.max_megapixels, options.redo, options.machine)
    if options.tags is None:
        model = load_model(options.network_file(), "seg")
        distributed.say(f"{model.method}, trained for {', '.join(model.classes)}; {len(images)} images on {device}")
        segment_images(model, images, folder, device, probabilities=options.probabilities, fast=options.fast)
        return
    assert options.run is not None
    run = RunFolder(options.run)
    cam = load_model(run.weights("cam"), "cam")
    refiner: Model | None = None
    if run.weights("aff").exists() and options.refine in ("auto", "walk"):
        refiner = load_model(run.weights("aff"), "aff")
        refiner = replace(refiner, recipe=replace(refiner.recipe, walk=settle_walk(refiner.recipe.walk, run)))
    threshold = options.threshold
    if threshold is None:
        threshold = run.scores().get("CAM", {}).get("threshold", 0.3)
    tags = [tag.strip() for tag in options.tags.split(",") if tag.strip()]
    distributed.say(f"{cam.method} (CAM network); {len(images)} images on {device}")
    how = map_images(
        cam, refiner, tags, images, folder, device, refine=options.refine, threshold=threshold, fast=options.fast
    )
    distributed.say(f"masks made by {how}")


def main(argv: Sequence[str]) -> int:
    """Command line. Returns the exit status: 1 if any image failed."""

    def work() -> None:
        options = tyro.cli(Options, args=commandline.as_help(argv), prog="predict.py", description=__doc__)
        if options.export:
            export(options)
        else:
            predict(options, distributed.start(options.machine.device))
            distributed.stop()

    return commandline.command(
        work, (ValueError, OSError, EachFailed, WorkerDied), "start the same command again to continue."
    )


if __name__ == "__main__":
    commandline.end(main(sys.argv[1:]))
