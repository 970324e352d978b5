"""What scripts.bench compares: inputs from fixed seeds, our fast forms and the published ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from misc.crf.dense import CRFSettings, DenseCRF
from misc.propagate.par import PAMR, PAR, Kernel, PixelAdaptive
from misc.propagate.walk import (
    by_path_length,
    half_circle,
    pair_cells,
    path,
    path_affinity,
    transition,
    walk,
)
from misc.score.metrics import Confusion, ThresholdCurve, mask_at
from net.backbone.depthwise import DepthwiseConv2d
from net.refine.psa import pair_affinity
from net.seed.aream_conformer import AreamConformer
from net.seed.aream_mctformer import AreamMCTformer
from net.seed.seam import correlate
from net.shared.aream import Aream, patch_pair_labels, patch_pair_losses
from net.shared.edge import propagate_scores
from tests import plain  # the plain forms live with the tests


@dataclass(frozen=True)
class BenchCase:
    """One comparison: title, inputs, both forms, and the largest difference allowed."""

    what: str
    prepare: Callable[[], tuple[Any, ...]]
    """Inputs of both forms, from a fixed seed."""
    ours: Callable[..., Any]
    """Returns an array or a tensor, as ``published`` does."""
    published: Callable[..., Any] | None = None
    """None where the published form takes minutes or more memory than a common machine has."""
    bound: float = 1e-4
    """Largest absolute difference allowed between the results."""
    repeats: int = 3
    """Timed runs of each form after one that gets new memory, as far as time allows."""


# ------------------------------------------------------------------------------------------------ random walk


@dataclass(frozen=True)
class WalkInputs:
    """PSA's pairs and scores on the grid of a 375 x 500 image at a stride, with its background and three classes."""

    stride: int
    radius: int

    def __call__(self) -> tuple[Tensor, ...]:
        height, width = -(-375 // self.stride), -(-500 // self.stride)
        source, target = pair_cells(half_circle(5), height, width, radius=self.radius)
        seeded = torch.Generator().manual_seed(0)
        affinity = torch.rand(len(source), generator=seeded)
        return source, target, affinity, torch.rand(4, height * width, generator=seeded)


@dataclass(frozen=True)
class SparseWalk:
    """The walk of misc/propagate/walk.py."""

    beta: float
    logt: int

    def __call__(self, source: Tensor, target: Tensor, affinity: Tensor, scores: Tensor) -> Tensor:
        step = transition(source, target, affinity, scores.shape[1], self.beta)
        return walk(step, scores, 2**self.logt)


@dataclass(frozen=True)
class DenseWalk:
    """The published form: N x N, squared logt times."""

    beta: float
    logt: int

    def __call__(self, source: Tensor, target: Tensor, affinity: Tensor, scores: Tensor) -> Tensor:
        dense = plain.dense_affinity(source, target, affinity, scores.shape[1])
        return scores @ plain.dense_transition(dense, self.beta, self.logt)


@dataclass(frozen=True)
class BoundaryInputs:
    """A boundary map and the maps of four classes on the grid of stride 4 of an image (H, W)."""

    height: int
    width: int

    def __call__(self) -> tuple[Tensor, ...]:
        size = -(-self.height // 4), -(-self.width // 4)
        seeded = torch.Generator().manual_seed(0)
        return torch.rand(4, *size, generator=seeded), torch.rand(size, generator=seeded)


def propagate_ours(scores: Tensor, boundary: Tensor) -> Tensor:
    """net/shared/edge.py: affinities across the boundaries, then the walk."""
    return propagate_scores(scores, boundary, radius=5, beta=10, steps=256)


def path_inputs() -> tuple[Any, ...]:
    """A boundary map of one 512 x 512 crop, and the cells of the paths of radius 10 by their length."""
    radius, side = 10, 128
    directions = by_path_length(half_circle(radius))
    source = pair_cells(directions[:1], side, side, radius=radius)[0]
    paths = []
    for length in sorted({len(path(d)) for d in directions}):
        cells = torch.tensor([path(d) for d in directions if len(path(d)) == length])  # (D_n, n, 2)
        paths.append((cells @ torch.tensor([side, 1]))[..., None] + source)  # (D_n, n, P)
    return torch.rand(1, side, side, generator=torch.Generator().manual_seed(0)), directions, paths


def paths_ours(boundary: Tensor, directions: list[tuple[int, int]], paths: list[Tensor]) -> Tensor:
    """Affinities and the gradient of their sum, one cell of one direction at a time."""
    boundary = boundary.detach().requires_grad_()
    path_affinity(boundary, directions, 10).square().sum().backward()
    return boundary.grad


def paths_published(boundary: Tensor, directions: list[tuple[int, int]], paths: list[Tensor]) -> Tensor:
    """The same with every cell of every path gathered."""
    boundary = boundary.detach().requires_grad_()
    plain.gathered_path_affinity(boundary, paths).square().sum().backward()
    return boundary.grad


# ------------------------------------------------------------------------------------------------ PSA's pair features


def pair_inputs() -> tuple[Tensor, ...]:
    """Features of one 448 x 448 crop and the pairs of its grid."""
    source, target = pair_cells(half_circle(5), 56, 56, radius=5)
    features = torch.randn(1, 448, 56, 56, generator=torch.Generator().manual_seed(0))
    return features, source.view(34, -1), target.view(34, -1)


def pairs_ours(features: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Affinities and the gradient of their sum, one displacement at a time."""
    features = features.detach().requires_grad_()
    pair_affinity(features, 5).sum().backward()
    return features.grad


def pairs_published(features: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The same with the (B, C, D, P) differences kept for the backward pass."""
    features = features.detach().requires_grad_()
    plain.pair_affinity(features, source, target).sum().backward()
    return features.grad


# ------------------------------------------------------------------------------------------------ AReAM's attention


@dataclass(frozen=True)
class AreamInputs:
    """The published network with random weights, and a batch of its crops, every image of two classes."""

    method: type[Aream]
    images: int

    def __call__(self) -> tuple[Any, ...]:
        torch.manual_seed(0)
        recipe = self.method.recipes["published"].cam
        side = recipe.augment.crop
        tags = torch.zeros(self.images, 20).index_fill_(1, torch.tensor([3, 7]), 1.0)
        box = torch.tensor([[0, side, 0, side]]).expand(self.images, -1)
        # without drop path: both forms must compute the same
        network = recipe.network.build(20, {}).eval()
        return network, {"image": torch.randn(self.images, 3, side, side), "tags": tags, "box": box}


def _gradient(network: Any, loss: Tensor) -> Tensor:
    """The loss and the norm of its gradient."""
    network.zero_grad()
    loss.backward()
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    return torch.stack([loss.detach(), torch.stack(norms).norm()])


def aream_ours(network: Any, batch: dict[str, Tensor]) -> Tensor:
    """A step's loss of the pairs and its gradient, the attention of one layer and head at a time."""
    return _gradient(network, network(batch, 1.0)["pair"])


def aream_published(network: Any, batch: dict[str, Tensor]) -> Tensor:
    """The same with the matrices of all layers and heads kept."""
    options, c = network.options, network.tokens
    network.training_cam = lambda images: plain.aream_training_cam(network, images, options.shallow_weights())
    label = network.make_labels(batch)
    seen: list[Tensor] = []
    _, maps = network.forward_maps(batch["image"], lambda _, attention: seen.append(attention.products()))
    deep = torch.stack(seen).mean(2)[options.split :, :, c:, c:]  # (L - split, B, N, N)
    losses = patch_pair_losses(deep.unbind(), patch_pair_labels(label, maps.shape[-2:]))
    return _gradient(network, options.pair_weight * (losses * losses.new_tensor(options.deep_weights())).mean())


# ------------------------------------------------------------------------------------------------ threshold curve


def curve_inputs() -> tuple[Any, ...]:
    """Truth and class maps of 20 images of 375 x 500 with two classes each."""
    rng = np.random.default_rng(0)
    truths = [np.repeat(np.repeat(rng.integers(0, 21, (15, 20)), 25, 0), 25, 1).astype(np.uint8) for _ in range(20)]
    maps = [cv2.GaussianBlur(rng.random((375, 500, 2), np.float32), (0, 0), 9).transpose(2, 0, 1) for _ in range(20)]
    maps = [(m - m.min()) / (m.max() - m.min()) for m in maps]
    return truths, [(np.array([3, 11]), m) for m in maps]


@dataclass(frozen=True)
class OnePassCurve:
    """misc/score/metrics.py: confusion matrices at all thresholds from one histogram."""

    thresholds: tuple[float, ...]

    def __call__(self, truths: list[np.ndarray], cams: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        curve = ThresholdCurve(21, self.thresholds)
        for truth, (keys, maps) in zip(truths, cams, strict=True):
            curve.add(truth, keys, maps)
        return curve.mious()


@dataclass(frozen=True)
class PassPerThreshold:
    """The published form: all images again for every threshold (without its reading of the files)."""

    thresholds: tuple[float, ...]

    def __call__(self, truths: list[np.ndarray], cams: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        mious = []
        for threshold in self.thresholds:
            confusion = Confusion(21)
            for truth, maps in zip(truths, cams, strict=True):
                confusion.add(truth, mask_at(maps, threshold))
            mious.append(confusion.miou())
        return np.array(mious)


# ------------------------------------------------------------------------------------------------ dense CRF


def crf_inputs() -> tuple[Any, ...]:
    """A smooth 375 x 500 picture and score stacks of four labels for two alphas."""
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (375, 500, 3)).astype(np.float32), (0, 0), 6)
    image = ((image - image.min()) / (image.max() - image.min()) * 255).astype(np.uint8)
    scores = cv2.GaussianBlur(rng.random((375, 500, 4), np.float32), (0, 0), 12).transpose(2, 0, 1)
    return image, [np.ascontiguousarray(scores), np.ascontiguousarray(scores[::-1])]


def crf_ours(image: np.ndarray, stacks: list[np.ndarray]) -> np.ndarray:
    """misc/crf/dense.py: the lattices are built once for both stacks."""
    return DenseCRF(image, CRFSettings())(np.stack(stacks))


def crf_pydensecrf(image: np.ndarray, stacks: list[np.ndarray]) -> np.ndarray:
    """pydensecrf, which builds a CRF for each stack (needs the package pydensecrf2)."""
    from pydensecrf import densecrf

    results = []
    for scores in stacks:
        n, height, width = scores.shape
        crf = densecrf.DenseCRF2D(width, height, n)
        unary = -np.log(np.clip(scores, 1e-5, 1)).reshape(n, -1)
        crf.setUnaryEnergy(np.ascontiguousarray(unary, dtype=np.float32))
        crf.addPairwiseGaussian(sxy=3, compat=3)
        crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
        results.append(np.array(crf.inference(10)).reshape(n, height, width))
    return np.stack(results)


# ------------------------------------------------------------------------------------------------ PAR and PAMR


def crops() -> tuple[Tensor, Tensor]:
    """Four smooth crops of 256 pixels in grey levels and maps of two classes each, as GETAM refines in an update."""
    seeded = torch.Generator().manual_seed(0)
    sources = torch.rand(4, 5, 40, 40, generator=seeded)
    planes = F.interpolate(sources, size=(256, 256), mode="bicubic", align_corners=False).clamp(0, 1)
    return planes[:, :3] * 255, planes[:, 3:]


@dataclass(frozen=True)
class Refined:
    """misc/propagate/par.py: neighbours are views, one at a time."""

    kernel: Kernel

    def __call__(self, images: Tensor, maps: Tensor) -> Tensor:
        return PixelAdaptive(images, self.kernel)(maps)


@dataclass(frozen=True)
class StackedRefined:
    """The published form: a stack of all neighbours."""

    kernel: Kernel

    def __call__(self, images: Tensor, maps: Tensor) -> Tensor:
        return plain.pixel_adaptive(images, maps, self.kernel, 10)


# ------------------------------------------------------------------------------------------------ pixel correlation


@dataclass(frozen=True)
class CorrelationInputs:
    """Maps of 21 classes and 192 features of each cell, of images on a grid of ``side`` x ``side`` cells."""

    images: int
    side: int

    def __call__(self) -> tuple[Tensor, Tensor]:
        seeded = torch.Generator().manual_seed(0)
        values = torch.rand(self.images, 21, self.side, self.side, generator=seeded)
        return values, torch.randn(self.images, 192, self.side, self.side, generator=seeded)


@dataclass(frozen=True)
class CorrelationGradient:
    """The gradient of the squares of the spread maps, for the features."""

    spread: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, values: Tensor, features: Tensor) -> Tensor:
        features = features.detach().requires_grad_()
        self.spread(values, features).square().sum().backward()
        return features.grad


# ------------------------------------------------------------------------------------------------ depthwise layers


@dataclass(frozen=True)
class DepthwiseInputs:
    """Maps of so many channels of 4 crops of 352 pixels at stride 16, channels last, and a filter for each."""

    channels: int
    dilation: int

    def __call__(self) -> tuple[Tensor, Tensor, int]:
        seeded = torch.Generator().manual_seed(0)
        maps = torch.randn(4, self.channels, 22, 22, generator=seeded).to(memory_format=torch.channels_last)
        return maps, torch.randn(self.channels, 1, 5, 5, generator=seeded), self.dilation


@dataclass(frozen=True)
class DepthwiseGradients:
    """A layer's result and both gradients of the sum of its squares, as multiples of their largest values."""

    layer: type[nn.Conv2d]

    def __call__(self, maps: Tensor, filters: Tensor, dilation: int) -> Tensor:
        count = len(filters)
        layer = self.layer(count, count, 5, padding=2 * dilation, dilation=dilation, groups=count, bias=False)
        layer.weight.data = filters
        maps = maps.detach().requires_grad_()
        result = layer(maps)
        result.square().sum().backward()
        found = (x.detach().flatten() for x in (result, maps.grad, layer.weight.grad))
        return torch.cat([x / x.abs().max() for x in found])


THRESHOLDS = tuple(i / 100 for i in range(60))

CASES: dict[str, BenchCase] = {
    "walk_psa": BenchCase(
        "random walk, 375 x 500 at stride 8, radius 5, 2^8 steps, 4 maps",
        WalkInputs(stride=8, radius=5), SparseWalk(beta=8, logt=8), DenseWalk(beta=8, logt=8),
    ),
    "walk_irn": BenchCase(
        "IRNet's affinities and walk, 375 x 500 at stride 4, radius 5, 2^8 steps, 4 maps",
        BoundaryInputs(375, 500), propagate_ours,
    ),
    "walk_irn_large": BenchCase(
        "the same of an image of 960 x 1280", BoundaryInputs(960, 1280), propagate_ours,
    ),
    "paths_irn": BenchCase(
        "affinities across boundaries and their gradient, one crop of 512, radius 10",
        path_inputs, paths_ours, paths_published, bound=0.1,  # of gradients of up to 400
    ),
    "pairs_psa": BenchCase(
        "pair affinities and their gradient, one crop of 448, 448 channels, radius 5",
        pair_inputs, pairs_ours, pairs_published,
    ),
    "aream_mctformer": BenchCase(
        "AReAM on MCTformer, one training step of 8 crops of 224 (published: 64)",
        AreamInputs(AreamMCTformer, 8), aream_ours, aream_published, bound=1e-6,
    ),
    "aream_conformer": BenchCase(
        "AReAM on Conformer, one training step of 1 crop of 384, three scales (published: 8)",
        AreamInputs(AreamConformer, 1), aream_ours, aream_published, bound=1e-6,
    ),
    "curve_60": BenchCase(
        "mIoU at 60 background scores, 20 images of 375 x 500 in memory, 2 classes each",
        curve_inputs, OnePassCurve(THRESHOLDS), PassPerThreshold(THRESHOLDS), bound=1e-12,
    ),
    "curve_1": BenchCase(
        "the same at one background score",
        curve_inputs, OnePassCurve((0.3,)), PassPerThreshold((0.3,)), bound=1e-12,
    ),
    "crf": BenchCase(
        "dense CRF, 375 x 500, 4 labels, 10 iterations, two alphas",
        crf_inputs, crf_ours, crf_pydensecrf if find_spec("pydensecrf") else None, bound=5e-3,
    ),
    "pamr": BenchCase(
        "PAMR of GETAM, 4 crops of 256 x 256, maps of 2 classes", crops, Refined(PAMR), StackedRefined(PAMR)
    ),
    "par": BenchCase(
        "PAR of AReAM, 4 crops of 256 x 256, maps of 2 classes", crops, Refined(PAR), StackedRefined(PAR)
    ),
    "pcm": BenchCase(
        "pixel correlation of SEAM, 2 images of 60 x 60 cells",
        CorrelationInputs(2, 60), correlate, plain.correlate,
    ),
    "pcm_training": BenchCase(
        "the same and its gradient, 4 images of 56 x 56 cells",
        CorrelationInputs(4, 56), CorrelationGradient(correlate), CorrelationGradient(plain.correlate),
    ),
    "pcm_training_small": BenchCase(
        "the same, 16 images of 14 x 14 cells",
        CorrelationInputs(16, 14), CorrelationGradient(correlate), CorrelationGradient(plain.correlate), repeats=9,
    ),
    "depthwise": BenchCase(
        "depthwise convolution of 5 x 5 and its gradients, 4 maps of 22 x 22 cells, 672 channels",
        DepthwiseInputs(672, 1), DepthwiseGradients(DepthwiseConv2d), DepthwiseGradients(nn.Conv2d), bound=1e-5,
    ),
    "depthwise_dilated": BenchCase(
        "the same with dilation 2, 1152 channels",
        DepthwiseInputs(1152, 2), DepthwiseGradients(DepthwiseConv2d), DepthwiseGradients(nn.Conv2d), bound=1e-5,
    ),
}  # fmt: skip
