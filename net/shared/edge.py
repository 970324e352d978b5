"""Edge affinity network on a ResNet: class boundaries, learnt from pairs of cells (irnet.md sections 7 to 10).

IRNet's, and with other settings SemFormer's and Puzzle-CAM's (semformer.md section 9, puzzlecam.md section 5). The
affinity of two cells is 1 - the largest boundary value on the line between them, so pairs with known labels train a
boundary map without any drawn boundary. A refiner subclasses ``EdgeNetwork`` and gives its recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, Names, Positive, Probability, Range, When
from misc.crf.dense import CRFSettings, DenseCRF
from misc.image.cam import Cam
from misc.image.labels import IGNORE
from misc.image.picture import Picture
from misc.propagate.walk import (
    Displacement,
    affinity_losses,
    by_path_length,
    fitting_radius,
    half_circle,
    pair_cells,
    pair_labels,
    path_affinity,
    transition,
    walk,
)
from net.backbone.resnet import STAGES, ResNetOptions, Stage
from net.backbone.stages import load_backbone, make_backbone, pretrained_name
from net.backbone.timm_cnn import ON_TIMM, PREFIX, TimmOptions
from net.contract import AffinityNetwork, Batch, Options
from net.groups import Group

CELL = 4
"""Stride of the boundary map, in pixels."""
_WIDTH, _GROUPS = 32, 4

StageMaps = Mapping[Stage, Tensor]


class EdgeNetwork(AffinityNetwork):
    """Backbone with a boundary head on its five stages: labels, losses and the walk.

    State-dict names are the official ones: ``resnet50`` (whatever the backbone), ``fc_edge1`` to ``fc_edge6``.
    """

    plane_fill: ClassVar[float] = float(IGNORE)
    heads: ClassVar[tuple[str, ...]] = ("fc_edge*",)
    """Name patterns of the layers outside the backbone."""

    def __init__(self, options: EdgeOptions) -> None:
        super().__init__()
        self.radius = options.radius
        self.resnet50 = make_backbone(options)
        self.normalisation = self.resnet50.normalisation
        channels, strides = self.resnet50.channels, self.resnet50.strides
        for number, stage in enumerate(STAGES, 1):
            head = make_projection(channels[stage], _WIDTH, _GROUPS, strides[stage], CELL, options.align_corners)
            self.add_module(f"fc_edge{number}", head)
        self.fc_edge6 = nn.Conv2d(_WIDTH * len(STAGES), 1, 1)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), target (B, S/4, S/4) -> the terms of
        ``misc.propagate.walk.affinity_losses``."""
        logits = self.edge_logits(self.resnet50.forward_stages(batch["image"]))
        return self.edge_losses(logits, self.label_pairs(batch["target"]), batch)

    @torch.no_grad()
    def refine(self, picture: Picture, cam: Cam, options: EdgeWalk) -> np.ndarray:
        """Random walk, and the CRF if there is one (irnet.md section 10.2). An image without a tag is all
        background. Raises ValueError if image and CAM differ in size."""
        size = check_sizes(picture, cam)
        if len(cam.keys) == 0:
            return np.ones((1, *size), np.float32)
        boundary = self.pair_boundary(self.forward_pair(picture.values, options.canvas), size)
        return self.walk_scores(picture, cam, boundary, options)

    # --- labels
    @classmethod
    def make_label(
        cls, image: np.ndarray, cam: Cam, options: EdgeLabel, device: torch.device | str = "cpu"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reliable classes and reliable background, 255 elsewhere (irnet.md section 7).

        Foreground wins where both apply. Training reads the picture itself: planes (1, H, W) uint8. An image without a
        tag is background.
        """
        picture = np.zeros(image.shape[:2], np.uint8)
        if len(cam.keys):
            certain, possible = two_threshold_label(image, cam, options, device)
            values = np.array([0, *(cam.keys + 1)], np.uint8)
            picture = np.where((certain == 0) & (possible != 0), np.uint8(IGNORE), values[certain])
        return picture, picture[None]

    @classmethod
    def make_target(cls, planes: np.ndarray) -> np.ndarray:
        """Label of every cell: (1, S, S) -> (S/4, S/4) uint8, the pixel right below its centre (PIL's nearest, irnet.md
        section 9.2). Raises ValueError if a side is not a multiple of 4."""
        height, width = planes.shape[-2:]
        if height % CELL or width % CELL:
            raise ValueError(f"A crop of {height} x {width} has no whole cells: set augment.crop to a multiple of 4.")
        return planes[0, CELL // 2 :: CELL, CELL // 2 :: CELL]

    # --- training
    def pair_geometry(self, size: tuple[int, int]) -> tuple[list[Displacement], int]:
        """Displacements of the pairs on a grid (h, w), and the radius that fits it (irnet.md section 9.1; published
        has one grid only)."""
        radius = fitting_radius(self.radius, *size)
        return by_path_length(half_circle(radius)), radius

    def label_pairs(self, target: Tensor) -> dict[str, Tensor]:
        """``misc.propagate.walk.pair_labels`` of targets (B, h, w)."""
        displacements, radius = self.pair_geometry(target.shape[-2:])
        return pair_labels(target, radius, displacements)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Number of background, foreground and negative pairs."""
        return {name: pairs.sum() for name, pairs in self.label_pairs(batch["target"]).items()}

    def edge_losses(self, logits: Tensor, labels: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The affinity terms of boundary logits (B, 1, h, w) (irnet.md section 9.3): {"bg", "fg", "neg"}."""
        boundary = logits[:, 0].float().sigmoid()  # (B, h, w)
        affinity = path_affinity(boundary, *self.pair_geometry(boundary.shape[-2:]))  # (B, D, P)
        return affinity_losses(affinity, labels, {name: batch[f"counts/{name}"] for name in labels})

    def edge_logits(self, taps: StageMaps) -> Tensor:
        """Boundary logits from the stages' maps: (B, 1, ceil(H/4), ceil(W/4))."""
        maps = [getattr(self, f"fc_edge{number}")(taps[stage]) for number, stage in enumerate(STAGES, 1)]
        return self.fc_edge6(torch.cat([crop_like(m, maps[1]) for m in maps], dim=1))

    def param_groups(self) -> list[Group]:
        """One group of all trained parameters, with weight decay (irnet.md section 9.4, semformer.md section 9.2)."""
        return [Group([p for p in self.parameters() if p.requires_grad])]

    # --- inference
    def forward_pair(self, image: Tensor, canvas: int) -> dict[Stage, Tensor]:
        """Stages of an image (3, H, W) and of its mirror image, (2, ...) each, on the canvas.

        They are padded at the bottom and right after mirroring. The published code crops images that are larger than
        the canvas (irnet.md section 12); here the canvas grows.
        """
        height, width = image.shape[-2:]
        pair = torch.stack([image, image.flip(-1)])
        return self.resnet50.forward_stages(F.pad(pair, (0, max(0, canvas - width), 0, max(0, canvas - height))))

    def pair_boundary(self, taps: StageMaps, size: tuple[int, int]) -> Tensor:
        """Boundary of an image of (H, W) from its ``forward_pair``: (ceil(H/4), ceil(W/4)) float32 in [0, 1], the
        sigmoid of the mean logit of both, cut before the second is mirrored back (irnet.md section 8)."""
        height, width = (-(-side // CELL) for side in size)
        logits = self.edge_logits(taps)[:, 0, :height, :width].float()  # (2, h, w)
        return ((logits[0] + logits[1].flip(-1)) / 2).sigmoid()

    def walk_scores(self, picture: Picture, cam: Cam, boundary: Tensor, options: EdgeWalk) -> np.ndarray:
        """``refine`` from a boundary map (h, w) on: (K + 1, H, W) float32."""
        maps = torch.from_numpy(cam.on_grid(tuple(boundary.shape))).to(boundary.device)  # (K, h, w)
        scores = propagate_scores(maps, boundary, options.radius, options.beta, 2**options.logt)
        scores = enlarge_cells(scores, picture.size)
        # the largest over all classes; the published code divides 0 by 0 if a CAM is empty
        scores = (scores / scores.max().clamp(min=torch.finfo(torch.float32).tiny)).cpu().numpy()
        return self.sharpen_scores(picture, scores, options)

    def sharpen_scores(self, picture: Picture, scores: np.ndarray, options: EdgeWalk) -> np.ndarray:
        """Walked scores (K, H, W) of an image with their background, and the CRF where there is one (irnet.md section
        10.2, semformer.md section 9.4): (K + 1, H, W) float32."""
        scores = np.concatenate([np.full_like(scores[:1], options.threshold), scores])
        if options.crf.iterations == 0:
            return scores
        return DenseCRF(picture.rgb, options.crf, picture.values.device).from_labels(scores.argmax(axis=0), len(scores))

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifier of the backbone."""
        return (pretrained_name(self.resnet50),)

    def load_weights(self, weights: str) -> str:
        """A released network of this kind, a network with the same backbone, or an ImageNet classifier ('pretrained':
        the option of the backbone); layers that it lacks have random weights. Buffers of the released files that are a
        function of the settings (path indices) are ignored."""
        return load_backbone(self, weights, heads=self.heads, owner="resnet50")


# ------------------------------------------------------------------------------------------------ pieces


def two_threshold_label(
    image: np.ndarray, cam: Cam, options: EdgeLabel, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The image's own labels, 0 background and k + 1 the k-th present class, sharpened at both background scores.

    (H, W, 3) uint8 and its CAMs (K >= 1) -> two (H, W) integers: those at ``threshold_fg`` and at ``threshold_bg``. A
    tie goes to the lower label (irnet.md section 7).
    """
    labels = np.stack([hard_label(cam.maps, threshold) for threshold in (options.threshold_fg, options.threshold_bg)])
    certain, possible = DenseCRF(image, options.crf, device).from_labels(labels, len(cam.keys) + 1).argmax(axis=1)
    return certain, possible


def hard_label(maps: np.ndarray, threshold: float) -> np.ndarray:
    """Arg-max of a constant background score and K maps: (K, H, W) -> (H, W) integers 0..K."""
    return np.concatenate([np.full_like(maps[:1], threshold), maps]).argmax(axis=0)


def propagate_scores(scores: Tensor, boundary: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    """Scores after the walk: every cell becomes a weighted mean of its neighbourhood; boundaries in between lower the
    weights.

    The scores are damped by (1 - boundary) first; any size of grid, all pairs nearer than the radius (irnet.md section
    10.1). The published code squares dense matrices of (h w)^2
    entries.

    Args:
        scores: (K, h, w).
        boundary: (h, w) in [0, 1].
        radius, beta: of the pairs, exponent of their affinities.
        steps: 2^exp_times.

    Returns:
        (K, h, w) float32.
    """
    height, width = boundary.shape
    displacements = half_circle(radius)
    source, target = pair_cells(displacements, height, width)
    affinity = path_affinity(boundary[None], displacements)[0]
    step = transition(source, target, affinity, height * width, beta)
    return walk(step, (scores * (1 - boundary)).float().flatten(1), steps).view_as(scores)


def enlarge_cells(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) cells -> (K, H, W): upsampled by the stride (align_corners False) and cropped (irnet.md section
    10.2)."""
    maps = F.interpolate(maps[None], scale_factor=CELL, mode="bilinear", align_corners=False)[0]
    return maps[:, : size[0], : size[1]]


def make_projection(
    cin: int, cout: int, groups: int, old: int = 1, new: int = 1, align_corners: bool = False
) -> nn.Sequential:
    """1x1 convolution, group normalisation, upsampling from stride ``old`` to ``new``, ReLU, in this order (irnet.md
    section 8). A finer map is averaged instead. Raises ValueError where neither stride is a multiple of the other."""
    if old % new and new % old:
        raise ValueError(f"A map of stride {old} can't be put on cells of {new} pixels.")
    fit: list[nn.Module] = []
    if old > new:
        fit = [nn.Upsample(scale_factor=old // new, mode="bilinear", align_corners=align_corners)]
    elif old < new:
        fit = [nn.AvgPool2d(new // old, ceil_mode=True, count_include_pad=False)]
    return nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.GroupNorm(groups, cout), *fit, nn.ReLU(inplace=True))


def crop_like(maps: Tensor, like: Tensor) -> Tensor:
    """The top left part of ``maps`` (B, C, h', w') that has the height and width of ``like``."""
    return maps[..., : like.shape[-2], : like.shape[-1]]


def check_sizes(picture: Picture, cam: Cam) -> tuple[int, int]:
    """(H, W) of an image. Raises ValueError if its CAM has another size."""
    size = picture.size
    if len(cam.keys) and cam.maps.shape[1:] != size:
        raise ValueError(f"The CAM is {cam.maps.shape[1:]}, the image {size}: make the CAM again.")
    return size


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class EdgeOptions(Options):
    """Options of the edge network; a refiner's options subclass these and build it."""
    # irnet.md section 8

    backbone: Annotated[str, Names(("resnet",), PREFIX)] = "resnet"
    """Backbone under the boundary head; only the section with this name is used. timm/NAME: a CNN of timm."""
    resnet: Annotated[ResNetOptions, When("backbone", "resnet")] = field(
        default_factory=lambda: ResNetOptions(frozen="layer4")
    )
    """ResNet. Published: completely frozen; only the layers on its stages are trained."""
    timm: Annotated[TimmOptions, ON_TIMM] = field(default_factory=lambda: TimmOptions(norm="frozen", frozen="layer4"))
    """CNN of timm, if it is the backbone; frozen like a ResNet by default."""
    radius: Annotated[int, Range(least=2)] = 10
    """Pairs nearer than this are trained on. Cells of 4 pixels."""
    align_corners: bool = False
    """align_corners of the bilinear upsampling inside the network: off in IRNet and Puzzle-CAM, on in SemFormer."""


@dataclass(frozen=True)
class EdgeLabel(Checked):
    """Labels from two thresholds."""
    # irnet.md section 7

    threshold_fg: Probability = 0.30
    """Background score against which a class must win to be reliable foreground."""
    threshold_bg: Probability = 0.05
    """Background score that must win to be reliable background."""
    crf: CRFSettings = field(default_factory=lambda: CRFSettings(bilateral_sxy=50.0, bilateral_srgb=5.0))
    """Dense CRF on both arg-maxes, with confidence 0.7, over the image's own labels."""


@dataclass(frozen=True)
class EdgeWalk(Checked):
    """Random walk across a boundary map."""
    # irnet.md section 10

    beta: Positive = 10.0
    """Exponent of the affinities."""
    logt: Annotated[int, Range(least=0, most=16)] = 8
    """The walk has 2^logt steps."""
    radius: Annotated[int, Range(least=2)] = 5
    """Pairs nearer than this are joined. Cells of 4 pixels."""
    background: Literal["constant", "otsu"] = "constant"
    """Background score. constant: the threshold. otsu: one for all images that splits the values of the run's CAMs into
    two groups as well as can be (Otsu), found without any mask."""
    threshold: Annotated[float, Range(least=0, most=1), When("background", "constant")] = 0.25
    """constant: the background score; the walked scores are divided by the largest of them first."""
    canvas: Annotated[int, Range(least=0)] = 512
    """The image is padded with the mean colour to a square of at least this side, which affects the group
    normalisation. Published: the side of the training crops. Longer sides are not changed. Pixels."""
    crf: CRFSettings = field(default_factory=lambda: CRFSettings(0, bilateral_sxy=50.0, bilateral_srgb=5.0))
    """Dense CRF after the walk, on the arg-max with confidence 0.7; iterations 0 switches it off (IRNet: 0,
    SemFormer and Puzzle-CAM: 1)."""
