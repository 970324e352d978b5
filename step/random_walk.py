"""Step 5: spread the CAMs by a random walk over affinities: pseudo masks label/ID.png."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from misc.config import Machine, flatten
from misc.each import each
from misc.fit import autocast
from misc.imaging import normalise, to_tensor
from misc.store import read_image, write_mask
from net.contract import AffinityNetwork, SoftCam
from step.config import Job
from step.make_aff_label import soft_cam
from step.scoring import score_masks
from step.training import trained


def walked(
    network: AffinityNetwork, image: torch.Tensor, cam: SoftCam, options: Any, machine: Machine, device: torch.device
) -> np.ndarray:
    """Scores (K + 1, H, W) float32 of background and the CAM's K classes: (3, H, W) normalised image, the recipe's
    ``walk``."""
    with torch.inference_mode(), autocast(machine, device):
        return network.refine(image.to(device), cam, options)


def run(job: Job, device: torch.device) -> None:
    """Make and score the pseudo masks of the training list and of the scored list."""
    network = trained(job, "aff", job.cfg.aff, device)
    assert isinstance(network, AffinityNetwork)

    def prepare(image_id: str) -> tuple[torch.Tensor, SoftCam]:
        image = read_image(job.catalog.image_path(image_id))
        return to_tensor(normalise(image, network.normalisation)), soft_cam(job, image_id, image.shape[:2])

    def work(image_id: str, prepared: tuple[torch.Tensor, SoftCam]) -> None:
        image, cam = prepared
        mask = np.zeros(image.shape[1:], np.uint8)
        if len(cam.keys):
            scores = walked(network, image, cam, job.cfg.aff.walk, job.cfg.machine, device)  # (K + 1, H, W)
            mask = np.concatenate([[0], cam.keys + 1]).astype(np.uint8)[scores.argmax(0)]
        write_mask(job.run.label(image_id), mask)

    each(
        "random_walk", job.cam_ids(), work, prepare=prepare, done=lambda i: job.run.label(i).exists(),
        workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
    )
    score_masks(
        job, "pseudo masks after the walk", job.cfg.score_list, job.run.label, tags="true tags",
        walk=flatten(job.cfg.aff.walk),
    )
