"""Random walk of class scores over a grid of cells with affinities between near cells: sparse, exact, CPU and GPU.

Used by every refiner: PSA (psa.md sections 5.2 and 6), IRNet (irnet.md section 10.1) and SemFormer's edge network
(semformer.md section 9.3). They differ in the affinities, the set of pairs and the settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from misc.image.labels import IGNORE
from misc.precision import full_precision

Displacement = tuple[int, int]
"""(dy, dx) from a pair's source to its target, in cells; dy >= 0."""

_EPS = 1e-5


def half_circle(radius: int) -> list[Displacement]:
    """Displacements inside the lower half of an open circle, in the published order; 34 for radius 5.

    (0, 1) ... (0, radius - 1), then row by row those with dy^2 + dx^2 < radius^2 (psa.md section 5.2).
    """
    first = [(0, dx) for dx in range(1, radius)]
    rows = [(dy, dx) for dy in range(1, radius) for dx in range(1 - radius, radius)]
    return first + [(dy, dx) for dy, dx in rows if dy * dy + dx * dx < radius * radius]


def fitting_radius(radius: int, height: int, width: int, *, early: bool = False) -> int:
    """The radius for a grid: shrunk to (shorter side - 1) // 2 where the grid is small (psa.md section 5.2).

    PSA's code fails if the shorter side is below 2 radius - 1: it then has no source cells. The rule is SEAM's, which
    (``early``) applies it already below 2 radius + 1. Radius 0 and 1 have no displacements: the walk then changes
    nothing.
    """
    shorter = min(height, width)
    return radius if shorter >= 2 * radius + (1 if early else -1) else (shorter - 1) // 2


def path(displacement: Displacement) -> list[Displacement]:
    """Cells between the ends of a pair, relative to its source: target first, source last (irnet.md section 9.1).

    All cells of the rectangle between the ends whose distance from the line is below 1: a thick line, not Bresenham's
    (the diagonal (1, 1) has four cells). Sorted by decreasing |y| + |x|, ties row by row.
    """
    dy, dx = displacement
    rows, columns = (range(min(0, d), max(0, d) + 1) for d in displacement)
    cells = [(y, x) for y in rows for x in columns if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]
    return sorted(cells, key=lambda cell: -abs(cell[0]) - abs(cell[1]))


def by_path_length(displacements: Sequence[Displacement]) -> list[Displacement]:
    """The displacements in IRNet's order: by the number of cells on their path, a stable sort (irnet.md section
    9.1)."""
    return sorted(displacements, key=lambda displacement: len(path(displacement)))


def cell_views(
    grid: Tensor, displacement: Displacement, cells: Sequence[Displacement], radius: int | None = None
) -> list[Tensor]:
    """Views of the grid at given places relative to the source, for all pairs of one displacement.

    Args:
        grid: (..., h, w).
        displacement: (dy, dx).
        cells: places relative to the source, in the rectangle that source and target span: (0, 0) is the source.
        radius: None for all pairs inside the grid. A number keeps the sources from which every displacement of
            ``half_circle(radius)`` stays inside: rows 0 to h - radius, columns radius - 1 to w - radius. These are
            PSA's and IRNet's pairs (psa.md section 5.2); the shape is the same for all displacements.

    Returns:
        a view (..., a, b) per entry of ``cells``; equal positions belong to the same pair.
    """
    (height, width), (dy, dx) = grid.shape[-2:], displacement
    if radius is None:
        bottom, left, right = height - dy, max(0, -dx), width - max(0, dx)
    else:
        bottom, left, right = height - radius + 1, radius - 1, width - radius + 1
    bottom, right = max(0, bottom), max(left, right)
    return [grid[..., y : y + bottom, left + x : right + x] for y, x in cells]


def pair_views(grid: Tensor, displacement: Displacement, radius: int | None = None) -> tuple[Tensor, Tensor]:
    """Sources and targets of all pairs of one displacement: ``cell_views`` of both ends, (..., a, b) each."""
    source, target = cell_views(grid, displacement, ((0, 0), displacement), radius)
    return source, target


def pair_cells(
    displacements: Sequence[Displacement], height: int, width: int, *, radius: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cell numbers (row * width + column) of the sources and targets of all pairs, displacement after displacement.

    Args:
        displacements: D of them.
        height, width: of the grid.
        radius: as in ``pair_views``.

    Returns:
        two (E,) int64 tensors. With a ``radius`` they can be reshaped to (D, P), P pairs per displacement.
    """
    cells = torch.arange(height * width).view(height, width)
    views = [pair_views(cells, displacement, radius) for displacement in displacements]
    empty = cells.new_empty(0)
    return (
        torch.cat([empty, *(source.flatten() for source, _ in views)]),
        torch.cat([empty, *(target.flatten() for _, target in views)]),
    )


def pair_labels(target: Tensor, radius: int, displacements: Sequence[Displacement] | None = None) -> dict[str, Tensor]:
    """Affinity labels of the pairs of cells (psa.md section 5.3, irnet.md section 9.2).

    Args:
        target: (B, h, w) local class indices, 0 background, 255 unknown.
        radius: of the circle; must fit the grid.
        displacements: D of them, in any order; None for ``half_circle(radius)``.

    Returns:
        {"bg", "fg", "neg"}: (B, D, P) bool, D displacements and P sources: both background, both of the same class, of
        different classes.
    """
    displacements = half_circle(radius) if displacements is None else displacements
    views = [pair_views(target, displacement, radius) for displacement in displacements]
    if not views:
        nothing = target.new_zeros((len(target), 0, 0), dtype=torch.bool)
        return {"bg": nothing, "fg": nothing, "neg": nothing}
    source = torch.stack([s.flatten(1) for s, _ in views], dim=1)  # (B, D, P)
    other = torch.stack([t.flatten(1) for _, t in views], dim=1)
    known = (source != IGNORE) & (other != IGNORE)
    same = known & (source == other)
    return {"bg": same & (source == 0), "fg": same & (source != 0), "neg": known & (source != other)}


def affinity_losses(affinity: Tensor, labels: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The three weighted loss terms of the pairs (psa.md section 5.4, irnet.md section 9.3).

    Args:
        affinity: (B, D, P) float32 in [0, 1].
        labels: of ``pair_labels``.
        counts: number of pairs by the same names, over the whole batch; or its mean over micro-batches.

    Returns:
        {"bg", "fg", "neg"}: scalars, weighted 1/4, 1/4 and 1/2; the loss is their sum.
    """
    alike, unlike = torch.log(affinity + _EPS), torch.log(1 + _EPS - affinity)
    parts = {"bg": (alike, 0.25), "fg": (alike, 0.25), "neg": (unlike, 0.5)}
    return {name: -weight * (log * labels[name]).sum() / (counts[name] + _EPS) for name, (log, weight) in parts.items()}


class _PathMaximum(torch.autograd.Function):
    """Largest value on the path of every pair: (B, h, w) -> (B, E).

    Keeps only a running maximum and the index of its cell on the path (one byte per pair). The plain form gathers every
    cell of every path, 20 times as many floats at radius 10.
    """

    @staticmethod
    def forward(ctx: Any, grid: Tensor, displacements: Sequence[Displacement], radius: int | None) -> Tensor:
        largest, winners = [], []
        for displacement in displacements:
            views = cell_views(grid, displacement, path(displacement), radius)
            best = views[0].clone()  # (B, a, b)
            winner = torch.zeros(best.shape, dtype=torch.uint8, device=grid.device)
            for number, view in enumerate(views[1:], 1):
                if ctx.needs_input_grad[0]:
                    winner.masked_fill_(view > best, number)
                torch.maximum(best, view, out=best)
            largest.append(best.flatten(1))
            winners.append(winner)
        ctx.winners, ctx.geometry, ctx.shape = winners, (displacements, radius), grid.shape
        return torch.cat(largest, dim=1) if largest else grid.new_zeros((len(grid), 0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        displacements, radius = ctx.geometry
        total = gradient.new_zeros(ctx.shape)
        sizes = [winner[0].numel() for winner in ctx.winners]
        for displacement, winner, part in zip(displacements, ctx.winners, gradient.split(sizes, 1), strict=True):
            part = part.reshape(winner.shape)  # (B, a, b)
            for number, view in enumerate(cell_views(total, displacement, path(displacement), radius)):
                view.add_(part * (winner == number))
        return total, None, None


class _GatheredPathMaximum(torch.autograd.Function):
    """The same as ``_PathMaximum`` in few large operations, for GPUs, which would wait for thousands of small ones: all
    paths of one length are gathered at a time."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, displacements: Sequence[Displacement], radius: int) -> Tensor:
        flat = grid.flatten(1)  # (B, N)
        source = source_cells(grid, radius)  # (P,)
        largest, winners, offsets = [], [], []
        for _, same in groupby(displacements, lambda displacement: len(path(displacement))):
            places = torch.tensor([path(displacement) for displacement in same], device=grid.device)  # (d, n, 2)
            steps = places[..., 0] * grid.shape[2] + places[..., 1]  # (d, n)
            best, winner = flat[:, steps[..., None] + source].max(2)  # of (B, d, n, P)
            largest.append(best.flatten(1))
            winners.append(winner.to(torch.uint8))  # (B, d, P)
            offsets.append(steps)
        ctx.geometry, ctx.shape = (source, offsets, winners), grid.shape
        return torch.cat(largest, dim=1) if largest else grid.new_zeros((len(grid), 0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        source, offsets, winners = ctx.geometry
        total = gradient.new_zeros(ctx.shape).flatten(1)  # (B, N)
        parts = gradient.split([winner[0].numel() for winner in winners], 1)
        for steps, winner, part in zip(offsets, winners, parts, strict=True):
            cells = steps.expand(len(winner), -1, -1).gather(2, winner.long()) + source  # (B, d, P)
            total.scatter_add_(1, cells.flatten(1), part)
        return total.view(ctx.shape), None, None


def source_cells(grid: Tensor, radius: int) -> Tensor:
    """Numbers (row * width + column) of the cells of a grid (..., h, w) that are sources with a radius (see
    ``cell_views``): (P,) int64 on the grid's device."""
    height, width = grid.shape[-2:]
    cells = torch.arange(height * width, device=grid.device).view(height, width)
    return cell_views(cells, (0, 0), ((0, 0),), radius)[0].flatten()


def path_affinity(boundary: Tensor, displacements: Sequence[Displacement], radius: int | None = None) -> Tensor:
    """Affinities across a boundary map: 1 - its largest value between the ends of a pair, in float32 (irnet.md section
    9.3).

    Args:
        boundary: (B, h, w) in [0, 1].
        displacements: D of them.
        radius: as in ``cell_views``; None for all pairs inside the grid (the walk).

    Returns:
        (B, E) in the order of ``pair_cells``; with a ``radius`` (B, D, P), P sources.
    """
    gathered = boundary.device.type == "cuda" and radius is not None
    affinity = 1 - (_GatheredPathMaximum if gathered else _PathMaximum).apply(boundary.float(), displacements, radius)
    if radius is None:
        return affinity
    pairs = affinity.shape[1] // max(1, len(displacements))
    return affinity.reshape(len(affinity), len(displacements), pairs)  # (B, D, P)


def transition(source: Tensor, target: Tensor, affinity: Tensor, cells: int, beta: float) -> Tensor:
    """One step of the walk, from the affinities of the pairs.

    The affinity matrix A is symmetric, with a unit diagonal and zeros for all other pairs. T = A^beta (element-wise),
    each COLUMN divided by its sum, so that a step V T gives every cell a weighted mean of its neighbourhood (psa.md
    section 6, trap 2 in section 8).

    Args:
        source, target: (E,) integer cell numbers; every pair at most once, in one direction; no cell with itself.
        affinity: (E,) in [0, 1], on the device of the walk.
        cells: number of cells N.
        beta: exponent.

    Returns:
        T transposed, (N, N) sparse CSR on the device of ``affinity``: what ``walk`` takes.
    """
    weight = (affinity if affinity.dtype == torch.float64 else affinity.float()).pow(beta)
    source, target = (cell.to(weight.device, torch.int32) for cell in (source, target))
    # the unit diagonal is added last: small weights added to one would lose digits, visible after 256 steps
    total = weight.new_zeros(cells).index_add_(0, source, weight).index_add_(0, target, weight).add_(1)
    itself = torch.arange(cells, dtype=torch.int32, device=weight.device)
    rows = torch.cat([source, target, itself])  # of T', the columns of T
    columns = torch.cat([target, source, itself])
    order = torch.argsort(rows.long() * cells + columns)
    starts = torch.zeros(cells + 1, dtype=torch.int32, device=weight.device)
    starts[1:] = torch.bincount(rows, minlength=cells).cumsum(0)
    weight = torch.cat([weight, weight, weight.new_ones(cells)])[order].div_(total[rows[order]])
    columns = columns[order]
    return _csr(starts, columns, weight)


def _csr(starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """The (N, N) sparse matrix with these rows."""
    cells = len(starts) - 1
    with warnings.catch_warnings():
        # PyTorch warns once that its CSR tensors are in beta, and some versions (2.11) that it does not check them,
        # although they are told not to: only a setting of the whole process would say more
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant checks)")
        return torch.sparse_csr_tensor(starts, columns, values, (cells, cells), check_invariants=False)


@torch.no_grad()
def walk(transition: Tensor, scores: Tensor, steps: int) -> Tensor:
    """V T^steps, exactly, as ``steps`` sparse products: O(steps * K * non-zeros), no dense matrix.

    Since columns of T sum to one, a step is V + (inflow - outflow). A cell's value is never added to the far smaller
    contributions of its neighbours one by one, which would lose digits at every step in single precision.

    Args:
        transition: (N, N), as returned by the function of that name.
        scores: (K, N), one row per class, of the same type and device.
        steps: number of steps, 2^logt in the published code.

    Returns:
        (K, N).
    """
    starts, columns, weight = transition.crow_indices(), transition.col_indices(), transition.values()
    cells = torch.arange(len(starts) - 1, dtype=torch.int32, device=starts.device)
    rows = cells.repeat_interleave(starts.diff())
    weight = weight.masked_fill(rows == columns, 0)
    leaving = weight.new_zeros(len(cells), 1).index_add_(0, rows, weight[:, None])  # (N, 1)
    others = _csr(starts, columns, weight)
    values = scores.t().contiguous()  # (N, K)
    with full_precision(values.device.type):
        for _ in range(steps):
            values = (others @ values).addcmul_(leaving, values, value=-1).add_(values)
    return values.t().contiguous()
