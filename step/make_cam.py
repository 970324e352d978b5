"""Step 2: infer the CAMs of the training images over scales and mirrors: cam/ID.npz."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from misc.files.camfiles import write_cam
from misc.files.images import read_image
from misc.infer.cams import scaled_inputs
from misc.loop.each import Rest, Together, each
from step.lib.config import Job
from step.lib.inference import predict_cam, predict_cams
from step.lib.networks import load_cam_network
from step.lib.scoring import score_cams


def run(job: Job, device: torch.device) -> None:
    """Infer and score the CAMs of the training list and of the scored list.

    An image without a tag gets a file without maps: everything is background.
    """
    infer_list(job, device, job.cam_ids())
    score_cams(job, device)
    for kind in job.further_weights:
        infer_list(job, device, job.further_cam_ids(), kind)
        score_cams(job, device, kind)


def infer_list(job: Job, device: torch.device, ids: list[str], kind: str = "") -> None:
    """Infer the CAMs of images by the CAM network, or by the one of ``Job.further_weights`` that is named."""
    network = load_cam_network(job, device, kind)
    infer, machine = job.cfg.cam.infer, job.machine(job.cfg.cam, device)

    def prepare(image_id: str) -> tuple[np.ndarray, np.ndarray, list[Tensor]]:
        image, tags = read_image(job.catalog.image_path(image_id)), job.catalog.tags(image_id)
        inputs = scaled_inputs(image, infer, network.normalisation) if tags.any() else iter(())
        return image, tags, list(inputs)

    def work(image_id: str, prepared: tuple[np.ndarray, np.ndarray, list[Tensor]]) -> Rest:
        image, tags, inputs = prepared
        cam = predict_cam(network, image, tags, infer, machine, device, inputs)
        return partial(write_cam, job.run.cam(image_id, kind), cam)

    def size(prepared: tuple[np.ndarray, np.ndarray, list[Tensor]]) -> tuple[int, ...] | None:
        return prepared[0].shape if prepared[2] else None  # an image without a tag has no inputs

    def work_together(image_ids: list[str], prepared: list[tuple[np.ndarray, np.ndarray, list[Tensor]]]) -> list[Rest]:
        images, tags, inputs = (list(part) for part in zip(*prepared, strict=True))
        found = predict_cams(network, images[0].shape[:2], tags, infer, machine, device, inputs)
        return [partial(write_cam, job.run.cam(i, kind), cam) for i, cam in zip(image_ids, found, strict=True)]

    each(
        f"make_cam {kind}".strip(), ids, work, prepare=prepare, done=lambda i: job.run.cam(i, kind).exists(),
        workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
        together=Together(machine.images_at_once(device), size, work_together), in_processes=device.type == "cpu",
    )
