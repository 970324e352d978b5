"""The dense CRF against plain mean field, exact kernels, and pydensecrf where it is installed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from misc.crf.dense import CRFSettings, DenseCRF
from misc.crf.lattice import Lattice


def smooth(channels: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(channels, height, width) in [0, 1], smooth with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 5, 6, generator=generator)
    fine = torch.rand(channels, height, width, generator=generator)
    return (0.9 * F.interpolate(coarse, (height, width), mode="bilinear")[0] + 0.1 * fine).numpy()


def picture(height: int, width: int, seed: int = 7) -> np.ndarray:
    return np.ascontiguousarray((255 * smooth(3, height, width, seed)).astype(np.uint8).transpose(1, 2, 0))


def kernels(image: np.ndarray, s: CRFSettings) -> list[tuple[float, torch.Tensor]]:
    """Weight and (H*W, d) features of the two pairwise terms."""
    y, x = np.indices(image.shape[:2], dtype=np.float32).reshape(2, -1)
    colours = image.reshape(-1, 3).T.astype(np.float32) / np.float32(s.bilateral_srgb)
    gauss = np.stack([x, y], 1) / np.float32(s.gauss_sxy)
    bilateral = np.stack([x / np.float32(s.bilateral_sxy), y / np.float32(s.bilateral_sxy), *colours], 1)
    return [(s.gauss_weight, torch.from_numpy(gauss)), (s.bilateral_weight, torch.from_numpy(bilateral))]


def lattice_matrix(features: torch.Tensor) -> torch.Tensor:
    return Lattice(features).filter(torch.eye(len(features))).double()


def exact_matrix(features: torch.Tensor) -> torch.Tensor:
    return torch.exp(-0.5 * torch.cdist(features.double(), features.double()) ** 2)


def mean_field(image: np.ndarray, scores: np.ndarray, s: CRFSettings, matrix) -> np.ndarray:
    """psa.md section 3 word by word, with matrices over all pairs of pixels."""
    unary = -torch.from_numpy(scores).double().clamp(1e-5, 1).log().flatten(1)  # (n, H*W)
    q = (-unary).softmax(0)
    terms = []
    for weight, features in kernels(image, s):
        k = matrix(features)
        scale = k.sum(1).rsqrt()
        terms.append(weight * scale[:, None] * k * scale)
    for _ in range(s.iterations):
        q = (-unary + sum(q @ term.t() for term in terms)).softmax(0)
    return q.reshape(scores.shape).numpy()


def published(image: np.ndarray, unary: np.ndarray, s: CRFSettings) -> np.ndarray:
    """The same from pydensecrf; unary (n, H, W) energies."""
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed (built from source)")
    n, height, width = unary.shape
    crf = densecrf.DenseCRF2D(width, height, n)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(n, -1), np.float32))
    crf.addPairwiseGaussian(sxy=s.gauss_sxy, compat=s.gauss_weight)
    crf.addPairwiseBilateral(sxy=s.bilateral_sxy, srgb=s.bilateral_srgb, rgbim=image, compat=s.bilateral_weight)
    return np.array(crf.inference(s.iterations)).reshape(n, height, width)


@pytest.mark.parametrize("size", [(40, 52), (37, 51), (1, 30), (30, 1), (1, 1)])
@pytest.mark.parametrize(
    "settings",
    [CRFSettings(), CRFSettings(10, 1, 3, 67, 3, 4), CRFSettings(10, 4, 3, 83, 5, 3), CRFSettings(1, 3, 3, 32, 13, 10)],
)
def test_equals_pydensecrf(size: tuple[int, int], settings: CRFSettings) -> None:
    image, scores = picture(*size), smooth(4, *size)
    expected = published(image, -np.log(np.clip(scores, 1e-5, 1)), settings)
    np.testing.assert_allclose(DenseCRF(image, settings)(scores), expected, atol=1e-3, rtol=0)


def test_equals_pydensecrf_where_filler_points_matter() -> None:
    """The top left corner is nearly black, so the empty vertices at the origin of the feature space take part."""
    image, scores = picture(33, 43), smooth(3, 33, 43)
    image[:20, :20] //= 9
    settings = CRFSettings(bilateral_sxy=20)
    expected = published(image, -np.log(scores), settings)
    np.testing.assert_allclose(DenseCRF(image, settings)(scores), expected, atol=1e-3, rtol=0)


def test_labels_equal_pydensecrf() -> None:
    utils = pytest.importorskip("pydensecrf.utils", reason="pydensecrf2 is not installed (built from source)")
    settings = CRFSettings(bilateral_sxy=50, bilateral_srgb=5)
    labels = smooth(5, 38, 45).argmax(0)
    unary = utils.unary_from_labels(labels, 5, gt_prob=0.7, zero_unsure=False).reshape(5, 38, 45)
    ours = DenseCRF(picture(38, 45), settings).from_labels(labels, 5, 0.7)
    np.testing.assert_allclose(ours, published(picture(38, 45), unary, settings), atol=1e-3, rtol=0)


def test_equals_plain_mean_field_on_the_lattice() -> None:
    image, scores = picture(18, 22), 1.4 * smooth(3, 18, 22) - 0.2  # some scores need the clip
    settings = CRFSettings(4, 2, 2.5, 12, 20, 6)
    expected = mean_field(image, scores, settings, lattice_matrix)
    np.testing.assert_allclose(DenseCRF(image, settings)(scores), expected, atol=1e-4, rtol=0)


def test_near_exact_kernels_after_one_iteration() -> None:
    """psa.md section 3: an approximation, in which single values differ by about 0.1."""
    image, scores = picture(30, 40), smooth(3, 30, 40)
    settings = CRFSettings(iterations=1)
    ours, exact = DenseCRF(image, settings)(scores), mean_field(image, scores, settings, exact_matrix)
    assert np.abs(ours - exact).max() < 0.2
    assert np.abs(ours - exact).mean() < 0.02
    assert np.corrcoef(ours.ravel(), exact.ravel())[0, 1] > 0.99
    assert np.abs(ours - scores / scores.sum(0)).max() > 0.2  # and it does something


def test_labels_are_scores_with_the_given_confidence() -> None:
    crf = DenseCRF(picture(14, 17))
    labels = smooth(4, 14, 17).argmax(0)
    scores = np.where(np.arange(4)[:, None, None] == labels, 0.6, 0.4 / 3)
    np.testing.assert_allclose(crf.from_labels(labels, 4, 0.6), crf(scores), atol=1e-5)
    np.testing.assert_array_equal(crf.from_labels(labels.astype(np.uint8), 4), crf.from_labels(labels, 4, 0.7))


def test_one_crf_for_many_stacks_gives_what_fresh_ones_give() -> None:
    image, a, b = picture(15, 20), smooth(3, 15, 20), smooth(5, 15, 20, seed=3)
    kept = a.copy()
    crf = DenseCRF(image)
    first = crf(a)
    crf(b)
    crf.from_labels(a.argmax(0), 3)
    np.testing.assert_array_equal(crf(a), first)
    np.testing.assert_array_equal(DenseCRF(image)(a), first)
    np.testing.assert_array_equal(a, kept)


def test_any_memory_layout() -> None:
    image, scores = picture(15, 20), smooth(3, 15, 20)
    expected = DenseCRF(image)(scores)
    turned_image = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    turned_scores = np.asfortranarray(scores.astype(np.float64))
    np.testing.assert_allclose(DenseCRF(turned_image)(turned_scores), expected, atol=1e-6)
    for stack in (scores, scores[:1]):
        channels_last = np.moveaxis(np.ascontiguousarray(np.moveaxis(stack, 0, -1)), -1, 0)
        kept = channels_last.copy()
        DenseCRF(image)(channels_last)
        np.testing.assert_array_equal(channels_last, kept)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (16, 20)])
def test_degenerate_images(size: tuple[int, int]) -> None:
    """Constant colours of all kinds, tiny images: finite, sums of one, and equal scores stay equal."""
    for colour in (0, 128, 255):
        crf = DenseCRF(np.full((*size, 3), colour, np.uint8))
        q = crf(smooth(3, *size))
        assert q.shape == (3, *size) and q.dtype == np.float32
        np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)
        np.testing.assert_allclose(crf(np.full((2, *size), 0.3)), 0.5, atol=1e-5)


def test_one_label() -> None:
    crf = DenseCRF(picture(6, 8))
    np.testing.assert_array_equal(crf(smooth(1, 6, 8)), np.ones((1, 6, 8)))
    np.testing.assert_array_equal(crf.from_labels(np.zeros((6, 8), int), 1), np.ones((1, 6, 8)))


def test_weights_and_iterations_of_zero_leave_out() -> None:
    image, scores = picture(12, 15), smooth(3, 12, 15)
    unary = np.clip(scores, 1e-5, 1)
    normalised = unary / unary.sum(0)
    np.testing.assert_allclose(DenseCRF(image, CRFSettings(iterations=0))(scores), normalised, atol=1e-6)
    no_kernel = CRFSettings(gauss_weight=0, bilateral_weight=0)
    np.testing.assert_allclose(DenseCRF(image, no_kernel)(scores), normalised, atol=1e-6)
    gauss_only = replace(CRFSettings(), bilateral_weight=0)
    inverted = DenseCRF(255 - image[:, ::-1], gauss_only)(scores)  # colours play no part
    np.testing.assert_array_equal(DenseCRF(image, gauss_only)(scores), inverted)


@pytest.mark.parametrize("weight", [40.0, 1e4])
def test_weights_whose_exponentials_overflow(weight: float) -> None:
    image, scores = picture(18, 22), smooth(3, 18, 22)
    settings = CRFSettings(2, weight, 2.5, 12, 20, weight)
    expected = mean_field(image, scores, settings, lattice_matrix)
    np.testing.assert_allclose(DenseCRF(image, settings)(scores), expected, atol=1e-3, rtol=0)


def test_a_single_label_without_confidence() -> None:
    """Its exponential vanishes in float32."""
    labels = np.zeros((6, 8), int)
    np.testing.assert_array_equal(DenseCRF(picture(6, 8)).from_labels(labels, 1, 1e-60), np.ones((1, 6, 8)))


def test_autocast_changes_nothing() -> None:
    image, scores = picture(15, 20), smooth(3, 15, 20)
    expected = DenseCRF(image)(scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(DenseCRF(image)(scores), expected)


def test_refuses_impossible_settings() -> None:
    for field in ("gauss_sxy", "bilateral_sxy", "bilateral_srgb"):
        with pytest.raises(ValueError, match=f"{field} = 0 is not possible: it must be above 0"):
            CRFSettings(**{field: 0})
    for field in ("iterations", "gauss_weight", "bilateral_weight", "gauss_sxy"):
        for value in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=field):
                CRFSettings(**{field: value})


def test_refuses_images_it_can_t_use() -> None:
    for image in (
        np.zeros((4, 5), np.uint8),
        np.zeros((4, 5, 1), np.uint8),
        np.zeros((4, 5, 3), np.float32),
        np.zeros((0, 5, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
            DenseCRF(image)


def test_refuses_scores_and_labels_that_don_t_fit() -> None:
    crf = DenseCRF(picture(4, 5))
    for scores in (np.zeros((2, 5, 4)), np.zeros((4, 5)), np.zeros((0, 4, 5))):
        with pytest.raises(ValueError, match=r"scores .*\(4, 5\)"):
            crf(scores)
    with pytest.raises(ValueError, match="NaN"):
        crf(np.full((2, 4, 5), np.nan))
    with pytest.raises(ValueError, match=r"labels \(5, 4\) .*\(4, 5\)"):
        crf.from_labels(np.zeros((5, 4), int), 2)
    for label in (-1, 2, 255):
        with pytest.raises(ValueError, match=r"labels .* 0\.\.1"):
            crf.from_labels(np.full((4, 5), label), 2)
    for confidence in (0, 1):
        with pytest.raises(ValueError, match="confidence"):
            crf.from_labels(np.zeros((4, 5), int), 2, confidence)


@pytest.mark.parametrize("iterations", [0, 2])
def test_stacks_together_are_stacks_one_by_one(iterations: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (14, 17, 3), np.uint8)
    crf = DenseCRF(image, CRFSettings(iterations=iterations))
    scores, labels = rng.random((3, 4, 14, 17), np.float32), rng.integers(0, 4, (3, 14, 17))
    np.testing.assert_allclose(crf(scores), np.stack([crf(one) for one in scores]), atol=1e-6)
    np.testing.assert_allclose(crf.from_labels(labels, 4), [crf.from_labels(one, 4) for one in labels], atol=1e-6)
