"""Step 7: test the segmentation network over scales, with CRF: predictions seg/ID.png."""

from __future__ import annotations

import numpy as np
import torch

from misc.each import each
from misc.fit import autocast
from misc.store import read_image, write_mask
from misc.testtime import segment, with_crf
from net.contract import Segmenter
from step.config import Job
from step.scoring import score_masks, start_weights
from step.training import trained


def predict(job: Job, network: Segmenter, image: np.ndarray, device: torch.device) -> np.ndarray:
    """Predicted mask (H, W) uint8 of one image (H, W, 3) uint8."""
    infer = job.cfg.seg.infer
    with autocast(job.cfg.machine, device):
        scores = segment(network.logits, image, infer, network.normalisation, device)
    return with_crf(scores, image, infer, network.normalisation, device).argmax(0).astype(np.uint8)


def run(job: Job, device: torch.device) -> None:
    """Predict and score the validation list. No tags are used."""
    network = trained(job, "seg", job.cfg.seg, device)
    assert isinstance(network, Segmenter)
    infer = job.cfg.seg.infer

    def prepare(image_id: str) -> np.ndarray:
        return read_image(job.catalog.image_path(image_id))

    def work(image_id: str, image: np.ndarray) -> None:
        write_mask(job.run.seg(image_id), predict(job, network, image, device))

    each(
        "infer_seg", job.catalog.ids(job.cfg.val_list), work, prepare=prepare,
        done=lambda i: job.run.seg(i).exists(), workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
    )
    trained_on = "pseudo masks" if job.cfg.masks == "pseudo" else "true masks"
    score_masks(
        job, f"predictions ({job.cfg.segmenter} trained on {trained_on})", job.cfg.val_list, job.run.seg, tags="none",
        scales=list(infer.scales), flip=infer.flip, crf_iterations=infer.crf.iterations,
        start_weights=start_weights(job.cfg.seg, job.cfg.cam),
    )
