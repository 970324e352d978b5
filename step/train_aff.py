"""Step 4: train the affinity network on the labels of step 3."""

from __future__ import annotations

import numpy as np
import torch

from misc.store import read_arrays
from step.config import Job
from step.training import build, train


def run(job: Job, device: torch.device) -> None:
    """Train on the training list: writes weights/aff.pt."""

    def planes(image_id: str) -> np.ndarray:
        return read_arrays(job.run.aff_planes(image_id))["planes"]

    method = job.refine_method()
    train(
        job, "aff", job.cfg.aff, build(job, job.cfg.aff), device, ids=job.train_ids(),
        planes=planes, plane_fill=method.plane_fill, target=method.target,
    )
