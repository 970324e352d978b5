"""Scores of what a step made, where the data set has masks, recorded in scores.json with their provenance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from misc import distributed
from misc.score import Scores, evaluate_cams, evaluate_masks
from misc.store import read_cam, read_mask
from step.config import Job

THRESHOLDS = tuple(i / 100 for i in range(60))
"""Background scores of the published curves (evaluation.md 1.3)."""


@dataclass(frozen=True)
class _Files:
    """Readers of an image's arrays by id; picklable for worker processes."""

    path: Callable[[str], Path | None]
    read: Callable[[Path], np.ndarray]

    def __call__(self, image_id: str) -> Any:
        path = self.path(image_id)
        if path is None:
            raise FileNotFoundError(f"{image_id} has no mask in the data set.")
        return self.read(path)


def _read_maps(path: Path) -> tuple[np.ndarray, np.ndarray]:
    cam = read_cam(path)
    return cam.keys, cam.full()


def score_cams(job: Job) -> None:
    """Search the background score of the CAMs on the scored list and record curve and best mIoU."""
    ids = _scorable(job, "CAM", job.cfg.score_list)
    if ids:
        scores = evaluate_cams(
            ids, _Files(job.run.cam, _read_maps), _Files(job.catalog.mask_path, read_mask),
            job.catalog.num_classes + 1, THRESHOLDS, boundary=False,
        )
        infer = job.cfg.cam.infer
        _record(job, "CAM", job.cfg.score_list, scores, tags="true tags", scales=list(infer.scales), flip=infer.flip)


def score_masks(job: Job, name: str, split: str, path: Callable[[str], Path], **provenance: Any) -> None:
    """Score masks of a list and record them under ``name``."""
    ids = _scorable(job, name, split)
    if ids:
        scores = evaluate_masks(
            ids, _Files(path, read_mask), _Files(job.catalog.mask_path, read_mask), job.catalog.num_classes + 1,
        )
        _record(job, name, split, scores, **provenance)


def why_unscored(job: Job, split: str) -> str | None:
    """Why the data set lets nothing be scored on a list, in a sentence or two; None where all its images have masks."""
    if not job.catalog.has_list(split):
        return f"There is no list {split} in {job.catalog.root}, so nothing is scored on it."
    ids = job.catalog.ids(split)
    with_mask = sum(job.catalog.mask_path(i) is not None for i in ids)
    if with_mask == 0:
        return f"The list {split} has no true masks, so scores are left out."
    if with_mask < len(ids):
        return (
            f"Only {with_mask} of the {len(ids)} images of the list {split} have true masks, so scores are left out. "
            "Add the others, or name a list of images with masks."
        )
    return None


def _scorable(job: Job, name: str, split: str) -> list[str]:
    """Ids of a list if this process is to score it: all images have masks, and no part of them is another job's.
    Otherwise it is said why ``name`` has no score."""
    if not distributed.is_main():
        return []
    if job.cfg.shard_part()[1] > 1:
        distributed.say("This is one part of the images (--shard): call the step again without it to score them all.")
        return []
    reason = why_unscored(job, split)
    if reason is not None:
        distributed.say(f"{name}: no score. {reason}")
        return []
    return job.catalog.ids(split)


def _record(job: Job, name: str, split: str, scores: Scores, **provenance: Any) -> None:
    names = ["background", *job.catalog.classes]
    job.run.add_score(name, {**scores.to_dict(names, split), **provenance})
    chosen = ""
    if scores.threshold is not None:
        chosen = f" at background score {scores.threshold:.2f} (searched on {split} itself)"
    distributed.say(f"{name}: {100 * scores.confusion.miou():.2f} mIoU on {split}, {scores.images} images{chosen}")
