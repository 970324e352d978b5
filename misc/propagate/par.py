"""Pixel-adaptive refinement: local averaging that makes maps follow the colours of their image. Nothing is learned.

Each iteration replaces a pixel by a weighted mean of 8 neighbours at each of several distances. The weights are
computed once, from the image. PAR of AReAM (aream.md section 5) and PAMR of GETAM (getam.md section 4) are two
settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.checked import Checked, Positive, Range, Weight

_EPSILON = 1e-8
# rows and columns of the 8 neighbours, row by row
_AROUND = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if row or column)


@dataclass(frozen=True)
class Kernel(Checked):
    """Kernel of the neighbours' weights; the defaults are those of PAR."""

    dilations: Annotated[tuple[int, ...], Range(least=1, filled=True)] = (1, 2, 4, 8, 12, 24)
    """Distances of the neighbours, with 8 neighbours at each. Pixels."""
    width: Positive = 0.3
    """Difference of colour, in standard deviations of the neighbourhood, at which the exponent is -1."""
    power: Literal[1, 2] = 2
    """Power of the difference in the exponent. 2: Gaussian. 1: Laplacian."""
    place: Weight = 0.01
    """Weight of a second kernel, on distance instead of colour. All weights then sum to 1 + this, so every iteration
    increases the maps a little. 0: none."""
    deviation_of_centre: bool = False
    """Include the pixel itself, once per dilation, in the standard deviation."""


PAR = Kernel()
"""Settings of AReAM (aream.md section 5)."""
PAMR = Kernel(width=0.1, power=1, place=0.0, deviation_of_centre=True)
"""Settings of GETAM (getam.md section 4)."""


def neighbours(maps: Tensor, dilations: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield the 8 D neighbours of every pixel as views of one padded copy.

    Args:
        maps: (B, C, H, W). Padded by replicating the border.
        dilations: D distances.

    Yields:
        (B, C, H, W) each, dilation by dilation: up-left, up, up-right, left, right, down-left, down, down-right.
    """
    height, width = maps.shape[-2:]
    margin = max(dilations)
    padded = F.pad(maps, (margin,) * 4, mode="replicate")
    for dilation in dilations:
        for row, column in _AROUND:
            top, left = margin + dilation * row, margin + dilation * column
            yield padded[..., top : top + height, left : left + width]


def distances(dilations: tuple[int, ...]) -> Tensor:
    """(8 D,) float32: distances of the ``neighbours``. Pixels."""
    return torch.tensor([d * (row**2 + column**2) ** 0.5 for d in dilations for row, column in _AROUND])


class PixelAdaptive:
    """Refinement guided by one batch of images; the weights are computed once for any number of maps.

    Args:
        images: (B, 3, H, W) float32, any range.
        kernel: weights of the neighbours.
    """

    weights: Tensor
    """(B, 8 D, H, W) float32, in the order of ``neighbours``."""

    def __init__(self, images: Tensor, kernel: Kernel = PAR) -> None:
        self.dilations = kernel.dilations
        exponents = _exponents(images.float(), kernel)
        self.weights = exponents.softmax(1)
        if kernel.place:
            places = distances(kernel.dilations).to(images.device)
            places = -((places / (places.std() + _EPSILON) / kernel.width) ** kernel.power)
            self.weights.add_(places.softmax(0)[:, None, None], alpha=kernel.place)

    def __call__(self, maps: Tensor, iterations: int = 10) -> Tensor:
        """Refine maps (B, Q, H, W), any Q -> the same shape, float32. ``iterations`` 0 changes nothing."""
        maps = maps.float()
        for _ in range(iterations):
            total = torch.zeros_like(maps)
            for weight, neighbour in zip(self.weights.split(1, dim=1), neighbours(maps, self.dilations), strict=True):
                total.addcmul_(weight, neighbour)
            maps = total
        return maps


def _exponents(images: Tensor, kernel: Kernel) -> Tensor:
    """Exponents of the colour kernel: (B, 3, H, W) float32 -> (B, 8 D, H, W).

    The unbiased standard deviation is each channel's, over the neighbourhood of each pixel.
    """
    around = list(neighbours(images, kernel.dilations))  # views
    centres = len(kernel.dilations) if kernel.deviation_of_centre else 0
    count = len(around) + centres
    mean = sum(around, images * centres) / count
    variance = sum(((x - mean) ** 2 for x in around), centres * (images - mean) ** 2) / (count - 1)
    scale = (variance.sqrt() + _EPSILON) * kernel.width
    return torch.stack([-((x - images).abs() / scale).pow(kernel.power).mean(1) for x in around], 1)
