"""Puzzle-CAM: the class maps of an image's quarters, put back together, should equal that of the whole image (Jo and
Yu, ICIP 2021; puzzlecam.md).

A classifier sees the image and its tiles. Tiles have less context, so their maps are higher on less discriminative
parts of objects; the reconstruction loss pulls the map of the whole image towards them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Count, Names, Positive, Range, Weight, When
from misc.config import Augment, CamInference, Fit
from net.backbone.resnest import ResNeStOptions
from net.backbone.resnet import SAMPLE_RESNET, ResNetOptions
from net.backbone.stages import load_backbone, make_backbone, place_maps, pretrained_name
from net.backbone.timm_cnn import ON_TIMM, PHOTOS, PREFIX, TimmOptions
from net.contract import Batch, Network, Options, Recipe, SeedNetwork, SeedRecipe
from net.groups import Group, name_groups
from net.losses import multilabel_soft_margin
from net.registry import seed
from net.shared.photos import PHOTOS_TIMM, make_photos_recipe
from net.start_weights import PRETRAINED

Masking = Literal["masking", "none", "selection"]

_EPSILON = 1e-5


@seed("puzzlecam")
class PuzzleCam(SeedNetwork):
    """A backbone ``model`` and a 1x1 ``classifier`` without bias.

    State-dict names are those of the official checkpoints, which hold the backbone twice (``model.*``, ``stage1.*`` to
    ``stage5.*``); here it is once. puzzlecam.md section 2.
    """

    published_scores = "61.9 † / – / 66.9 †"
    selection_thresholds = tuple(i / 100 for i in range(10, 50, 5))  # puzzlecam.md section 4

    def __init__(self, options: PuzzleCamOptions, num_classes: int) -> None:
        super().__init__()
        self.options = options
        self.model = make_backbone(options)
        self.normalisation = self.model.normalisation
        self.classifier = nn.Conv2d(self.model.channels["layer4"], num_classes, 1, bias=False)
        nn.init.kaiming_normal_(self.classifier.weight)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C) -> {"cl": multi-label soft margin loss of the whole image's maps,
        "pcl": the same of the joined ones, "re": weighted reconstruction} and, if enabled, "conf".

        Raises ValueError if the joined maps of the tiles have another size than the image's map.
        """
        options, tags = self.options, batch["tags"].to(torch.float32)
        whole = self.forward_maps(batch["image"])  # (B, C, h, w)
        tiles = self.forward_maps(split_tiles(batch["image"], options.tiles))  # (tiles^2 B, C, h / tiles, w / tiles)
        joined = join_tiles(tiles, options.tiles)  # (B, C, h, w)
        if joined.shape != whole.shape:
            raise ValueError(
                f"The maps of the tiles make {tuple(joined.shape[2:])} cells, that of the image has "
                f"{tuple(whole.shape[2:])}: make augment.crop a multiple of {options.tiles} cells."
            )
        terms = {"cl": multilabel_soft_margin(whole.mean((2, 3)), tags)}
        if options.level == "cam":
            whole, joined = divide_by_maximum(whole), divide_by_maximum(joined)
        terms["pcl"] = multilabel_soft_margin(joined.mean((2, 3)), tags)
        weight = options.alpha * min(progress / options.alpha_rise, 1)
        terms["re"] = weight * reconstruction_loss(whole, joined, tags, options.masking, options.squared)
        if options.confidence:
            terms["conf"] = score_entropy(tiles.mean((2, 3)))
        return terms

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """Rectified maps of all classes: (B, 3, H, W) -> (B, C, h, w) float32; on a CNN of timm (B, C, H, W)."""
        return place_maps(self.model, F.relu(self.forward_maps(images)), images.shape[-2:])

    def forward_maps(self, images: Tensor) -> Tensor:
        """Class maps, signed: (B, 3, H, W) -> (B, C, h, w) float32, at stride 16 in the published form."""
        return self.classifier(self.model(images)).float()

    def param_groups(self) -> list[Group]:
        """The backbone's weights and biases, the classifier at ``head_lr`` times their rate."""
        return name_groups(self, ("model",), self.options.head_lr)

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifier of the backbone."""
        return (pretrained_name(self.model),)

    def load_weights(self, weights: str) -> str:
        """Start from an ImageNet file of torchvision, timm or ResNeSt, or from a whole Puzzle-CAM; 'pretrained': timm's
        file."""
        return load_backbone(self, weights, heads=("classifier",), owner="model")


# ---------------------------------------------------------------------------- tiles and losses (puzzlecam.md section 3)


def split_tiles(images: Tensor, side: int) -> Tensor:
    """Equal tiles, one after the other: (B, C, H, W) -> (side * side * B, C, H / side, W / side), all images' top left,
    then those right of them, row by row.

    Raises ValueError if H or W is not a multiple of ``side``.
    """
    height, width = images.shape[-2:]
    if height % side or width % side:
        raise ValueError(
            f"Images of {height} x {width} pixels can't be cut into {side} x {side} equal tiles: make augment.crop a "
            f"multiple of {side}."
        )
    rows = images.chunk(side, dim=2)
    return torch.cat([tile for row in rows for tile in row.chunk(side, dim=3)])


def join_tiles(tiles: Tensor, side: int) -> Tensor:
    """The inverse of ``split_tiles``, of maps of any size: (side * side * B, C, h, w) -> (B, C, side * h, side * w)."""
    pieces = tiles.chunk(side * side)
    return torch.cat([torch.cat(pieces[i * side : (i + 1) * side], dim=3) for i in range(side)], dim=2)


def divide_by_maximum(maps: Tensor) -> Tensor:
    """Rectified maps, each divided by its maximum: (B, C, h, w) -> the same, in [0, 1)."""
    maps = F.relu(maps)
    return F.relu(maps - _EPSILON) / (maps.amax((2, 3), keepdim=True) + _EPSILON)


def reconstruction_loss(whole: Tensor, joined: Tensor, tags: Tensor, masking: Masking, squared: bool) -> Tensor:
    """Distance of two sets of maps, (B, C, h, w) each, with tags (B, C) -> scalar; see ``PuzzleCamOptions``."""
    difference = (whole - joined).square() if squared else (whole - joined).abs()
    if masking == "none":
        return difference.mean()
    by_class = difference.mean((2, 3)) * tags  # (B, C)
    if masking == "masking":
        return by_class.mean()
    return (by_class.sum(1) / tags.sum(1).clamp(min=1)).mean()


def score_entropy(scores: Tensor) -> Tensor:
    """Sum over classes of -v log(v + 1e-5) with v = sigmoid(score), mean over the rest: (B, C) -> scalar."""
    v = scores.sigmoid()
    return -(v * (v + _EPSILON).log()).sum(1).mean()


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class PuzzleCamOptions(Options):
    """Options of network and losses; the defaults are the published ones."""

    backbone: Annotated[str, Names(("resnet", "resnest"), PREFIX)] = "resnet"
    """Backbone; only the section with this name is used. The published scores are for resnest. timm/NAME: a CNN of
    timm."""
    resnet: Annotated[ResNetOptions, When("backbone", "resnet")] = field(
        default_factory=lambda: ResNetOptions(norm="trained")
    )
    """Options of the ResNet, if it is the backbone."""
    resnest: Annotated[ResNeStOptions, When("backbone", "resnest")] = field(default_factory=ResNeStOptions)
    """Options of the ResNeSt, if it is the backbone."""
    timm: Annotated[TimmOptions, ON_TIMM] = field(default_factory=TimmOptions)
    """CNN of timm, if it is the backbone."""
    tiles: Count = 2
    """Tiles per side: 2 splits an image into quarters. Must divide the side of the training images."""
    level: Literal["feature", "cam"] = "feature"
    """Maps to compare. feature: the raw class maps. cam: class maps divided by their maxima."""
    # puzzlecam.md section 6
    masking: Masking = "masking"
    """Maps used in the reconstruction loss. masking: those of present classes, divided by the number of all classes
    (so that its weight depends on that number). none: all. selection: those of present classes, mean over these."""
    squared: bool = False
    """Use squared instead of absolute differences."""
    alpha: Weight = 4.0
    """Largest weight of the reconstruction (the published code's default is 1, its best run has 4)."""
    alpha_rise: Annotated[float, Range(above=0, most=1)] = 0.5
    """Fraction of the training in which the weight rises from 0 to ``alpha``."""
    confidence: bool = False
    """Add the entropy-like loss on the tiles' scores, which is in the published code but not in the paper."""
    head_lr: Positive = 10.0
    """Learning rate of the classifier relative to the backbone's."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> PuzzleCam:
        """Puzzle-CAM for ``num_classes`` foreground classes."""
        return PuzzleCam(self, num_classes)


# ------------------------------------------------------------------------------ recipes (puzzlecam.md sections 4 and 5)

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=PuzzleCamOptions(backbone="resnest"),
        # momentum: the published optimiser uses the weight decay as momentum (semformer.md section 7). Published: after
        # each epoch the network is kept that scores best against the pixel labels of train; here the last one is.
        fit=Fit(epochs=15, batch_size=32, lr=0.1, momentum=1e-4, nesterov=True, weight_decay=1e-4, power=0.9),
        augment=Augment(order=("long_side", "flip", "normalize", "crop"), long_side=(320, 640), flip=0.5, crop=512),
        weights=PRETRAINED,
        init="imagenet",
        infer=CamInference(scales=(0.5, 1.0, 1.5, 2.0), flip=True, normalise="max", round_up=16, coarse=4),
    ),
    refiner="edge",
    refine={
        "network.backbone": "resnest",
        "network.align_corners": False,
        "label.threshold_fg": 0.40,
        "label.threshold_bg": 0.10,
        "augment.order": ("long_side", "flip", "normalize", "crop"),
        "walk.threshold": 0.35,
        "walk.crf.iterations": 1,
    },
    segmenter="deeplabv3plus",
)

# trained from random weights
_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        network=PuzzleCamOptions(resnet=SAMPLE_RESNET, alpha=1.0, head_lr=1.0),
        fit=Fit(epochs=25, batch_size=16, optimiser="adamw", lr=0.003, weight_decay=0.01),
        augment=Augment(long_side=(112, 160), jitter=(0.2, 0.2, 0.2, 0.02), crop=112),
        infer=CamInference(scales=(0.5, 1.0, 1.5, 2.0), flip=True, normalise="max"),
    ),
    refiner="edge",
    refine={"weights": "cam"},
    segmenter="deeplabv2",
    segment={"weights": "cam"},
)

PuzzleCam.recipes = {
    "published": _PUBLISHED,
    "sample": _SAMPLE,
    "photos": make_photos_recipe(PuzzleCamOptions(backbone=PHOTOS, timm=PHOTOS_TIMM)),
}
