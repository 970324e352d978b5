"""Step 7: test the segmentation network over scales, with CRF: predictions seg/ID.png of the validation list, and of
the training images that the report shows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from misc.files.images import read_image, write_mask
from misc.infer.masks import segment_inputs
from misc.loop.each import Rest, each
from step.lib import overlays
from step.lib.config import Job
from step.lib.inference import infer_class_scores
from step.lib.networks import load_segmentation_network
from step.lib.scoring import precisions, score_masks, start_weights
from step.lib.sizes import write_full_masks


def run(job: Job, device: torch.device) -> None:
    """Predict the validation list and the training images in the report; score the former. No tags are used."""
    network = load_segmentation_network(job, device)
    infer = job.cfg.seg.infer
    machine = job.machine(job.cfg.cam if job.single_stage else job.cfg.seg, device)

    def prepare(image_id: str) -> tuple[np.ndarray, list[Tensor]]:
        image = read_image(job.catalog.image_path(image_id))
        return image, list(segment_inputs(image, infer, network.normalisation))

    def work(image_id: str, prepared: tuple[np.ndarray, list[Tensor]]) -> Rest:
        image, inputs = prepared
        before, scores = infer_class_scores(network, image, infer, machine, device, inputs)

        def write() -> None:
            if infer.crf.iterations:
                write_mask(job.run.seg_before_crf(image_id), before.argmax(0).astype(np.uint8))
            write_mask(job.run.seg(image_id), scores.argmax(0).astype(np.uint8))  # written last

        return write

    each(
        "infer_seg", job.predicted_ids(), work, prepare=prepare, done=lambda i: job.run.seg(i).exists(),
        workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
    )
    overlays.draw(job, job.run.seg, job.predicted_ids())
    write_full_masks(job, job.run.seg, job.predicted_ids())
    known = set(job.train_ids())
    if job.single_stage:
        trained_on, phase = f"{job.cfg.method} itself, trained on tags", job.cfg.cam
    else:
        masks = {"pseudo": "pseudo masks", "truth": "true masks"}[job.cfg.masks]
        trained_on, phase = f"{job.cfg.segmenter} trained on {masks}", job.cfg.seg
    provenance = dict(
        tags="none", scales=list(infer.scales), flip=infer.flip,
        start_weights=start_weights(phase, job.cfg.cam),
        precision=precisions(job, "cam" if job.single_stage else "seg", device),
        seen_in_training=sum(i in known for i in job.catalog.ids(job.cfg.val_list)),
    )
    name, iterations = f"predictions ({trained_on})", infer.crf.iterations
    score_masks(job, name, job.cfg.val_list, job.run.seg, crf_iterations=iterations, **provenance)
    if iterations:
        score_masks(
            job, f"{name}, before the CRF", job.cfg.val_list, job.run.seg_before_crf, crf_iterations=0, **provenance
        )
