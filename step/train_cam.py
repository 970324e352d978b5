"""Step 1: train the CAM network from tags (all of its phases, one after the other)."""

from __future__ import annotations

import torch

from net.contract import Network
from step.config import Job
from step.training import build, train, trained


def run(job: Job, device: torch.device) -> None:
    """Train every phase of the method on the training list: writes weights/PHASE.pt, the last one weights/cam.pt."""
    earlier: dict[str, Network] = {}
    for name, phase in job.cfg.cam.phases():
        train(job, name, phase, build(job, phase, earlier), device, ids=job.train_ids())
        earlier[name] = trained(job, name, phase, device, earlier).requires_grad_(False)
