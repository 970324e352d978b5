"""Collects what the page of a run shows (run.html.jinja), from the files of the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from misc.image import draw
from misc.loop.terms import RATING
from misc.tables import ResultTable
from step import STEPS, Step, select
from step.lib.config import Job, default_config
from step.lib.report import box_part, charts, choose, findings, gallery, judge, page, unscored_part
from step.lib.report.curves import TrainingCurve, read_curves
from step.lib.scoring import is_meaningless
from voc12.lists import pick_evenly

MEANINGLESS = (
    "These results mean nothing: a part of the network that is never trained has random weights. The run shows that "
    "all steps work, no more. For results give trained weights (--cam.weights FILE), or take a preset that has them."
)
"""Stands above all else on the page of such a run."""


def make_page(job: Job, unscored: Sequence[str]) -> str:
    """The page of a run; ``unscored``: sentences that say why lists have no scores."""
    record, scores, drawn = job.run.record(), job.run.scores(), page.Charts()
    stages = findings.mask_scores(scores)
    images = judge.RunImages.of(job.catalog, job.run)
    judged = {} if job.aim == "boxes" else _judge(job, images)
    galleries, share_charts, table = _galleries(job, images, judged), [], None
    remarks = _findings(scores, stages) or box_part.find_box_findings(job)
    if judged and not any(j.ious for of_list in judged.values() for j in of_list):
        table, share_charts = unscored_part.tell_without_truth(judged, drawn)
        remarks = unscored_part.find_unscored_findings(job, judged)
    classes = _class_part(scores, stages, drawn) if stages else box_part.chart_box_classes(job, drawn)
    return page.render(
        "run.html.jinja", scores,
        title=f"{job.cfg.method} on {job.cfg.data}",
        summary=tell_run(job),
        meaningless=MEANINGLESS if any(map(is_meaningless, (p for _, p in job.cfg.cam.needed_phases()))) else "",
        headlines=findings.find_headlines(scores), has_miou=bool(stages), miou_means=findings.MIOU_MEANS,
        unscored=unscored,
        findings=remarks,
        without_truth=table, share_charts=share_charts,
        pipeline=_pipeline(job, record),
        **classes,
        galleries=galleries,
        mistakes=gallery.css_legend(draw.mistake_entries()),
        threshold_charts=_threshold_charts(scores, drawn),
        searched=any(str(s.get("threshold_choice")).startswith("searched") for s in scores.values()),
        training_charts=_training_charts(job, drawn),
        log=job.run.log,
        scores=_score_table(scores) if scores else None,
        commands=[f"python {command}" for command in dict.fromkeys(record["command"])],
        cfg=job.cfg, record=record, changed=_changed(job),
        charts=drawn,
    )  # fmt: skip


def tell_run(job: Job) -> str:
    """What the run did, in a sentence or two."""
    cfg, names = job.cfg, list(job.catalog.classes)
    count, shown = len(job.train_ids()), ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    what = "box" if job.aim == "boxes" else "mask"
    learnt = any(phase.is_trained for _, phase in cfg.cam.needed_phases())
    told = f"From the tags of {count} images ({len(names)} classes: {shown}), without any {what}"
    told += f", {cfg.method} learned " if learnt else f" and without training, {cfg.method} "
    done, val = job.run.finished, f"{len(job.listed(cfg.val_list))} images of {cfg.val_list}"
    if job.aim == "boxes":
        found = f" It then did so in {val}." if done("localise") else ""
        verbs = ("to name", "to draw") if learnt else ("names", "draws")
        return f"{told}{verbs[0]} the object of an image and {verbs[1]} a box round it.{found}"
    predicted = f" It then segmented {val} without tags." if done("infer_seg") else ""
    if job.single_stage:
        return f"{told}{'to segment' if learnt else 'segments'} them.{predicted}"
    if cfg.masks == "truth":
        return f"The upper bound: {cfg.segmenter} was trained on the true masks of {count} images.{predicted}"
    told += f"{'' if learnt else 'finds '}where each class is (CAM)."
    told += f" The refiner {cfg.refiner} made pseudo masks of that." if done("random_walk") else ""
    told += f" {cfg.segmenter} was trained on these." if done("train_seg") else ""
    return told + predicted


def name_unit(scores: dict[str, dict[str, Any]]) -> str:
    """Unit of the scores, as a column's heading."""
    return "mIoU" if any("miou" in s for s in scores.values()) or not scores else "value"


def tell_threshold(score: dict[str, Any]) -> str:
    """Background score and how it was chosen."""
    if score["threshold"] is None:
        return score["threshold_choice"] or "-"
    return f"{score['threshold']:.2f}, {score['threshold_choice']}"


def _judge(job: Job, images: judge.RunImages) -> dict[str, list[judge.Judgement]]:
    """List -> its judged images: the training images (of the scored list, if there is one), the validation list."""
    scored = job.cfg.score_list if job.catalog.has_list(job.cfg.score_list) else job.train_list
    found = {}
    for split in dict.fromkeys((scored, job.cfg.val_list)):
        ids = pick_evenly(job.listed(split), judge.MOST_JUDGED)
        judged = judge.judge_images(images, ids, job.cfg.machine.workers)
        if judged:
            found[split] = judged
    return found


def _galleries(
    job: Job, images: judge.RunImages, judged: dict[str, list[judge.Judgement]]
) -> list[tuple[str, gallery.Gallery]]:
    if job.aim == "boxes":
        return box_part.make_box_galleries(job, images)
    found = []
    for split, of_list in judged.items():
        stage = judge.last_stage(of_list)
        if stage is None:
            continue
        by_id = {j.image_id: j for j in of_list}
        shown = [i for i in job.shown_ids() if i in by_id]
        groups = choose.choose_groups(of_list, stage, job.catalog.classes, shown)
        wanted = dict.fromkeys(i for ids in groups.values() for i in ids)
        cards = {i: gallery.mask_card(images, by_id[i]) for i in wanted}
        total = len(job.listed(split))
        text = f"{len(of_list)} of {total} images were looked at. " if len(of_list) < total else ""
        if any(j.ious for j in of_list):
            text += f"Ranked by the IoU of the {stage}, the mean over the object classes in truth or mask."
        else:
            text += "Ranked by how far the stages agree: the most uncertain first."
        if judge.CAM_MASK in of_list[0].foreground:
            text += f" CAMs are cut at the background score {images.threshold:.2f} ({images.threshold_choice})."
        if split != job.cfg.val_list and any(judge.PREDICTION in j.foreground for j in of_list):
            text += " Predictions of training images are made of the evenly picked ones only."
        title = f"Images of {split}"
        found.append((f"gallery-{len(found) + 1}", gallery.make_gallery(title, text, groups, cards)))
    return found


def _findings(scores: findings.ScoreFile, stages: dict[str, str]) -> list[findings.Finding]:
    """The worst class and why, the best class."""
    if not stages:
        return []
    title, name = list(stages.items())[-1]
    extremes = findings.extreme_classes(scores[name])
    if extremes is None:
        return []
    worst, best = extremes
    found = []
    for word, number in (("Worst", worst), ("Best", best)):
        seen = findings.examine_class(scores[name], number)
        rows = {t: scores[n]["classes"][number : number + 1] for t, n in stages.items()}
        ious = [(t, row[0]["iou"]) for t, row in rows.items() if row]
        reason = f": {seen.reason}" if word == "Worst" else ""
        texts = [f"In the {title}: {seen.sentence()}", findings.tell_steps(ious) if word == "Worst" else ""]
        numbers = [(t, (n, "classes", number, "iou")) for t, n in stages.items()]
        head = f"{word} class: {seen.name}{reason}"
        label = f"IoU of {seen.name}, %"
        found.append(findings.Finding(head, [text for text in texts if text], numbers, label, calm=word == "Best"))
        if best == worst:
            break
    return found


def _class_part(scores: findings.ScoreFile, stages: dict[str, str], drawn: page.Charts) -> dict[str, Any]:
    """Charts and table of the classes."""
    ious = {title: {c["name"]: c["iou"] for c in scores[name]["classes"]} for title, name in stages.items()}
    ious = {title: by_class for title, by_class in ious.items() if by_class}
    if not ious:
        return {"class_chart": None, "class_label": "", "confusion_charts": [], "classes": None}
    title = list(ious)[-1]
    name = stages[title]
    rows, shares, columns = findings.row_shares(scores[name])
    label = f"Confusion of the {title}: what the pixels of a true class are taken for, % of the row"
    return {
        "class_chart": drawn.add(charts.class_chart(ious)),
        "class_label": f"IoU of each class, %, worst in the {title} first",
        "confusion_charts": [(drawn.add(charts.confusion_chart(rows, shares, columns)), label)] if rows else [],
        "classes": _class_table(scores),
    }


def _class_table(scores: findings.ScoreFile) -> ResultTable:
    """IoU per class, with one column per score of masks."""
    columns = [name for name, score in scores.items() if "miou" in score]
    names = [c["name"] for c in max((scores[column]["classes"] for column in columns), key=len)]
    rows = [(n, *(page.number(scores, (c, "classes", i, "iou")) for c in columns)) for i, n in enumerate(names)]
    return ResultTable(("IoU %", *columns), rows, numbers=range(1, len(columns) + 1))


def _score_table(scores: dict[str, dict[str, Any]]) -> ResultTable:
    """All scores with their provenance."""
    known = {"scales", "flip", "crf_iterations", "start_weights", "walk", "grid", "seen_in_training", "precision"}
    edges = any("boundary_miou" in s for s in scores.values())
    rows, above = [], ""
    for name, s in scores.items():
        settings = "; ".join(f"{k.replace('_', ' ')} {_setting(s[k])}" for k in s if k in known)
        rows.append((
            name, _main_number(scores, name), *([page.number(scores, (name, "boundary_miou"))] if edges else ()),
            s["split"], str(s["images"]), tell_threshold(s), s["tags"],
            "as above" if settings and settings == above else settings,
        ))  # fmt: skip
        above = settings
    head = ("", name_unit(scores), *(["boundary mIoU %"] if edges else ()), "list", "images", "threshold", "tags used",
            "test settings")  # fmt: skip
    return ResultTable(head, rows, numbers={1, 2, 4} if edges else {1, 3})


def _main_number(scores: dict[str, dict[str, Any]], name: str) -> Markup:
    key, unit = findings.main_number(scores[name])
    return page.number(scores, (name, key)) + unit


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_setting(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _pipeline(job: Job, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps that belong to the run, with time, memory and files."""
    steps = [s for s in STEPS if s in select((), job.aim) or s.name in record["steps"]]
    return [_told_step(job, step, record["steps"].get(step.name)) for step in steps if step.name != "report"]


def _told_step(job: Job, step: Step, done: dict[str, Any] | None) -> dict[str, Any]:
    number = STEPS.index(step) + 1
    told: dict[str, Any] = {"number": number, "name": step.name, "does": step.tell(job), "done": bool(done)}
    if not done:
        return told
    memory = [("peak_memory_mb", "memory"), ("peak_gpu_memory_mb", "GPU memory")]
    made = []
    for name in step.makes:
        count, size = _count_files(job.run.root / name)
        if count:
            made.append(f"{name}: {count} file{'s' * (count > 1)}, {_amount(size)}")
    return told | {
        "time": tell_time(done.get("seconds", 0.0)),
        "memory": [f"{_amount(done[key] * 2**20)} {word}" for key, word in memory if key in done],
        "made": made,
    }


def _count_files(path: Path) -> tuple[int, int]:
    """Number of files below a path (or the file itself) and their bytes."""
    if path.is_file():
        return 1, path.stat().st_size
    sizes = [os.stat(os.path.join(top, name)).st_size for top, _, names in os.walk(path) for name in names]
    return len(sizes), sum(sizes)


def _amount(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GB"


def tell_time(seconds: float) -> str:
    """A duration as people say it, without a place to break the line."""
    minutes, rest = divmod(round(seconds), 60)
    told = f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    return (told if seconds >= 60 else f"{seconds:.1f} s").replace(" ", "\u00a0")


def _threshold_charts(scores: findings.ScoreFile, drawn: page.Charts) -> list[tuple[str, str]]:
    shown = []
    for name, score in scores.items():
        if "curve" in score and score["threshold"] is not None:
            chosen = float(score["threshold"])
            label = f"{name}: mIoU at each background score on {score['split']}; chosen: {chosen:.2f}"
            shown.append((drawn.add(charts.threshold_chart(score["curve"], chosen)), label))
    return shown


def _training_charts(job: Job, drawn: page.Charts) -> list[tuple[str, str]]:
    trainings: dict[str, list[TrainingCurve]] = {}
    for curve in read_curves(job.run.log):
        trainings.setdefault(curve.training, []).append(curve)
    order = [name for name, _ in job.cfg.cam.phases()] + ["aff", "seg"]
    shown = []
    for name in sorted(trainings, key=lambda n: (order.index(n) if n in order else len(order), n)):
        losses = [c for c in trainings[name] if c.is_loss]
        if losses:
            shown.append((drawn.add(charts.training_chart(losses, "loss")), f"Training of {name}: loss terms"))
        for curve in (c for c in trainings[name] if c.is_rating):
            measure = curve.term.removeprefix(RATING)
            label = f"Training of {name}: {measure} of each epoch; the weights with the highest were kept"
            shown.append((drawn.add(charts.rating_chart(curve, measure)), label))
    return shown


def _changed(job: Job) -> ResultTable | None:
    """Settings that differ from those of the preset."""
    cfg = job.cfg
    usual, now = default_config(cfg.method, cfg.preset, cfg.refiner, cfg.segmenter).recorded(), cfg.recorded()
    rows = [(k, str(usual.get(k, "–")), str(v)) for k, v in now.items() if usual.get(k) != v]
    return ResultTable(("setting", "preset", "here"), rows) if rows else None
