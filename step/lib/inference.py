"""Inference on one image at the machine's precision: class maps, class scores, scores after the walk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from misc.config import CamInference, Machine, SegInference
from misc.files.camfiles import read_cam
from misc.files.runfolder import RunFolder
from misc.image.cam import Cam, otsu_threshold
from misc.image.labels import IGNORE
from misc.image.picture import Picture
from misc.infer import cams
from misc.infer.masks import segment, segment_together, with_crf
from misc.precision import autocast
from misc.score.objects import Instances
from net.contract import Refiner, SeedNetwork, Segmenter, SingleStage
from step.lib.config import Job
from voc12.lists import pick_evenly

_OTSU_IMAGES = 400
"""CAMs from which a background score is found without masks."""


def predict_cam(
    network: SeedNetwork, image: np.ndarray, tags: np.ndarray, infer: CamInference, machine: Machine,
    device: torch.device, inputs: Iterable[Tensor] | None = None,
) -> Cam:  # fmt: skip
    """``misc.infer.cams.infer_cam`` at the machine's precision, with gradients if the network's maps need them."""
    grad = contextlib.nullcontext() if network.map_needs_gradient else torch.inference_mode()
    with grad, autocast(machine, device):
        return cams.infer_cam(network.cam, image, tags, infer, network.normalisation, device, inputs)


def predict_cams(
    network: SeedNetwork, size: tuple[int, int], tags: Sequence[np.ndarray], infer: CamInference,
    machine: Machine, device: torch.device, inputs: Sequence[Sequence[Tensor]],
) -> list[Cam]:  # fmt: skip
    """``misc.infer.cams.infer_cams``, otherwise as ``predict_cam``."""
    grad = contextlib.nullcontext() if network.map_needs_gradient else torch.inference_mode()
    with grad, autocast(machine, device):
        return cams.infer_cams(network.cam, tags, size, infer, device, inputs)


def infer_class_scores(
    network: Segmenter | SingleStage, image: np.ndarray, infer: SegInference, machine: Machine, device: torch.device,
    inputs: Iterable[Tensor] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (C + 1, H, W) float32 of one image (H, W, 3) uint8 over scales, background first: before and after the CRF
    (equal if there is no CRF). ``inputs`` as for ``misc.infer.masks.segment``."""
    with autocast(machine, device):
        scores = segment(network.logits, image, infer, network.normalisation, device, inputs)
    return scores, with_crf(scores, image, infer, network.normalisation, device)


def infer_class_scores_together(
    network: Segmenter | SingleStage, images: Sequence[np.ndarray], infer: SegInference, machine: Machine,
    device: torch.device, inputs: Sequence[Sequence[Tensor]],
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """``infer_class_scores`` of several images of one size, which go through the network together; one after the other
    through the CRF."""
    with autocast(machine, device):
        found = segment_together(network.logits, images, infer, device, inputs)
    return [
        (scores, with_crf(scores, image, infer, network.normalisation, device))
        for image, scores in zip(images, found, strict=True)
    ]


def walk_cam(
    refiner: Refiner, picture: Picture, cam: Cam, options: Any, machine: Machine, device: torch.device
) -> tuple[np.ndarray, Instances]:
    """Refine a CAM by the recipe's ``walk``: scores (K + 1, H, W) float32 of background and the CAM's K classes, and
    the single objects (none of them if the refiner does not separate objects)."""
    with torch.inference_mode(), autocast(machine, device):
        if refiner.finds_instances(options):
            return refiner.find_instances(picture.to(device), cam, options)
        return refiner.refine(picture.to(device), cam, options), Instances.none(picture.size)


def pseudo_mask(scores: np.ndarray, keys: np.ndarray, ignore_below: float) -> np.ndarray:
    """Mask of the best scores: (K + 1, H, W) of background and the classes ``keys`` (K,), 0-based -> (H, W) uint8, 0
    background, class + 1, 255 where the largest score is below ``ignore_below``."""
    mask = np.concatenate([[0], keys + 1]).astype(np.uint8)[scores.argmax(0)]
    if ignore_below:
        mask[scores.max(0) < ignore_below] = IGNORE
    return mask


def read_full_cam(job: Job, image_id: str, size: tuple[int, int]) -> Cam:
    """The run's CAMs of an image, at image size. Raises ValueError if the file is for another size."""
    path = job.run.cam(image_id)
    cam = read_cam(path, job.catalog.num_classes)
    if cam.size != tuple(size):
        raise ValueError(f"{path} was made from an image of {cam.size}, the image is {tuple(size)} now. Delete it.")
    return cam.at_image_size()


def rests_on_all_cams(walk: Any) -> bool:
    """Whether ``settle_walk`` finds the background score from the run's CAMs or their score."""
    return getattr(walk, "background", "") == "otsu" or getattr(walk, "threshold", 0.0) is None


def settle_walk(walk: Any, run: RunFolder) -> Any:
    """A recipe's ``walk`` with the background score filled in: None becomes the one with the best score of the run's
    CAMs, and the rule otsu gets the one that splits them best (``otsu_threshold`` of some of them). Raises ValueError
    if these have no score, and if there are none."""
    if getattr(walk, "background", "") == "otsu":
        files = pick_evenly(sorted((run.root / "cam").rglob("*.npz")), _OTSU_IMAGES)
        if not files:
            raise ValueError(
                f"{run.root} has no CAMs from which a background score could be found: make them, or give "
                "--aff.walk.background constant --aff.walk.threshold T."
            )
        return replace(walk, threshold=otsu_threshold(read_cam(path).maps for path in files))
    if getattr(walk, "threshold", 0.0) is not None:
        return walk
    found = run.scores().get("CAM", {}).get("threshold")
    if found is None:
        raise ValueError(
            "The walk uses the background score that make_cam found best, but this run's CAMs have no score (scoring "
            "needs true masks). Give --aff.walk.threshold a number; published is 0.39."
        )
    return replace(walk, threshold=found)
