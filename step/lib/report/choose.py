"""Which images a page shows: worst, median and best, some of each class, those with a tag that was not found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from step.lib.report.judge import Judgement
from voc12.lists import pick_evenly

FEW, MANY = 4, 8
"""Images of a group."""
MOST_CLASSES = 20
"""Classes, the worst first, of which single images are picked."""

Groups = dict[str, list[str]]
"""Title of a group -> ids, the first ones first."""


def choose_groups(
    judged: Sequence[Judgement], stage: str, classes: Sequence[str], shown: Sequence[str] = ()
) -> Groups:
    """Groups of the images by their mask of a stage. With truth, ranked by IoU; without, by how far the stages agree,
    which is no measure of quality, but says where to look.

    Args:
        judged: the images of a list.
        stage: whose masks are ranked.
        classes: (C,) names.
        shown: ids that make a group of their own: images at equal distances in the list.
    """
    known = any(j.ious for j in judged)
    rank: Callable[[Judgement], float | None] = (lambda j: j.iou(stage)) if known else (lambda j: j.agreement)
    ranked = sorted((j for j in judged if rank(j) is not None), key=lambda j: (rank(j), j.image_id))
    names = ("worst", "median", "best") if known else ("least agreement", "median", "most agreement")
    groups: Groups = {}
    if ranked:
        middle = max(0, len(ranked) // 2 - FEW // 2)
        parts = (ranked[:MANY], ranked[middle : middle + FEW], ranked[::-1][:FEW])
        groups = {name: [j.image_id for j in part] for name, part in zip(names, parts, strict=True)}
    groups["tag not found"] = [j.image_id for j in judged if j.not_found(stage)][:MANY]
    if not known:
        groups["class without its tag"] = [j.image_id for j in judged if j.not_tagged(stage)][:MANY]
    groups["evenly picked"] = list(shown) or pick_evenly([j.image_id for j in judged], FEW)
    for c in _classes_worst_first(judged, stage, len(classes))[:MOST_CLASSES]:
        groups[f"class {classes[c]}"] = _of_class(judged, stage, c)
    return {name: ids for name, ids in groups.items() if ids}


def _classes_worst_first(judged: Sequence[Judgement], stage: str, count: int) -> list[int]:
    """Classes in the images; with truth by the mean of their IoUs, without by their number."""
    means = {}
    for c in range(count):
        ious = [j.ious[stage].get(c, 0.0) for j in judged if c in j.present and stage in j.ious]
        there = sum(c in j.present for j in judged)
        if there:
            means[c] = sum(ious) / len(ious) if ious else -there
    return sorted(means, key=lambda c: means[c])


def _of_class(judged: Sequence[Judgement], stage: str, c: int) -> list[str]:
    """The two worst images, the median and the best of a class; without truth some at equal distances."""
    found = [j for j in judged if c in j.present and stage in j.foreground]
    if not any(stage in j.ious for j in found):
        return pick_evenly([j.image_id for j in found], FEW)
    ranked = sorted((j for j in found if stage in j.ious), key=lambda j: (j.ious[stage].get(c, 0.0), j.image_id))
    picked = [*ranked[:2], ranked[len(ranked) // 2], ranked[-1]]
    return list(dict.fromkeys(j.image_id for j in picked))


def choose_box_groups(ious: Mapping[str, float], classes: Mapping[str, str], errors: Mapping[str, str]) -> Groups:
    """Groups of the images of a run of boxes, ranked by the overlap of the true class's box; all arguments by id:
    overlap, name of the true class, kind of the error."""
    ranked = sorted(ious, key=lambda i: (ious[i], i))
    middle = max(0, len(ranked) // 2 - FEW // 2)
    groups = {"worst": ranked[:MANY], "median": ranked[middle : middle + FEW], "best": ranked[::-1][:FEW]}
    groups["wrong class"] = [i for i in ranked if errors[i] == "class"][:MANY]
    groups["evenly picked"] = pick_evenly(list(ious), FEW)
    means = {name: [ious[i] for i in ious if classes[i] == name] for name in set(classes.values())}
    for name in sorted(means, key=lambda n: (sum(means[n]) / len(means[n]), n))[:MOST_CLASSES]:
        mine = [i for i in ranked if classes[i] == name]
        groups[f"class {name}"] = list(dict.fromkeys([*mine[:2], mine[len(mine) // 2], mine[-1]]))
    return {name: ids for name, ids in groups.items() if ids}
