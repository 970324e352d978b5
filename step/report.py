"""Step 9: one self-contained page that shows a run: how good it is and why, what it did, pictures, curves,
configuration.

It only reads files of earlier steps; no network runs here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from misc import distributed
from misc.files import store
from misc.files.camfiles import read_cam
from misc.files.images import png_bytes, read_image, read_mask
from misc.image import draw, pixels
from misc.tables import ResultTable
from step.lib.config import Job
from step.lib.report import findings, page, story
from step.lib.report.judge import PREDICTION, PSEUDO, RunImages
from step.lib.scoring import why_unscored

_SHEET_ROWS = 4


def run(job: Job, device: torch.device) -> None:
    """Write report.html and pictures.png."""
    if not distributed.is_main():
        return
    store.write_bytes(job.run.report, story.make_page(job, _unscored(job)).encode())
    if not page.load_library():
        distributed.say(page.NO_CHARTS)
    sheet = _sheet(job)
    if sheet is not None:
        store.write_bytes(job.run.root / "pictures.png", png_bytes(sheet))
    show(job)


def show(job: Job) -> None:
    """Print the score table and the paths of the pictures."""
    scores = job.run.scores()
    distributed.say(score_table(scores) if scores else "scores: none.")
    for reason in _unscored(job):
        distributed.say(reason)
    distributed.say(f"pictures: {job.run.report}, {job.run.root / 'pictures.png'}")


def _unscored(job: Job) -> list[str]:
    """Why lists have no scores of masks, if the data set is the reason."""
    if job.aim == "boxes":
        return []
    reasons = (why_unscored(job, split) for split in dict.fromkeys((job.cfg.score_list, job.cfg.val_list)))
    return [reason for reason in reasons if reason is not None]


def current(job: Job) -> bool:
    """Whether the page is up to date with the recorded scores."""
    scores = job.run.root / "scores.json"
    return not scores.exists() or job.run.report.stat().st_mtime >= scores.stat().st_mtime


def score_table(scores: dict[str, dict[str, Any]]) -> str:
    """The recorded scores as aligned text: name, mIoU (AP50 for single objects; for boxes the name says what it is),
    list, number of images, choice of the threshold, tags, start weights of the network."""
    head = ("score", story.name_unit(scores), "list", "images", "threshold", "tags used", "start weights")
    rows = [
        (n, _main(s), s["split"], str(s["images"]), story.tell_threshold(s), s["tags"], s.get("start_weights", "-"))
        for n, s in scores.items()
    ]
    return ResultTable(head, rows).text()


def _main(score: dict[str, Any]) -> str:
    key, unit = findings.main_number(score)
    return "-" if score.get(key) is None else f"{score[key]:.2f}{unit}"


def _sheet(job: Job) -> Any:
    """The picture pictures.png: a few images with what each step made of them; None before any step has."""
    images = RunImages.of(job.catalog, job.run)
    shown = [i for i in job.shown_ids() if job.run.cam(i).exists()] if job.aim != "boxes" else []
    masks = {image_id: _sheet_masks(images, image_id) for image_id in shown[:_SHEET_ROWS]}
    rows = [_sheet_row(images, image_id, of_image) for image_id, of_image in masks.items()]
    if rows:
        headings = tuple(rows[0]) if all(row.keys() == rows[0].keys() for row in rows) else ()
        sheet = draw.tile([list(row.values()) for row in rows], height=150, headings=headings)
        values = [np.unique(mask) for of_image in masks.values() for mask in of_image.values()]
        entries = draw.legend_entries(np.concatenate(values), job.catalog.classes) if values else []
        return draw.append_legend(sheet, entries, size=14)
    done = [i for i in job.listed(job.cfg.val_list) if job.run.box(i).exists()][: 2 * _SHEET_ROWS]
    boxed = [_boxed_row(images, image_id) for image_id in done]
    if len(boxed) < 2:
        return None
    # rows of boxes are short: two per line
    sheet = draw.tile([a + b for a, b in zip(boxed[::2], boxed[1::2], strict=False)], height=150)
    return draw.append_legend(sheet, draw.box_entries(), size=14)


def _sheet_masks(images: RunImages, image_id: str) -> dict[str, np.ndarray]:
    """Heading -> mask (H, W) of an image, in the order of the steps."""
    stages, masks = images.stages(image_id), {}
    if images.run.aff_label(image_id).exists():
        masks["affinity label"] = read_mask(images.run.aff_label(image_id))
    masks |= {stage: stages[stage] for stage in (PSEUDO, PREDICTION) if stage in stages}
    truth = images.truth(image_id)
    return masks if truth is None else {**masks, "truth": truth}


def _sheet_row(images: RunImages, image_id: str, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Heading -> picture of an image."""
    image = read_image(images.catalog.image_path(image_id))
    cam = read_cam(images.run.cam(image_id)).at_image_size()
    row = {"image": image, "CAM": draw.heat(image, cam.maps.max(0, initial=0.0))}
    return row | {heading: draw.overlay(image, mask) for heading, mask in masks.items()}


def _boxed_row(images: RunImages, image_id: str) -> list[Any]:
    """Image, map of the best class, and its box with the true ones."""
    image, found = read_image(images.catalog.image_path(image_id)), store.read_arrays(images.run.box(image_id))
    size = image.shape[:2]
    boxed = draw.draw_boxes(image, found["truth"], found["boxes"][0], len(found["score"]))
    return [image, draw.heat(image, pixels.resize_mask(found["score"], size) / 255), boxed]
