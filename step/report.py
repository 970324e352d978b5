"""Step 9: one self-contained page that shows a run: scores with their provenance, curve, pictures, configuration.

It only reads files of earlier steps; no network runs here."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from misc import distributed
from misc.files import store
from misc.files.camfiles import read_cam
from misc.files.images import jpeg_bytes, png_bytes, read_image, read_mask
from misc.image import draw, pixels
from misc.tables import ResultTable
from step.lib.config import REPORT_IMAGES, Job
from step.lib.scoring import why_unscored
from voc12.lists import pick_evenly

LARGEST = 480
"""Longest side of a picture on the page, in pixels."""

_TEMPLATE = "report.html.jinja"
"""File name of the page's template, in step/lib."""


@dataclass(frozen=True)
class _Picture:
    caption: str
    pixels: np.ndarray


def run(job: Job, device: torch.device) -> None:
    """Write report.html and pictures.png. Rows: image, CAM, affinity label, pseudo mask, objects if there are any,
    prediction, truth. For a data set of boxes: image, map of the predicted class, its box and the true one."""
    if not distributed.is_main():
        return
    train = [_train_row(job, i) for i in job.shown_ids() if job.run.cam(i).exists()]
    val = [_val_row(job, i) for i in _done(job, job.run.seg)]
    boxes = [_box_row(job, i) for i in _done(job, job.run.box)]
    page = _page(job, train, val, boxes)
    store.write_bytes(job.run.report, page.encode())
    # rows of boxes are short: two per line
    rows = train[:4] or [a + b for a, b in zip(boxes[::2], boxes[1::2], strict=False)]
    if rows:
        captions = {tuple(p.caption for p in row[1:]) for row in rows}
        headings = ("image", *captions.pop()) if train and len(captions) == 1 else ()
        sheet = draw.tile([[p.pixels for p in row] for row in rows], height=150, headings=headings)
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
    head = ("score", _measure(scores), "list", "images", "threshold", "tags used", "trained from")
    rows = [
        (n, _main(s), s["split"], str(s["images"]), _threshold(s), s["tags"], s.get("start_weights", "-"))
        for n, s in scores.items()
    ]
    return ResultTable(head, rows).text()


def _measure(scores: dict[str, dict[str, Any]]) -> str:
    """Unit of the scores, as the column's heading."""
    return "mIoU" if any("miou" in s for s in scores.values()) or not scores else "value"


def _main(score: dict[str, Any]) -> str:
    if "miou" in score:
        return _number(score["miou"])
    return f"{_number(score['ap50'])} AP50" if "ap50" in score else f"{_number(score['value'])} %"


def _threshold(score: dict[str, Any]) -> str:
    if score["threshold"] is None:
        return score["threshold_choice"] or "-"
    return f"{score['threshold']:.2f}, {score['threshold_choice']}"


def _done(job: Job, made: Callable[[str], Path]) -> list[str]:
    """Images of the validation list to show, among those that have a file."""
    if not job.catalog.has_list(job.cfg.val_list):
        return []
    return pick_evenly([i for i in job.catalog.ids(job.cfg.val_list) if made(i).exists()], REPORT_IMAGES)


def _train_row(job: Job, image_id: str) -> list[_Picture]:
    image = read_image(job.catalog.image_path(image_id))
    cam = read_cam(job.run.cam(image_id))
    score = cam.full_maps().max(0) if len(cam.keys) else np.zeros(image.shape[:2], np.float32)
    names = ", ".join(job.catalog.classes[k] for k in cam.keys)
    row = [_Picture(f"{image_id}: {names or 'no tag'}", image), _Picture("CAM", draw.heat(image, score))]
    row += _mask_picture("affinity label", image, job.run.aff_label(image_id))
    row += _mask_picture("pseudo mask", image, job.run.label(image_id))
    row += _mask_picture("objects", image, job.run.instance_picture(image_id))
    row += _mask_picture("prediction", image, job.run.seg(image_id))
    return row + _mask_picture("truth", image, job.catalog.mask_path(image_id))


def _val_row(job: Job, image_id: str) -> list[_Picture]:
    image = read_image(job.catalog.image_path(image_id))
    row = [_Picture(image_id, image), *_mask_picture("prediction", image, job.run.seg(image_id))]
    return row + _mask_picture("truth", image, job.catalog.mask_path(image_id))


def _box_row(job: Job, image_id: str) -> list[_Picture]:
    """The map of the best class, and its box (red) with the true ones (green), in the aspect ratio of the image."""
    found, classes = store.read_arrays(job.run.box(image_id)), job.catalog.classes
    image = read_image(job.catalog.image_path(image_id))
    (height, width), side = image.shape[:2], len(found["score"])
    scale = np.array([width, height] * 2) / side
    boxed = image
    for box in found["truth"]:
        boxed = draw.draw_box(boxed, box * scale, (60, 200, 60))
    boxed = draw.draw_box(boxed, found["boxes"][0] * scale, (230, 40, 40))
    true, first = (classes[int(k)] for k in (job.catalog.tags(image_id).argmax(), found["best"][0]))
    shown = f"{first}, overlap with the true class's map {found['iou'].item():.2f}"
    score = pixels.resize_mask(found["score"], (height, width)) / 255
    return [
        _Picture(f"{image_id}: {true}", image),
        _Picture(f"map of {first}", draw.heat(image, score)),
        _Picture(f"red: {shown}; green: truth", boxed),
    ]


def _mask_picture(caption: str, image: np.ndarray, path: Path | None) -> list[_Picture]:
    if path is None or not path.exists():
        return []
    return [_Picture(caption, draw.overlay(image, read_mask(path)))]


def _page(job: Job, train: list[list[_Picture]], val: list[list[_Picture]], boxes: list[list[_Picture]]) -> str:
    """The page, rendered from step/lib/report.html.jinja, which escapes all text."""
    record, scores = job.run.record(), job.run.scores()
    galleries = {"Training images": train, "Validation images": val, "Boxes": boxes}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "lib"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )
    return environment.get_template(_TEMPLATE).render(
        title=f"{job.cfg.method} on {job.cfg.data}",
        cfg=job.cfg,
        record=record,
        commands=[f"python {command}" for command in dict.fromkeys(record["command"])],
        scores=_scores(scores) if scores else None,
        searched=any((s.get("threshold_choice") or "").startswith("searched") for s in scores.values()),
        unscored=_unscored(job),
        curves=[_curve(name, s["curve"]) for name, s in scores.items() if "curve" in s],
        classes=_classes(scores),
        colours=[
            (name, [int(v) for v in colour], _ink(colour))
            for name, colour in zip(job.catalog.classes, draw.palette()[1:], strict=False)
        ],
        galleries={name: [[_figure(p) for p in row] for row in rows] for name, rows in galleries.items() if rows},
        steps=_steps(record),
    )


def _ink(colour: np.ndarray) -> str:
    """The text colour, black or white, that is readable on a colour."""
    return "#fff" if colour @ np.array([0.299, 0.587, 0.114]) < 140 else "#000"


def _scores(scores: dict[str, dict[str, Any]]) -> ResultTable:
    """All scores with their provenance."""
    known = {"scales", "flip", "crf_iterations", "start_weights", "walk", "grid", "seen_in_training"}
    rows = [
        (
            name, _main(s), _number(s.get("boundary_miou")), s["split"], str(s["images"]), _threshold(s),
            s["tags"], "; ".join(f"{k.replace('_', ' ')} {_setting(s[k])}" for k in s if k in known),
        )
        for name, s in scores.items()
    ]
    head = ("", _measure(scores), "boundary mIoU %", "list", "images", "threshold", "tags used", "test settings")
    return ResultTable(head, rows, numbers={1, 2, 4})


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_setting(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _classes(scores: dict[str, dict[str, Any]]) -> ResultTable | None:
    """IoU per class, with one column per score of masks; None without such scores."""
    columns = [name for name, score in scores.items() if "miou" in score]
    if not columns:
        return None
    names = [c["name"] for c in scores[columns[0]]["classes"]]
    rows = [(n, *(_number(scores[c]["classes"][i]["iou"]) for c in columns)) for i, n in enumerate(names)]
    return ResultTable(("IoU %", *columns), rows, numbers=range(1, len(columns) + 1))


def _steps(record: dict[str, Any]) -> ResultTable:
    """Time and memory per step."""
    rows = [
        (name, f"{s['seconds']:.1f}", str(s.get("peak_memory_mb", "-")), str(s.get("peak_gpu_memory_mb", "-")))
        for name, s in record["steps"].items()
    ]
    head = ("step", "seconds", "peak memory MB (main process)", "peak GPU memory MB")
    return ResultTable(head, rows, numbers={1, 2, 3})


def _curve(name: str, curve: list[dict[str, float]]) -> dict[str, Any]:
    """Positions of a threshold curve's points and grid lines in the drawing, in pixels from the top left corner."""
    width, height, left, bottom = 620, 220, 40, 30
    xs, ys = [p["threshold"] for p in curve], [p["miou"] for p in curve]
    top = max(10.0, 10 * np.ceil(max(ys) / 10))
    last = max(xs) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / last * (width - left - 10), height - bottom - y / top * (height - bottom - 15)

    best = int(np.argmax(ys))
    return {
        "name": name,
        "width": width,
        "height": height,
        "left": left,
        "right": width - 10,
        "points": [place(x, y) for x, y in zip(xs, ys, strict=True)],
        "best": place(xs[best], ys[best]),
        "best_threshold": xs[best],
        "best_miou": ys[best],
        "levels": [(f"{y:.0f}", place(0, y)[1]) for y in np.arange(0, top + 1, 10)],
        "thresholds": [(f"{x:.1f}", *place(x, 0)) for x in np.arange(0, last + 0.01, 0.1)],
    }


def _figure(picture: _Picture) -> dict[str, str]:
    """A picture for the page: caption, and a base64 JPEG with sides of at most LARGEST pixels."""
    height, width = picture.pixels.shape[:2]
    scale = min(1.0, LARGEST / max(height, width))
    shown = pixels.resize_image(picture.pixels, pixels.scaled_size((height, width), scale))
    return {"caption": picture.caption, "jpeg": base64.b64encode(jpeg_bytes(shown)).decode()}
