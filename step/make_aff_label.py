"""Step 3: make affinity labels from the CAMs: aff_label/ID.npz for the training, aff_label/ID.png to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from misc.files.images import read_image, write_mask
from misc.files.store import write_arrays
from misc.image.cam import Cam
from misc.loop.each import each
from step.lib.config import Job
from step.lib.inference import read_full_cam


@dataclass(frozen=True)
class _MakeLabel:
    """Makes the affinity labels of one image; picklable for worker processes."""

    job: Job
    device: torch.device

    def read(self, image_id: str) -> tuple[np.ndarray, Cam]:
        """Image and CAMs."""
        image = read_image(self.job.catalog.image_path(image_id))
        return image, read_full_cam(self.job, image_id, image.shape[:2])

    def __call__(self, image_id: str, prepared: tuple[np.ndarray, Cam] | None = None) -> None:
        job = self.job
        image, cam = prepared or self.read(image_id)
        picture, planes = job.refine_method().make_label(image, cam, job.cfg.aff.label, self.device)
        write_arrays(job.run.aff_planes(image_id), planes=planes)
        write_mask(job.run.aff_label(image_id), picture)


def run(job: Job, device: torch.device) -> None:
    """Make the labels of the training list: on the GPU, or else in worker processes."""
    make = _MakeLabel(job, device)
    each(
        "make_aff_label", job.train_ids(), make, prepare=None if device.type == "cpu" else make.read,
        done=lambda i: job.run.aff_label(i).exists(),  # written last
        workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
    )
