"""Class-aware attention-based affinity (CAA) of CLIP-ES: class maps spread by a transformer's attention, from inside
rectangles around their strong parts (Lin et al., 2023; clipes.md section 5).
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

_EPSILON = 1e-7
_ROUNDS = 3


def scale_to_unit(maps: Tensor) -> Tensor:
    """(..., h, w) -> each map minus its minimum, divided by (1e-7 + its maximum): [0, 1)."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (_EPSILON + maps.amax((-2, -1), keepdim=True))


def doubly_stochastic(attention: Tensor) -> Tensor:
    """A symmetric matrix of attention between cells, whose rows and columns sum to about one.

    Args:
        attention: (..., N, N), not negative, rows attend to columns; rows need not sum to one (the class token's share
            is cut off).

    Returns:
        (..., N, N): three rounds of columns, then rows divided by their sums, and the mean of that with its transpose.
    """
    for _ in range(_ROUNDS):
        attention = attention / attention.sum(-2, keepdim=True)
        attention = attention / attention.sum(-1, keepdim=True)
    return (attention + attention.transpose(-1, -2)) / 2


def rectangles(scores: np.ndarray, cut: float) -> list[tuple[int, int, int, int]]:
    """Bounding rectangles of the connected parts (8 neighbours) of a map above a share of its maximum.

    Args:
        scores: (h, w) float32 in [0, 1].
        cut: the share, in [0, 1); both are compared as 8-bit values with the fraction cut off.

    Returns:
        (x0, y0, x1, y1) each, x1 and y1 exclusive. Published oddity: these are at most w - 1 and h - 1, so that the
        last column and row are in no rectangle (clipes.md section 5.1). Holes have rectangles too, inside the others.
    """
    height, width = scores.shape
    grey = (scores * 255).astype(np.uint8)
    strong = (grey > int(cut * grey.max())).astype(np.uint8)
    contours, _ = cv2.findContours(strong, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    boxes = [cv2.boundingRect(contour) for contour in contours]
    return [(x, y, min(x + w, width - 1), min(y + h, height - 1)) for x, y, w, h in boxes]


def rectangle_mask(scores: np.ndarray, cut: float) -> np.ndarray:
    """Union of the ``rectangles`` of a map: (h, w) float32 in [0, 1] -> (h, w) uint8 of 0 and 1."""
    mask = np.zeros(scores.shape, np.uint8)
    for x0, y0, x1, y1 in rectangles(scores, cut):
        mask[y0:y1, x0:x1] = 1
    return mask


def refine_by_attention(maps: Tensor, attention: Tensor, cut: float) -> Tensor:
    """Class maps of one image spread by its attention: r(i) = sum over j of P(i, j) mask(j) map(j), P = S S.

    Args:
        maps: (K, h, w) float32 in [0, 1].
        attention: (h w, h w) float32 as for ``doubly_stochastic``, which makes S of it.
        cut: of the rectangles that a map spreads from.

    Returns:
        (K, h, w) float32, 0 or more, not scaled; 0 for a map without a rectangle.
    """
    if not len(maps):
        return maps
    masks = np.stack([rectangle_mask(scores, cut) for scores in maps.detach().float().cpu().numpy()])
    inside = (maps * torch.from_numpy(masks).to(maps.device)).flatten(1).T  # (N, K)
    matrix = doubly_stochastic(attention)
    # twice the matrix times few maps, instead of its square, which costs N / K times as much
    return (matrix @ (matrix @ inside)).T.view_as(maps)
