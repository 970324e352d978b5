"""Step 7: test the segmentation network over scales, with CRF: predictions seg/ID.png."""

from __future__ import annotations

import numpy as np
import torch

from misc.config import Machine, SegInference
from misc.files.store import read_image, write_mask
from misc.infer.masks import segment, with_crf
from misc.loop.each import each
from misc.loop.fit import autocast
from net.contract import Segmenter, SingleStage
from step.lib import overlays
from step.lib.config import Job
from step.lib.scoring import score_masks, start_weights
from step.lib.training import trained
from step.make_cam import cam_network


def segmentation_network(job: Job, device: torch.device) -> Segmenter | SingleStage:
    """The trained network that predicts masks, in evaluation mode: of a single-stage run the CAM network."""
    network = cam_network(job, device) if job.single_stage else trained(job, "seg", job.cfg.seg, device)
    assert isinstance(network, Segmenter | SingleStage)
    return network


def class_scores(
    network: Segmenter | SingleStage, image: np.ndarray, infer: SegInference, machine: Machine, device: torch.device
) -> np.ndarray:
    """Scores (C + 1, H, W) float32 of one image (H, W, 3) uint8 over scales, after the CRF, background first."""
    with autocast(machine, device):
        scores = segment(network.logits, image, infer, network.normalisation, device)
    return with_crf(scores, image, infer, network.normalisation, device)


def predict(job: Job, network: Segmenter | SingleStage, image: np.ndarray, device: torch.device) -> np.ndarray:
    """Predicted mask (H, W) uint8 of one image (H, W, 3) uint8."""
    return class_scores(network, image, job.cfg.seg.infer, job.cfg.machine, device).argmax(0).astype(np.uint8)


def run(job: Job, device: torch.device) -> None:
    """Predict and score the validation list. No tags are used."""
    network = segmentation_network(job, device)
    infer = job.cfg.seg.infer

    def prepare(image_id: str) -> np.ndarray:
        return read_image(job.catalog.image_path(image_id))

    def work(image_id: str, image: np.ndarray) -> None:
        write_mask(job.run.seg(image_id), predict(job, network, image, device))

    each(
        "infer_seg", job.catalog.ids(job.cfg.val_list), work, prepare=prepare,
        done=lambda i: job.run.seg(i).exists(), workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
    )
    overlays.draw(job, job.run.seg, job.catalog.ids(job.cfg.val_list))
    known = set(job.train_ids())
    if job.single_stage:
        trained_on, phase = f"{job.cfg.method} itself, trained on tags", job.cfg.cam
    else:
        masks = {"pseudo": "pseudo masks", "truth": "true masks"}[job.cfg.masks]
        trained_on, phase = f"{job.cfg.segmenter} trained on {masks}", job.cfg.seg
    score_masks(
        job, f"predictions ({trained_on})", job.cfg.val_list, job.run.seg, tags="none",
        scales=list(infer.scales), flip=infer.flip, crf_iterations=infer.crf.iterations,
        start_weights=start_weights(phase, job.cfg.cam),
        seen_in_training=sum(i in known for i in job.catalog.ids(job.cfg.val_list)),
    )
