"""Step 2: infer the CAMs of the training images over scales and mirrors: cam/ID.npz."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from misc.config import CamInference, Machine
from misc.files.store import read_image, write_cam
from misc.infer.cams import infer_cams
from misc.loop.each import each
from misc.loop.fit import autocast
from net.contract import Network, SeedNetwork
from step.lib.config import Job
from step.lib.scoring import score_cams
from step.lib.training import trained


def cam_network(job: Job, device: torch.device) -> SeedNetwork:
    """The trained CAM network (the last phase), in evaluation mode."""
    earlier: dict[str, Network] = {}
    for name, phase in job.cfg.cam.phases():
        earlier[name] = trained(job, name, phase, device, earlier)
    return earlier["cam"]  # type: ignore[return-value]


def class_maps(
    network: SeedNetwork, image: np.ndarray, tags: np.ndarray, infer: CamInference, machine: Machine,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray | None]:
    """``misc.infer.cams.infer_cams`` at the machine's precision, with gradients where the network's map needs them."""
    grad = contextlib.nullcontext() if network.map_needs_gradient else torch.inference_mode()
    with grad, autocast(machine, device):
        return infer_cams(network.cam, image, tags, infer, network.normalisation, device)


def run(job: Job, device: torch.device) -> None:
    """Infer and score the CAMs of the training list and of the scored list.

    An image without a tag gets a file without maps: it holds background only.
    """
    network = cam_network(job, device)
    infer = job.cfg.cam.infer

    def prepare(image_id: str) -> tuple[np.ndarray, np.ndarray]:
        return read_image(job.catalog.image_path(image_id)), job.catalog.tags(image_id)

    def work(image_id: str, prepared: tuple[np.ndarray, np.ndarray]) -> None:
        image, tags = prepared
        maps, coarse = class_maps(network, image, tags, infer, job.cfg.machine, device)
        write_cam(job.run.cam(image_id), np.flatnonzero(tags), maps, image.shape[:2], coarse)

    each(
        "make_cam", job.cam_ids(), work, prepare=prepare, done=lambda i: job.run.cam(i).exists(),
        workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
    )
    score_cams(job)
