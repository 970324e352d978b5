"""CRT: a transformer refined by a convolutional network (Huo, Su and Wu, arXiv 2022; crt.md; on CUB: wsol.md
section 3).

A CNN activates too little of an object, a transformer too much. Both are trained together on the same batch, each by a
classification loss on its pooled class maps; another term minimises the difference between their raw maps. The final
maps come from the transformer alone: a DeiT in TS-CAM's form that processes the image in overlapping tiles of its
pre-training size, and runs its blocks three times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Count, Positive, Probability, Weight, When
from misc.config import Augment, BoxInference, CamInference, Fit
from misc.precision import at_least_float32
from net.backbone.resnet import SAMPLE_RESNET, ResNet, ResNetOptions, load_resnet
from net.backbone.transformer import Visit
from net.backbone.vit import SAMPLE_VIT, SemanticViT, ViTOptions
from net.contract import Batch, Network, Options, Recipe, SeedNetwork, SeedRecipe
from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors
from net.groups import Group, decay_groups
from net.losses import ClassLoss, class_loss
from net.registry import seed
from net.start_weights import PRETRAINED

Tiles = tuple[int, int]
"""Rows and columns of tiles."""


@seed("crt")
class Crt(SeedNetwork):
    """Both branches; maps and class scores are the transformer's."""

    published_scores = "57.7 / 71.8 / 71.2"
    normalisation = SemanticViT.normalisation

    def __init__(self, options: CrtOptions, num_classes: int) -> None:
        super().__init__()
        self.options = options
        self.cnn = CnnBranch(options.cnn, num_classes)
        self.transformer = TransformerBranch(options, num_classes)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C) -> ``crt_losses`` and, in the epochs that have it, {"agreement":
        the weighted ``agreement_loss``}. The branches' maps must be of one size.

        With tiles S must be a multiple of half a tile, and at least one.
        """
        image, options = batch["image"], self.options
        maps = self.cnn(image), self.transformer(image)
        terms = crt_losses(*maps, batch["tags"], options.loss)
        if options.agreement > 0 and options.agrees(progress):
            size = image.shape[-2:] if options.agreement_size == "image" else None
            terms["agreement"] = options.agreement * agreement_loss(*maps, size)
        return terms

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """The transformer's map, rectified after the tiles are merged: (B, 3, H, W) -> (B, C, ceil(H / patch),
        ceil(W / patch)) float32. So negative values of one tile cancel positive ones of another, as published."""
        return self.transformer.forward_any_size(images, coupled=True).relu()

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """Means of the transformer's semantic maps, which the loss trains: (B, 3, H, W) -> (B, C)."""
        return self.transformer.forward_any_size(images, coupled=False).mean((2, 3))

    def param_groups(self) -> list[Group]:
        """Groups as ``CrtOptions.optimisers`` says: the backbones first, then the classifiers."""
        options, cnn = self.options, self.cnn.classifier.weight
        body = [p for p in self.cnn.resnet50.parameters() if p.requires_grad]
        if options.optimisers == "two":
            # momentum is left at PyTorch's 0 (wsol.md section 5)
            rule = Fit(optimiser="sgd", lr=options.cnn_lr, weight_decay=options.cnn_weight_decay, schedule="constant")
            two = [Group(body, rule=rule), Group([cnn], 10.0, rule=rule)]
            return decay_groups(self.transformer, ("pos_embed", "cls_token")) + two
        head = list(self.transformer.head.parameters())
        rest = [p for n, p in self.transformer.named_parameters() if not n.startswith("head.")]
        return [Group(body + rest), Group([cnn, *head], options.head_lr)]

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifiers of both branches."""
        return (self.transformer.pretrained, self.cnn.resnet50.options.pretrained)

    def load_weights(self, weights: str) -> str:
        """Load a file of both branches (of this project), of one branch, or 'pretrained', which has both.

        It is recognised by its tensor names: DeiT's, and ResNet's under torchvision's names, without their heads; or
            the official ``deits_cam.pth``, ``res152_cam.pth`` and the CUB checkpoint, whole. Give both branches' files
            as ,FILE.
        """
        state = read_tensors(weights)
        if "transformer.cls_token" in state:
            return str(load_tensors(self, state, label=weights))
        if "blocks.0.norm1.weight" in state:
            return self.transformer.load_weights(weights)
        return load_resnet(self.cnn, weights, heads=["classifier"])


# ------------------------------------------------------------------------------------- tiles (crt.md section 4.1)


def padded_side(side: int, tile: int) -> int:
    """Side of an image padded for tiling. Published: one that fits already gets another half tile, unless it is smaller
    than a tile."""
    half = tile // 2
    return max((side // half + 1) * half, tile)


def cut_tiles(images: Tensor, tile: int) -> tuple[Tensor, Tiles]:
    """Tiles that overlap by half: (B, 3, H, W) -> (nv * nh * B, 3, tile, tile), tile-major, and (nv, nh).

    Entries t * B to (t + 1) * B - 1 are tile t, in row-major order, of all images. Raises ValueError for sides that
    tiles do not cover exactly.
    """
    half = tile // 2
    if any(side < tile or side % half for side in images.shape[-2:]):
        height, width = images.shape[-2:]
        raise ValueError(
            f"Tiles of {tile} need sides that are multiples of {half} and at least {tile}, got {height} x {width}. "
            "Set cam.augment.crop to such a number."
        )
    tiles = images.unfold(2, tile, half).unfold(3, tile, half)  # (B, 3, nv, nh, tile, tile)
    return tiles.permute(2, 3, 0, 1, 4, 5).flatten(0, 2), (tiles.shape[2], tiles.shape[3])


def merge_tiles(maps: Tensor, tiles: Tiles) -> Tensor:
    """Mean of the tiles' maps where they overlap: (nv * nh * B, C, g, g), tile-major, g even -> (B, C, h, w) with
    h = (nv + 1) * g / 2, w = (nh + 1) * g / 2."""
    nv, nh = tiles
    side = maps.shape[-1]
    half = side // 2
    placed = maps.unflatten(0, (nv, nh, -1))  # (nv, nh, B, C, g, g)
    canvas = maps.new_zeros(*placed.shape[2:4], (nv + 1) * half, (nh + 1) * half)
    count = maps.new_zeros(canvas.shape[-2:])
    for row in range(nv):
        for column in range(nh):
            at = (..., slice(half * row, half * row + side), slice(half * column, half * column + side))
            canvas[at] += placed[row, column]
            count[at] += 1
    return canvas / count


# ------------------------------------------------------------------------------------- loss (crt.md section 5)


def crt_losses(cnn: Tensor, transformer: Tensor, tags: Tensor, kind: ClassLoss) -> dict[str, Tensor]:
    """Classification losses of both branches: raw maps (B, C, h, w) twice, tags (B, C) -> scalars cnn, transformer."""
    return {
        "cnn": class_loss(cnn.mean((2, 3)), tags, kind),
        "transformer": class_loss(transformer.mean((2, 3)), tags, kind),
    }


def agreement_loss(cnn: Tensor, transformer: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Mean difference of the raw maps of all classes, present or not: (B, C, h, w) twice -> scalar.

    Both get its gradient. ``size``: the maps are resized to this first, bilinear with aligned corners.
    """
    if size is not None:
        cnn, transformer = (
            F.interpolate(at_least_float32(maps), size=size, mode="bilinear", align_corners=True)
            for maps in (cnn, transformer)
        )
    return (cnn - transformer).abs().mean()


# ------------------------------------------------------------------------------------- networks


class CnnBranch(nn.Module):
    """ResNet and a 1x1 ``classifier`` without bias: (B, 3, H, W) -> raw maps (B, C, ceil(H/16), ceil(W/16)) float32.

    Names are those of the official checkpoint, in which even a ResNet-152 is called resnet50 (crt.md section 3).
    """

    def __init__(self, options: ResNetOptions, num_classes: int) -> None:
        super().__init__()
        self.resnet50 = ResNet(options)
        self.classifier = nn.Conv2d(self.resnet50.channels["layer4"], num_classes, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Maps before pooling. As the classifier has no bias, pooling before or after it gives the same scores."""
        return self.classifier(self.resnet50(images)).float()


class TransformerBranch(SemanticViT):
    """TS-CAM's DeiT in rounds and over tiles (crt.md section 4). Names are those of the official checkpoint."""

    def __init__(self, options: CrtOptions, num_classes: int) -> None:
        super().__init__(options.transformer, num_classes)
        self.rounds = options.rounds
        self.tile = options.transformer.image_size if options.tiles else None

    def forward_blocks(self, x: Tensor, visit: Visit | None = None) -> Tensor:
        """All blocks, ``rounds`` times, with a skip connection around each round, which about doubles the tokens: (B,
        T, D) -> the same shape. ``visit`` gets every layer of every round."""
        if self.rounds == 1:
            return super().forward_blocks(x, visit)
        for _ in range(self.rounds):
            x = x + super().forward_blocks(x, visit)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Raw maps of training images, merged from their tiles: (B, 3, H, W) -> (B, C, h, w) float32, signed."""
        if self.tile is None:
            return self.semantic_maps(images)
        tiles, grid = cut_tiles(images, self.tile)
        return merge_tiles(self.semantic_maps(tiles), grid)

    def forward_any_size(self, images: Tensor, coupled: bool) -> Tensor:
        """Maps at any image size: (B, 3, H, W) -> (B, C, ceil(H / patch), ceil(W / patch)) float32, signed.

        Images are padded for tiling at the bottom and the right, each by itself: the mirrored one after mirroring.

        Args:
            coupled: times the class token's attention, tile by tile, before the merging; else the semantic maps.
        """
        maps_of = self.coupled_maps if coupled else self.semantic_maps
        if self.tile is None:
            return maps_of(images)
        size = images.shape[-2:]
        bottom, right = (padded_side(side, self.tile) - side for side in size)
        tiles, grid = cut_tiles(F.pad(images, (0, right, 0, bottom)), self.tile)
        height, width = (-(-side // self.patch_embed.patch) for side in size)
        return merge_tiles(maps_of(tiles), grid)[..., :height, :width]


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class CrtOptions(Options):
    """Both networks and their loss. The defaults are the published ones on VOC; the preset published_cub has those for
    CUB-200-2011, called CUB below."""

    cnn: ResNetOptions = field(
        default_factory=lambda: ResNetOptions(depth=(3, 8, 36, 3), frozen="layer2", pretrained="resnet152.tv_in1k")
    )
    """Convolutional branch. CUB: depth 3 4 6 3, pretrained resnet50.tv_in1k."""
    transformer: ViTOptions = field(default_factory=lambda: ViTOptions(drop_path=0.0))
    """Transformer branch. CUB: drop_path 0.1."""
    tiles: bool = True
    """Cut images into tiles of the transformer's image_size that overlap by half. CUB: no."""
    rounds: Count = 3
    """Number of passes through the blocks; each pass adds its output to its input. 1 (CUB): the plain transformer,
    nothing is added."""
    loss: ClassLoss = "soft_margin"
    """Classification loss of either branch. CUB: cross_entropy."""
    agreement: Weight = 0.1
    """Weight of the mean difference of the two branches' maps. CUB: 1."""
    agreement_size: Annotated[Literal["image", "grid"], When("agreement")] = "image"
    """Resolution at which maps are compared: that of the image, or (CUB) their own."""
    agreement_from: Annotated[Probability, When("agreement")] = 1 / 10
    """Fraction of the training after which the agreement loss starts: the first of 10 epochs (CUB: 4 of 60)."""
    agreement_period: Annotated[Probability, When("agreement")] = 0.0
    """From then on it is active in the first half of every period of this fraction of the training. 0: always. CUB: 10
    of 60 epochs."""
    optimisers: Literal["one", "two"] = "one"
    """one: everything with fit's optimiser and weight decay. two (CUB): the transformer with fit's, without decay on
    vectors and positions; the CNN with plain SGD at a constant rate."""
    cnn_lr: Annotated[Positive, When("optimisers", "two")] = 0.005
    """two: learning rate of the CNN; its classifier has ten times that."""
    cnn_weight_decay: Annotated[Weight, When("optimisers", "two")] = 1e-4
    """two: weight decay of the CNN."""
    head_lr: Annotated[Positive, When("optimisers", "one")] = 10.0
    """one: learning rate of both classifiers relative to the rest."""

    def cross_check(self) -> None:
        """Raises ValueError for tiles that do not overlap in whole patches."""
        super().cross_check()
        if self.tiles and self.transformer.image_size % (2 * self.transformer.patch):
            raise ValueError(
                "transformer.image_size must be a multiple of two patches: tiles overlap by half, in whole patches."
            )

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> Crt:
        """CRT for ``num_classes`` foreground classes."""
        return Crt(self, num_classes)

    def agrees(self, progress: float) -> bool:
        """Whether the agreement loss is active at this fraction of the training."""
        since = progress - self.agreement_from + 1e-8  # k / n - m / n may fall short of (k - m) / n
        return since > 0 and (self.agreement_period == 0 or since / self.agreement_period % 1 < 0.5)


# ------------------------------------------------------------------------------------- recipes (crt.md 2, 5, 6)

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=CrtOptions(),
        # momentum: the published optimiser uses the weight decay as momentum, for both branches (crt.md section 9)
        fit=Fit(epochs=10, batch_size=16, lr=0.1, momentum=1e-4, weight_decay=1e-4, schedule="poly", power=0.9),
        augment=Augment(order=("long_side", "normalize", "flip", "crop"), long_side=(210, 420), flip=0.5, crop=336),
        weights=PRETRAINED,
        infer=CamInference(
            scales=(1.0, 0.5, 1.5, 2.0, 0.75, 1.25, 1.75), flip=True, normalise="max", round_up=16, coarse=4,
            fixed_background=0.15,
        ),
    ),
    refiner="irn",
    refine={"label.threshold_fg": 0.35, "label.threshold_bg": 0.15, "walk.instances": False},
    segmenter="deeplabv2",
)

# wsol.md sections 3, 5 and 6
_PUBLISHED_CUB = Recipe(
    cam=SeedRecipe(
        network=CrtOptions(
            cnn=ResNetOptions(frozen="layer2"),
            transformer=ViTOptions(),
            tiles=False,
            rounds=1,
            loss="cross_entropy",
            agreement=1.0,
            agreement_size="grid",
            agreement_from=4 / 60,  # the epochs e, from 1 on, with an odd e // 5
            agreement_period=10 / 60,
            optimisers="two",
        ),
        fit=Fit(
            epochs=60, batch_size=64, last_batch="keep", optimiser="adamw", lr=5e-5, weight_decay=0.05,
            schedule="step", step_epochs=(30,),
        ),
        augment=Augment(order=("square", "crop", "flip", "normalize"), square=256, crop=224, flip=0.5),
        weights=PRETRAINED,
        infer=CamInference(scales=(224,), square=True, resize="bilinear", flip=False, normalise="minmax"),
        boxes=BoxInference(threshold=0.1, interval=0.001),
    ),
    refiner="irn",
    refine={"label.threshold_fg": 0.35, "label.threshold_bg": 0.15, "walk.instances": False},
    segmenter="deeplabv2",
    data="cub200",
)  # fmt: skip

# trained from random weights; small tiles, so that images of the sample set have several
_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        network=CrtOptions(
            cnn=SAMPLE_RESNET,
            transformer=replace(SAMPLE_VIT, image_size=64, depth=3, local_start=1.0),
            rounds=2,
            agreement=0.5,
            agreement_from=1 / 30,
            head_lr=1.0,
        ),
        fit=Fit(epochs=30, batch_size=16, optimiser="adamw", lr=1.5e-3, weight_decay=0.01),
        augment=Augment(long_side=(112, 160), jitter=(0.2, 0.2, 0.2, 0.02), crop=96),
        infer=CamInference(scales=(0.5, 1.0, 1.5, 2.0), flip=True, normalise="max", coarse=4),
    ),
    refiner="irn",
    refine={"label.threshold_fg": 0.07, "label.threshold_bg": 0.02, "walk.threshold": 0.12, "walk.instances": False},
    segmenter="deeplabv2",
)

Crt.recipes = {"published": _PUBLISHED, "published_cub": _PUBLISHED_CUB, "sample": _SAMPLE}
