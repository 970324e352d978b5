"""What can be said of a run without true masks: how far its stages agree, how much is foreground, tags without a
pixel."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from misc.tables import ResultTable
from net.names import OWN
from step.lib.config import Job
from step.lib.inference import settle_walk
from step.lib.report import advice, charts, judge, page
from step.lib.report.findings import Finding

MOST_OBJECT, LEAST_OBJECT = 0.85, 0.02
"""A mask with a larger share of foreground is nearly all object, one with a smaller share nearly all background. The
page warns where half or more of a list's masks are one of both; images that are known to show no object don't count."""
_KINDS = {
    "object": "Nearly all object", "background": "Nearly all background",
    "either": "Nearly all object or nearly all background",
}  # fmt: skip


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
    """Masks that are nearly all object or nearly all background, how far the stages agree, and the class whose tags
    most often stay without a pixel."""
    texts = []
    for split, of_list in judged.items():
        agreed = [j.agreement for j in of_list if j.agreement is not None]
        stages = dict.fromkeys(stage for j in of_list for stage in j.foreground)
        if agreed:
            mean = 100 * sum(agreed) / len(agreed)
            texts.append(f"{split}: {_joined(list(stages))} agree to {mean:.0f} % (mean IoU of {len(agreed)} images).")
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
    return find_odd_shares(job, judged) + found


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def find_odd_shares(job: Job, judged: dict[str, list[judge.Judgement]]) -> list[Finding]:
    """A warning for every list and stage whose masks are nearly all object or nearly all background, with what to try:
    of pseudo masks and predictions; of CAMs, whose cut is for show, where they are the last stage."""
    found = []
    for split, of_list in judged.items():
        last = judge.last_stage(of_list)
        for stage in (judge.CAM_MASK, judge.PSEUDO, judge.PREDICTION):
            shares = [j.foreground[stage] for j in of_list if stage in j.foreground and j.tags != ()]
            kind = "" if stage == judge.CAM_MASK != last else tell_odd_shares(shares)
            if not kind:
                continue
            more, less = count_odd(shares)
            text = (
                f"More than {MOST_OBJECT:.0%} of the pixels are an object in {more} of {len(shares)} images, less than "
                f"{LEAST_OBJECT:.0%} in {less}; the mean is {mean(shares):.1%}. Such masks are hardly ever right."
            )
            title = f"{_KINDS[kind]}: {stage if stage == judge.CAM_MASK else stage + 's'} of {split}"
            found.append(Finding(title, [text.replace("%", "\u00a0%"), _remedy(job, stage, kind, found)], []))
    return found


def count_odd(shares: Sequence[float]) -> tuple[int, int]:
    """Numbers of masks that are nearly all object, and nearly all background; ``shares`` of foreground, in [0, 1]."""
    return sum(share > MOST_OBJECT for share in shares), sum(share < LEAST_OBJECT for share in shares)


def tell_odd_shares(shares: Sequence[float]) -> str:
    """"object" or "background" where half or more of the masks are nearly all of one of both, and most of these of that
    one; "either" where both are frequent (less than three of one for each of the other); else empty."""
    more, less = count_odd(shares)
    if not shares or more + less < len(shares) / 2:
        return ""
    return "object" if more >= 3 * less else "background" if less >= 3 * more else "either"


def _remedy(job: Job, stage: str, kind: str, earlier: Sequence[Finding]) -> str:
    """What to try, in a sentence."""
    cfg, more = job.cfg, kind == "object"
    if stage == judge.CAM_MASK:
        return (
            "The CAMs are cut at a background score that no mask chose, for this page alone: make pseudo masks of "
            "them, or look at other scores (python -m scripts.sheet, --field background; docs/your_data.md, section 4)."
        )
    if stage == judge.PREDICTION and cfg.segmenter == OWN:
        return (
            f"The network {'labels its own training images' if cfg.cam.is_trained else 'is not trained here'}: "
            f"{advice.mend_own_masks(cfg)}."
        )
    if stage == judge.PREDICTION:
        made = any(judge.PSEUDO in finding.title for finding in earlier)
        longer = advice.train_longer(cfg.seg, "seg") or "take another segmentation network (--segmenter)"
        rest = "they are what it was trained on" if made else f"if they are right, {longer}"
        return f"Look at the pseudo masks of the training images first: {rest}."
    if kind == "either":
        return (
            "One background score can't mend both: look at the CAMs, and where they don't find the objects, "
            f"{advice.mend_cams(cfg)}."
        )
    rule = cfg.aff.walk.background
    if rule == "power":
        told = f"a {'smaller' if more else 'larger'} --aff.walk.alpha (it is {cfg.aff.walk.alpha:g})"
    else:
        try:
            known = f" (it is {settle_walk(cfg.aff.walk, job.run).threshold:.2f})"
        except ValueError:
            known = ""  # its CAMs are gone
        told = f"a {'larger' if more else 'smaller'} --aff.walk.threshold{known}"
        told = f"--aff.walk.background constant and {told}" if rule == "otsu" else told
    return (
        f"Make the background {'stronger' if more else 'weaker'}: {told}, with --cams {job.run.root}, which keeps the "
        "CAMs, and another --out; docs/your_data.md, section 4, shows how to choose it."
    )
