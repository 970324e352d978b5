"""What the masks of single images say: IoU with the truth, agreement of the stages, tags without a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from misc.files.camfiles import read_cam
from misc.files.images import read_mask
from misc.files.runfolder import RunFolder
from misc.image.labels import IGNORE
from misc.score.metrics import Confusion, mask_at
from voc12.catalog import Catalog
from voc12.tags import DataError

CAM_MASK, PSEUDO, BEFORE, PREDICTION = "CAM", "pseudo mask", "prediction before the CRF", "prediction"
"""Stages of a run that are masks, in their order."""
USUAL_THRESHOLD = 0.3
"""Background score at which CAMs become masks where none was chosen."""
MOST_JUDGED = 2000
"""Images of a list that are judged, at equal distances, so that a page of a large data set takes a minute or two."""


@dataclass(frozen=True)
class RunImages:
    """What a run made of the images of its data set."""

    catalog: Catalog
    run: RunFolder
    threshold: float
    """Background score at which CAMs become masks."""
    threshold_choice: str
    """How it was chosen, in words."""

    @classmethod
    def of(cls, catalog: Catalog, run: RunFolder) -> RunImages:
        """With the background score of the run's CAM score, of its published recipe, or else ``USUAL_THRESHOLD``."""
        score, fixed = run.scores().get("CAM"), run.record().get("config", {}).get("cam.infer.fixed_background")
        if score is not None and score["threshold"] is not None:
            return cls(catalog, run, float(score["threshold"]), score["threshold_choice"])
        if fixed is not None:
            return cls(catalog, run, float(fixed), "the published one")
        return cls(catalog, run, USUAL_THRESHOLD, "not chosen by truth")

    def tags(self, image_id: str) -> tuple[int, ...] | None:
        """0-based classes of the image's tags; None where the data set has none for it."""
        try:
            return tuple(np.flatnonzero(self.catalog.tags(image_id)).tolist())
        except (DataError, OSError):
            return None

    def truth(self, image_id: str) -> np.ndarray | None:
        """(H, W) uint8 true mask, None where there is none."""
        path = self.catalog.mask_path(image_id)
        return None if path is None else read_mask(path)

    def stages(self, image_id: str) -> dict[str, np.ndarray]:
        """(H, W) uint8 mask of every stage that the run has made for the image, in order."""
        masks = {}
        if self.run.cam(image_id).exists():
            cam = read_cam(self.run.cam(image_id))
            masks[CAM_MASK] = mask_at((cam.keys, cam.full_maps()), self.threshold)
        paths = {PSEUDO: self.run.label, BEFORE: self.run.seg_before_crf, PREDICTION: self.run.seg}
        return masks | {stage: read_mask(path(image_id)) for stage, path in paths.items() if path(image_id).exists()}


@dataclass(frozen=True)
class Judgement:
    """What is known of the masks of one image. IoUs and shares are fractions in [0, 1]."""

    image_id: str
    tags: tuple[int, ...] | None
    """0-based classes."""
    ious: dict[str, dict[int, float]]
    """Stage -> class -> IoU, of foreground classes in truth or mask; empty without truth."""
    present: frozenset[int]
    """Classes in the truth; without truth, the tags."""
    foreground: dict[str, float]
    """Stage -> share of the pixels that are an object."""
    found: dict[str, frozenset[int]] = field(default_factory=dict)
    """Stage -> classes that have a pixel in its mask."""
    agreement: float | None = None
    """Mean IoU of the stages with one another; None with fewer than two."""

    def iou(self, stage: str) -> float | None:
        """Mean IoU of the foreground classes in truth or mask; None without any, or without truth."""
        values = self.ious.get(stage, {}).values()
        return float(np.mean(list(values))) if values else None

    def not_found(self, stage: str) -> list[int]:
        """Classes of the tags without a pixel in a stage's mask."""
        return [] if self.tags is None or stage not in self.found else sorted({*self.tags} - self.found[stage])

    def not_tagged(self, stage: str) -> list[int]:
        """Classes in a stage's mask that are no tag of the image."""
        return [] if self.tags is None or stage not in self.found else sorted(self.found[stage] - {*self.tags})


def class_ious(truth: np.ndarray, mask: np.ndarray, num_classes: int) -> dict[int, float]:
    """IoU of each of the C = ``num_classes`` foreground classes in two (H, W) uint8 masks, 0-based, of those in either;
    255 is ignored in ``truth`` and no class in ``mask``."""
    confusion = Confusion(num_classes + 1)
    confusion.add(truth, mask)
    ious = confusion.iou("nanmean")[1:]
    return {c: float(ious[c]) for c in np.flatnonzero(~np.isnan(ious)).tolist()}


def agreement_of(masks: Sequence[np.ndarray], num_classes: int) -> float | None:
    """Mean over the pairs of masks of the mean IoU of the foreground classes in either; pixels that one of the two
    ignores are left out. None for fewer than two masks; two without an object agree wholly."""
    pairs = [(a, b) for i, a in enumerate(masks) for b in masks[i + 1 :]]
    if not pairs:
        return None
    values = []
    for a, b in pairs:
        ious = class_ious(np.where(b == IGNORE, b, a), np.where(a == IGNORE, a, b), num_classes)
        values.append(np.mean(list(ious.values())) if ious else 1.0)
    return float(np.mean(values))


def judge_image(images: RunImages, image_id: str) -> Judgement:
    """Judge the masks that a run has made of one image. Raises ValueError, naming the image, for masks that don't fit
    one another."""
    try:
        return _judge(images, image_id)
    except ValueError as error:
        raise ValueError(f"{image_id}: {error}") from None


def _judge(images: RunImages, image_id: str) -> Judgement:
    tags, truth, masks = images.tags(image_id), images.truth(image_id), images.stages(image_id)
    count = images.catalog.num_classes
    values = {stage: set(np.unique(mask).tolist()) - {0, IGNORE} for stage, mask in masks.items()}
    present = (tags or ()) if truth is None else (v - 1 for v in np.unique(truth).tolist() if v not in (0, IGNORE))
    return Judgement(
        image_id, tags,
        ious={} if truth is None else {stage: class_ious(truth, mask, count) for stage, mask in masks.items()},
        present=frozenset(present),
        foreground={s: float(((m > 0) & (m < IGNORE)).mean()) for s, m in masks.items()},
        found={stage: frozenset(v - 1 for v in found) for stage, found in values.items()},
        agreement=agreement_of(list(masks.values()), count),
    )  # fmt: skip


def judge_images(images: RunImages, ids: Sequence[str], workers: int) -> list[Judgement]:
    """Judge the images that have a mask of any stage, at most ``workers`` at a time, in the order of ``ids``."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = pool.map(partial(judge_image, images), ids)
        return [judgement for judgement in found if judgement.foreground]


def last_stage(judged: Sequence[Judgement]) -> str | None:
    """The last stage that most of the images have; None without images."""
    stages = [s for s in (CAM_MASK, PSEUDO, PREDICTION) if 2 * sum(s in j.foreground for j in judged) > len(judged)]
    return stages[-1] if stages else None
