"""Masks of new images, without a list, a data set or ground truth.

A segmentation network needs only its weights file:

  python predict.py photos/ --weights runs/seam-sample/weights/seg.pt --out masks

A CAM network needs the classes in the images, the same ones in all or a line for each:

  python predict.py a.jpg b.jpg --run runs/seam-sample --tags "dog,person" --out maps
  python predict.py photos/ --run runs/seam-sample --tags-from photos/labels.csv --out maps

CLIP-ES needs no run, as nothing is trained; it knows classes by their names:

  python predict.py photos/ --method clipes --tags "dog,person" --out masks

A checkpoint as its authors released it, by the recipe of the published system (scripts/SYSTEM.sh names the files):

  python predict.py photos/ --released deeplabv1.pth --method seam --out masks
  python predict.py a.jpg --released res38_cls.pth --method psa --tags "dog,person" --out maps

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

commandline.begin(__name__)
_USAGE = "IMAGE... (--weights FILE | --run RUN | --method NAME) [--tags NAMES] [--out DIR] [options]"
if __name__ == "__main__" and (done := commandline.answer_early(Path(__file__), sys.argv[1:], _USAGE)) is not None:
    sys.exit(done)  # before PyTorch is imported, which takes seconds

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
import tyro

from misc import distributed
from misc.config import Machine, override
from misc.files import store
from misc.files.imagefiles import find_images, unread_pictures
from misc.files.runfolder import RunFolder
from misc.loop.each import EachFailed, WorkerDied
from net.contract import Segmenter, SingleStage
from net.export import export_onnx
from net.model import Model, load_model, predicts_masks
from step.lib.new_images import ResultFolder, map_images, open_released, segment_images
from step.lib.tagged_images import (
    Refinement,
    constant_rule,
    read_image_tags,
    run_rule,
    split_tags,
    untrained_model,
)


@dataclass(frozen=True)
class PredictionOptions:
    """Options: images, networks and results."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Image files, folders (searched recursively) and globs; in folders and globs only files that end in jpg, jpeg,
    jfif, png, bmp, webp, tif, tiff or gif."""
    weights: Path | None = None
    """Weights file of a trained segmentation network (weights/seg.pt of a run, or weights/cam.pt of a method that
    predicts masks itself). With --method, CLIP's weights, as --cam.weights of run_sample.py."""
    run: Annotated[Path | None, tyro.conf.arg(aliases=["--run-folder"])] = None
    """Run folder: use its segmentation network, or with --tags its CAM network and refiner. Under torchrun write
    --run-folder, because torchrun has its own option --run."""
    out: Path = Path("predictions")
    """Folder for the results."""
    tags: str | None = None
    """Classes in the images, separated by commas, or by semicolons where names hold commas: make maps of these classes
    with a CAM network."""
    tags_from: Path | None = None
    """Table of the classes in each image, such as labels.csv of a data folder, in place of --tags. Images are found by
    their paths below the table's folder, or by names that come once."""
    released: str | None = None
    """Checkpoint FILE that the authors of --method released (FILE,FILE for a network of two parts), used as it is: its
    segmentation network, or with tags its CAM network."""
    classes: Path | None = None
    """With --released: text file of the names of the classes, one a line, in the file's order. Default: VOC's 20."""
    method: str | None = None
    """METHOD of run_sample.py: with --released the one that the file belongs to, else one that is not trained, such as
    clipes, to make maps without a run. Its classes are those of --tags, or of the table and the classes.txt beside
    it."""
    preset: str | None = None
    """With --method: its recipe. Default: photos where an untrained method has one, else published."""
    texts: Path | None = None
    """With --method: CSV file of lines 'class,words', what to call a class instead of its name. Default: texts.csv
    beside the table of --tags-from, where there is one."""
    refine: Refinement = "auto"
    """With tags and --run, how the mask is made. walk: as the run makes its pseudo masks, by its trained refiner. crf:
    dense CRF over the maps and the background score. threshold: background score only. auto: by the run's refiner, or
    by the CRF if that is not trained yet."""
    threshold: float | None = None
    """With --refine crf or threshold: the background score in [0, 1]. Default: the best one on the run's scored list,
    else 0.3."""
    segments: Path | None = None
    """With a run whose refiner is sam: folder of class-agnostic segments of these images, named by their ids
    (misc/files/segments.py)."""
    ignore_below: float | None = None
    """With tags: pixels whose largest score is below this become 255 in the mask. Default: as in the run; 0 (none) with
    --method."""
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
        if self.released is not None:
            if self.method is None or self.run is not None or self.weights is not None:
                raise ValueError("--released FILE needs --method METHOD, and neither --run nor --weights.")
            if self.tagged and (self.export or self.refine == "walk"):
                raise ValueError("--released FILE with tags: neither --export nor --refine walk, which needs a run.")
        elif self.method is not None:
            if self.run is not None or self.export or not self.tagged:
                raise ValueError("--method needs --tags or --tags-from, and neither --run nor --export. Give it those.")
            if self.refine != "auto" or self.threshold is not None:
                raise ValueError("--method makes masks by its recipe: leave out --refine and --threshold.")
        elif (self.weights is None) == (self.run is None):
            raise ValueError("Give --weights FILE, --run RUNFOLDER, --released FILE, or --method clipes with --tags.")
        elif self.tagged and (self.run is None or self.export):
            raise ValueError("--tags needs a CAM network: give --run RUNFOLDER or --method clipes, and no --export.")
        if self.method is None and (self.preset is not None or self.texts is not None):
            raise ValueError("--preset and --texts go with --method. Leave them out.")
        if self.classes is not None and self.released is None:
            raise ValueError("--classes goes with --released. Leave it out.")
        if self.tags is not None and self.tags_from is not None:
            raise ValueError("Give either --tags or --tags-from.")
        if bool(self.images) == bool(self.export):
            raise ValueError("Give images, or --export onnx without images.")
        if not (0 <= (self.max_megapixels or 0) and 0 <= (self.threshold or 0) <= 1 and 0 <= (self.ignore_below or 0)):
            raise ValueError("--max-megapixels and --ignore-below must be 0 or more, --threshold in [0, 1].")

    @property
    def tagged(self) -> bool:
        """Whether the classes in the images are given."""
        return self.tags is not None or self.tags_from is not None

    def segmenter(self) -> Model:
        """The network that predicts masks. Raises as ``load_model`` and ``open_released``."""
        if self.released is not None and self.method is not None:
            return open_released(self.method, self.preset or "published", self.released, self.classes, "seg")
        return load_model(self.network_file(), "seg")

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


def export(options: PredictionOptions) -> None:
    """Write the ONNX file."""
    with commandline.before_work((ValueError, OSError)):
        model = options.segmenter()
    assert isinstance(model.network, Segmenter | SingleStage)
    path = options.out / f"{Path(options.released or options.network_file()).stem}.onnx"
    difference = export_onnx(model.network, path, model.classes, model.recipe.infer.align_corners)
    print(f"{model.method}, {len(model.classes)} classes: differs from PyTorch by at most {difference:.1e} of the "
          f"largest logit\nfiles: {path}")  # fmt: skip


def predict(options: PredictionOptions, device: torch.device) -> None:
    """Make the masks."""
    images = find_images(options.images, leave_out=options.out)
    if unread := unread_pictures(options.images, leave_out=options.out):
        shown = f"{', '.join(unread[:5])}{', ...' if len(unread) > 5 else ''}"
        distributed.say(f"Note: {len(unread)} pictures are of other formats than those looked for and are left out "
                        f"({shown}): save them as JPEG or PNG.")  # fmt: skip
    folder = ResultFolder(options.out, options.max_megapixels, options.redo, options.machine)
    if not options.tagged:
        model = options.segmenter()
        distributed.say(f"{model.method}, trained for {', '.join(model.classes)}; {len(images)} images on {device}")
        segment_images(model, images, folder, device, probabilities=options.probabilities, fast=options.fast)
        return
    run = None if options.run is None else RunFolder(options.run)
    cam = None if run is None else load_model(run.weights("cam"), "cam")
    if options.released is not None and options.method is not None:
        cam = open_released(options.method, options.preset or "published", options.released, options.classes, "cam")
    classes, tags, source = image_tags(options, images, cam)
    if options.released is not None and cam is not None:
        rule = constant_rule(options.refine, options.threshold)
    elif cam is None or run is None:
        assert options.method is not None
        texts, weights = options.texts, None if options.weights is None else str(options.weights)
        if texts is None and options.tags_from is not None and options.tags_from.with_name("texts.csv").is_file():
            texts = options.tags_from.with_name("texts.csv")
        cam, rule = untrained_model(options.method, options.preset, weights, classes, texts)
    else:
        rule = run_rule(run, options.refine, options.threshold)
    if options.ignore_below is not None:
        rule = replace(rule, settings=override(rule.settings, {"ignore_below": options.ignore_below}))
    distributed.say(f"{cam.method} (CAM network); {len(images)} images on {device}")
    map_images(cam, rule, tags, source, images, folder, device, segments=options.segments, fast=options.fast)
    ignored = rule.settings.ignore_below
    unsure = f"; 255 where its largest score is below {ignored:g}" if ignored else ""
    distributed.say(f"masks made by {rule.told}{unsure}")


def image_tags(
    options: PredictionOptions, images: Mapping[str, Path], cam: Model | None
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]], Any]:
    """The classes that are asked for, those of every image by its id, and what is recorded of them.

    ``cam``: the network that must know them. Raises ValueError for tags without a name, and as ``read_image_tags``.
    """
    if options.tags_from is not None:
        classes, tags = read_image_tags(options.tags_from, images, None if cam is None else cam.classes)
        return classes, tags, f"{options.tags_from.name}, {store.fingerprint(options.tags_from)}"
    assert options.tags is not None
    names = split_tags(options.tags, () if cam is None else cam.classes)
    if not names:
        raise ValueError("--tags: there is no class (none named). Name at least one: --tags 'dog,person'.")
    return names, dict.fromkeys(images, names), sorted(names)


def main(argv: Sequence[str]) -> int:
    """Command line. Returns the exit status: 2 if the call is refused before any work, 1 if any image failed."""

    def work() -> None:
        words = commandline.as_help(argv)
        options = commandline.parse_options(PredictionOptions, words, prog="predict.py", description=__doc__)
        if options.export:
            export(options)
            return
        with commandline.before_work((ValueError, FileNotFoundError)):  # those of an image are in EachFailed
            predict(options, distributed.start(options.machine.device))
        distributed.stop()

    return commandline.command(
        work, (ValueError, OSError, EachFailed, WorkerDied), "start the same command again to continue."
    )


if __name__ == "__main__":
    commandline.end(main(sys.argv[1:]))
