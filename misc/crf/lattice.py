"""The permutohedral lattice: high-dimensional Gaussian filtering in tensor operations, on CPU and GPU.

The numbers are those of the lattice inside pydensecrf (Kraehenbuehl and Koltun's code after Adams et al., "Fast
High-Dimensional Filtering Using the Permutohedral Lattice", 2010), on which every published CRF result of psa.md
section 3 and the dense energy loss of getam.md section 5 stand. It is an approximation, so even a filter nearer to the
true Gaussian would be another method: elevation, rounding, ties, blur order and scale follow that code to the letter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 4
"""Block size of the published code; it pads its last block with points at the origin."""

_CHUNK, _CHUNK_CPU = 1 << 20, 1 << 16
"""Points per chunk when simplices and vertices are found; on a CPU, intermediate tensors stay in its cache."""

_FARTHEST = 1e6
"""Beyond this, float32 can no longer distinguish lattice coordinates."""


class Lattice:
    """Gaussian filter ``out_i = sum_j exp(-|f_i - f_j|^2 / 2) * value_j`` (j = i included), approximated on a lattice.

    It is built once for any number of ``filter`` calls; cost and memory grow linearly with the number of points.
    Everything lives on the device of ``features`` and nothing is differentiated. As published, the filter is not quite
    symmetric in i and j: blur directions only commute where no neighbour is missing. Source: psa.md section 3, getam.md
    section 5.

    Args:
        features: (N, d) positions of the points, already divided by the standard deviation of each axis; or (B, N, d)
            for B independent sets of points. Converted to float32.
        normalised: filter with the symmetrically normalised kernel k(i, j) / sqrt(sum_l k(i, l) * sum_l k(l, j)).

    Raises:
        ValueError: wrong number of axes, no points, NaN, or positions so far apart (in standard deviations) that
            the lattice's cells can't be numbered with 63 bits.
    """

    @torch.no_grad()
    def __init__(self, features: Tensor, normalised: bool = False) -> None:
        if features.ndim not in (2, 3) or 0 in features.shape:
            raise ValueError(f"features must be (N, d) or (B, N, d) without empty axes, got {tuple(features.shape)}")
        if not features.abs().max() < _FARTHEST:
            raise ValueError(f"features must be numbers below {_FARTHEST:g} standard deviations: check their scale")
        self.shape = tuple(features.shape[:-1])
        """(N,) or (B, N): the leading axes that values must have."""
        points, d = features.shape[-2:]
        # Published oddity: the filler points of the last block leave their (empty) vertices in the lattice, and the
        # blur passes through them.
        padded = F.pad(features.float().reshape(-1, points, d), (0, 0, 0, -points % _BLOCK))  # (B, N', d)
        sets, padded = len(padded), padded.reshape(-1, d)
        cells = padded.new_empty(d, len(padded), dtype=torch.int32)
        rank = padded.new_empty(d + 1, len(padded), dtype=torch.int8)
        weights = padded.new_empty(len(padded), d + 1)
        for chunk in _chunks(padded):
            cells[:, chunk], rank[:, chunk], corners = _enclosing_simplices(padded[chunk].t().contiguous())
            weights[chunk] = corners.t()
        del padded  # as every large table is, once it isn't needed: their sum would be the peak of a run
        vertices, packed, strides = _vertices(cells, rank, sets)
        del cells, rank
        # The filler points end here: (B*N', d+1) -> (B*N, d+1)
        vertices, weights = (
            table.reshape(sets, -1, d + 1)[:, :points].reshape(-1, d + 1).contiguous() for table in (vertices, weights)
        )
        self.vertices = len(packed)
        """Number of lattice vertices, M."""
        blur = weights.new_tensor([1.0, 0.5, 0.5]).repeat(self.vertices + 1, 1)
        self._splat = _Rows(*_by_vertex(vertices, weights, self.vertices))
        self._blur = [_Rows.of_table(neighbours, blur) for neighbours in _neighbours(packed, strides)]
        self._slice = _Rows.of_table(vertices, weights.mul_(1 / (1 + 2.0**-d)))
        if normalised:
            mass = self.filter(weights.new_ones(*self.shape, 1)).flatten()
            scale = torch.rsqrt(mass + 1e-20)
            self._splat.weights.mul_(scale.index_select(0, self._splat.columns))
            self._slice.weights.view_as(weights).mul_(scale[:, None])

    @torch.no_grad()
    def filter(self, values: Tensor) -> Tensor:
        """Filter K channels.

        Args:
            values: (N, K), or (B, N, K) for a batch of point sets; converted to float32.

        Returns:
            A new float32 tensor of the same shape, without gradient.

        Raises:
            ValueError: the leading axes are not those of the features.
        """
        if values.ndim != len(self.shape) + 1 or tuple(values.shape[:-1]) != self.shape:
            raise ValueError(f"values must be {(*self.shape, 'K')} as the features were, got {tuple(values.shape)}")
        lattice = self._splat(values.float().reshape(-1, values.shape[-1]))  # (B*N, K) -> (M + 1, K), the last row zero
        for along in self._blur:  # by (1/2, 1, 1/2) along each of the d + 1 directions in turn
            lattice = along(lattice)
        return self._slice(lattice).reshape(*self.shape, -1)


@dataclass(frozen=True)
class _Rows:
    """A sparse matrix by rows. Its product is an embedding bag: the fastest form in torch on a CPU (as fast as loops
    that are compiled for it), and the same code runs on a GPU."""

    starts: Tensor
    """(R + 1,) int32 start of each row's entries, and their number."""
    columns: Tensor
    """(E,) int32 column of each entry."""
    weights: Tensor
    """(E,) float32."""

    @classmethod
    def of_table(cls, columns: Tensor, weights: Tensor) -> _Rows:
        """From (R, C) columns and weights: as many entries in every row."""
        rows, width = columns.shape
        starts = torch.arange(0, rows * width + 1, width, dtype=torch.int32, device=columns.device)
        return cls(starts, columns.flatten(), weights.flatten())

    def __call__(self, values: Tensor) -> Tensor:
        """The product with (columns, K) values: (R, K)."""
        return F.embedding_bag(
            self.columns, values, self.starts, mode="sum", per_sample_weights=self.weights, include_last_offset=True
        )


def _chunks(points: Tensor) -> list[slice]:
    """Parts of the first axis, of a size that suits the device."""
    size = _CHUNK_CPU if points.device.type == "cpu" else _CHUNK
    return [slice(start, start + size) for start in range(0, len(points), size)]


def _enclosing_simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the simplex that encloses each point, in the published code's order of float32 operations.

    Equal results need equal rounding: a point on the border of a simplex may otherwise create other vertices.

    Args:
        features: (d, N).

    Returns:
        (d, N) int32 nearest remainder-0 vertex, in units of d + 1, without its last coordinate, which follows from the
        others; (d+1, N) int8 rank of each coordinate's distance to it, 0 = largest; (d+1, N) float32 barycentric
        weights of the simplex's vertices with remainder 0..d.
    """
    d, n = features.shape
    expected_std = float(np.float32(math.sqrt(2 / 3) * (d + 1)))
    elevated = features.new_empty(d + 1, n)
    total = features.new_zeros(n)
    for j in range(d, 0, -1):
        scaled = features[j - 1] * (expected_std / math.sqrt((j + 1) * j))
        torch.sub(total, j * scaled, out=elevated[j])
        total = total + scaled
    elevated[0] = total

    nearest = (elevated * (1 / (d + 1))).round_()
    excess = nearest[0].clone()
    for row in nearest[1:]:
        excess += row
    nearest *= d + 1

    # Comparisons straight into float32: several times as fast as by way of booleans.
    residual = elevated - nearest
    rank = torch.arange(d + 1, device=features.device, dtype=torch.float32)[:, None].repeat(1, n)
    smaller = torch.empty_like(excess)
    for i in range(d):
        # Rank i to begin with: of two coordinates the earlier one goes first, unless it is smaller.
        for j in range(i + 1, d + 1):
            torch.lt(residual[i], residual[j], out=smaller)
            rank[i] += smaller
            rank[j] -= smaller
    # Rounding may leave the plane sum = 0: the coordinates that were rounded furthest come back by one cell.
    rank += excess
    too_low = torch.lt(rank, 0, out=residual)
    shift = too_low.sub_(torch.gt(rank, d, out=torch.empty_like(rank))).mul_(d + 1)
    rank += shift
    nearest += shift

    distance = elevated.sub_(nearest).mul_(1 / (d + 1))
    by_rank = torch.empty_like(distance).scatter_(0, rank.long(), distance).flip(0)
    weights = by_rank.clone()
    weights[1:] -= by_rank[:-1]
    weights[0] += 1 - by_rank[-1]
    return torch.div(nearest[:d], d + 1).int(), rank.to(torch.int8), weights


def _strides(spans: Sequence[int]) -> list[int]:
    """Strides that pack coordinates of the given spans into one non-negative int64 without collisions."""
    strides, size = [], 1
    for span in reversed(spans):
        strides.append(size)
        size *= span
    if size >= 2**63:
        extent = " x ".join(map(str, spans))
        raise ValueError(f"features span {extent} lattice cells, too many to number: use larger standard deviations")
    return strides[::-1]


def _pack(coordinates: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Sum of coordinate times stride, as int64."""
    packed = torch.zeros_like(coordinates[0], dtype=torch.int64)
    for coordinate, stride in zip(coordinates, strides, strict=True):
        packed.add_(coordinate, alpha=stride)
    return packed


def _vertices(cells: Tensor, rank: Tensor, sets: int) -> tuple[Tensor, Tensor, list[int]]:
    """Assign numbers to the lattice vertices around all points.

    A vertex is its simplex's remainder-0 vertex (the cell) and the set of coordinates that have come down by d + 1 on
    the way to it. Points share few cells, so a table of cells and sets finds the distinct vertices, and only these are
    sorted.

    Args:
        cells: (d, N) as from ``_enclosing_simplices``.
        rank: (d+1, N) from there.
        sets: number of point sets, N / sets points each, that share no vertex.

    Returns:
        (N, d+1) int32 number 0..M-1 of the vertices around each point; (M,) sorted packed coordinates of the vertices;
        the strides of that packing, set first.
    """
    d, n = cells.shape
    group = torch.arange(sets, device=cells.device).repeat_interleave(n // sets)
    low, high = cells.aminmax(dim=1, keepdim=True)
    cells -= low
    spans = (high - low + 1).flatten().tolist()

    keys = _pack([group, *cells], _strides([sets, *spans]))
    runs, run = torch.unique_consecutive(keys, return_inverse=True)  # fewer to sort
    distinct, owner = torch.unique(runs, return_inverse=True)
    owner = owner.index_select(0, run)
    # Any point of a cell can represent it.
    example = torch.empty_like(distinct).scatter_(0, owner, torch.arange(n, device=cells.device))

    # From one vertex of a simplex to the next: 1 up in all coordinates, d + 1 down in the one whose turn it is, from
    # the last rank to the first. Bit i of a code stands for coordinate i.
    size = len(distinct) << (d + 1)
    codes = owner.new_empty(n, d + 1, dtype=torch.int32 if size < 2**31 else torch.int64)
    seen = torch.zeros(size, dtype=torch.bool, device=cells.device)
    for chunk in _chunks(codes):
        turns = codes.new_empty(d + 1, len(codes[chunk]))
        turns[0] = owner[chunk] << (d + 1)
        down = torch.empty_like(turns[0])
        for remainder in range(1, d + 1):
            turns[remainder] = turns[0]
            for i in range(d + 1):
                turns[remainder].add_(torch.gt(rank[i, chunk], d - remainder, out=down), alpha=1 << i)
        codes[chunk] = turns.t()
        seen.index_fill_(0, codes[chunk].flatten().long(), True)
    found = seen.nonzero().squeeze(1)

    # A vertex lies up to d away from the cell's, its neighbours d further: margins keep packed sums unique.
    strides = _strides([sets, *((d + 1) * (span + 3) for span in spans)])
    start = _pack([group[example], *cells[:, example].long().add_(2).mul_(d + 1)], strides)
    packed = start.index_select(0, found >> (d + 1))
    for i in range(d + 1):
        # The coordinate that isn't stored moves nothing when its turn comes.
        packed.add_((found >> i) & 1, alpha=sum(strides[1:]) - ((d + 1) * strides[1 + i] if i < d else 0))
    packed, numbers = torch.unique(packed, return_inverse=True)  # (M,), (found,)
    table = numbers.new_empty(size, dtype=torch.int32).scatter_(0, found, numbers.int())
    return table.index_select(0, codes.flatten()).view(n, d + 1), packed, strides


def _by_vertex(vertices: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Transpose the table of each point's vertices: which points contribute to a vertex, and how much.

    Args:
        vertices, weights: (N, d+1).
        count: number of vertices, M.

    Returns:
        (M + 2,) int32 start of each vertex's list, an empty one for the zero row included; (N * (d+1),) int32 points;
        (N * (d+1),) weights.
    """
    points, corners = vertices.shape
    if vertices.device.type == "cpu":  # a counting sort, where PyTorch would compare
        starts = np.arange(0, points * corners + 1, corners, dtype=np.int32)
        table = csr_array((weights.flatten().numpy(), vertices.flatten().numpy(), starts), (points, count + 1)).tocsc()
        return tuple(map(torch.from_numpy, (table.indptr, table.indices, table.data)))  # type: ignore[return-value]
    ordered, order = torch.sort(vertices.flatten(), stable=True)
    rows = torch.arange(count + 2, device=vertices.device, dtype=torch.int32)
    starts = torch.searchsorted(ordered, rows, out_int32=True)
    weights = weights.flatten().index_select(0, order)
    return starts, torch.div(order.int(), corners, rounding_mode="floor"), weights


def _neighbours(packed: Tensor, strides: list[int]) -> list[Tensor]:
    """For each of the d + 1 directions (M + 1, 3) int32: a vertex and its two neighbours, M where there is none."""
    m = len(packed)
    every = torch.arange(m + 1, device=packed.device)
    tables = []
    for direction in range(len(strides)):
        # d up in one coordinate, 1 down in the others; the last direction goes up in the coordinate that isn't stored.
        step = -sum(strides[1:])
        if direction + 1 < len(strides):
            step += len(strides) * strides[direction + 1]
        up = torch.full_like(every, m)
        up[:m] = _places(packed, packed + step)
        down = torch.full_like(every, m).scatter_(0, up, every)
        down[m] = m  # every vertex without a neighbour has written there
        tables.append(torch.stack([every, up, down], dim=1).int())
    return tables


def _places(packed: Tensor, wanted: Tensor) -> Tensor:
    """For each of the wanted numbers its place among the packed ones, as many as these if it is not there: int64. Both
    are sorted, without duplicates."""
    m = len(packed)
    if packed.device.type == "cpu":  # timsort merges two sorted lists in one pass: quicker than a search for each
        places, numbers = torch.full_like(wanted, m), packed.numpy()
        for chunk in _chunks(wanted):
            these = wanted[chunk].numpy()
            low, high = np.searchsorted(numbers, these[[0, -1]])
            both = np.concatenate([these, numbers[low : high + 1]])
            order = np.argsort(both, kind="stable")
            both = both[order]
            first = np.flatnonzero(both[1:] == both[:-1])
            places[chunk].numpy()[order[first]] = order[first + 1] + (low - len(these))
        return places
    found = torch.searchsorted(packed, wanted).clamp_(max=m - 1)
    return torch.where(packed.index_select(0, found) == wanted, found, m)
