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
