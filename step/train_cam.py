"""Step 1: train the CAM network from tags (all of its phases, one after the other)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from misc.files.images import read_image, read_mask
from misc.image.pixels import normalise_image, to_tensor
from misc.loop.fit import autocast
from misc.score.metrics import ThresholdCurve
from net.contract import Network, SeedNetwork
from step.lib.config import Job
from step.lib.inference import predict_cam
from step.lib.networks import build_earlier, build_network, load_network
from step.lib.training import train

_THRESHOLDS = tuple(i / 100 for i in range(1, 100))


def run(job: Job, device: torch.device) -> None:
    """Train every phase of the method on the training list: writes weights/PHASE.pt, the last one weights/cam.pt."""
    masks = scored_masks(job) if job.cfg.cam.selection == "train_miou" else None
    tagged = tagged_ids(job) if job.cfg.cam.selection == "val_tags" else None
    earlier: dict[str, Network] = {}
    if job.cfg.cam.released:  # earlier phases were only needed for its training, which is done
        *before, (name, phase) = job.cfg.cam.phases()
        train(job, name, phase, build_network(job, phase, build_earlier(job, before)), device, ids=job.train_ids())
        return
    for name, phase in job.cfg.cam.phases():
        network = build_network(job, phase, earlier)
        score = None
        if name == "cam" and masks is not None:
            assert isinstance(network, SeedNetwork)
            score = partial(train_miou, job, network, masks, device)
        elif name == "cam" and tagged is not None:
            assert isinstance(network, SeedNetwork)
            score = partial(val_map, job, network, tagged, device)
        train(job, name, phase, network, device, ids=job.train_ids(), score=score)
        earlier[name] = load_network(job, name, phase, device, earlier).requires_grad_(False)


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
    """Best mIoU over all background scores of the network's single-scale maps, compared with these masks by image
    id."""
    infer = job.cfg.cam.infer
    infer = replace(infer, scales=infer.scales[:1] if infer.square else (1.0,), flip=False, coarse=0)
    curve = ThresholdCurve(job.catalog.num_classes + 1, _THRESHOLDS)
    for image_id, path in masks.items():
        image, tags = read_image(job.catalog.image_path(image_id)), job.catalog.tags(image_id)
        cam = predict_cam(network, image, tags, infer, job.machine(job.cfg.cam, device), device)
        curve.add(read_mask(path), cam.keys, cam.maps)
    return curve.best()[1]
