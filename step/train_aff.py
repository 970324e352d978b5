"""Step 4: train the affinity network on the labels of step 3."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from misc.files.store import read_arrays
from step.lib.config import Job
from step.lib.networks import build_network
from step.lib.training import train


@dataclass(frozen=True)
class _Planes:
    """Reads the label planes of an image; picklable for worker processes."""

    job: Job

    def __call__(self, image_id: str) -> np.ndarray:
        path = self.job.run.aff_planes(image_id)
        planes = read_arrays(path).get("planes")
        if planes is None or planes.ndim != 3 or planes.dtype.kind not in "fiub" or not np.isfinite(planes).all():
            raise ValueError(f"{path} holds no affinity labels of finite numbers: delete it, make_aff_label makes it.")
        return planes


def run(job: Job, device: torch.device) -> None:
    """Train on the training list: writes weights/aff.pt."""
    method = job.refine_method()
    train(
        job, "aff", job.cfg.aff, build_network(job, job.cfg.aff), device, ids=job.train_ids(),
        planes=_Planes(job), plane_fill=method.plane_fill, target=method.make_target,
    )
