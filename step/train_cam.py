"""Step 1: train the CAM network from tags (all of its phases, one after the other)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from misc.config import CamInference
from misc.files.images import read_image, read_mask
from misc.image.draw import heat, tile
from misc.image.labels import IGNORE
from misc.image.pixels import normalise_image, resize_image, resize_mask, scaled_size, to_tensor
from misc.precision import autocast
from misc.score.metrics import ThresholdCurve
from net.contract import Network, Phase, SeedNetwork, TaggedPhase, TagScorer
from step.lib.boxes import rate_boxes
from step.lib.config import Job
from step.lib.inference import predict_cam
from step.lib.networks import build_earlier, build_network, load_network
from step.lib.training import train

_THRESHOLDS = tuple(i / 100 for i in range(1, 100))
_EPS = 1e-5
_WATCHED, _WATCHED_SIDE = 4, 320
"""Images whose CAMs TensorBoard shows during the training, and their longest side in pixels."""


def run(job: Job, device: torch.device) -> None:
    """Train every phase of the method on the training list: writes weights/PHASE.pt, the last one weights/cam.pt."""
    if job.cfg.cam.released:  # its epoch was selected, and earlier phases were needed, by those who trained it
        *before, (name, phase) = job.cfg.cam.phases()
        train(job, name, phase, build_network(job, phase, build_earlier(job, before)), device, ids=job.train_ids())
        return
    masks = scored_masks(job) if job.cfg.cam.selection == "train_miou" else None
    tagged = tagged_ids(job) if job.cfg.cam.selection == "val_tags" else None
    earlier: dict[str, Network] = {}
    for name, phase in job.cfg.cam.phases():
        network = build_network(job, phase, earlier)
        score = None
        if isinstance(phase, TaggedPhase) and phase.selection == "train_tags":
            assert isinstance(network, TagScorer)
            score = rating("tag_precision", partial(tag_precision, job, phase, network, device))
        elif name == "cam" and masks is not None:
            assert isinstance(network, SeedNetwork)
            score = rating("train_miou", partial(train_miou, job, network, masks, device))
        elif name == "cam" and tagged is not None:
            assert isinstance(network, SeedNetwork)
            score = rating("val_map", partial(val_map, job, network, tagged, device))
        elif name == "cam" and job.cfg.cam.selection == "val_boxes":
            assert isinstance(network, SeedNetwork)
            score = partial(rate_boxes, job, network, device)
        pictures = None
        if name == "cam" and isinstance(network, SeedNetwork) and not network.calibrates:
            pictures = partial(draw_cams, job, network, device)
        train(job, name, phase, network, device, ids=job.train_ids(), score=score, pictures=pictures)
        earlier[name] = load_network(job, name, phase, device, earlier).requires_grad_(False)


def check_selection(job: Job) -> None:
    """Raises ValueError where a list lacks the masks, tags or boxes that an epoch is selected by."""
    if job.cfg.cam.released:
        return
    if job.cfg.cam.selection == "train_miou":
        scored_masks(job)
    elif job.cfg.cam.selection == "val_tags":
        tagged_ids(job)
    elif job.cfg.cam.selection == "val_boxes":
        job.catalog.boxes(job.catalog.ids(job.cfg.val_list)[0])  # raises for data sets without boxes
    by_tags = [n for n, p in job.cfg.cam.phases() if isinstance(p, TaggedPhase) and p.selection == "train_tags"]
    if by_tags and not job.catalog.has_list(job.cfg.score_list):
        raise ValueError(
            f"--cam.{by_tags[0]}.selection train_tags needs the tags of the list {job.cfg.score_list}, and there is no "
            f"such list. Take --cam.{by_tags[0]}.selection last, or name another --score-list."
        )


def draw_cams(job: Job, network: SeedNetwork, device: torch.device) -> dict[str, np.ndarray]:
    """Pictures for TensorBoard, the same images each time: image and single-scale CAM of each of its tags, by id, of
    ``_WATCHED`` images of the report, (H, W, 3) uint8."""
    infer = one_scale(job.cfg.cam.infer)
    drawn = {}
    for image_id in [i for i in job.shown_ids() if job.catalog.tags(i).any()][:_WATCHED]:
        image = read_image(job.catalog.image_path(image_id))
        size = scaled_size(image.shape[:2], min(1.0, _WATCHED_SIDE / max(image.shape[:2])))
        image = resize_image(image, size)
        cam = predict_cam(network, image, job.catalog.tags(image_id), infer, job.machine(job.cfg.cam, device), device)
        maps = [heat(image, score) for score in cam.full_maps().clip(0, 1)]
        names = [job.catalog.classes[key] for key in cam.keys]
        drawn[image_id] = tile([[image, *maps]], height=size[0], headings=("image", *names))
    return drawn


def one_scale(infer: CamInference) -> CamInference:
    """The inference at one scale, without the mirror image."""
    return replace(infer, scales=infer.scales[:1] if infer.square else (1.0,), flip=False, coarse=0)


def rating(name: str, measure: Callable[[], float]) -> Callable[[], Mapping[str, float]]:
    """A single measure as the training loop takes it: {NAME: value}."""
    return lambda: {name: measure()}


def scored_masks(job: Job) -> dict[str, Path]:
    """The mask of every image of the scored list. Raises ValueError if an image has none."""
    split = job.cfg.score_list
    paths = {image_id: job.catalog.mask_path(image_id) for image_id in job.catalog.ids(split)}
    without = [image_id for image_id, path in paths.items() if path is None]
    if without:
        raise ValueError(
            f"--cam.selection train_miou needs the masks of the list {split}, but {len(without)} images have none "
            f"({without[0]}). Take --cam.selection last, or name another --score-list."
        )
    return {image_id: path for image_id, path in paths.items() if path is not None}


def tagged_ids(job: Job) -> list[str]:
    """The validation images that have a tag; ValueError where there are none."""
    split = job.cfg.val_list
    ids = [i for i in job.catalog.ids(split) if job.catalog.tags(i).any()] if job.catalog.has_list(split) else []
    if not ids:
        raise ValueError(
            f"--cam.selection val_tags needs the tags of the list {split}, and there are none. Take --cam.selection "
            "last, or name another --val-list."
        )
    return ids


def val_map(job: Job, network: SeedNetwork, ids: Sequence[str], device: torch.device) -> float:
    """Mean over images of the average precision of an image's class scores (mctformer.md section 6): the shorter side
    resized to 8/7 of the training crop, its centre cut out."""
    side, total = job.cfg.cam.augment.crop, 0.0
    for image_id in ids:
        image = Image.fromarray(read_image(job.catalog.image_path(image_id)))
        factor = int(side * 256 / 224) / min(image.size)
        width, height = (max(side, int(round(length * factor))) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        values = to_tensor(normalise_image(np.asarray(image), network.normalisation))[None].to(device)
        with torch.inference_mode(), autocast(job.machine(job.cfg.cam, device), device):
            scores = network.classify(values, job.catalog.num_classes)[0].float().cpu().numpy()
        total += average_precision(scores, job.catalog.tags(image_id) > 0)
    return total / len(ids)


def average_precision(scores: np.ndarray, present: np.ndarray) -> float:
    """Mean, over the present ones, of the share of present classes among those that score as high: (C,) each."""
    ranked = present[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precision[ranked].mean())


def train_miou(job: Job, network: SeedNetwork, masks: Mapping[str, Path], device: torch.device) -> float:
    """Best mIoU over the background scores, compared with these masks by image id: of the maps and scores that were
    published for the network, or else of its single-scale CAMs at all scores."""
    if network.selection_thresholds is not None:
        return corner_miou(job, network, masks, device)
    infer = one_scale(job.cfg.cam.infer)
    curve = ThresholdCurve(job.catalog.num_classes + 1, _THRESHOLDS)
    for image_id, path in masks.items():
        image, tags = read_image(job.catalog.image_path(image_id)), job.catalog.tags(image_id)
        cam = predict_cam(network, image, tags, infer, job.machine(job.cfg.cam, device), device)
        curve.add(read_mask(path), cam.keys, cam.maps)
    return curve.best()[1]


def corner_miou(job: Job, network: SeedNetwork, masks: Mapping[str, Path], device: torch.device) -> float:
    """``train_miou`` as published for SemFormer (semformer.md section 5.3) and Puzzle-CAM (puzzlecam.md section 4): of
    top left corners of the images, padded with zeros to the training crop; those of an incomplete last batch are left
    out. Their maps are divided by their maxima, masks reduced to the maps' grid. For Puzzle-CAM corners and division
    are taken from SemFormer, which inherited its data classes; its public code was not compared."""
    assert network.selection_thresholds is not None
    whole = len(masks) // job.cfg.cam.fit.batch_size * job.cfg.cam.fit.batch_size or len(masks)
    curve, side = ThresholdCurve(job.catalog.num_classes + 1, network.selection_thresholds), job.cfg.cam.augment.crop
    for image_id, path in list(masks.items())[:whole]:
        pixels, tags = read_image(job.catalog.image_path(image_id))[:side, :side], job.catalog.tags(image_id)
        values = torch.zeros(1, 3, side, side)
        values[0, :, : pixels.shape[0], : pixels.shape[1]] = to_tensor(normalise_image(pixels, network.normalisation))
        truth = np.full((side, side), IGNORE, np.uint8)
        truth[: pixels.shape[0], : pixels.shape[1]] = read_mask(path)[:side, :side]
        present = torch.tensor(tags, dtype=torch.float32, device=device)[None]
        with torch.inference_mode(), autocast(job.machine(job.cfg.cam, device), device):
            maps = network.selection_maps(values.to(device), present)[0].float()  # (C, h, w)
        maps = (maps - _EPS).clamp(min=0) / (maps.amax((1, 2), keepdim=True) + _EPS)
        keys = np.flatnonzero(tags)
        curve.add(resize_mask(truth, (maps.shape[1], maps.shape[2])), keys, maps.cpu().numpy()[keys])
    return curve.best()[1]


def tag_precision(job: Job, phase: Phase, network: TagScorer, device: torch.device) -> float:
    """Best mean average precision, over images of the scored list and at the best threshold, of thresholded class
    scores against tags, background included (semformer.md section 3.4). Images are squashed to the training crop; those
    of an incomplete last batch are left out, as published."""
    side, ids = phase.augment.crop, job.catalog.ids(job.cfg.score_list)
    ids = ids[: len(ids) // phase.fit.batch_size * phase.fit.batch_size] or ids
    total = np.zeros(len(_THRESHOLDS))
    for image_id in ids:
        pixels = resize_image(read_image(job.catalog.image_path(image_id)), (side, side), "bilinear")
        values = to_tensor(normalise_image(pixels, network.normalisation))[None].to(device)
        with torch.inference_mode(), autocast(job.machine(phase, device), device):
            scores = network.score_classes(values)[0].float().cpu().numpy()
        present = np.concatenate([[True], job.catalog.tags(image_id) > 0])
        total += [binary_precision(scores > threshold, present) for threshold in _THRESHOLDS]
    return float(total.max() / len(ids))


def binary_precision(found: np.ndarray, present: np.ndarray) -> float:
    """Average precision of yes and no in place of scores: those found first, then all; (K,) bool each."""
    right, share = (found & present).sum() / present.sum(), present.mean()
    return float(right * present[found].mean() + (1 - right) * share) if found.any() else float(share)
