"""Scores of a step's results, if the data set has true masks; recorded in scores.json with their provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from misc import distributed
from misc.files.camfiles import read_cam
from misc.files.images import read_mask
from misc.files.store import read_arrays, read_model
from misc.score import wsol
from misc.score.evaluate import InstanceScores, Scores, evaluate_cams, evaluate_instances, evaluate_masks
from misc.score.objects import Instances, read_instances, true_instances
from net.contract import Phase, SeedRecipe
from net.start_weights import NONE
from step.lib.config import Config, Job


def start_weights(phase: Phase, cam: SeedRecipe | None = None) -> str:
    """The start weights of a phase's network, in words, for the provenance of its scores: random, a file and its own
    training, the CAM network (made by the method ``cam``), or the released checkpoint that it is."""
    if phase.released:
        return f"released checkpoint {', '.join(Path(file).name for file in phase.released_files)}, as it is"
    if is_meaningless(phase):
        return "random, and partly never trained: these results mean nothing"
    return phase.start.tell(phase.init, None if cam is None else start_weights(cam.phases()[-1][1]))


def is_meaningless(phase: Phase) -> bool:
    """Whether a part of a phase's network stays random, so that nothing it finds means anything."""
    return not phase.released and phase.network.keeps_start_weights and phase.start.word == NONE


def refiner_weights(cfg: Config) -> str:
    """``start_weights`` of the refiner; of one that is not trained, those of the CAM network whose maps it refines."""
    if isinstance(cfg.aff, Phase):
        return start_weights(cfg.aff, cfg.cam)
    return start_weights(cfg.cam.phases()[-1][1])


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
    return cam.keys, cam.full_maps()


def precisions(job: Job, name: str, device: torch.device) -> dict[str, str]:
    """Precision of the training of the network NAME (cam, aff, seg), as its file says, and of its inference; for a
    refiner that is not trained the latter alone."""
    phase = {"cam": job.cfg.cam, "aff": job.cfg.aff, "seg": job.cfg.seg}[name]
    applied = job.machine(phase, device).precision(device)
    if name == "aff" and not job.refine_method().is_trained:
        return {"inference": applied}
    _, description = read_model(job.run.weights(name))
    return {"training": description.get("precision", "not recorded"), "inference": applied}


def selection(job: Job, kind: str = "") -> dict[str, Any]:
    """How the epoch of the CAM network, or of the one of ``Job.further_weights`` that is named, was selected, and its
    rating, for the provenance of its scores."""
    if job.cfg.cam.released:
        return {"selection": "that of its authors", "selection_rating": None}
    chosen = {"last": "last", "loc_top1": "val_boxes, by Loc Top-1"}.get(kind, job.cfg.cam.selection)
    _, description = read_model(job.run.weights(f"cam.{kind}" if kind else "cam"))
    rating = description.get("rating")
    if chosen != "last" and rating and "selected" not in rating:
        chosen = f"last ({chosen} was no number in any epoch)"
    return {"selection": chosen, "selection_rating": rating}


def class_texts(job: Job) -> dict[str, Any]:
    """By what words the CAM network knows the classes, for the provenance of its scores: {"texts": {"source": the file
    of the user's words or "default", "classes": name -> text, "background": words that they compete with,
    "templates"}}; empty for networks that read none, and for masks that rest on the true ones."""
    path = job.run.weights("cam")
    if not job.cfg.cam.network.reads_class_texts or job.cfg.masks == "truth" or not path.exists():
        return {}
    texts = read_model(path)[1].get("texts")
    if texts is None:  # from before they were noted
        return {}
    own = (job.cfg.texts or job.catalog.root / "texts.csv").name if job.texts() else "default"
    words = dict(zip(job.catalog.classes, texts["classes"], strict=True))
    return {"texts": {"source": own, **texts, "classes": words}}


FURTHER = {"": "", "last": ", last weights", "loc_top1": ", weights of the best Loc Top-1"}
"""Endings of the names of scores, by the kind of the CAM network (``Job.further_weights``)."""


def score_cams(job: Job, device: torch.device, kind: str = "") -> None:
    """Search the best background score of the CAMs on the scored list, and record curve and best mIoU. ``kind``: those
    of the network of ``Job.further_weights`` that is named."""
    ids = _scorable(job, "CAM", job.cfg.score_list)
    if ids:
        infer = job.cfg.cam.infer
        files = _Files(partial(job.run.cam, kind=kind), _read_maps), _Files(job.catalog.mask_path, read_mask)
        searched = [i / 100 for i in range(round(100 * infer.search_to) + 1)]  # evaluation.md 1.3
        searches = {"CAM": searched}
        if infer.fixed_background is not None:
            searches["CAM at the published background score"] = [infer.fixed_background]
        for name, thresholds in searches.items():
            scores = evaluate_cams(ids, *files, job.catalog.num_classes + 1, thresholds, boundary=False)
            _record(
                job, name + FURTHER[kind], job.cfg.score_list, scores, tags="true tags", scales=list(infer.scales),
                flip=infer.flip, start_weights=start_weights(job.cfg.cam.phases()[-1][1]),
                precision=precisions(job, "cam", device), **selection(job, kind),
            )


def score_masks(job: Job, name: str, split: str, path: Callable[[str], Path], **provenance: Any) -> None:
    """Score the masks of a list and record the score under ``name``."""
    ids = _scorable(job, name, split)
    if ids:
        scores = evaluate_masks(
            ids, _Files(path, read_mask), _Files(job.catalog.mask_path, read_mask), job.catalog.num_classes + 1,
        )
        _record(job, name, split, scores, **provenance)


@dataclass(frozen=True)
class _TrueInstances:
    """Reads an image's true objects by its id; picklable for worker processes."""

    job: Job

    def __call__(self, image_id: str) -> Instances:
        catalog = self.job.catalog
        paths = catalog.object_path(image_id), catalog.mask_path(image_id)
        assert paths[0] is not None and paths[1] is not None  # score_instances has checked
        try:
            return true_instances(read_mask(paths[0]), read_mask(paths[1]))
        except ValueError as error:
            raise ValueError(f"{paths[0]}, {paths[1]}: {error}. Replace the wrong one.") from None


def score_instances(job: Job, name: str, split: str, path: Callable[[str], Path], **provenance: Any) -> None:
    """Score the single objects of a list, if the data set has masks of objects, and record the score under ``name``."""
    ids = _scorable(job, name, split)
    if ids and any(job.catalog.object_path(i) is None for i in ids):
        distributed.say(f"The list {split} has images without masks of single objects: {name} are not scored.")
    elif ids:
        scores = evaluate_instances(
            ids, _Files(path, read_instances), _TrueInstances(job), job.catalog.num_classes
        )
        _record_instances(job, name, split, scores, **provenance)


def _record_instances(job: Job, name: str, split: str, scores: InstanceScores, **provenance: Any) -> None:
    job.run.add_score(name, {**scores.to_dict(job.catalog.classes, split), **provenance, **class_texts(job)})
    found = ", ".join(
        f"{100 * scores.precision.mean(at):.2f} AP at mask IoU {iou:g}" for at, iou in enumerate(scores.precision.ious)
    )
    distributed.say(
        f"{name}: {found} on {split}, {scores.images} images, {scores.precision.objects.sum()} objects; start weights: "
        f"{provenance['start_weights']}"
    )


def score_boxes(job: Job, device: torch.device, kind: str = "") -> None:
    """Score the boxes of the validation list by both protocols and record each score (wsol.md sections 7 and 8).
    ``kind``: those of the network of ``Job.further_weights`` that is named."""
    if not _whole(job):
        return
    split, options, infer = job.cfg.val_list, job.cfg.cam.boxes, job.cfg.cam.infer
    found = [read_arrays(job.run.box(i, kind)) for i in job.catalog.ids(split)]
    verdicts = [
        wsol.Verdict(**{f.name: stored[f.name].item() for f in dataclasses.fields(wsol.Verdict)}) for stored in found
    ]
    overlap = np.stack([stored["overlap"] for stored in found], 1)  # (2, N, T)
    taus = wsol.list_thresholds(options.interval)
    v1, at = wsol.max_box_acc(overlap[0], taus)
    searched = f"searched on {split} itself"
    hidden, given, start = "none", "true class", start_weights(job.cfg.cam.phases()[-1][1])
    precision, selected = precisions(job, "cam", device), selection(job, kind)
    fixed = {"threshold": options.threshold, "threshold_choice": "fixed"}
    means = wsol.summarise_verdicts(verdicts)
    figures = [(n, v, given if n == "GT-Known" else hidden, fixed) for n, v in means.items()]
    figures += [
        ("MaxBoxAcc", v1, given, {"threshold": at, "threshold_choice": searched}),
        ("MaxBoxAccV2", wsol.max_box_acc_v2(overlap[1]), given,
         {"threshold": None, "threshold_choice": f"one for each overlap of {list(wsol.IOUS)}, {searched}"}),
    ]  # fmt: skip
    pixels = sum(stored["pixels"] for stored in found)
    if pixels.any():
        figures.append(("PxAP", wsol.pxap(pixels), given, {"threshold": None, "threshold_choice": "all"}))
    for name, value, tags, cut in figures:
        cut = {"threshold": None, "threshold_choice": None} if name.startswith("Cls") else cut
        job.run.add_score(
            f"boxes: {name}{FURTHER[kind]}",
            {"value": value, "unit": "percent", "images": len(found), "split": split, "tags": tags, **cut,
             "scales": list(infer.scales), "flip": infer.flip, "grid": options.side, "start_weights": start,
             "precision": precision, **selected, **class_texts(job),
             **({"errors": wsol.error_shares(verdicts)} if name == "Loc Top-1" else {})},
        )  # fmt: skip
        distributed.say(f"{name}{FURTHER[kind]}: {value:.2f} % on {split}, {len(found)} images, tags used: {tags}")


def _whole(job: Job) -> bool:
    """Whether this process scores a list: only the main process, and only if the images are not split over jobs."""
    if job.cfg.shard_part()[1] > 1:
        distributed.say("This is one part of the images (--shard): to score all, run the step again without --shard.")
        return False
    return distributed.is_main()


def why_unscored(job: Job, split: str) -> str | None:
    """Why a list cannot be scored, in a sentence or two; None if all its images have true masks."""
    if not job.catalog.has_list(split):
        return f"There is no list {split} in {job.catalog.root}, so nothing is scored on it."
    ids = job.catalog.ids(split)
    with_mask = sum(job.catalog.mask_path(i) is not None for i in ids)
    if with_mask == 0:
        return f"The list {split} has no true masks, so scores are left out."
    if with_mask < len(ids):
        return (
            f"Only {with_mask} of the {len(ids)} images of the list {split} have true masks, so scores are left out. "
            "Add the missing masks, or name a list of images with masks."
        )
    return None


def _scorable(job: Job, name: str, split: str) -> list[str]:
    """Ids of a list if this process scores it: all images have masks and are not split over jobs. Otherwise prints why
    ``name`` has no score."""
    if not _whole(job):
        return []
    reason = why_unscored(job, split)
    if reason is not None:
        distributed.say(f"{name}: no score. {reason}")
        return []
    return job.catalog.ids(split)


def _record(job: Job, name: str, split: str, scores: Scores, **provenance: Any) -> None:
    names = ["background", *job.catalog.classes]
    job.run.add_score(name, {**scores.to_dict(names, split), **provenance, **class_texts(job)})
    chosen = ""
    if scores.threshold is not None:
        how = "fixed" if scores.curve is None else f"searched on {split} itself"
        chosen = f" at background score {scores.threshold:.2f} ({how})"
    distributed.say(
        f"{name}: {100 * scores.confusion.miou():.2f} mIoU on {split}, {scores.images} images{chosen}; start weights: "
        f"{provenance['start_weights']}"
    )
