"""Visualisation: the VOC palette of mask files, overlays and their legend, heat maps, mistakes, boxes, contact sheets.

A *layer* is a picture of one thing to be laid over the greyed image: (H, W, 4) uint8 RGBA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from misc.image.labels import IGNORE
from misc.image.pixels import resize_image


def palette(n: int = 256) -> np.ndarray:
    """The PASCAL VOC colour map: (n, 3) uint8 RGB; index bits b0, b3, b6 make red, b1, b4, b7 green, b2, b5 blue
    (evaluation.md 3.3)."""
    index = np.arange(n)
    colours = np.zeros((n, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel) & 1) << (7 - bit)
        index = index >> 3
    return colours.astype(np.uint8)


CLASS_COLOURS = (
    "33BBEE", "EE8866", "F0E442", "AA3377", "0077BB", "BD1F01", "AAAA00", "FFAABB", "332288", "661100",
)  # fmt: skip
"""Ten colours that people with any kind of colour blindness tell apart, chosen among Paul Tol's and Petroff's: any two
differ by 22 or more in CIELAB, also as seen with protanopia, deuteranopia or tritanopia (tests/misc/test_draw.py)."""
MISTAKES = {"missed": (51, 34, 136), "false": (189, 31, 1), "confused": (255, 170, 187)}
"""Colour of pixels of an object taken for background, of background taken for an object, of one class for another: the
ninth, sixth and eighth of ``CLASS_COLOURS``, which few pictures show as classes."""
BOX_COLOURS = {"truth": (51, 187, 238), "found": (238, 136, 102)}
"""Colours of true boxes and of those that a run found."""
_VEIL = (255, 255, 255)
_MISTAKE_ALPHA = 215

Swatch = Callable[[int], np.ndarray]
"""side -> (side, side, 3) uint8: the square of a legend, which looks as the thing does on a middle grey picture."""
Legend = list[tuple[str, Swatch]]
"""Names and squares."""


def class_colours(count: int) -> np.ndarray:
    """Colours of overlays: (count, 3) uint8 RGB of the mask values 1 ..: ``CLASS_COLOURS``, then the same lighter, then
    darker, then again. With more than ten classes, read the legend."""
    ten = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in CLASS_COLOURS], float)
    shades = np.concatenate([ten, 0.55 * ten + 0.45 * 255, 0.55 * ten])
    return shades[np.arange(count) % len(shades)].round().astype(np.uint8)


def greyed(image: np.ndarray) -> np.ndarray:
    """The image in pale grey, on which the colours of overlays stand out: (H, W, 3) uint8."""
    pale = (40 + 0.75 * np.arange(256)).round().astype(np.uint8)
    return np.repeat(pale[cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)][..., None], 3, 2)


def mask_layer(mask: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """A mask as a layer to lay over its image: (H, W, 4) uint8 RGBA. Background is transparent, each class has its tint
    at this opacity and an opaque outline, ignored pixels are hatched in white."""
    height, width = mask.shape
    classes, ignored = np.where(mask == IGNORE, 0, mask).astype(np.uint8), mask == IGNORE
    table = np.zeros((256, 3), np.uint8)
    table[1:IGNORE] = class_colours(IGNORE - 1)
    layer = np.zeros((height, width, 4), np.uint8)
    layer[..., :3] = table[classes]
    layer[classes > 0, 3] = round(255 * opacity)
    layer[_outline(classes) & (classes > 0), 3] = 255
    step = max(3, round(max(height, width) / 60))
    rows, columns = np.indices(mask.shape, sparse=True)
    hatched = ignored & ((rows + columns) % (2 * step) < step)
    layer[hatched] = (*_VEIL, 170)
    return layer


def _outline(labels: np.ndarray) -> np.ndarray:
    """Pixels of uint8 labels (H, W) near another label, about 0.6 % of the longer side wide: (H, W) bool."""
    side = 2 * max(1, round(max(labels.shape) / 160)) + 1
    square = np.ones((side, side), np.uint8)
    return cv2.erode(labels, square) != cv2.dilate(labels, square)


def heat_layer(score: np.ndarray) -> np.ndarray:
    """A class map as a layer: (H, W) in [0, 1] -> (H, W, 4) uint8 RGBA, more opaque and brighter where it is higher."""
    levels = (np.clip(np.nan_to_num(score), 0, 1) * 15).round().astype(np.uint8) * 17  # few levels make small files
    coloured = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]
    alpha = np.clip(levels * 1.2, 0, 225)
    return np.dstack([coloured, alpha]).astype(np.uint8)


def mistake_layer(mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Where a mask is wrong, as a layer: (H, W, 4) uint8 RGBA in the colours of ``MISTAKES``. What is right is
    transparent, as is what the truth ignores; a mask's ignored pixels count as background."""
    given, scored = np.where(mask == IGNORE, 0, mask), truth != IGNORE
    kinds = ((given == 0) & (truth > 0), (given > 0) & (truth == 0), (given > 0) & (truth > 0) & (given != truth))
    layer = np.zeros((*mask.shape, 4), np.uint8)
    for kind, colour in zip(kinds, MISTAKES.values(), strict=True):
        layer[kind & scored] = (*colour, _MISTAKE_ALPHA)
    return layer


def lay_over(image: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """A layer (H, W, 4) uint8 RGBA over the greyed image: (H, W, 3) uint8."""
    alpha = layer[..., 3:].astype(np.uint16)
    return ((greyed(image) * (255 - alpha) + layer[..., :3] * alpha + 127) // 255).astype(np.uint8)


def overlay(image: np.ndarray, mask: np.ndarray, classes: Sequence[str] = ()) -> np.ndarray:
    """The one way a mask is shown on its image: ``mask_layer`` over the greyed image, (H, W, 3) uint8; with the names
    of the ``classes`` (C,), a legend of those in the mask below it, which makes it higher."""
    picture = lay_over(image, mask_layer(mask))
    return append_legend(picture, legend_entries(mask, classes)) if classes else picture


def legend_entries(mask: np.ndarray, classes: Sequence[str]) -> Legend:
    """Name and square of every class in a mask of any shape, and of ignored pixels if it has any."""
    values = np.unique(mask).tolist()
    found: Legend = [(classes[v - 1], partial(label_swatch, v)) for v in values if 0 < v <= len(classes)]
    return found + [("not labelled", partial(label_swatch, IGNORE))] * (IGNORE in values)


def mistake_entries() -> Legend:
    """Name and square of each kind of ``MISTAKES``."""
    return [(name, partial(mistake_swatch, name)) for name in MISTAKES]


def box_entries() -> Legend:
    """Name and square of each kind of ``BOX_COLOURS``."""
    return [(name, partial(box_swatch, name)) for name in BOX_COLOURS]


def label_swatch(value: int, side: int) -> np.ndarray:
    """A square of the mask value, with its tint and outline, or hatched, as ``overlay`` shows it: (side, side, 3)."""
    mask = np.pad(np.full((side, side), value, np.uint8), 0 if value == IGNORE else 1)
    layer = mask_layer(mask)
    return _on_grey(layer if value == IGNORE else layer[1:-1, 1:-1])


def mistake_swatch(name: str, side: int) -> np.ndarray:
    """A square of a kind of ``MISTAKES``, as ``mistake_layer`` shows it: (side, side, 3) uint8."""
    return _on_grey(np.full((side, side, 4), (*MISTAKES[name], _MISTAKE_ALPHA), np.uint8))


def box_swatch(name: str, side: int) -> np.ndarray:
    """A square of a kind of ``BOX_COLOURS`` with the black edge that ``draw_box`` gives it: (side, side, 3) uint8."""
    square = np.zeros((side, side, 3), np.uint8)
    square[1:-1, 1:-1] = BOX_COLOURS[name]
    return square


def _on_grey(layer: np.ndarray) -> np.ndarray:
    return lay_over(np.full((*layer.shape[:2], 3), 128, np.uint8), layer)


def append_legend(picture: np.ndarray, entries: Legend, size: int | None = None) -> np.ndarray:
    """The picture (H, W, 3) uint8 with lines of squares and names below it, of ``size`` pixels (by default in
    proportion to the picture); as it is without entries."""
    if not entries:
        return picture
    size = size or max(11, round(max(picture.shape[:2]) / 32))
    font, gap, right = ImageFont.load_default(size), size // 2, picture.shape[1]
    places, x, y = [], gap, gap
    for name, swatch in entries:
        wide = size + gap + int(font.getlength(name)) + 2 * gap
        if x > gap and x + wide > right:
            x, y = gap, y + size + gap
        places.append((x, y, name, swatch))
        x += wide
    strip = Image.new("RGB", (right, y + size + gap), "white")
    pen = ImageDraw.Draw(strip)
    for x, y, name, swatch in places:
        strip.paste(Image.fromarray(swatch(size)), (x, y))
        pen.text((x + size + gap, y + size / 2), name, "black", font, anchor="lm")
    return np.concatenate([picture, np.asarray(strip)])


def resized_argmax(scores: np.ndarray, size: tuple[int, int], below: float = 0.0) -> np.ndarray:
    """Arg-max of (n, h, w) scores resized to ``size`` (H, W), bilinear with align_corners False: (H, W) uint8 indices,
    255 (IGNORE) where the largest score is below ``below``.

    One class at a time, so that memory doesn't grow with their number.
    """
    if scores.shape[1:] == tuple(size):
        index = scores.argmax(0).astype(np.uint8)
        if below:
            index[scores.max(0) < below] = IGNORE
        return index
    best: Tensor | None = None
    chosen = torch.zeros(size, dtype=torch.uint8)
    for number, score in enumerate(torch.from_numpy(np.ascontiguousarray(scores, np.float32))):
        large = F.interpolate(score[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        if best is None:
            best = large
            continue
        chosen[large > best] = number
        torch.maximum(best, large, out=best)
    if below and best is not None:
        chosen[best < below] = IGNORE
    return chosen.numpy()


def heat(image: np.ndarray, score: np.ndarray) -> np.ndarray:
    """A class map on the greyed image: score (H, W) in [0, 1] -> (H, W, 3) uint8 RGB."""
    return lay_over(image, heat_layer(score))


def draw_box(image: np.ndarray, box: Sequence[float], colour: tuple[int, int, int]) -> np.ndarray:
    """Draw the outline of a box (x0, y0, x1, y1), last pixel included, on a copy of the image: (H, W, 3) uint8.

    The line is about 1 % of the longer side thick, in ``colour`` with a black edge. The box is clipped to the image.
    """
    canvas = np.ascontiguousarray(image).copy()
    height, width = image.shape[:2]
    thick = max(1, round(max(height, width) / 100))
    x0, y0, x1, y1 = (int(round(v)) for v in box)
    first, last = (max(0, x0), max(0, y0)), (min(width - 1, x1), min(height - 1, y1))
    for stroke, value in ((thick + 2, (0, 0, 0)), (thick, colour)):
        cv2.rectangle(canvas, first, last, value, stroke)
    return canvas


def draw_boxes(image: np.ndarray, truth: np.ndarray, found: np.ndarray, side: int) -> np.ndarray:
    """True boxes (n, 4) and a found one (4,) on a copy of the image (H, W, 3) uint8; their coordinates are those of a
    square grid of ``side`` pixels that covers the image."""
    scale = np.array([image.shape[1], image.shape[0]] * 2) / side
    for box in truth:
        image = draw_box(image, box * scale, BOX_COLOURS["truth"])
    return draw_box(image, found * scale, BOX_COLOURS["found"])


def tile(
    rows: Sequence[Sequence[np.ndarray]], height: int = 160, gap: int = 4, headings: Sequence[str] = ()
) -> np.ndarray:
    """A contact sheet: rows of (H, W, 3) uint8 pictures, each scaled to ``height``, on white.

    ``headings``: one per column, shown above it; pictures are then centred in their columns. Without them the pictures
    of a row follow one another.
    """
    cells = [[resize_image(p, (height, max(1, round(p.shape[1] * height / p.shape[0])))) for p in row] for row in rows]
    columns = [0] * max(map(len, cells))
    if headings:
        columns = [max(row[i].shape[1] for row in cells if i < len(row)) for i in range(len(columns))]
    lines = [_heading_line(headings, columns, gap)] if headings else []
    for row in cells:
        widths = [max(cell.shape[1], column) for cell, column in zip(row, columns, strict=False)]
        line = np.full((height + gap, sum(widths) + gap * len(widths), 3), 255, np.uint8)
        x = 0
        for cell, width in zip(row, widths, strict=True):
            left = x + (width - cell.shape[1]) // 2
            line[:height, left : left + cell.shape[1]] = cell
            x += width + gap
        lines.append(line)
    sheet = np.full((sum(x.shape[0] for x in lines), max(x.shape[1] for x in lines), 3), 255, np.uint8)
    y = 0
    for line in lines:
        sheet[y : y + line.shape[0], : line.shape[1]] = line
        y += line.shape[0]
    return sheet


def titled(picture: np.ndarray, text: str, height: int) -> np.ndarray:
    """The picture (H, W, 3) uint8 scaled to ``height``, with lines of text above it; longer words are cut off."""
    picture = resize_image(picture, (height, max(1, round(picture.shape[1] * height / picture.shape[0]))))
    return np.concatenate([_heading_line([text], [picture.shape[1]], 0), picture])


def framed(pictures: Sequence[np.ndarray], columns: int, gap: int = 6) -> np.ndarray:
    """Pictures (H, W, 3) uint8 of any sizes on white, so many in a row, each at its size in a cell of its own."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    widths = [max(row[i].shape[1] for row in rows if i < len(row)) for i in range(len(rows[0]))]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    sheet = np.full((sum(heights) + gap * (len(rows) + 1), sum(widths) + gap * (len(widths) + 1), 3), 255, np.uint8)
    y = gap
    for row, height in zip(rows, heights, strict=True):
        x = gap
        for picture, width in zip(row, widths, strict=False):
            sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
            x += width + gap
        y += height + gap
    return sheet


def _heading_line(headings: Sequence[str], columns: Sequence[int], gap: int) -> np.ndarray:
    """The headings, centred over their columns and wrapped between words where they are too wide."""
    font = ImageFont.load_default(13)
    line = Image.new("RGB", (sum(columns) + gap * len(columns), 38), "white")
    pen = ImageDraw.Draw(line)
    x = 0
    for heading, width in zip(headings, columns, strict=False):
        broken = [""]
        for word in heading.split():
            longer = f"{broken[-1]} {word}".strip()
            if font.getlength(longer) <= width or not broken[-1]:
                broken[-1] = longer
            else:
                broken.append(word)
        text = "\n".join(broken[:2])
        pen.multiline_text((x + width / 2, 35), text, "black", font, anchor="md", align="center", spacing=2)
        x += width + gap
    return np.asarray(line)
