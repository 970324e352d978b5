"""The sparse random walk against the dense published form, and its pair geometry."""

from __future__ import annotations

import warnings

import plain
import pytest
import torch
from torch import Tensor

from misc.propagate.walk import fitting_radius, half_circle, pair_cells, pair_views, transition, walk


def graph(height: int, width: int, radius: int | None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a grid with random affinities."""
    source, target = pair_cells(half_circle(5), height, width, radius=radius)
    return source, target, torch.rand(len(source), generator=torch.Generator().manual_seed(seed))


def test_half_circle_has_the_published_order() -> None:
    assert half_circle(2) == [(0, 1), (1, -1), (1, 0), (1, 1)]
    five = half_circle(5)
    assert len(five) == 34 and five[:5] == [(0, 1), (0, 2), (0, 3), (0, 4), (1, -4)] and five[-1] == (4, 2)
    assert len(half_circle(10)) == 152
    assert half_circle(1) == half_circle(0) == []


@pytest.mark.parametrize(("size", "needed", "early"), [((11, 30), 5, 5), ((10, 12), 5, 4), ((9, 9), 5, 4),
                                                       ((8, 40), 3, 3), ((5, 7), 2, 2), ((3, 2), 0, 0)])  # fmt: skip
def test_radius_shrinks_on_small_grids(size: tuple[int, int], needed: int, early: int) -> None:
    assert fitting_radius(5, *size) == needed
    assert fitting_radius(5, *size, early=True) == early


def test_published_pairs_start_inside_the_borders() -> None:
    height, width, radius = 12, 15, 5
    source, target = pair_cells(half_circle(radius), height, width, radius=radius)
    inner = [y * width + x for y in range(height - 4) for x in range(4, width - 4)]
    source, target = source.view(34, -1), target.view(34, -1)
    for index, (dy, dx) in enumerate(half_circle(radius)):
        assert source[index].tolist() == inner
        assert torch.equal(target[index] - source[index], torch.full((len(inner),), dy * width + dx))


def test_all_pairs_are_those_inside_the_circle() -> None:
    height, width = 7, 6
    source, target = pair_cells(half_circle(5), height, width)
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < 25
    dense = plain.dense_affinity(source, target, torch.ones(len(source)), height * width)
    assert torch.equal(dense == 1, near)
    assert len(source) == (near.sum() - height * width) / 2  # none twice


def test_pair_views_share_the_memory_of_the_grid() -> None:
    grid = torch.zeros(2, 9, 10)
    source, target = pair_views(grid, (2, -1), 3)
    source += 1
    target += 10
    assert grid.sum() == 11 * source.numel() and grid[0, 2, 1] == 10 and grid[0, 0, 2] == 1


@pytest.mark.parametrize(("height", "width", "radius", "beta", "logt"), [(12, 15, 5, 8, 8), (13, 9, None, 10, 6)])
def test_walk_is_the_dense_one(height: int, width: int, radius: int | None, beta: float, logt: int) -> None:
    source, target, affinity = graph(height, width, radius)
    cells = height * width
    scores = torch.rand(3, cells)
    dense = plain.dense_affinity(source, target, affinity, cells)
    step = transition(source, target, affinity, cells, beta)
    torch.testing.assert_close(step.to_dense().t(), plain.dense_transition(dense, beta, 0))
    torch.testing.assert_close(
        walk(step, scores, 2**logt), scores @ plain.dense_transition(dense, beta, logt), rtol=1e-4, atol=1e-5
    )


def test_columns_sum_to_one_and_constant_scores_stay() -> None:
    source, target, affinity = graph(10, 11, None)
    step = transition(source, target, affinity, 110, 4)
    torch.testing.assert_close(step.to_dense().sum(dim=1), torch.ones(110))  # it is held transposed
    scores = torch.tensor([[0.25], [3.0]]).expand(2, 110)
    torch.testing.assert_close(walk(step, scores, 64), scores.contiguous())


def test_a_cell_without_affinities_keeps_its_score() -> None:
    """A step is a mean over sources for each target (columns): what an isolated cell has never leaves it."""
    source, target = torch.tensor([0]), torch.tensor([1])
    step = transition(source, target, torch.tensor([0.5]), 3, 1)
    got = walk(step, torch.tensor([[1.0, 0.0, 5.0]]), 1)
    torch.testing.assert_close(got, torch.tensor([[1 / 1.5, 0.5 / 1.5, 5.0]]))


def test_no_pairs_leave_the_scores_alone() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    scores = torch.rand(2, 6)
    assert torch.equal(walk(transition(nothing, nothing, torch.zeros(0), 6, 8), scores, 256), scores)


def test_half_precision_affinities_and_inference_mode() -> None:
    source, target, affinity = graph(9, 9, None)
    half = affinity.bfloat16()
    expected = transition(source, target, half.float(), 81, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        step = transition(source, target, half, 81, 8)
        walked = walk(step, torch.rand(2, 81), 4)
        assert torch.equal(step.to_dense(), expected.to_dense())
    assert walked.dtype == torch.float32


@pytest.mark.parametrize("told", [
    "Sparse CSR tensor support is in beta state.", "Sparse invariant checks are implicitly disabled. Memory errors",
])  # fmt: skip
def test_what_pytorch_says_about_sparse_matrices_is_not_passed_on(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it says so depends on its version, and only once in a process."""
    real = torch.sparse_csr_tensor

    def telling(*args: object, **settings: object) -> Tensor:
        warnings.warn(told, stacklevel=1)
        return real(*args, **settings)

    monkeypatch.setattr(torch, "sparse_csr_tensor", telling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source, target, affinity = graph(12, 15, 5)
        walk(transition(source, target, affinity, 180, 8.0), torch.rand(2, 180), 4)
