"""The dense energy loss: predictions should change where colours change (getam.md section 5, after Tang et al., 2018).

Nothing is compiled, memory is linear in the number of pixels: all pairs are filtered on a permutohedral lattice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.checked import Checked, Positive, Range, Weight
from misc.crf.lattice import Lattice
from misc.image.labels import IGNORE


@dataclass(frozen=True)
class DenseOptions(Checked):
    """Strength and kernel of the dense energy loss."""
    # getam.md section 5

    weight: Weight = 1e-7
    """Weight of the loss. It is tuned for the lattice's filter, whose values are about 0.62 of exact Gaussian sums. 0:
    no such loss."""
    scale: Annotated[float, Range(above=0, most=1)] = 0.5
    """The loss is computed on images resized by this factor."""
    sigma_rgb: Positive = 15.0
    """Standard deviation of the kernel in colour. Grey levels."""
    sigma_xy: Positive = 100.0
    """Standard deviation of the kernel in position, multiplied by ``scale``. Pixels."""


def dense_energy(
    logits: Tensor, label: Tensor, colours: Tensor, inside: Tensor, options: DenseOptions, ignore: int = IGNORE
) -> Tensor:
    """Pairwise energy of all pixels: low where pixels that are near and of similar colour have similar predictions.

    The gradient is the hand-written one of the published code, not the derivative: the gate and the filtered values
    count as constants, the two ends of a pair as two terms.

    Args:
        logits: (B, C + 1, H, W) float32.
        label: (B, H, W) int64; the gate is 1 where it is ``ignore``, elsewhere smaller the more confident
            the prediction.
        colours: (B, 3, H, W) RGB of 0 .. 255.
        inside: (B, H, W) bool, true where the crop shows the image (not padding).

    Returns:
        Scalar, negative.
    """
    def nearest(planes: Tensor) -> Tensor:
        return F.interpolate(planes.float(), scale_factor=options.scale, recompute_scale_factor=True)

    p = F.interpolate(
        logits.softmax(1), scale_factor=options.scale, recompute_scale_factor=True, mode="bilinear",
        align_corners=False,
    )  # (B, C + 1, h, w)
    inside, label = nearest(inside[:, None]), nearest(label[:, None])  # (B, 1, h, w) each
    with torch.no_grad():
        gate = (inside - p.amax(1, keepdim=True)).clamp(min=0).masked_fill(label == ignore, 1.0)
        rows, columns = (torch.arange(side, device=p.device, dtype=torch.float32) for side in p.shape[-2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flip(0)  # (2, h, w), x first
        place = grid.expand(len(p), -1, -1, -1) / (options.sigma_xy * options.scale)
        features = torch.cat([place, nearest(colours) / options.sigma_rgb], 1)  # (B, 5, h, w)
        filtered = _filter(p * inside, features)
    energy = -options.weight / len(p) * (p * inside * gate * filtered).sum()
    # the value counts a pair once, the gradient twice: at both ends
    return 2 * energy - energy.detach()


@torch.compiler.disable  # the sizes of a lattice depend on the picture
def _filter(maps: Tensor, features: Tensor) -> Tensor:
    """Maps (B, K, h, w) filtered by the positions (B, D, h, w) of their pixels: the same shape."""
    lattice = Lattice(features.flatten(2).transpose(1, 2))
    filtered = lattice.filter(maps.flatten(2).transpose(1, 2))  # (B, h * w, K)
    return filtered.transpose(1, 2).unflatten(2, maps.shape[-2:])
