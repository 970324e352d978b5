"""What can be said of a run without true masks: how far its stages agree, how much is foreground, tags without a
pixel."""

from __future__ import annotations

from misc.tables import ResultTable
from step.lib.config import Job
from step.lib.report import charts, judge, page
from step.lib.report.findings import Finding


def tell_without_truth(
    judged: dict[str, list[judge.Judgement]], drawn: page.Charts
) -> tuple[ResultTable, list[tuple[str, str]]]:
    """Table of each list and stage, and histograms of the shares of foreground."""
    rows, shown = [], []
    for split, of_list in judged.items():
        shares: dict[str, list[float]] = {}
        for stage in (judge.CAM_MASK, judge.PSEUDO, judge.PREDICTION):
            there = [j for j in of_list if stage in j.foreground]
            if not there:
                continue
            tagged = [j for j in there if j.tags is not None]
            tags = sum(len(j.tags or ()) for j in tagged)
            absent = sum(len(j.not_found(stage)) for j in tagged)
            extra = sum(bool(j.not_tagged(stage)) for j in tagged)
            shares[stage] = [j.foreground[stage] for j in there]
            rows.append((
                split, stage, str(len(there)), f"{100 * sum(shares[stage]) / len(there):.1f} %",
                f"{absent} of {tags}" if tags else "no tags", f"{extra} of {len(tagged)}" if tagged else "no tags",
            ))  # fmt: skip
        chart = drawn.add(charts.share_chart(shares, "share of foreground, %"))
        shown.append((chart, f"How much of each image of {split} is an object"))
    head = ("list", "stage", "images", "foreground, mean", "tags without a pixel",
            "images with a class that is no tag")  # fmt: skip
    return ResultTable(head, rows, numbers={2, 3, 4, 5}), shown


def find_unscored_findings(job: Job, judged: dict[str, list[judge.Judgement]]) -> list[Finding]:
    """How far the stages agree, and the class whose tags most often stay without a pixel."""
    texts = []
    for split, of_list in judged.items():
        agreed = [j.agreement for j in of_list if j.agreement is not None]
        stages = dict.fromkeys(stage for j in of_list for stage in j.foreground)
        if agreed:
            mean = 100 * sum(agreed) / len(agreed)
            texts.append(f"{split}: {', '.join(stages)} agree to {mean:.0f} % (mean IoU of {len(agreed)} images).")
    found = [Finding("How far the stages agree", texts, [], calm=True)] if texts else []
    counts: dict[int, tuple[int, int]] = {}
    for of_list in judged.values():
        stage = judge.last_stage(of_list)
        for j in (j for j in of_list if j.tags and stage is not None):
            for c in j.tags or ():
                absent, total = counts.get(c, (0, 0))
                counts[c] = (absent + (c in j.not_found(str(stage))), total + 1)
    worst = max(counts, key=lambda c: (counts[c][0], -counts[c][1]), default=None)
    if worst is not None and counts[worst][0]:
        absent, total = counts[worst]
        text = f"{absent} of {total} images with this tag have not a pixel of it in their last mask."
        found.insert(0, Finding(f"Most often not found: {job.catalog.classes[worst]}", [text], []))
    return found
