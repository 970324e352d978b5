"""What the page of a run of boxes shows: the worst class, right boxes of each class, pictures."""

from __future__ import annotations

from typing import Any

from misc.files import store
from step.lib.config import Job
from step.lib.report import advice, charts, choose, gallery, judge, page
from step.lib.report.findings import Finding
from voc12.lists import pick_evenly


def box_scores_of(job: Job) -> dict[str, dict[str, Any]]:
    """Id -> content of box/ID.npz, of at most ``judge.MOST_JUDGED`` images of the validation list."""
    done = [i for i in job.listed(job.cfg.val_list) if job.run.box(i).exists()]
    return {i: store.read_arrays(job.run.box(i)) for i in pick_evenly(done, judge.MOST_JUDGED)}


def make_box_galleries(job: Job, images: judge.RunImages) -> list[tuple[str, gallery.Gallery]]:
    """The gallery, with its key on the page; none before any box is found."""
    found = box_scores_of(job)
    if not found:
        return []
    true = {i: job.catalog.classes[int(job.catalog.tags(i).argmax())] for i in found}
    groups = choose.choose_box_groups(
        {i: float(f["iou"]) for i, f in found.items()}, true, {i: str(f["error"]) for i, f in found.items()}
    )
    wanted = dict.fromkeys(i for ids in groups.values() for i in ids)
    cards = {i: gallery.box_card(images, i) for i in wanted}
    text = "Ranked by the overlap of the true class's box with the true box."
    return [("gallery-1", gallery.make_gallery(f"Boxes of {job.cfg.val_list}", text, groups, cards))]


def find_box_findings(job: Job) -> list[Finding]:
    """The class with the worst boxes, and what is wrong with them."""
    found = box_scores_of(job) if job.aim == "boxes" else {}
    if not found:
        return []
    by_class: dict[str, list[dict[str, Any]]] = {}
    for image_id, stored in found.items():
        by_class.setdefault(job.catalog.classes[int(job.catalog.tags(image_id).argmax())], []).append(stored)
    share = {name: 100 * sum(bool(f["gt_known"]) for f in of) / len(of) for name, of in by_class.items()}
    overlap = {name: sum(float(f["iou"]) for f in of) / len(of) for name, of in by_class.items()}
    worst = min(share, key=lambda name: (share[name], overlap[name], name))
    kinds = [str(f["error"]) for f in by_class[worst]]
    wrong = sorted({k for k in kinds if k != "right"}, key=lambda k: -kinds.count(k))
    every = 100 * sum(bool(f["gt_known"]) for f in found.values()) / len(found)
    texts = [
        f"{share[worst]:.1f} % of its boxes overlap the true one by half or more, if the class is given; over all "
        f"classes {every:.1f} %. The mean overlap is {100 * overlap[worst]:.0f} %."
    ]
    empty = sum(not f["score"].any() for f in found.values())
    if wrong:
        told = ", ".join(f"{gallery.BOX_ERRORS[k]} in {kinds.count(k)} of {len(kinds)} images" for k in wrong[:3])
        texts.append(f"Where the class has to be found too: {told}.")
    reason = f": mostly, {gallery.BOX_ERRORS[wrong[0]]}" if wrong else ""
    findings = [Finding(f"Worst class: {worst}{reason}", texts, [])]
    if 2 * empty >= len(found):
        text = (
            f"In {empty} of {len(found)} images the map of the best class is empty, so that there is nothing to draw a "
            f"box round: {advice.mend_cams(job.cfg)}."
        )
        findings.insert(0, Finding("Most maps are empty", [text], []))
    return findings


def chart_box_classes(job: Job, drawn: page.Charts) -> dict[str, Any]:
    """The values of the page's part on classes: right boxes of each class."""
    found = box_scores_of(job) if job.aim == "boxes" else {}
    empty: dict[str, Any] = {"class_chart": None, "class_label": "", "confusion_charts": [], "classes": None}
    if not found:
        return empty
    by_class: dict[str, list[bool]] = {}
    for image_id, stored in found.items():
        by_class.setdefault(job.catalog.classes[int(job.catalog.tags(image_id).argmax())], []).append(
            bool(stored["gt_known"])
        )
    shares = {name: 100 * sum(hits) / len(hits) for name, hits in by_class.items()}
    label = "Right boxes of each class, the class given (GT-Known), %, worst first"
    return empty | {"class_chart": drawn.add(charts.class_chart({"GT-Known": shares}, "%")), "class_label": label}
