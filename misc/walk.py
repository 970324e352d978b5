"""Random walk of class scores over a grid of cells whose near pairs have affinities: sparse, exact, CPU and GPU.

Serves every refiner: PSA (psa.md sections 5.2 and 6), IRNet (irnet.md section 10.1) and SemFormer's edge network
(semformer.md section 9.3) differ in the affinities, in which pairs there are, and in the numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

Displacement = tuple[int, int]
"""(dy, dx) from a pair's source to its target, in cells; dy >= 0."""


def half_circle(radius: int) -> list[Displacement]:
    """Displacements inside the lower half of an open circle, in the published order; 34 for radius 5.

    (0, 1) ... (0, radius - 1), then row by row those with dy^2 + dx^2 < radius^2 (psa.md section 5.2).
    """
    first = [(0, dx) for dx in range(1, radius)]
    rows = [(dy, dx) for dy in range(1, radius) for dx in range(1 - radius, radius)]
    return first + [(dy, dx) for dy, dx in rows if dy * dy + dx * dx < radius * radius]


def fitting_radius(radius: int, height: int, width: int, *, early: bool = False) -> int:
    """The radius for a grid: shrunk to (shorter side - 1) // 2 where the grid is small (psa.md section 5.2).

    PSA's own code has no sources and fails where the shorter side is below 2 radius - 1. The rule is SEAM's, which
    (``early``) already applies it below 2 radius + 1. Radius 0 and 1 have no displacements: the walk then leaves the
    scores as they are.
    """
    shorter = min(height, width)
    return radius if shorter >= 2 * radius + (1 if early else -1) else (shorter - 1) // 2


def pair_views(grid: Tensor, displacement: Displacement, radius: int | None = None) -> tuple[Tensor, Tensor]:
    """Sources and targets of all pairs of one displacement, as views of the grid.

    Args:
        grid: (..., h, w).
        displacement: (dy, dx).
        radius: None for all pairs inside the grid. A number keeps the sources from which every displacement of
            ``half_circle(radius)`` stays inside: rows 0 to h - radius, columns radius - 1 to w - radius. Those are
            PSA's pairs (psa.md section 5.2); they have the same shape for each displacement.

    Returns:
        two views (..., a, b), equal positions are a pair.
    """
    (height, width), (dy, dx) = grid.shape[-2:], displacement
    if radius is None:
        bottom, left, right = height - dy, max(0, -dx), width - max(0, dx)
    else:
        bottom, left, right = height - radius + 1, radius - 1, width - radius + 1
    bottom, right = max(0, bottom), max(left, right)
    return grid[..., :bottom, left:right], grid[..., dy : dy + bottom, left + dx : right + dx]


def pair_cells(
    displacements: Sequence[Displacement], height: int, width: int, *, radius: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cell numbers (row * width + column) of the sources and targets of all pairs, displacement after displacement.

    Args:
        displacements: D of them.
        height, width: of the grid.
        radius: as in ``pair_views``.

    Returns:
        two (E,) int64 tensors. With a ``radius`` they can be reshaped to (D, P), P pairs a displacement.
    """
    cells = torch.arange(height * width).view(height, width)
    views = [pair_views(cells, displacement, radius) for displacement in displacements]
    empty = cells.new_empty(0)
    return (
        torch.cat([empty, *(source.flatten() for source, _ in views)]),
        torch.cat([empty, *(target.flatten() for _, target in views)]),
    )


def transition(source: Tensor, target: Tensor, affinity: Tensor, cells: int, beta: float) -> Tensor:
    """One step of the walk, from the affinities of the pairs.

    The affinity matrix A is symmetric with a unit diagonal and zero for all other pairs; T = A^beta (element-wise),
    each COLUMN divided by its sum, so that a step V T gives every cell a weighted mean of its neighbourhood
    (psa.md section 6, trap 2 in section 8).

    Args:
        source, target: (E,) integer cell numbers; every pair at most once, in one direction, none with itself.
        affinity: (E,) in [0, 1], on the device of the walk.
        cells: number of cells N.
        beta: exponent.

    Returns:
        T transposed, (N, N) sparse CSR on the device of ``affinity``: what ``walk`` takes.
    """
    source, target = source.to(affinity.device), target.to(affinity.device)
    weight = (affinity if affinity.dtype == torch.float64 else affinity.float()).pow(beta)
    total = weight.new_ones(cells).index_add_(0, source, weight).index_add_(0, target, weight)
    itself = torch.arange(cells, device=weight.device)
    rows = torch.cat([source, target, itself])
    columns = torch.cat([target, source, itself])
    weight = torch.cat([weight, weight, weight.new_ones(cells)]) / total[rows]  # rows of T', the columns of T
    order = torch.argsort(rows * cells + columns)
    starts = torch.zeros(cells + 1, dtype=torch.int32, device=weight.device)
    starts[1:] = torch.bincount(rows, minlength=cells).cumsum(0)
    with warnings.catch_warnings():  # the library announces once that its CSR tensors may still change
        warnings.filterwarnings("ignore", message="Sparse CSR")
        return torch.sparse_csr_tensor(
            starts, columns[order].int(), weight[order], (cells, cells), check_invariants=False
        )


@torch.no_grad()
def walk(transition: Tensor, scores: Tensor, steps: int) -> Tensor:
    """V T^steps, exactly, as ``steps`` sparse products: O(steps * K * non-zeros), no dense matrix.

    Args:
        transition: (N, N) of the function of that name.
        scores: (K, N), one row a class, of the same type and device.
        steps: number of steps, 2^logt of the published codes.

    Returns:
        (K, N).
    """
    columns = scores.t().contiguous()  # (N, K)
    with torch.autocast(columns.device.type, enabled=False):
        for _ in range(steps):
            columns = transition @ columns
    return columns.t().contiguous()
