"""Plain forms of what the product computes in a faster way: as the publications have it, dense, nothing saved.

Tests compare with them, scripts/bench.py measures against them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_affinity(source: Tensor, target: Tensor, affinity: Tensor, cells: int) -> Tensor:
    """Affinities (E,) of pairs of cells -> (N, N), symmetric, unit diagonal, zero elsewhere (psa.md section 5.2)."""
    dense = torch.eye(cells, dtype=affinity.dtype)
    dense[source, target] = affinity
    dense[target, source] = affinity
    return dense


def dense_transition(dense: Tensor, beta: float, logt: int) -> Tensor:
    """(N, N) affinities -> T^(2^logt), T the columns of the element-wise power divided by their sums, squared logt
    times (psa.md section 6)."""
    power = dense**beta
    result = power / power.sum(dim=0, keepdim=True)
    for _ in range(logt):
        result = result @ result
    return result


def pair_affinity(features: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Affinities of PSA with all pairs gathered at once: (B, C, h, w), two (D, P) -> (B, D, P) (psa.md section 5.2)."""
    flat = features.flatten(2)  # (B, C, N)
    difference = flat[:, :, source] - flat[:, :, target]  # (B, C, D, P)
    return torch.exp(-difference.abs().mean(dim=1))


def path_affinity(boundary: Tensor, displacements: list[tuple[int, int]], radius: int | None) -> Tensor:
    """1 - the largest value on the thick line between two cells, all cells gathered at once: (B, h, w) -> (B, E)
    (irnet.md sections 9.1 and 9.3)."""
    height, width = boundary.shape[-2:]
    affinity = []
    for dy, dx in displacements:
        edge = 0 if radius is None else radius - 1
        first, last = (max(0, -dx), width - max(0, dx)) if radius is None else (edge, width - edge)
        for y in range(height - (dy if radius is None else edge)):
            for x in range(first, last):
                line = [
                    boundary[:, y + i, x + j]
                    for i in range(dy + 1)
                    for j in range(min(0, dx), max(0, dx) + 1)
                    if (dy * j - dx * i) ** 2 < dy * dy + dx * dx
                ]
                affinity.append(1 - torch.stack(line).amax(0))
    return torch.stack(affinity, dim=1)


def gathered_path_affinity(boundary: Tensor, paths: list[Tensor]) -> Tensor:
    """The published form of it: ``boundary`` (B, h, w) is gathered at the cell numbers of all paths of one length,
    (D_n, n, P) each, and the largest taken -> (B, D, P)."""
    flat = boundary.flatten(1)
    return torch.cat([1 - flat[:, cells].amax(dim=2) for cells in paths], dim=1)
