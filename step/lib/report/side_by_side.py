"""The same images through several runs: which are shown, and their cards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from misc.files.images import read_image
from misc.image import draw, pixels
from step.lib.report.choose import FEW, MANY, Groups
from step.lib.report.gallery import Card, Gallery, Panel, css_legend, encode_layer, encode_thumbnail, make_gallery
from step.lib.report.judge import CAM_MASK, PREDICTION, PSEUDO, RunImages, agreement_of, class_ious
from voc12.lists import pick_evenly

MOST_COMPARED = 200
"""Images of a list that are looked at to find those in which runs differ."""

Entry = tuple[str, RunImages]
"""Name of a run, its images."""


def make_galleries(runs: Sequence[Entry]) -> list[tuple[str, Gallery]]:
    """Galleries, with their keys on the page, of the validation list and of the scored list, as far as all runs have
    masks of the same images."""
    found = []
    for kind in ("val_list", "score_list"):
        splits = {images.run.record()["config"].get(kind) for _, images in runs}
        if len(splits) == 1 and None not in splits and all(images.catalog.aim == "masks" for _, images in runs):
            (split,) = splits
            made = _gallery(split, runs)
            if made.cards:
                found.append((f"gallery-{len(found) + 1}", made))
    return found


def last_mask(images: RunImages, image_id: str) -> tuple[str, np.ndarray] | None:
    """Stage and (H, W) uint8 mask of the last stage that a run has made of an image; None without any."""
    masks = images.stages(image_id)
    stages = [stage for stage in (PREDICTION, PSEUDO, CAM_MASK) if stage in masks]
    return (stages[0], masks[stages[0]]) if stages else None


def _gallery(split: str, runs: Sequence[Entry]) -> Gallery:
    listed = [i.catalog.ids(split) if i.catalog.has_list(split) else [] for _, i in runs]
    everywhere = set(listed[0]).intersection(*listed[1:])
    shared = [i for i in listed[0] if i in everywhere]
    ranks: dict[str, tuple[float, float]] = {}
    names = runs[0][1].catalog.classes
    same = all(images.catalog.classes == names for _, images in runs)
    for image_id in pick_evenly(shared, MOST_COMPARED) if same else []:
        masks = [last_mask(images, image_id) for _, images in runs]
        if any(mask is None for mask in masks):
            continue
        plain = [mask[1] for mask in masks if mask is not None]
        truth = runs[0][1].truth(image_id)
        if truth is None:
            ranks[image_id] = (1 - (agreement_of(plain, len(names)) or 0.0), 0.0)
        else:
            ious = [_mean(class_ious(truth, mask, len(names))) for mask in plain]
            ranks[image_id] = (float(max(ious) - min(ious)), float(np.mean(ious)))
    differing = sorted(ranks, key=lambda i: (-ranks[i][0], i))
    groups: Groups = {"runs differ most": differing[:MANY], "evenly picked": pick_evenly(list(ranks), FEW)}
    if any(mean for _, mean in ranks.values()):
        by_mean = sorted(ranks, key=lambda i: (ranks[i][1], i))
        groups |= {"worst of all runs": by_mean[:FEW], "best of all runs": by_mean[::-1][:FEW]}
    groups = {name: ids for name, ids in groups.items() if ids}
    cards = {i: _card(i, runs) for i in dict.fromkeys(i for ids in groups.values() for i in ids)}
    text = f"The same images through all runs, {len(ranks)} of {len(shared)} looked at; the last mask of each run."
    return make_gallery(f"Images of {split}", text, groups, cards)


def _mean(ious: dict[int, float]) -> float:
    return float(np.mean(list(ious.values()))) if ious else 1.0


def _card(image_id: str, runs: Sequence[Entry]) -> Card:
    catalog = runs[0][1].catalog
    jpeg, size = encode_thumbnail(read_image(catalog.image_path(image_id)))
    truth, panels, wrong, values = runs[0][1].truth(image_id), [Panel("image")], [], set()
    if truth is not None:
        small = pixels.resize_mask(truth, size)
        panels.append(Panel("truth", encode_layer(draw.mask_layer(small))))
        values |= set(np.unique(small).tolist())
    for name, images in runs:
        found = last_mask(images, image_id)
        if found is None:
            continue
        stage, mask = found
        shown = pixels.resize_mask(mask, size)
        values |= set(np.unique(shown).tolist())
        iou = None if truth is None else _mean(class_ious(truth, mask, catalog.num_classes))
        note = stage if iou is None else f"{stage}, IoU {100 * iou:.0f} %"
        panels.append(Panel(name, encode_layer(draw.mask_layer(shown)), note))
        if truth is not None:
            wrong.append(Panel(f"mistakes of {name}", encode_layer(draw.mistake_layer(shown, small))))
    legend = css_legend(draw.legend_entries(np.array(sorted(values)), catalog.classes))
    return Card(image_id, (), jpeg, size, legend, [], panels + wrong)
