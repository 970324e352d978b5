"""An extra step outside the pipeline: masks of new images from trained networks, without a list, a data set or true
masks.

Networks are read from their weights files (net/model.py). Results go to one folder: masks/ID.png (VOC palette),
overlays/ID.jpg, and optional files.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from misc import distributed
from misc.config import CamInference, Machine, SegInference, override
from misc.files import atomic, store
from misc.files.camfiles import read_cam, write_cam
from misc.files.ids import result_path
from misc.files.imagefiles import safe_name
from misc.files.images import jpeg_bytes, read_image, read_size, write_mask
from misc.files.schema import Each
from misc.files.segments import read_segments
from misc.image import draw, pixels
from misc.image.labels import IGNORE
from misc.image.picture import Picture
from misc.loop.each import EachFailed, each
from misc.precision import place
from net.contract import AffinityNetwork, Phase, SeedNetwork, Segmenter, SegmentRecipe, SingleStage
from net.model import Model, as_segmenter, released_model
from net.names import OWN
from step.lib.config import default_config
from step.lib.inference import infer_class_scores, predict_cam, walk_cam
from step.lib.tagged_images import MaskRule
from voc12.data_sets.voc12 import VOC_CLASSES
from voc12.tags import encode_tags, read_classes

ScoreImage = Callable[[str, np.ndarray, tuple[int, int]], tuple[np.ndarray, np.ndarray]]
"""id, image (h, w, 3) uint8 at the network's size, size (H, W) of the original image -> scores (n, h, w) float32, and
the mask value of each (n,) uint8."""


@dataclass(frozen=True)
class ResultFolder:
    """Where results are written, and how they are made."""

    out: Path
    """Folder for the results."""
    max_megapixels: float | None = None
    """Larger images are downscaled to this for the network; masks and overlays keep the image's size. 0: never.
    None: ``usual_megapixels`` of the network."""
    redo: bool = False
    """Make existing masks again."""
    machine: Machine = field(default_factory=Machine)
    """Devices, processes, precision."""

    def file(self, kind: str, image_id: str, suffix: str) -> Path:
        """File KIND/ID.SUFFIX; ValueError for an id that would leave the folder."""
        return result_path(self.out / kind, image_id, f".{suffix}")


def open_released(method: str, preset: str, released: str, classes: Path | None, part: Literal["cam", "seg"]) -> Model:
    """A released checkpoint by the recipe of a published system.

    Args:
        method, preset: as for run_sample.py.
        released: FILE, or FILE,FILE for a network of two parts.
        classes: file of class names, a line each; None: VOC's.
        part: the system's CAM network, or what predicts its masks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown names, or the file does not fit.
    """
    config = default_config(method, preset)
    files = tuple(released.split(","))
    for file in files:
        if not os.path.isfile(file):
            raise FileNotFoundError(f"--released {file}: there is no such file.")
    names = VOC_CLASSES if classes is None else read_classes(classes)
    if part == "cam":
        return released_model(config.cam, method, files, names)
    if config.segmenter == OWN:
        return released_model(as_segmenter(config.cam, config.seg), method, files, names)
    assert isinstance(config.seg, SegmentRecipe)
    return released_model(config.seg, config.segmenter, files, names)


def segment_images(
    model: Model, images: Mapping[str, Path], folder: ResultFolder, device: torch.device, *,
    probabilities: bool = False, fast: bool = False,
) -> None:
    """Predict images with a segmentation network, as its recipe tests it.

    Args:
        model: of part seg.
        images: {id: file}.
        folder: where results are written, and how they are made.
        device: where to compute.
        probabilities: also write probabilities/ID.npz: ``probabilities`` (C + 1, h, w) float16, summing to one, at the
            size of the network's input, and ``size`` (2,), height and width of the image.
        fast: one scale, no mirror image, no CRF.

    Raises:
        ValueError: the folder holds results of another model or other settings.
        EachFailed: some images failed, the others are finished.
    """
    network, machine = model.network, folder.machine.with_recipe(model.recipe.amp, device)
    assert isinstance(network, Segmenter | SingleStage)
    place(network, machine, device)
    infer: SegInference = model.recipe.infer
    if fast:
        usual = model.recipe.augment.crop if infer.square else 1
        nearest = min(infer.scales, key=lambda scale: abs(math.log(scale / usual)))
        infer = override(infer, {"scales": (nearest,), "flip": False, "crf.iterations": 0})
    values = np.arange(len(model.classes) + 1, dtype=np.uint8)

    def scores(image_id: str, image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        _, found = infer_class_scores(network, image, infer, machine, device)
        if probabilities:
            shares = found / found.sum(0, keepdims=True)  # a maximum over scales does not sum to one
            path = folder.file("probabilities", image_id, "npz")
            store.write_arrays(path, probabilities=shares.astype(np.float16), size=np.array(size))
        return found, values

    made = ["probabilities/*.npz"] if probabilities else []
    settings = {"fast": fast, "probabilities": probabilities}
    _each_image(scores, images, folder, model, settings, made, device)


def map_images(
    cam: Model, rule: MaskRule, tags: Mapping[str, Sequence[str]], source: Any, images: Mapping[str, Path],
    folder: ResultFolder, device: torch.device, *, segments: Path | None = None, fast: bool = False,
) -> None:
    """Maps and refined masks of images with known tags, from a CAM network.

    Also writes maps/ID.npz (as in a run's cam/) and maps/ID_CLASS.jpg. An image without a tag is all background.

    Args:
        cam: model of part cam.
        rule: how a mask is made of the maps.
        tags: {id: names of the classes in the image}.
        source: what says which tags these are, as JSON has it: recorded with the results.
        images, folder, device: as for ``segment_images``.
        segments: folder of the images' segments, for a refiner that wants them.
        fast: one scale, no mirror image.

    Raises:
        ValueError: tags that the network does not know; a refiner of other classes; as ``segment_images``. EachFailed.
    """
    unknown = sorted({tag for names in tags.values() for tag in names} - set(cam.classes))
    if unknown:
        raise ValueError(f"--tags: there is no class {', '.join(unknown)} in this network. It knows: "
                         f"{', '.join(cam.classes)}.")  # fmt: skip
    if rule.classes not in (None, cam.classes):
        raise ValueError("--refine walk: the run has no trained refiner for these classes. Run train_aff, or leave it.")
    network, refiner = cam.network, rule.refiner
    if refiner.wants_segments and segments is None:
        raise ValueError(
            "The run's refiner chooses among segments of these images: give --segments DIR, or --refine crf to do "
            "without."
        )
    assert isinstance(network, SeedNetwork)
    machine = folder.machine.with_recipe(cam.recipe.amp, device)
    refining = folder.machine.with_recipe(rule.precision, device)
    place(network, machine, device)
    if isinstance(refiner, AffinityNetwork):
        place(refiner, refining, device)
    infer: CamInference = cam.recipe.infer
    if fast:
        infer = override(infer, {"scales": infer.scales[:1], "flip": False})

    def scores(image_id: str, image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        present = encode_tags(tags[image_id], cam.classes)
        path = folder.file("maps", image_id, "npz")
        write_cam(path, replace(predict_cam(network, image, present, infer, machine, device), size=size))
        stored = read_cam(path)  # in the precision of a run's files, so that a training image gets the same mask again
        for key, score in zip(stored.keys, stored.maps, strict=True):
            name = class_file(cam.classes, key)
            store.write_bytes(folder.file("maps", f"{image_id}_{name}", "jpg"), jpeg_bytes(draw.heat(image, score)))
        values = np.array([0, *(stored.keys + 1)], np.uint8)
        if not len(stored.keys):
            return np.ones((1, *image.shape[:2]), np.float32), values
        seen = replace(stored, size=image.shape[:2])  # the refiner works at the size of the network's input
        picture = Picture.of_rgb(image, refiner.normalisation)
        if refiner.wants_segments and segments is not None:
            picture = replace(picture, segments=read_segments(segments, image_id, picture.size))
        return walk_cam(refiner, picture, seen, rule.settings.walk, refining, device)[0], values

    settings = {"tags": source, "fast": fast, **rule.record()}
    made = ["maps/*.npz", "maps/*.jpg"]
    _each_image(scores, images, folder, cam, settings, made, device, ignore_below=rule.settings.ignore_below)


def class_file(classes: Sequence[str], key: int) -> str:
    """A class in a file name: its name without what may not stand there, at most 60 letters; with its number from 1 on
    where two classes would be written alike."""

    def short(name: str) -> str:
        return safe_name(name).replace("/", "_")[:60]

    name = short(classes[key])
    alike = sum(short(other).casefold() == name.casefold() for other in classes) > 1
    return f"{name}_{key + 1}" if alike else name


def usual_megapixels(recipe: Phase) -> float:
    """Default size above which images are downscaled for a network: six times the area of its training crops.

    Images of data sets like VOC are smaller, so they are treated as in the run. In photographs of many megapixels,
    objects are far larger than those in training, and inference would need gigabytes.
    """
    return 6 * recipe.augment.crop**2 / 1e6


def shrunk(image: np.ndarray, megapixels: float) -> np.ndarray:
    """Downscale (H, W, 3) uint8 to at most so many megapixels (0: unchanged), keeping the aspect ratio."""
    height, width = image.shape[:2]
    factor = math.sqrt(megapixels * 1e6 / (height * width)) if megapixels else 1.0
    return pixels.resize_image(image, pixels.truncated_size((height, width), factor)) if factor < 1 else image


def _each_image(
    scores: ScoreImage, images: Mapping[str, Path], folder: ResultFolder, model: Model, settings: dict[str, Any],
    made: Sequence[str], device: torch.device, ignore_below: float = 0.0,
) -> None:
    """Write mask and overlay of every image that has none yet; pixels whose largest score is below ``ignore_below``
    become 255."""
    megapixels = usual_megapixels(model.recipe) if folder.max_megapixels is None else folder.max_megapixels
    _begin(folder, model.classes, {"model": model.fingerprint, **settings, "max_megapixels": megapixels})

    def done(image_id: str) -> bool:
        mask, image = folder.file("masks", image_id, "png"), images[image_id]
        there = os.path.exists(mask) and os.path.exists(image)  # False for names that are too long
        return not folder.redo and there and mask.stat().st_mtime >= image.stat().st_mtime

    def prepare(image_id: str) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(images[image_id])
        return image, shrunk(image, megapixels)

    def work(image_id: str, prepared: tuple[np.ndarray, np.ndarray]) -> None:
        image, small = prepared
        found, values = scores(image_id, small, image.shape[:2])
        every = np.full(256, IGNORE, np.uint8)
        every[: len(values)] = values
        mask = every[draw.resized_argmax(found, image.shape[:2], ignore_below)]
        picture = jpeg_bytes(draw.overlay(image, mask, model.classes))
        store.write_bytes(folder.file("overlays", image_id, "jpg"), picture)
        write_mask(folder.file("masks", image_id, "png"), mask)  # written last: its presence means that all are written

    failed: EachFailed | None = None
    left = [image_id for image_id in images if not done(image_id)]
    try:
        each(
            "predict", list(images), work, prepare=prepare, done=done, workers=folder.machine.workers,
            in_processes=device.type == "cpu",
        )
    except EachFailed as error:  # also report the finished ones
        failed = error
    count = 0
    for image_id in left if megapixels and distributed.is_main() else ():
        with contextlib.suppress(OSError, ValueError):  # one that failed, or that is gone meanwhile
            there = os.path.exists(folder.file("masks", image_id, "png"))
            count += there and math.prod(read_size(images[image_id])) > megapixels * 1e6
    if count:
        distributed.say(
            f"{count} images were downscaled to {megapixels:.2g} megapixels for the network (--max-megapixels); their "
            "masks keep the images' size."
        )
    distributed.say(f"files: {', '.join(str(folder.out / name) for name in ('masks/*.png', 'overlays/*.jpg', *made))}")
    if failed is not None:
        raise failed


_RECORD = {"settings": dict, "mask values": Each(str)}
"""What predict.json holds."""


def _begin(folder: ResultFolder, classes: Sequence[str], settings: dict[str, Any]) -> None:
    """Record the model and settings of the folder's results (predict.json). Raises ValueError if they differ from the
    recorded ones."""
    path = folder.out / "predict.json"
    now = {"settings": settings, "mask values": {str(i): name for i, name in enumerate(["background", *classes])}}
    there = store.read_json(path, _RECORD) if path.exists() else now
    if there != now:
        was = {**there.get("settings", {}), "classes": list(there.get("mask values", {}).values())}
        new = {**settings, "classes": list(now["mask values"].values())}
        differing = [k for k in {**was, **new} if was.get(k) != new.get(k)]
        lines = "\n".join(f"  {k}: {was.get(k)!r} there, {new.get(k)!r} now" for k in differing)
        raise ValueError(
            f"{folder.out} holds results of another model or other settings:\n{lines}\n"
            "Use another --out folder, or delete this one."
        )
    distributed.barrier()
    if distributed.is_main():
        atomic.remove_leftovers([folder.out])
        store.write_json(path, now)
    distributed.barrier()
