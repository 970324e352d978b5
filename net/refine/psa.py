"""PSA: pixel-level semantic affinity, AffinityNet and its random walk (Ahn and Kwak, CVPR 2018). psa.md.

CAMs with a strong and a weak background, sharpened by a CRF, give reliable labels. On pairs of near cells a network
learns whether both show the same class; its affinities spread the CAMs in a random walk. SEAM, MCTformer, AReAM and
TransCAM use the same with other settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, Names, Positive, Probability, Range, When
from misc.config import Augment, Fit
from misc.crf.dense import CRFSettings, DenseCRF
from misc.image.cam import Cam
from misc.image.labels import IGNORE
from misc.image.picture import Picture, truncate_image, truncate_values_to_image
from misc.propagate.walk import (
    affinity_losses,
    fitting_radius,
    half_circle,
    pair_cells,
    pair_labels,
    pair_views,
    transition,
    walk,
)
from net.backbone.resnet38 import SAMPLE_RESNET38, ResNet38, ResNet38Options
from net.backbone.timm_cnn import ON_TIMM, PHOTOS, PREFIX, TimmCNN, TimmOptions, load_timm
from net.backbone.vgg16 import VGG16, VGG16Options
from net.contract import AffinityNetwork, Batch, Network, Options, RefineRecipe
from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors
from net.groups import Group, conv_groups
from net.registry import refiner
from net.shared.background import BackgroundRule, stack_background
from net.start_weights import CAM, REQUIRED

STRIDE = 8
"""Stride of the features of both backbones, in pixels."""
_EPS = 1e-5
_LEVELS = (3, 4, 5)


@refiner("psa")
class PSA(AffinityNetwork):
    """Base of both affinity networks. A subclass also inherits from a backbone, so that state dicts have the official
    names."""

    tapped: ClassVar[tuple[str, str, str]]
    """Backbone taps under f8_3, f8_4 and f8_5."""
    new_layers: ClassVar[tuple[str, ...]]
    """Layers on top of the backbone; a group norm gn8_N, if listed, follows f8_N."""

    def _add_layers(self, num_classes: int, options: PSAOptions) -> None:
        """Create the layers on top of the backbone, in the official order."""
        self.num_classes, self.radius = num_classes, options.radius
        widths = options.widths
        for level, tap, width in zip(_LEVELS, self.tapped, widths, strict=True):
            layer = nn.Conv2d(self.channels[tap], width, 1, bias=False)
            nn.init.kaiming_normal_(layer.weight)
            self.add_module(f"f8_{level}", layer)
        for level, width in zip(_LEVELS, widths, strict=True):
            if f"gn8_{level}" in self.new_layers:
                self.add_module(f"gn8_{level}", nn.GroupNorm(width // 8, width))
        self.f9 = nn.Conv2d(sum(widths), sum(widths), 1, bias=False)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), target (B, S/8, S/8) -> the terms of ``affinity_losses``."""
        features = self.forward_features(batch["image"])
        radius = fitting_radius(self.radius, *features.shape[-2:])
        counts = {name: batch[f"counts/{name}"] for name in ("bg", "fg", "neg")}
        return affinity_losses(pair_affinity(features, radius), self._pair_labels(batch), counts)

    @torch.no_grad()
    def refine(self, picture: Picture, cam: Cam, options: PSAWalk) -> np.ndarray:
        """Random walk, and the CRF if there is one, cropped to the image; see ``spread_cam``. An image without a tag is
        all background. Raises ValueError where image and CAM differ in size."""
        height, width = picture.size
        if len(cam.keys) == 0:
            return np.ones((1, height, width), np.float32)
        if cam.maps.shape[1:] != (height, width):
            raise ValueError(f"The CAM is {cam.maps.shape[1:]}, the image {(height, width)}: make the CAM again.")
        return np.ascontiguousarray(self.spread_cam(picture, cam, options)[:, :height, :width])

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised, any size -> (B, sum of the widths, ceil(H/8), ceil(W/8)), psa.md section 5.1."""
        taps, parts = self.forward_stages(images), []
        for level, tap in zip(_LEVELS, self.tapped, strict=True):
            part = self.get_submodule(f"f8_{level}")(taps[tap])
            if f"gn8_{level}" in self.new_layers:
                part = self.get_submodule(f"gn8_{level}")(part)
            parts.append(F.elu(part))
        return F.elu(self.f9(torch.cat(parts, dim=1)))

    @classmethod
    def make_label(
        cls, image: np.ndarray, cam: Cam, options: PSALabel, device: torch.device | str = "cpu"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Low/high-alpha label (psa.md section 4): CRF posteriors of the present classes under two backgrounds.

        The planes are the low and then the high posteriors, (2 (K + 1), H, W) float16; with ``crf_unary`` labels the
        two label maps, (2, H, W) uint8. Both number the classes by their position in ``cam.keys``, from 1, since only
        equality matters. The picture is the merged label at full resolution. An image without a tag is all background.
        """
        if len(cam.keys) == 0:
            picture = np.zeros(image.shape[:2], np.uint8)
            hard = options.crf_unary == "labels"
            return picture, np.stack([picture, picture] if hard else [np.ones_like(picture, np.float16)] * 2)
        if options.crf_truncates_image:
            image = truncate_image(image, cls.normalisation, single=True)
        alphas, thresholds = (options.alpha_low, options.alpha_high), (options.threshold_low, options.threshold_high)
        both = zip(alphas, thresholds, strict=True)
        scores = np.stack([stack_background(cam.maps, options.background, *rule) for rule in both])  # (2, K + 1, H, W)
        crf = DenseCRF(image, options.crf, device)
        if options.crf_unary == "scores":
            posteriors = crf(scores)
        else:
            posteriors = crf.from_labels(scores.argmax(axis=1), max(options.crf_labels, scores.shape[1]))
        low, high = posteriors.argmax(axis=1)  # (H, W) each
        if options.crf_unary == "scores":
            planes = np.concatenate(posteriors).astype(np.float16)
        else:
            planes = np.stack([low, high]).astype(np.uint8)
            high = np.maximum(low, high)
        values = np.full(IGNORE + 1, IGNORE, np.uint8)
        values[: len(cam.keys) + 1] = [0, *(cam.keys + 1)]
        return values[merge_alpha_labels(low, high)], planes

    @classmethod
    def make_target(cls, planes: np.ndarray) -> np.ndarray:
        """Confident label of every cell (psa.md section 5.3): (P, S, S) -> (S/8, S/8) uint8, 255 unknown.

        Made from the averaged posteriors, not by averaging labels; where there are none (the canvas around the image)
        the label is unknown. Label maps (TransCAM) are sampled, and background only wins where both maps say so.

        Raises ValueError if a side is not a multiple of 8.
        """
        height, width = planes.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise ValueError(f"A crop of {height} x {width} has no whole cells: set augment.crop to a multiple of 8.")
        if planes.dtype == np.uint8:
            low, high = planes[:, ::STRIDE, ::STRIDE]
            return merge_alpha_labels(low, np.maximum(low, high))
        blocks = planes.astype(np.float32).reshape(len(planes), height // STRIDE, STRIDE, width // STRIDE, STRIDE)
        cells = blocks.mean(axis=(2, 4))  # (P, S/8, S/8)
        low, high = cells.reshape(2, -1, *cells.shape[1:]).argmax(axis=1)
        return np.where(cells.max(axis=0) < _EPS, IGNORE, merge_alpha_labels(low, high)).astype(np.uint8)

    def _pair_labels(self, batch: Batch) -> dict[str, Tensor]:
        target = batch["target"]
        return pair_labels(target, fitting_radius(self.radius, *target.shape[-2:]))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Number of background, foreground and negative pairs."""
        return {name: pairs.sum() for name, pairs in self._pair_labels(batch).items()}

    @torch.no_grad()
    def make_transition(self, image: Tensor, options: PSAWalk) -> Tensor:
        """One step of the walk over an image: (3, H, W) normalised -> (N, N) of ``misc.propagate.walk.transition``,
        N = ceil(H/8) ceil(W/8) cells (psa.md section 6, steps 1 and 2)."""
        features = self.forward_features(pad_to_stride(image)[None])
        height, width = features.shape[-2:]
        radius = fitting_radius(options.radius, height, width, early=options.shrink_early)
        source, target = pair_cells(half_circle(radius), height, width, radius=radius)
        return transition(source, target, pair_affinity(features, radius).flatten(), height * width, options.beta)

    @torch.no_grad()
    def spread_cam(self, picture: Picture, cam: Cam, options: PSAWalk) -> np.ndarray:
        """``refine`` before cropping: (K + 1, 8 ceil(H/8), 8 ceil(W/8)) float32 (psa.md section 6, transcam.md section
        6). Absent classes are left out of the walk, where they would stay zero."""
        if options.threshold is None:
            raise ValueError("walk.threshold is None: fill in the background score that make_cam found.")
        scores = stack_background(cam.maps, options.background, options.alpha, options.threshold)
        step = self.make_transition(picture.values, options)
        walked = walk_maps(torch.from_numpy(scores).to(picture.values.device), step, 2**options.logt).cpu().numpy()
        return self._crf(picture.values, walked, options) if options.crf.iterations else walked

    def _crf(self, values: Tensor, scores: np.ndarray, options: PSAWalk) -> np.ndarray:
        """The CRF also runs on the padding, and its image is recovered with truncation (psa.md section 6). Absent
        classes are included: (K + 1, H, W) scores of the padded size -> posteriors of the same labels."""
        image = truncate_values_to_image(pad_to_stride(values), self.normalisation)
        crf = DenseCRF(image, options.crf, values.device)
        labels = len(scores)
        if options.crf_unary == "labels":
            return crf.from_labels(scores.argmax(axis=0), self.num_classes + 1)[:labels]
        absent = np.zeros((self.num_classes + 1 - labels, *scores.shape[1:]), np.float32)
        return crf(np.concatenate([scores, absent]))[:labels]

    def param_groups(self) -> list[Group]:
        """Backbone at the base rate, new layers at 10 times it; biases at twice that, without decay (seam.md section
        4.2). Group normalisation counts as an old layer, as published (psa.md section 5.1). Batch normalisation, if
        trained, isn't decayed."""
        return conv_groups(self, [name for name in self.new_layers if not name.startswith("gn8_")])

    def load_weights(self, weights: str) -> str:
        """A released affinity network (strictly), or a backbone: ImageNet's ``.params`` or caffemodel, PSA's
        classifier, any network here with the same backbone; the new layers then have random weights."""
        whole = "f8_5.weight" in read_tensors(weights)
        return str(load_tensors(self, weights, allow_missing=() if whole else self.new_layers))


class PSAResNet38(PSA, ResNet38):
    """AffinityNet on ResNet38 (psa.md section 5.1)."""

    normalisation = ResNet38.normalisation
    tapped = ("conv4", "conv5", "conv6")
    new_layers = ("f8_3", "f8_4", "f8_5", "f9")

    def __init__(self, num_classes: int, options: PSAOptions) -> None:
        ResNet38.__init__(self, options.resnet38)
        self._add_layers(num_classes, options)


class PSAVGG16(PSA, VGG16):
    """AffinityNet on VGG16, with group normalisation, 8 channels a group, before the first ELUs (psa.md 5.1)."""

    normalisation = VGG16.normalisation
    tapped = ("conv4_3", "conv5_3", "fc7")
    new_layers = ("f8_3", "f8_4", "f8_5", "gn8_3", "gn8_4", "gn8_5", "f9")

    def __init__(self, num_classes: int, options: PSAOptions) -> None:
        VGG16.__init__(self, options.vgg16)
        self._add_layers(num_classes, options)


class PSATimm(PSA):
    """AffinityNet on a CNN of timm, with group normalisation before the first ELUs as on VGG16."""

    tapped = ("layer2", "layer3", "layer4")
    new_layers = PSAVGG16.new_layers

    def __init__(self, num_classes: int, options: PSAOptions) -> None:
        super().__init__()
        self.backbone = TimmCNN(options.backbone, options.timm)
        self.normalisation, self.channels = self.backbone.normalisation, self.backbone.channels
        self._add_layers(num_classes, options)

    def forward_stages(self, images: Tensor) -> dict[str, Tensor]:
        """The tapped stages on cells of 8 pixels: {stage: (B, channels, ceil(H/8), ceil(W/8))}."""
        return dict(zip(self.tapped, self.backbone.maps_at(images, self.tapped, STRIDE), strict=True))

    def pretrained_names(self) -> tuple[str, ...]:
        """The backbone, by timm's name."""
        return (self.backbone.name,)

    def load_weights(self, weights: str) -> str:
        """timm's weights of the backbone, or a network here with the same one."""
        return load_timm(self, weights, heads=self.new_layers, owner="backbone")


# ------------------------------------------------------------------------------------------------ labels


def merge_alpha_labels(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Merge two label maps (..., int): ``low``'s classes, background where ``high`` is 0, 255 elsewhere.

    Background wins where both apply (psa.md section 5.3). Returns uint8 of the same shape.
    """
    label = np.where(low == 0, IGNORE, low)
    return np.where(high == 0, 0, label).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ affinities


class _PairDistance(torch.autograd.Function):
    """Mean absolute difference of the features of all pairs: (B, C, h, w) -> (B, D, P).

    One displacement at a time, and the backward pass recomputes the differences: the plain form keeps
    (B, C, D, P) floats, 1.2 GB for a batch of 8 crops of 448 (psa.md section 8, trap 8), this one (B, C, P).
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, radius: int) -> Tensor:
        ctx.save_for_backward(features)
        ctx.radius = radius
        distances = []
        for displacement in half_circle(radius):
            source, target = pair_views(features, displacement, radius)
            distances.append((source - target).abs_().mean(dim=1).flatten(1))  # (B, P)
        return torch.stack(distances, dim=1) if distances else features.new_zeros((len(features), 0, 0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors
        total = torch.zeros_like(features)
        for index, displacement in enumerate(half_circle(ctx.radius)):
            source, target = pair_views(features, displacement, ctx.radius)
            to_source, to_target = pair_views(total, displacement, ctx.radius)
            scale = gradient[:, index].reshape(len(source), 1, *source.shape[2:]) / features.shape[1]
            change = (source - target).sign_().mul_(scale)  # (B, C, a, b)
            to_source.add_(change)
            to_target.sub_(change)
        return total, None


def pair_affinity(features: Tensor, radius: int) -> Tensor:
    """Affinities of PSA's pairs: exp(-mean over channels of |F_i - F_j|), in float32 (psa.md section 5.2).

    Args:
        features: (B, C, h, w).
        radius: of the circle, fitting the grid.

    Returns:
        (B, D, P) in (0, 1], in the order of ``misc.propagate.walk.pair_cells``.
    """
    return torch.exp(-_PairDistance.apply(features.float(), radius))


# ------------------------------------------------------------------------------------------------ walk


def pad_to_stride(x: Tensor) -> Tensor:
    """(..., H, W) with zeros at the bottom and right up to multiples of 8."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE))


def pool_to_cells(scores: Tensor) -> Tensor:
    """Scores of the cells: (n, H, W) -> (n, ceil(H/8), ceil(W/8)).

    The padding counts as zero in all channels, background included, so border cells have too low scores: published
        behaviour (psa.md section 8, trap 3).
    """
    return F.avg_pool2d(pad_to_stride(scores), STRIDE)


def walk_maps(scores: Tensor, transition: Tensor, steps: int) -> Tensor:
    """Random walk of score maps (psa.md section 6, steps 3 and 4).

    Args:
        scores: (n, H, W) float32.
        transition: of ``misc.propagate.walk.transition`` for the grid of ceil(H/8) x ceil(W/8) cells.
        steps: number of steps.

    Returns:
        (n, 8 ceil(H/8), 8 ceil(W/8)): the padded size.
    """
    cells = pool_to_cells(scores)  # (n, h, w)
    walked = walk(transition, cells.flatten(1), steps).view_as(cells)
    return F.interpolate(walked[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)[0]


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class PSAOptions(Options):
    """Options of AffinityNet; the defaults are the published ones."""
    # psa.md section 5.1

    backbone: Annotated[str, Names(("resnet38", "vgg16"), PREFIX)] = "resnet38"
    """Backbone of the affinity layers. timm/NAME: a CNN of timm, whose stages of strides 8 and 16 are on the cells."""
    resnet38: Annotated[ResNet38Options, When("backbone", "resnet38")] = field(
        default_factory=lambda: ResNet38Options(frozen="b2")
    )
    """Size and freezing of ResNet38, if it is the backbone."""
    vgg16: Annotated[VGG16Options, When("backbone", "vgg16")] = field(
        default_factory=lambda: VGG16Options(fc6_dilation=4)
    )
    """Size and freezing of VGG16, if it is the backbone."""
    timm: Annotated[TimmOptions, ON_TIMM] = field(default_factory=TimmOptions)
    """CNN of timm, if it is the backbone."""
    widths: Annotated[tuple[int, int, int], Range(least=8, multiple=8)] = (64, 128, 256)
    """Channels of f8_3, f8_4 and f8_5; f9 has their sum. Multiples of 8."""
    radius: Annotated[int, Range(least=2)] = 5
    """Pairs nearer than this are trained on. Cells of 8 pixels."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> PSA:
        """The affinity network; ``num_classes`` is only used by a CRF after the walk, ``earlier`` is not used."""
        return {"resnet38": PSAResNet38, "vgg16": PSAVGG16}.get(self.backbone, PSATimm)(num_classes, self)




@dataclass(frozen=True)
class PSALabel(Checked):
    """How affinity labels are made of the CAMs: background scores and CRF."""
    # psa.md section 4; TransCAM's: transcam.md sections 5 and 6

    background: Literal["power", "constant"] = "power"
    """Background score. power: (1 - largest CAM)^alpha. constant: a threshold."""
    alpha_low: Annotated[Positive, When("background", "power")] = 4.0
    """power: exponent of the strong background; pixels that stay foreground are reliable foreground."""
    alpha_high: Annotated[Positive, When("background", "power")] = 32.0
    """power: exponent of the weak background; pixels that stay background are reliable background."""
    threshold_low: Annotated[Probability, When("background", "constant")] = 0.6
    """constant: score of the strong background."""
    threshold_high: Annotated[Probability, When("background", "constant")] = 0.25
    """constant: score of the weak background."""
    crf: CRFSettings = field(default_factory=CRFSettings)
    """Dense CRF on the scores of background and present classes."""
    crf_unary: Literal["scores", "labels"] = "scores"
    """Input of the CRF. labels: the arg-max, with confidence 0.7; training then reads label maps, in which the canvas
    around an image counts as background (TransCAM)."""
    # mctformer.md section 4
    crf_truncates_image: bool = False
    """Give the CRF the image recovered from the normalised one by truncation, which lowers some pixels by a grey level
    (as in MCTformer)."""
    crf_labels: Annotated[int, Range(least=0), When("crf_unary", "labels")] = 0
    """crf_unary labels: number of labels over which the remaining confidence is divided, background included (TransCAM:
    all 21 of VOC). 0: those of the image."""


@dataclass(frozen=True)
class PSAWalk(Checked):
    """How affinities spread the CAMs by a random walk."""
    # psa.md section 6

    beta: Positive = 8.0
    """Exponent of the affinities."""
    logt: Annotated[int, Range(least=0, most=16)] = 8
    """The walk has 2^logt steps."""
    radius: Annotated[int, Range(least=2)] = 5
    """Pairs nearer than this are joined. Cells of 8 pixels."""
    shrink_early: bool = False
    """Also shrink the radius on grids 9 and 10 cells wide, as in SEAM and TransCAM; PSA only below 9."""
    background: BackgroundRule = "power"
    """Background score. power: (1 - largest CAM)^alpha. constant: the threshold. otsu: one for all images that splits
    the values of the run's CAMs into two groups as well as can be (Otsu), found without any mask."""
    alpha: Annotated[Positive, When("background", "power")] = 16.0
    """power: exponent of the background score."""
    threshold: Annotated[float | None, Range(least=0, most=1), When("background", "constant")] = 0.39
    """constant: the background score. None: the one that make_cam found best for the CAMs (AReAM)."""
    crf: CRFSettings = field(default_factory=lambda: CRFSettings(iterations=0))
    """Dense CRF after the walk; iterations 0 switches it off (SEAM: 1)."""
    crf_unary: Literal["scores", "labels"] = "scores"
    """Input of the CRF. labels: the arg-max, with confidence 0.7 (TransCAM)."""


@dataclass(frozen=True)
class PSARecipe(RefineRecipe):
    """Recipe of PSA."""

    network: PSAOptions = field(default_factory=PSAOptions)
    """Options of the network itself."""
    label: PSALabel = field(default_factory=PSALabel)
    """How affinity labels are made from CAMs."""
    walk: PSAWalk = field(default_factory=PSAWalk)
    """The random walk."""


# ------------------------------------------------------------------------------------- recipes

PSA.recipes = {
    # README row "random walk, ResNet38, alpha 4/16/32" (61.0 train, 60.2 val; psa.md section 1). ResNet38 needs lr
    # 0.01, the README's 0.1 is for VGG16 (section 5.5). The momentum is the published poly-SGD's, which passes its
    # weight decay there (seam.md section 7, trap 1).
    "published": PSARecipe(
        fit=Fit(epochs=8, batch_size=8, lr=0.01, momentum=5e-4, weight_decay=5e-4),
        augment=Augment(order=("jitter", "normalize", "crop", "flip"), crop=448),
        weights=REQUIRED,
    ),
    # from random weights, so nothing is frozen and the momentum is a real one
    "sample": PSARecipe(
        amp="fast",
        network=PSAOptions(
            resnet38=SAMPLE_RESNET38,
            widths=(16, 16, 32),
        ),
        fit=Fit(epochs=8, batch_size=8, lr=0.01, momentum=0.9),
        augment=Augment(order=("jitter", "normalize", "crop", "flip"), crop=96),
        label=PSALabel(alpha_low=16, alpha_high=64),
        walk=PSAWalk(alpha=26, beta=20, logt=3, crf=CRFSettings(iterations=5)),
    ),
    "photos": PSARecipe(
        amp="fast",
        network=PSAOptions(backbone=PHOTOS),
        fit=Fit(epochs=6, batch_size=16, optimiser="adamw", lr=2e-4, weight_decay=1e-4),
        augment=Augment(order=("long_side", "jitter", "normalize", "crop", "flip"), long_side=(320, 512), crop=352),
        weights=CAM,
        label=PSALabel(
            background="constant",
            threshold_low=0.55,
            threshold_high=0.30,
            crf=CRFSettings(iterations=5, bilateral_sxy=50, bilateral_srgb=5),
            crf_unary="labels",
        ),
        walk=PSAWalk(background="otsu", logt=6),
    ),
}
