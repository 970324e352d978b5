"""Step 6: train the segmentation network on the pseudo masks (or, for the upper bound, on the true ones)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from misc import distributed
from misc.files.images import read_mask
from misc.image.labels import IGNORE
from misc.loop.progress import Progress
from net.contract import SegmentRecipe
from step.lib.config import Job
from step.lib.networks import build_network
from step.lib.training import train


def run(job: Job, device: torch.device) -> None:
    """Train on the training list: writes weights/seg.pt."""
    ids, masks, recipe = job.train_ids(), _Masks(job), job.cfg.seg
    assert isinstance(recipe, SegmentRecipe)  # --segmenter own is refused before any work starts
    if not recipe.released:  # else no masks are needed
        _look_over(ids, masks, job.catalog.num_classes)
    train(job, "seg", recipe, build_network(job, recipe), device, ids=ids, mask=masks)


@dataclass(frozen=True)
class _Masks:
    """Reads the training mask of an image; picklable for worker processes."""

    job: Job

    def __call__(self, image_id: str) -> np.ndarray:
        job = self.job
        path = job.run.label(image_id) if job.cfg.masks == "pseudo" else job.catalog.mask_path(image_id)
        if path is None:
            raise FileNotFoundError(f"--masks truth: {image_id} has no mask in {job.catalog.root}.")
        return read_mask(path)


def _look_over(ids: list[str], masks: _Masks, num_classes: int) -> None:
    """Check before hours of training that every mask exists, has known classes, and that not all are empty."""
    if not distributed.is_main():
        return
    missing, wrong, objects = [], [], 0
    for image_id in Progress(ids, desc="checking masks", unit="mask", leave=False):
        try:
            values = np.unique(masks(image_id))
        except FileNotFoundError:
            missing.append(image_id)
            continue
        if ((values > num_classes) & (values != IGNORE)).any():
            wrong.append(image_id)
        objects += bool(((values > 0) & (values != IGNORE)).any())
    if missing or wrong:
        raise ValueError(
            f"train_seg: {len(missing)} masks are missing ({', '.join(missing[:5])}), {len(wrong)} hold values above "
            f"{num_classes} ({', '.join(wrong[:5])}). Run random_walk again (--steps random_walk), or fix the masks."
        )
    if objects == 0:
        raise ValueError("train_seg: all masks are background or ignored: check the CAMs and the walk first.")
