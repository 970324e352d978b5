"""Step 9: one self-contained page that shows a run: scores with their provenance, curve, pictures, configuration.

It only reads what earlier steps wrote: no network runs here."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from misc import distributed
from misc.files import store
from misc.files.camfiles import read_cam
from misc.files.images import jpeg_bytes, png_bytes, read_image, read_mask
from misc.image import draw, pixels
from step.lib.config import REPORT_IMAGES, Job
from step.lib.scoring import why_unscored
from voc12.lists import pick_evenly

LARGEST = 480
"""Longest side of a picture on the page, in pixels."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --pale: #57606a; --line: #d8dee4; --panel: #f6f8fa; --paper: #fff;
--blue: #0969da; --red: #cf222e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --pale: #9198a1; --line: #3d444d; --panel: #1c2128;
--paper: #0d1117; --blue: #58a6ff; --red: #ff7b72 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
max-width: 75rem; padding: 0 1rem } h1 { line-height: 1.2 } h2 { margin: 2.2rem 0 .6rem; font-size: 1.25rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .3rem 0 } td, th { padding: .3rem .8rem;
text-align: left; border-bottom: 1px solid var(--line); vertical-align: top } tr > :first-child { padding-left: 0;
min-width: 7rem } th { font-weight: 600; vertical-align: bottom } .n { text-align: right;
font-variant-numeric: tabular-nums } td.n { white-space: nowrap }
td:last-child:not(.n) { min-width: 12rem } .small, figcaption, summary { color: var(--pale);
font-size: 13px } pre { background: var(--panel); padding: .8rem; margin: .5rem 0; overflow-x: auto; border-radius: 6px;
font-size: 12.5px } pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere } summary { cursor: pointer }
figure { margin: 0; min-width: 0 } svg { width: 100%; max-width: 620px; height: auto; display: block } svg text {
fill: var(--pale) } .row { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem;
margin-bottom: .9rem } .row img { width: 100%; aspect-ratio: 4 / 3; object-fit: contain; display: block;
background: var(--panel) } .row figcaption { line-height: 1.35; overflow-wrap: anywhere } .key { margin-bottom: .5rem }
.key span { display: inline-block; padding: 0 .5rem; margin: 0 .3rem .3rem 0; border-radius: 3px; font-size: 13px }
.key .void { border: 1px dashed var(--pale) }
"""


@dataclass(frozen=True)
class _Picture:
    caption: str
    pixels: np.ndarray


def run(job: Job, device: torch.device) -> None:
    """Write report.html and pictures.png: rows of image, CAM, affinity label, pseudo mask, objects where there are any,
    prediction, truth; of a data set of boxes, image, map of the class that was found, its box and the true one."""
    if not distributed.is_main():
        return
    train = [_train_row(job, i) for i in job.shown_ids() if job.run.cam(i).exists()]
    val = [_val_row(job, i) for i in _done(job, job.run.seg)]
    boxes = [_box_row(job, i) for i in _done(job, job.run.box)]
    page = _page(job, train, val, boxes)
    store.write_bytes(job.run.report, page.encode())
    # boxes are small rows: two of them make a line
    rows = train[:4] or [a + b for a, b in zip(boxes[::2], boxes[1::2], strict=False)]
    if rows:
        captions = {tuple(p.caption for p in row[1:]) for row in rows}
        headings = ("image", *captions.pop()) if train and len(captions) == 1 else ()
        sheet = draw.tile([[p.pixels for p in row] for row in rows], height=150, headings=headings)
        store.write_bytes(job.run.root / "pictures.png", png_bytes(sheet))
    show(job)


def show(job: Job) -> None:
    """Print the score table and where the pictures are."""
    scores = job.run.scores()
    distributed.say(score_table(scores) if scores else "scores: none.")
    for reason in _unscored(job):
        distributed.say(reason)
    distributed.say(f"pictures: {job.run.report}, {job.run.root / 'pictures.png'}")


def _unscored(job: Job) -> list[str]:
    """Why lists have no scores of masks, as far as it lies with the data set."""
    if job.aim == "boxes":
        return []
    reasons = (why_unscored(job, split) for split in dict.fromkeys((job.cfg.score_list, job.cfg.val_list)))
    return [reason for reason in reasons if reason is not None]


def current(job: Job) -> bool:
    """Whether the page shows the scores there are."""
    scores = job.run.root / "scores.json"
    return not scores.exists() or job.run.report.stat().st_mtime >= scores.stat().st_mtime


def score_table(scores: dict[str, dict[str, Any]]) -> str:
    """The recorded scores as aligned text: name, mIoU (of single objects AP50, of boxes what the name says), list,
    number of images, how the threshold was chosen, tags, what the network was trained from."""
    rows = [("score", _measure(scores), "list", "images", "threshold", "tags used", "trained from")]
    rows += [
        (n, _main(s), s["split"], str(s["images"]), _threshold(s), s["tags"], s.get("start_weights", "-"))
        for n, s in scores.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _measure(scores: dict[str, dict[str, Any]]) -> str:
    """What the numbers are."""
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
    """Images of the validation list to show, of those that have a file."""
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
    """The map of the best class, and its box (red) beside the true ones (green), in the proportions of the image."""
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


def _page(
    job: Job, train: list[list[_Picture]], val: list[list[_Picture]], boxes: list[list[_Picture]]
) -> str:
    record, scores = job.run.record(), job.run.scores()
    title = f"{job.cfg.method} on {job.cfg.data}"
    commands = "\n".join(f"python {command}" for command in dict.fromkeys(record["command"]))
    parts = [
        f"<h1>{_text(title)}</h1><pre class=wrap>{_text(commands)}</pre><p class=small>preset {job.cfg.preset}, seed "
        f"{job.cfg.seed}, {record['world_size']} process(es), commit {_text(record['git_commit'])}, "
        f"{_text(_versions(record))}</p>",
        "<h2>Scores</h2>" + _scores(scores, _unscored(job)),
    ]
    curves = [(name, s["curve"]) for name, s in scores.items() if "curve" in s]
    if curves:
        parts.append("<h2>Background score</h2>" + "".join(_curve(*curve) for curve in curves))
    if classes := _classes(scores):
        parts.append("<h2>Classes</h2>" + classes)
    key = "".join(
        f'<span style="background: rgb{tuple(int(v) for v in colour)}; color: {_ink(colour)}">{_text(name)}</span>'
        for name, colour in zip(job.catalog.classes, draw.palette()[1:], strict=False)
    )
    key += "<span class=void>white veil: not labelled</span>"
    if train:
        parts.append(f"<h2>Training images</h2><div class=key>{key}</div>" + _gallery(train))
    if val:
        parts.append("<h2>Validation images</h2>" + _gallery(val))
    if boxes:
        parts.append("<h2>Boxes</h2>" + _gallery(boxes))
    parts.append("<h2>Steps</h2>" + _steps(record))
    configuration = "\n".join(f"{k} = {v}" for k, v in record["config"].items())
    lists = "\n".join(f"list {k} = {v}" for k, v in record["data"].items())
    parts.append(
        f"<h2>Configuration</h2><details><summary>{len(record['config'])} settings, {len(record['data'])} lists "
        f"(sha256 of class names, ids and tags)</summary><pre>{_text(configuration)}\n{_text(lists)}</pre></details>"
    )
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport "
        f"content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _ink(colour: np.ndarray) -> str:
    return "#fff" if colour @ np.array([0.299, 0.587, 0.114]) < 140 else "#000"


def _versions(record: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in record["versions"].items())


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Callable[[int], bool]) -> str:
    def cells(row: Sequence[Any], tag: str) -> str:
        marks = (f"<{tag}{' class=n' if numbers(i) else ''}>{_text(v)}</{tag}>" for i, v in enumerate(row))
        return "<tr>" + "".join(marks) + "</tr>"

    table = cells(head, "th") + "".join(cells(row, "td") for row in rows)
    return f"<div class=scroll><table>{table}</table></div>"


def _scores(scores: dict[str, dict[str, Any]], unscored: list[str]) -> str:
    notes = "".join(f"<p>{_text(reason)}</p>" for reason in unscored)
    if not scores:
        return notes or "<p>No step that is scored has run.</p>"
    known = {"scales", "flip", "crf_iterations", "start_weights", "walk", "grid", "seen_in_training"}
    rows = [
        (
            name, _main(s), _number(s.get("boundary_miou")), s["split"], s["images"], _threshold(s),
            s["tags"], "; ".join(f"{k.replace('_', ' ')} {_setting(s[k])}" for k in s if k in known),
        )
        for name, s in scores.items()
    ]
    head = ("", _measure(scores), "boundary mIoU %", "list", "images", "threshold", "tags used", "test settings")
    searched = any((s.get("threshold_choice") or "").startswith("searched") for s in scores.values())
    if searched:
        notes += "<p class=small>A threshold that was searched on the scored list used its truth.</p>"
    return _table(head, rows, lambda i: i in (1, 2, 4)) + notes


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_setting(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _classes(scores: dict[str, dict[str, Any]]) -> str:
    columns = [name for name, score in scores.items() if "miou" in score]
    if not columns:
        return ""
    names = [c["name"] for c in scores[columns[0]]["classes"]]
    rows = [(n, *(_number(scores[c]["classes"][i]["iou"]) for c in columns)) for i, n in enumerate(names)]
    return _table(("IoU %", *columns), rows, lambda i: i > 0)


def _curve(name: str, curve: list[dict[str, float]]) -> str:
    """The threshold curve as an SVG drawing."""
    width, height, left, bottom = 620, 220, 40, 30
    xs, ys = [p["threshold"] for p in curve], [p["miou"] for p in curve]
    top = max(10.0, 10 * np.ceil(max(ys) / 10))
    last = max(xs) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / last * (width - left - 10), height - bottom - y / top * (height - bottom - 15)

    points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in zip(xs, ys, strict=True))
    best = int(np.argmax(ys))
    bx, by = place(xs[best], ys[best])
    grid = ""
    for y in np.arange(0, top + 1, 10):
        x0, y0 = place(0, y)
        grid += (
            f'<line x1="{x0}" y1="{y0:.1f}" x2="{width - 10}" y2="{y0:.1f}" stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{y0 + 4:.1f}" text-anchor="end">{y:.0f}</text>'
        )
    for x in np.arange(0, last + 0.01, 0.1):
        x0, y0 = place(x, 0)
        grid += f'<text x="{x0:.1f}" y="{y0 + 18:.1f}" text-anchor="middle">{x:.1f}</text>'
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" font-size="12" role="img" aria-label="threshold curve">{grid}'
        f'<polyline points="{points}" fill="none" stroke="var(--blue)" stroke-width="2"/>'
        f'<circle cx="{bx:.1f}" cy="{by:.1f}" r="4" fill="var(--red)"/></svg><figcaption>{_text(name)}: mIoU in % over '
        f"the background score; best {ys[best]:.2f} at {xs[best]:.2f}</figcaption></figure>"
    )


def _gallery(rows: list[list[_Picture]]) -> str:
    return "".join("<div class=row>" + "".join(_figure(p) for p in row) + "</div>" for row in rows)


def _figure(picture: _Picture) -> str:
    height, width = picture.pixels.shape[:2]
    scale = min(1.0, LARGEST / max(height, width))
    shown = pixels.resize_image(picture.pixels, pixels.scaled_size((height, width), scale))
    data = base64.b64encode(jpeg_bytes(shown)).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{_text(picture.caption)}">'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def _steps(record: dict[str, Any]) -> str:
    rows = [
        (name, f"{s['seconds']:.1f}", s.get("peak_memory_mb", "-"), s.get("peak_gpu_memory_mb", "-"))
        for name, s in record["steps"].items()
    ]
    return _table(("step", "seconds", "peak memory MB (main process)", "peak GPU memory MB"), rows, lambda i: i > 0)
