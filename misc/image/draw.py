"""Visualisation: the VOC palette, overlays, heat maps, boxes, contact sheets."""

from __future__ import annotations

from collections.abc import Sequence

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


def overlay(image: np.ndarray, mask: np.ndarray, opacity: float = 0.55) -> np.ndarray:
    """The mask's colours blended over the image: (H, W, 3) uint8. Background is left unchanged, ignored pixels are
    whitened, and each class has a white outline."""
    colours = palette()
    colours[IGNORE] = 255
    mixed, inside = image.copy(), mask != 0
    mixed[inside] = image[inside] * (1 - opacity) + colours[mask[inside]] * opacity
    mask = np.where(mask == IGNORE, 0, mask)
    edge = np.zeros(mask.shape, bool)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
    mixed[edge] = 255
    return mixed


def resized_argmax(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Arg-max of (n, h, w) scores resized to ``size`` (H, W), bilinear with align_corners False: (H, W) uint8 indices.

    One class at a time, so that memory doesn't grow with their number.
    """
    if scores.shape[1:] == tuple(size):
        return scores.argmax(0).astype(np.uint8)
    best: Tensor | None = None
    index = torch.zeros(size, dtype=torch.uint8)
    for number, score in enumerate(torch.from_numpy(np.ascontiguousarray(scores, np.float32))):
        large = F.interpolate(score[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        if best is None:
            best = large
            continue
        index[large > best] = number
        torch.maximum(best, large, out=best)
    return index.numpy()


def heat(image: np.ndarray, score: np.ndarray) -> np.ndarray:
    """A class map as a heat map on the image: score (H, W) in [0, 1] -> (H, W, 3) uint8 RGB."""
    hot = cv2.applyColorMap((np.clip(score, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    return (0.5 * image + 0.5 * hot).astype(np.uint8)


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
