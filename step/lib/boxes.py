"""Maps on the grid of boxes, and the rating of a network by true boxes."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from misc.files.images import read_image
from misc.infer.cams import infer_logits, infer_raw_maps, merge_maps, normalise_maps
from misc.precision import autocast
from misc.score import wsol
from net.contract import SeedNetwork
from step.lib.config import Job


def on_grid(job: Job, maps: list[torch.Tensor], mode: str) -> np.ndarray:
    """Merge maps to (K, side, side) float32, each scaled to 0 .. 1."""
    infer, side = job.cfg.cam.infer, job.cfg.cam.boxes.side
    total = normalise_maps(merge_maps(maps, (side, side), mode=mode), infer.normalise).cpu().numpy()  # type: ignore[arg-type]
    return np.stack([wsol.stretch_map(m) for m in total])


def rate_boxes(job: Job, network: SeedNetwork, device: torch.device) -> dict[str, float]:
    """GT-Known and Loc Top-1 of the validation list, fractions {"gt_known", "loc_top1"}: of the true class's map the
    box at the fixed threshold overlaps a true box by half or more; by more than half, and the class has the highest
    logit (wsol.md sections 1 and 7)."""
    catalog, infer, options = job.catalog, job.cfg.cam.infer, job.cfg.cam.boxes
    ids, known, located = catalog.ids(job.cfg.val_list), 0, 0
    grad = contextlib.nullcontext() if network.map_needs_gradient else torch.inference_mode()
    with grad, autocast(job.machine(job.cfg.cam, device), device):
        for image_id in ids:
            image, tags = read_image(catalog.image_path(image_id)), catalog.tags(image_id)
            maps = list(infer_raw_maps(network.cam, image, tags, infer, network.normalisation, device))
            box = wsol.fixed_box(on_grid(job, maps, "bilinear")[0], options.threshold)
            truth = wsol.scaled_boxes(catalog.boxes(image_id), image.shape[:2], options.side, clip=True)
            overlap = wsol.box_iou(box[None], truth).max()
            logits = infer_logits(network.classify, image, catalog.num_classes, infer, network.normalisation, device)
            known += overlap >= 0.5
            located += overlap > 0.5 and tags[logits.argmax()] > 0
    return {"gt_known": float(known) / len(ids), "loc_top1": float(located) / len(ids)}
