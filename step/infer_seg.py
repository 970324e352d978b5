"""Step 7: test the segmentation network over scales, with CRF: predictions seg/ID.png of the validation list, and of
the training images that the report shows."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from misc.files.images import read_image, write_mask
from misc.infer.masks import segment_inputs
from misc.loop.each import Rest, Together, each
from step.lib import overlays
from step.lib.config import Job
from step.lib.inference import infer_class_scores, infer_class_scores_together
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

    def write(image_id: str, before: np.ndarray, scores: np.ndarray) -> None:
        if infer.crf.iterations:
            write_mask(job.run.seg_before_crf(image_id), before.argmax(0).astype(np.uint8))
        write_mask(job.run.seg(image_id), scores.argmax(0).astype(np.uint8))  # written last

    def work(image_id: str, prepared: tuple[np.ndarray, list[Tensor]]) -> Rest:
        image, inputs = prepared
        return partial(write, image_id, *infer_class_scores(network, image, infer, machine, device, inputs))

    def work_together(image_ids: list[str], prepared: list[tuple[np.ndarray, list[Tensor]]]) -> list[Rest]:
        images, inputs = (list(part) for part in zip(*prepared, strict=True))
        found = infer_class_scores_together(network, images, infer, machine, device, inputs)
        return [partial(write, i, *scores) for i, scores in zip(image_ids, found, strict=True)]

    each(
        "infer_seg", job.predicted_ids(), work, prepare=prepare, done=lambda i: job.run.seg(i).exists(),
        workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
        together=Together(machine.images_at_once(device), lambda prepared: prepared[0].shape, work_together),
        in_processes=device.type == "cpu",
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
