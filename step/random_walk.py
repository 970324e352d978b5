"""Step 5: refine the CAMs, by a random walk over affinities or without training: pseudo masks label/ID.png.

Refiners that separate single objects also write instance/ID.npz, and instance/ID.png to look at.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from misc.config import flatten
from misc.files.images import read_image, write_mask
from misc.files.segments import read_segments
from misc.image.cam import Cam
from misc.image.picture import Picture
from misc.loop.each import each
from misc.score.objects import Instances, write_instances
from step.lib import overlays
from step.lib.config import Job
from step.lib.inference import pseudo_mask, read_full_cam, settle_walk, walk_cam
from step.lib.networks import load_refiner
from step.lib.scoring import precisions, refiner_weights, score_instances, score_masks
from step.lib.sizes import write_full_masks


def run(job: Job, device: torch.device) -> None:
    """Make and score the pseudo masks of the training list and of the scored list."""
    refiner, walk = load_refiner(job, device), settle_walk(job.cfg.aff.walk, job.run)
    machine = job.machine(job.cfg.aff, device)
    finds_instances = refiner.finds_instances(walk)

    def prepare(image_id: str) -> tuple[Picture, Cam]:
        image = read_image(job.catalog.image_path(image_id))
        picture = Picture.of_rgb(image, refiner.normalisation)
        if refiner.wants_segments:
            picture = replace(picture, segments=read_segments(job.segments_folder(), image_id, picture.size))
        return picture, read_full_cam(job, image_id, picture.size)

    def work(image_id: str, prepared: tuple[Picture, Cam]) -> None:
        picture, cam = prepared
        mask = np.zeros(picture.size, np.uint8)
        instances = Instances.none(mask.shape)
        if len(cam.keys):
            scores, instances = walk_cam(refiner, picture, cam, walk, machine, device)
            mask = pseudo_mask(scores, cam.keys, job.cfg.aff.ignore_below)
        if finds_instances:
            write_instances(job.run.instance(image_id), instances)
            write_mask(job.run.instance_picture(image_id), instances.picture())
        write_mask(job.run.label(image_id), mask)  # written last

    each(
        "random_walk", job.cam_ids(), work, prepare=prepare, done=lambda i: job.run.label(i).exists(),
        workers=job.cfg.machine.workers, part=job.cfg.shard_part(), in_processes=device.type == "cpu",
    )
    overlays.draw(job, job.run.label, job.cam_ids())
    write_full_masks(job, job.run.label, job.cam_ids())
    precision = precisions(job, "aff", device)
    score_masks(
        job, "pseudo masks after the walk", job.cfg.score_list, job.run.label, tags="true tags",
        refiner=job.cfg.refiner, walk=flatten(walk), ignore_below=job.cfg.aff.ignore_below,
        start_weights=refiner_weights(job.cfg), precision=precision,
    )
    if finds_instances:
        score_instances(
            job, "pseudo objects after the walk", job.cfg.score_list, job.run.instance, tags="true tags",
            walk=flatten(walk), start_weights=refiner_weights(job.cfg), precision=precision,
        )
