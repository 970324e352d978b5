"""Pictures of single images for a page: the image once, and layers to lay over it (misc.image.draw)."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, replace

import numpy as np

from misc.files import store
from misc.files.camfiles import read_cam
from misc.files.images import jpeg_bytes, layer_bytes, read_image, read_mask
from misc.image import draw, pixels
from step.lib.report.choose import Groups
from step.lib.report.judge import CAM_MASK, PREDICTION, PSEUDO, Judgement, RunImages

LARGEST = 320
"""Longest side of a picture on the page, in pixels."""
MOST_BYTES = 3_000_000
"""Bytes of the pictures of one gallery; what does not fit is left out, and the page says so."""
BOX_ERRORS = {
    "right": "class and box are right", "class": "the class is wrong", "several": "the box holds several true objects",
    "part": "the box holds a part of the object only", "more": "the box holds more than the object",
    "wrong": "the box lies elsewhere",
}  # fmt: skip
"""Kinds of misc.score.wsol.ERRORS in words."""
_MOST_MAPS = 6
_QUALITY = 78


@dataclass(frozen=True)
class Panel:
    """One picture of a card: the image, greyed under a layer."""

    caption: str
    layer: str = ""
    """Base64 of a PNG with transparency; empty: the image itself, in colour."""
    note: str = ""
    """A second line of the caption."""


@dataclass(frozen=True)
class Card:
    """All pictures of one image."""

    image_id: str
    groups: tuple[str, ...]
    """Titles of the groups that the image was chosen for."""
    jpeg: str
    """Base64 of the image."""
    size: tuple[int, int]
    """Height and width of the picture."""
    legend: list[tuple[str, str]]
    """``css_legend`` of the classes in the pictures."""
    facts: list[str]
    """Short sentences."""
    panels: list[Panel] = field(default_factory=list)

    def count_bytes(self) -> int:
        """Bytes that the card takes on the page, nearly."""
        return len(self.jpeg) + sum(len(p.layer) for p in self.panels)


@dataclass(frozen=True)
class Gallery:
    """Cards with the groups by which they can be chosen."""

    title: str
    text: str
    """What is shown, and by what it is ranked."""
    groups: dict[str, int]
    """Title of a group -> number of its cards."""
    cards: list[Card]
    left_out: int = 0
    """Cards that did not fit."""
    mistakes: bool = False
    """Whether any card shows mistakes."""


def encode_layer(layer: np.ndarray) -> str:
    """Base64 of a layer's PNG."""
    return base64.b64encode(layer_bytes(layer)).decode()


def css_legend(entries: draw.Legend) -> list[tuple[str, str]]:
    """Names and CSS of the squares of a legend; hatched ones are a class of the page's style, so theirs is empty."""
    told = []
    for name, swatch in entries:
        square = swatch(9)
        inside = np.unique(square[2:-2, 2:-2].reshape(-1, 3), axis=0)
        edge, fill = (f"rgb({', '.join(map(str, colour))})" for colour in (square[0, 0], inside[0]))
        told.append((name, f"background: {fill}; border-color: {edge}" if len(inside) == 1 else ""))
    return told


def make_gallery(title: str, text: str, groups: Groups, make: dict[str, Card]) -> Gallery:
    """The cards of all groups, in the order of the groups, each once, as many as fit ``MOST_BYTES``."""
    order = list(dict.fromkeys(i for ids in groups.values() for i in ids if i in make))
    cards, taken = [], 0
    for image_id in order:
        card = replace(make[image_id], groups=tuple(name for name, ids in groups.items() if image_id in ids))
        taken += card.count_bytes()
        if taken > MOST_BYTES:
            break
        cards.append(card)
    counts = {name: sum(name in card.groups for card in cards) for name in groups}
    mistakes = any(panel.caption.startswith("mistakes") for card in cards for panel in card.panels)
    return Gallery(title, text, {n: c for n, c in counts.items() if c}, cards, len(order) - len(cards), mistakes)


def encode_thumbnail(image: np.ndarray) -> tuple[str, tuple[int, int]]:
    """Base64 of a JPEG with sides of at most ``LARGEST``, and its height and width."""
    height, width = image.shape[:2]
    size = pixels.scaled_size((height, width), min(1.0, LARGEST / max(height, width)))
    small = pixels.resize_image(image, size)
    return base64.b64encode(jpeg_bytes(small, _QUALITY)).decode(), size


def mask_card(images: RunImages, judged: Judgement) -> Card:
    """The card of an image in a run of masks: image, CAM of each class, affinity label, pseudo mask, single objects,
    prediction, truth, and the mistakes of the last mask."""
    image_id, catalog, run = judged.image_id, images.catalog, images.run
    jpeg, size = encode_thumbnail(read_image(catalog.image_path(image_id)))
    panels, values = [Panel("image")], set()

    def add(caption: str, mask: np.ndarray, note: str = "") -> np.ndarray:
        small = pixels.resize_mask(mask, size)
        values.update(np.unique(small).tolist())
        panels.append(Panel(caption, encode_layer(draw.mask_layer(small)), note))
        return small

    if run.cam(image_id).exists():
        cam = read_cam(run.cam(image_id))
        for key, score in list(zip(cam.keys, replace(cam, size=size).full_maps(), strict=True))[:_MOST_MAPS]:
            panels.append(Panel(f"CAM: {catalog.classes[key]}", encode_layer(draw.heat_layer(score))))
        if len(cam.keys) > _MOST_MAPS:
            panels[-1] = replace(panels[-1], note=f"{len(cam.keys) - _MOST_MAPS} more classes not shown")
    masks, last, shown = images.stages(image_id), None, None
    if CAM_MASK in masks:
        cut = add(f"CAM above {images.threshold:.2f}", masks[CAM_MASK], _told(judged, CAM_MASK))
        last, shown = CAM_MASK, cut
    if run.aff_label(image_id).exists():
        add("affinity label", read_mask(run.aff_label(image_id)))
    if PSEUDO in masks:
        last, shown = PSEUDO, add(PSEUDO, masks[PSEUDO], _told(judged, PSEUDO))
    if run.instance_picture(image_id).exists():
        objects = pixels.resize_mask(read_mask(run.instance_picture(image_id)), size)
        panels.append(Panel("objects", encode_layer(draw.mask_layer(objects)), "a colour each, of no class"))
    if PREDICTION in masks:
        last, shown = PREDICTION, add(PREDICTION, masks[PREDICTION], _told(judged, PREDICTION))
    truth = images.truth(image_id)
    if truth is not None:
        small = add("truth", truth)
        if shown is not None:
            panels.append(Panel(f"mistakes of the {last}", encode_layer(draw.mistake_layer(shown, small))))
    legend = css_legend(draw.legend_entries(np.array(sorted(values)), catalog.classes))
    return Card(image_id, (), jpeg, size, legend, _facts(images, judged, last), panels)


def _told(judged: Judgement, stage: str) -> str:
    iou = judged.iou(stage)
    return "" if iou is None else f"IoU {100 * iou:.0f} %"


def _facts(images: RunImages, judged: Judgement, last: str | None) -> list[str]:
    names = images.catalog.classes
    tags = "no tags" if judged.tags is None else ", ".join(names[c] for c in judged.tags) or "no class"
    facts = [f"tags: {tags}"]
    if last is None:
        return facts
    if judged.agreement is not None and not judged.ious:
        facts.append(f"its stages agree to {100 * judged.agreement:.0f} %")
    for classes, told in ((judged.not_found(last), "tagged, but not a pixel in the"),
                          (judged.not_tagged(last), "not tagged, but in the")):  # fmt: skip
        if classes:
            facts.append(f"{told} {last}: {', '.join(names[c] for c in classes)}")
    return facts


def box_card(images: RunImages, image_id: str) -> Card:
    """The card of an image in a run of boxes: image, map of the best class, its box and the true ones."""
    found, classes = store.read_arrays(images.run.box(image_id)), images.catalog.classes
    image = read_image(images.catalog.image_path(image_id))
    jpeg, size = encode_thumbnail(image)
    drawn = draw.draw_boxes(np.zeros((*size, 3), np.uint8), found["truth"], found["boxes"][0], len(found["score"]))
    boxes = np.dstack([drawn, 255 * drawn.any(2).astype(np.uint8)])
    true, first = (classes[int(k)] for k in (images.catalog.tags(image_id).argmax(), found["best"][0]))
    heat = draw.heat_layer(pixels.resize_mask(found["score"], size) / 255)
    panels = [
        Panel("image"), Panel(f"map of {first}", encode_layer(heat)),
        Panel("boxes", encode_layer(boxes), f"overlap of the true class's box {100 * found['iou'].item():.0f} %"),
    ]  # fmt: skip
    legend = css_legend(draw.box_entries())
    facts = [f"true class: {true}", f"found: {first}", BOX_ERRORS[str(found["error"])]]
    if not found["score"].any():
        facts[2:] = ["the map is empty, and so is its box"]
    return Card(image_id, (), jpeg, size, legend, facts, panels)
