"""The lattice against a plain transcription, point by point, and against the exact kernel it approximates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from misc.crf.lattice import Lattice

f32 = np.float32


def plain_filter(features: Tensor, values: Tensor) -> tuple[Tensor, int]:
    """The published algorithm with a dictionary as lattice: (N, d), (N, K) -> (N, K), number of vertices."""
    count, d = features.shape
    lattice: dict[tuple[int, ...], np.ndarray] = {}
    simplices = []
    points = np.concatenate([features.numpy(), np.zeros((-count % 4, d), f32)])
    for point in points:
        elevated, total = [f32(0)] * (d + 1), f32(0)
        for j in range(d, 0, -1):
            scaled = point[j - 1] * f32(float(f32(math.sqrt(2 / 3) * (d + 1))) / math.sqrt(j * (j + 1)))
            elevated[j] = total - f32(j) * scaled
            total = total + scaled
        elevated[0] = total
        nearest = [int(np.rint(e * f32(1 / (d + 1)))) * (d + 1) for e in elevated]
        distance = [e - f32(r) for e, r in zip(elevated, nearest, strict=True)]
        order = sorted(range(d + 1), key=lambda i: (-distance[i], i))
        rank = [order.index(i) + sum(nearest) // (d + 1) for i in range(d + 1)]
        for i in range(d + 1):
            back = (rank[i] < 0) - (rank[i] > d)
            rank[i], nearest[i] = rank[i] + back * (d + 1), nearest[i] + back * (d + 1)
        weights = [f32(0)] * (d + 2)
        for i in range(d + 1):
            share = (elevated[i] - f32(nearest[i])) * f32(1 / (d + 1))
            weights[d - rank[i]] += share
            weights[d + 1 - rank[i]] -= share
        weights[0] += 1 + weights[d + 1]
        keys = [tuple(nearest[i] + r - (d + 1) * (rank[i] > d - r) for i in range(d + 1)) for r in range(d + 1)]
        simplices.append(list(zip(keys, weights[: d + 1], strict=True)))
        lattice.update({key: np.zeros(values.shape[1], f32) for key in keys if key not in lattice})
    for simplex, value in zip(simplices, values.numpy(), strict=False):  # the filler points have no value
        for key, weight in simplex:
            lattice[key] += weight * value
    for j in range(d + 1):
        step = np.full(d + 1, -1)
        step[j] += d + 1
        zero = np.zeros(values.shape[1], f32)
        lattice = {
            key: value + f32(0.5) * (lattice.get(tuple(key + step), zero) + lattice.get(tuple(key - step), zero))
            for key, value in lattice.items()
        }
    out = [sum(weight * lattice[key] for key, weight in simplex) for simplex in simplices[:count]]
    return torch.from_numpy(np.stack(out)) / (1 + 2.0**-d), len(lattice)


def exact_filter(features: Tensor, values: Tensor) -> Tensor:
    """sum_j exp(-|f_i - f_j|^2 / 2) v_j, all pairs."""
    return torch.exp(-0.5 * torch.cdist(features.double(), features.double()) ** 2) @ values.double()


def smooth_pixels(height: int, width: int, seed: int = 0) -> Tensor:
    """(H*W, 5) bilateral features of a smooth random image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(1, 3, 4, 5, generator=generator)
    colours = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)[0].round()
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([torch.stack([x, y]) / 20, colours / 25]).flatten(1).t().contiguous()


def random_values(points: int, channels: int, seed: int = 1) -> Tensor:
    return torch.rand(points, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("d, points", [(1, 9), (2, 60), (3, 50), (5, 42)])
def test_same_as_the_published_algorithm(d: int, points: int) -> None:
    features = 1.5 * torch.randn(points, d, generator=torch.Generator().manual_seed(d))
    values = random_values(points, 3)
    expected, vertices = plain_filter(features, values)
    lattice = Lattice(features)
    assert lattice.vertices == vertices
    torch.testing.assert_close(lattice.filter(values), expected, rtol=1e-5, atol=1e-5)


def test_same_on_the_borders_of_simplices() -> None:
    """Pixels of a grid, where coordinates tie and some vertices have no weight."""
    y, x = torch.meshgrid(torch.arange(9), torch.arange(7), indexing="ij")
    features = torch.stack([x, y], dim=-1).reshape(-1, 2) / 3
    values = random_values(63, 2)
    expected, vertices = plain_filter(features, values)
    assert Lattice(features).vertices == vertices
    torch.testing.assert_close(Lattice(features).filter(values), expected, rtol=1e-5, atol=1e-5)


def test_filler_points_leave_their_vertices() -> None:
    """Three points and the filler at the origin, against four points."""
    assert Lattice(torch.full((3, 2), 20.0)).vertices == Lattice(torch.full((4, 2), 20.0)).vertices + 3


def test_approximates_the_exact_kernel() -> None:
    """The published remarks: too small without normalisation (0.5 to 0.7 of the exact values), but proportional."""
    features = smooth_pixels(24, 30)
    values = random_values(720, 2)
    ours, exact = Lattice(features).filter(values).double(), exact_filter(features, values)
    assert np.corrcoef(ours.flatten(), exact.flatten())[0, 1] > 0.97
    assert 0.45 < float(ours.sum() / exact.sum()) < 0.75


def test_normalised_is_the_symmetric_normalisation() -> None:
    features = smooth_pixels(11, 13)
    values = random_values(143, 3)
    plain = Lattice(features)
    scale = plain.filter(torch.ones(143, 1)).rsqrt()
    expected = scale * plain.filter(scale * values)
    torch.testing.assert_close(Lattice(features, normalised=True).filter(values), expected, rtol=1e-5, atol=1e-6)


def test_linear_and_slice_is_the_adjoint_of_splat() -> None:
    features = smooth_pixels(10, 12)
    lattice = Lattice(features)
    a, b = random_values(120, 4), random_values(120, 4, seed=2)
    torch.testing.assert_close(lattice.filter(2 * a - b), 2 * lattice.filter(a) - lattice.filter(b))
    splat = lattice._splat(torch.eye(120))  # (M + 1, 120)
    torch.testing.assert_close(splat.sum(0), torch.ones(120))  # barycentric weights
    assert not splat[-1].any()  # the row that stands for missing neighbours
    torch.testing.assert_close(lattice._slice(torch.eye(lattice.vertices + 1)), splat.t() / (1 + 2.0**-5))


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_a_batch_is_its_sets_one_by_one(d: int, spread: float) -> None:
    """Also where a set fits into few lattice cells and the sets' vertices lie close together in number."""
    generator = torch.Generator().manual_seed(d)
    features = spread * torch.randn(3, 21, d, generator=generator)  # filler points in each
    values = torch.rand(3, 21, 4, generator=generator)
    lattice = Lattice(features)
    together = lattice.filter(values)
    assert together.shape == values.shape
    assert lattice.vertices == sum(Lattice(points).vertices for points in features)
    for i in range(3):
        torch.testing.assert_close(together[i], Lattice(features[i]).filter(values[i]))


def test_same_numbers_each_time_and_no_side_effects() -> None:
    features, values = smooth_pixels(12, 15), random_values(180, 4)
    kept_features, kept_values = features.clone(), values.clone()
    lattice = Lattice(features)
    first = lattice.filter(values)
    assert torch.equal(first, lattice.filter(values))
    assert torch.equal(first, Lattice(features).filter(values))
    assert torch.equal(features, kept_features) and torch.equal(values, kept_values)


def test_built_in_pieces_or_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, values = smooth_pixels(12, 15), random_values(180, 4)
    expected = Lattice(features).filter(values)
    monkeypatch.setattr("misc.crf.lattice._CHUNK_CPU", 37)
    assert torch.equal(Lattice(features).filter(values), expected)


def test_no_gradient_any_layout_and_precision() -> None:
    features, values = smooth_pixels(6, 8), random_values(48, 3)
    expected = Lattice(features).filter(values)
    out = Lattice(features.t().contiguous().t()).filter(values.t().contiguous().t().double().requires_grad_())
    assert out.dtype == torch.float32 and not out.requires_grad
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("points", [1, 2, 5])
def test_points_in_one_place(points: int) -> None:
    """Everything falls on one vertex, or one simplex: all points get the same value, the sum up to a factor."""
    values = torch.arange(1.0, points + 1)[:, None]
    for features in (torch.zeros(points, 5), torch.full((points, 5), 7.3)):
        out = Lattice(features).filter(values)
        torch.testing.assert_close(out, out[:1].expand(points, 1))
        mean = Lattice(features, normalised=True).filter(values)
        torch.testing.assert_close(mean, values.mean(0).expand(points, 1), rtol=1e-5, atol=1e-6)


def test_far_apart_points_don_t_meet() -> None:
    out = Lattice(torch.tensor([[0.0, 0.0], [500.0, -800.0]])).filter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert out[0, 1] == 0 and out[1, 0] == 0 and (out.diagonal() > 0.1).all()


def test_refuses_impossible_features_and_values() -> None:
    for shape in ((4,), (0, 2), (3, 0), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="features must be"):
            Lattice(torch.zeros(shape))
    for value in (float("nan"), float("inf"), -1e9):
        with pytest.raises(ValueError, match="check their scale"):
            Lattice(torch.tensor([[0.0, value]]))
    with pytest.raises(ValueError, match="too many to number"):
        Lattice(torch.stack([torch.zeros(5), torch.tensor([9e5, -9e5, 9e5, -9e5, 9e5])]))
    lattice = Lattice(torch.zeros(4, 2))
    for values in (torch.zeros(5, 1), torch.zeros(4), torch.zeros(1, 4, 1)):
        with pytest.raises(ValueError, match=r"values must be \(4, 'K'\)"):
            lattice.filter(values)
