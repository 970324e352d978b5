"""Step 3: make affinity labels from the CAMs: aff_label/ID.npz for the training, aff_label/ID.png to look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from misc.files.images import read_image, write_mask
from misc.files.store import write_arrays
from misc.loop.each import each
from step.lib.config import Job
from step.lib.inference import read_full_cam


@dataclass(frozen=True)
class _MakeLabel:
    """Makes the affinity labels of one image; picklable for worker processes."""

    job: Job

    def __call__(self, image_id: str) -> None:
        job = self.job
        image = read_image(job.catalog.image_path(image_id))
        cam = read_full_cam(job, image_id, image.shape[:2])
        picture, planes = job.refine_method().make_label(image, cam, job.cfg.aff.label)
        write_arrays(job.run.aff_planes(image_id), planes=planes)
        write_mask(job.run.aff_label(image_id), picture)


def run(job: Job, device: torch.device) -> None:
    """Make the labels of the training list, in worker processes."""
    each(
        "make_aff_label", job.train_ids(), _MakeLabel(job),
        done=lambda i: job.run.aff_label(i).exists(),  # written last
        workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
    )
