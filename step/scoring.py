"""Scores of what a step made, where the data set has masks, recorded in scores.json with their provenance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from misc import distributed
from misc.instances import Instances, read_instances, true_instances
from misc.score import InstanceScores, Scores, evaluate_cams, evaluate_instances, evaluate_masks
from misc.store import read_cam, read_mask
from net.contract import Phase, SeedRecipe
from step.config import Job

THRESHOLDS = tuple(i / 100 for i in range(60))
"""Background scores of the published curves (evaluation.md 1.3)."""


def start_weights(phase: Phase, cam: SeedRecipe | None = None) -> str:
    """What the network of a phase was trained from, in words, for the provenance of its scores: random weights, a file
    and what that was trained on, or the CAM network, which ``cam`` made."""
    if phase.weights == "none":
        return "random"
    if phase.weights == "cam" and cam is not None:
        return f"CAM network (from {start_weights(cam.phases()[-1][1])})"
    name = Path(phase.weights).name
    return f"{phase.init} ({name})" if phase.init else name


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
    ids = _scorable(job, job.cfg.score_list)
    if ids:
        scores = evaluate_cams(
            ids, _Files(job.run.cam, _read_maps), _Files(job.catalog.mask_path, read_mask),
            job.catalog.num_classes + 1, THRESHOLDS, boundary=False,
        )
        infer = job.cfg.cam.infer
        _record(
            job, "CAM", job.cfg.score_list, scores, tags="true tags", scales=list(infer.scales), flip=infer.flip,
            start_weights=start_weights(job.cfg.cam.phases()[-1][1]),
        )


def score_masks(job: Job, name: str, split: str, path: Callable[[str], Path], **provenance: Any) -> None:
    """Score masks of a list and record them under ``name``."""
    ids = _scorable(job, split)
    if ids:
        scores = evaluate_masks(
            ids, _Files(path, read_mask), _Files(job.catalog.mask_path, read_mask), job.catalog.num_classes + 1,
        )
        _record(job, name, split, scores, **provenance)


@dataclass(frozen=True)
class _TrueInstances:
    """An image's true objects by its id; picklable for worker processes."""

    job: Job

    def __call__(self, image_id: str) -> Instances:
        catalog = self.job.catalog
        paths = catalog.object_path(image_id), catalog.mask_path(image_id)
        assert paths[0] is not None and paths[1] is not None  # score_instances has looked
        try:
            return true_instances(read_mask(paths[0]), read_mask(paths[1]))
        except ValueError as error:
            raise ValueError(f"{paths[0]}, {paths[1]}: {error}. Replace the wrong one.") from None


def score_instances(job: Job, name: str, split: str, path: Callable[[str], Path], **provenance: Any) -> None:
    """Score single objects of a list, where the data set tells its objects apart, and record them under ``name``."""
    ids = _scorable(job, split)
    if ids and any(job.catalog.object_path(i) is None for i in ids):
        distributed.say(f"The list {split} has images without masks of single objects: {name} are not scored.")
    elif ids:
        scores = evaluate_instances(
            ids, _Files(path, read_instances), _TrueInstances(job), job.catalog.num_classes
        )
        _record_instances(job, name, split, scores, **provenance)


def _record_instances(job: Job, name: str, split: str, scores: InstanceScores, **provenance: Any) -> None:
    job.run.add_score(name, {**scores.to_dict(job.catalog.classes, split), **provenance})
    found = ", ".join(
        f"{100 * scores.precision.mean(at):.2f} AP at mask IoU {iou:g}" for at, iou in enumerate(scores.precision.ious)
    )
    distributed.say(
        f"{name}: {found} on {split}, {scores.images} images, {scores.precision.objects.sum()} objects; trained from "
        f"{provenance['start_weights']}"
    )


def _scorable(job: Job, split: str) -> list[str]:
    """Ids of a list if this process is to score it: all images have masks, and no part of them is another job's."""
    if not distributed.is_main():
        return []
    if job.cfg.shard_part()[1] > 1:
        distributed.say("This is one part of the images (--shard): call the step again without it to score them all.")
        return []
    if not job.catalog.has_list(split):
        distributed.say(f"No list {split} in {job.catalog.root}: nothing is scored.")
        return []
    ids = job.catalog.ids(split)
    if any(job.catalog.mask_path(i) is None for i in ids):
        distributed.say(f"The list {split} has images without masks: nothing is scored.")
        return []
    return ids


def _record(job: Job, name: str, split: str, scores: Scores, **provenance: Any) -> None:
    names = ["background", *job.catalog.classes]
    job.run.add_score(name, {**scores.to_dict(names, split), **provenance})
    chosen = ""
    if scores.threshold is not None:
        chosen = f" at background score {scores.threshold:.2f} (searched on {split} itself)"
    distributed.say(
        f"{name}: {100 * scores.confusion.miou():.2f} mIoU on {split}, {scores.images} images{chosen}; trained from "
        f"{provenance['start_weights']}"
    )
