"""Step 6: train the segmentation network on the pseudo masks (or, for the upper bound, on the true ones)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from misc import distributed
from misc.store import read_mask
from step.config import Job
from step.training import build, train


def run(job: Job, device: torch.device) -> None:
    """Train on the training list: writes weights/seg.pt."""
    ids = job.train_ids()

    def path(image_id: str) -> Path:
        if job.cfg.masks == "pseudo":
            return job.run.label(image_id)
        found = job.catalog.mask_path(image_id)
        if found is None:
            raise ValueError(f"--masks truth: {image_id} has no mask in {job.catalog.root}.")
        return found

    _look_over(ids, path, job.catalog.num_classes)
    train(job, "seg", job.cfg.seg, build(job, job.cfg.seg), device, ids=ids, mask=lambda i: read_mask(path(i)))


def _look_over(ids: list[str], path, num_classes: int) -> None:
    """Before hours of training: every mask is there, holds known classes, and they are not all empty."""
    if not distributed.is_main():
        return
    missing, wrong, objects = [], [], 0
    for image_id in tqdm(ids, desc="checking masks", unit="mask", leave=False):
        try:
            values = np.unique(read_mask(path(image_id)))
        except FileNotFoundError:
            missing.append(image_id)
            continue
        if ((values > num_classes) & (values != 255)).any():
            wrong.append(image_id)
        objects += bool(((values > 0) & (values != 255)).any())
    if missing or wrong:
        raise ValueError(
            f"train_seg: {len(missing)} masks are missing ({', '.join(missing[:5])}), {len(wrong)} hold values above "
            f"{num_classes} ({', '.join(wrong[:5])}). Run random_walk again (--steps random_walk), or mend the masks."
        )
    if objects == 0:
        raise ValueError("train_seg: all masks are background or ignored: look at the CAMs and the walk first.")
