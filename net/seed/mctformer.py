"""MCTformer V1, V2 and MCTformer+: multi-class token transformers (Xu et al., CVPR 2022 and 2023; mctformer.md).

A DeiT with one class token per class. The score of a class is the channel mean of its token, so the token collects the
evidence of its class, and its attention to the patches localises it (V1). V2 multiplies this with the map of a
convolution on the patches. MCTformer+ pools that map by rank and pushes the class tokens apart. All maps are refined by
the patch-to-patch attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Range, When, check
from misc.config import Augment, CamInference, Fit, override
from misc.precision import full_precision
from net.backbone.transformer import AttentionSums, spread_maps
from net.backbone.vit import (
    SAMPLE_VIT,
    Grid,
    MultiClassViT,
    ViTOptions,
    fit_positions,
    resize_positions,
    split_positions,
)
from net.contract import Batch, Network, Options, Recipe, SeedNetwork, SeedRecipe
from net.foreign.pytorch import State
from net.groups import Group, decay_groups
from net.losses import multilabel_soft_margin
from net.registry import seed
from net.start_weights import PRETRAINED


@seed("mctformer")
class MCTformer(MultiClassViT, SeedNetwork):
    """V2: class tokens and patch map (mctformer.md section 2.4); base of the other versions.

    State-dict names are those of the official checkpoints, which load strictly. Start weights are a DeiT's.
    """

    published_scores = "V2: 61.7 / 69.1 † / 71.9"
    mean_layers = False
    """Whether the map takes the mean over the layers or, published for V1 and V2, their sum."""
    published_layers: int | None = 3
    """Number of last layers that make the map; None: all."""

    def __init__(self, options: MCTformerOptions, num_classes: int) -> None:
        super().__init__(options.backbone, num_classes)
        self.attention, self.affinity, self.rank_decay = options.attention, options.affinity, options.rank_decay
        depth = options.backbone.depth
        self.map_layers = min(options.map_layers or self.published_layers or depth, depth)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C) -> a multi-label soft margin loss for each of
        ``logits_by_loss``."""
        x, grid = self.forward_features(batch["image"])
        return {name: multilabel_soft_margin(z, batch["tags"]) for name, z in self.logits_by_loss(x, grid).items()}

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """The spread map: (B, 3, H, W) -> (B, C, H // patch, W // patch) float32, 0 or above.

        Pixels cropped at the bottom and right are missing in the map, which is nevertheless stretched over the whole
        image, as published (mctformer.md section 4). Only one layer's head mean of the attention exists at a time.
        """
        depth = len(self.blocks)
        weight = 1 / self.map_layers if self.mean_layers else 1.0
        first = depth - self.map_layers
        sums = AttentionSums(
            self.tokens,
            [weight if self.attention and layer >= first else 0.0 for layer in range(depth)],
            [float(self.affinity)] * depth,  # always of all layers
        )
        x, grid = self.forward_features(images, sums)
        if self.attention:
            maps = self.fuse_maps(sums.to_patches.unflatten(2, grid), x, grid)
        else:
            maps = F.relu(self.patch_maps(x, grid))
        return spread_maps(sums.affinity, maps) if self.affinity else maps

    def logits_by_loss(self, x: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Tokens (B, T, D) after the last block -> logits (B, C) by the name of their loss."""
        return {"cls": self.class_token_logits(x), "patch": self.patch_maps(x, grid).mean((2, 3))}

    def fuse_maps(self, attention: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """The map before it is spread: class-to-patch attention (B, C, h, w) and tokens (B, T, D) -> (B, C, h, w)."""
        return attention * F.relu(self.patch_maps(x, grid))

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """The scores of the class tokens: (B, 3, H, W) -> (B, C)."""
        return self.class_token_logits(self.forward_features(images)[0])

    def param_groups(self) -> list[Group]:
        """Weight decay on matrices, except the class tokens and ``pos_embed`` (for plus see there)."""
        return decay_groups(self, ("pos_embed", "cls_token"))


class MCTformerV1(MCTformer):
    """Class tokens only (mctformer.md section 2.3). Official files hold a linear head that nothing uses."""

    def __init__(self, options: MCTformerOptions, num_classes: int) -> None:
        super().__init__(options, num_classes)
        self.head = nn.Linear(self.width, num_classes).requires_grad_(False)

    def logits_by_loss(self, x: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Logits of the class tokens."""
        return {"cls": self.class_token_logits(x)}

    def fuse_maps(self, attention: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """The class-to-patch attention alone."""
        return attention


class MCTformerPlus(MCTformer):
    """MCTformer+ (mctformer.md section 2.5): positions of class tokens and patches are separate, the patch map is
    pooled by rank, the class tokens are contrasted after every block, and the map is a root over all layers."""

    position_offset = 0.0
    mean_layers = True
    published_layers = None
    unused = ("pos_embed",)

    def __init__(self, options: MCTformerOptions, num_classes: int) -> None:
        super().__init__(options, num_classes)
        width, patches = self.width, self.grid[0] * self.grid[1]
        # never used: that of the DeiT, whose grid has half the side
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (self.grid[0] // 2) ** 2, width), requires_grad=False)
        # published: only pos_embed and cls_token are exempt by name, so these two are decayed (section 6)
        self.pos_embed_cls = nn.Parameter(torch.zeros(1, num_classes, width))
        self.pos_embed_pat = nn.Parameter(torch.zeros(1, patches, width))
        for table in (self.pos_embed, self.pos_embed_cls, self.pos_embed_pat):
            nn.init.trunc_normal_(table, std=0.02)

    def positions(self, grid: Grid, as_trained: bool) -> Tensor:
        """Position embedding of all tokens: (1, T, D)."""
        patches = self.pos_embed_pat if as_trained else resize_positions(self.pos_embed_pat, self.grid, grid)
        return torch.cat([self.pos_embed_cls, patches], 1)

    def logits_by_loss(self, x: Tensor, grid: Grid) -> dict[str, Tensor]:
        """As in V2, with the patch map pooled by rank."""
        return {"cls": self.class_token_logits(x), "patch": ranking_pool(self.patch_maps(x, grid), self.rank_decay)}

    def fuse_maps(self, attention: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """The square root of V2's map."""
        return super().fuse_maps(attention, x, grid).sqrt()

    def class_tokens(self, images: Tensor) -> tuple[list[Tensor], Tensor, Grid]:
        """Class tokens after every block, each (B, C, D); all tokens (B, T, D) after the last one; the grid."""
        x, grid = self.embed_patches(images)
        tokens = []
        for block in self.blocks:
            x = block(x)
            tokens.append(x[:, : self.tokens])
        return tokens, x, grid

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C) -> V2's terms and {"contrast": ``contrast_loss``}."""
        tokens, x, grid = self.class_tokens(batch["image"])
        terms = {name: multilabel_soft_margin(z, batch["tags"]) for name, z in self.logits_by_loss(x, grid).items()}
        return {**terms, "contrast": contrast_loss(tokens, batch["tags"])}

    def from_classifier(self, state: State) -> State:
        """As V2's, but the patches' positions are enlarged by repeating each entry (mctformer.md section 3)."""
        first, patches = split_positions(state["pos_embed"])
        return {
            **state,
            "cls_token": state["cls_token"].repeat(1, self.tokens, 1),
            "pos_embed_cls": first.repeat(1, self.tokens, 1),
            "pos_embed_pat": fit_positions(patches, self.grid, "nearest"),
        }


# ------------------------------------------------------------------------------------- losses (mctformer.md section 5)


def ranking_pool(maps: Tensor, decay: float) -> Tensor:
    """Global weighted ranking pooling: (B, C, h, w) -> (B, C).

    The k-th largest value of a map, k from 0, has the weight decay^k; the weights are normalised (section 2.5).
    """
    ranked = maps.float().flatten(2).sort(dim=2, descending=True).values  # (B, C, N)
    weights = decay ** torch.arange(ranked.shape[2], device=maps.device, dtype=torch.float32)
    with full_precision(maps.device.type):  # thousands of small weights: not in half precision
        return ranked @ (weights / weights.sum())


def contrast_loss(tokens: Sequence[Tensor], tags: Tensor) -> Tensor:
    """Pushes an image's class tokens apart, after every block: L times (B, C, D), tags (B, C) -> scalar.

    Only tokens of present classes are pushed away, but from those of absent classes too.
    """
    stacked = torch.stack(list(tokens)).float()  # (L, B, C, D)
    with full_precision(stacked.device.type):
        unit = F.normalize(stacked, dim=3)
        similarity = unit @ unit.transpose(2, 3)  # (L, B, C, C)
    errors = -similarity.log_softmax(3).diagonal(dim1=2, dim2=3).mean(0)  # (B, C)
    tags = tags.float()
    return ((errors * tags).sum(1) / (tags.sum(1) + 1e-8)).mean()


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class MCTformerOptions(Options):
    """Network, loss and map; the defaults are the published V2."""

    version: Literal["v1", "v2", "plus"] = "v2"
    """v1: class tokens only. v2: with a patch map. plus: MCTformer+, published with backbone.image_size and crop 448,
    batch 32, 45 epochs, lr 3.125e-5 and scales 1.0 0.75 1.25 (the preset published_plus)."""
    backbone: ViTOptions = field(default_factory=ViTOptions)
    """Options of the transformer."""
    map_layers: Annotated[int, Range(least=0)] = 0
    """Number of last layers whose class-to-patch attention makes the map. 0: as published (3; plus: all)."""
    attention: bool = True
    """Multiply the patch map by the class tokens' attention to the patches (v1: that attention alone is the map). Off:
    the plain CAM of the same network."""
    affinity: bool = True
    """Spread the maps along the patches' attention (V1 on VOC train: 47.2 without, 55.2 with)."""
    rank_decay: Annotated[float, Range(above=0, most=1), When("version", "plus")] = 0.996
    """plus: weight of a patch relative to the next higher one in the pooling of the patch map."""

    def cross_check(self) -> None:
        """Raises ValueError for more layers than exist, and for V1 without attention."""
        super().cross_check()
        depth = self.backbone.depth
        check(self.map_layers <= depth, "map_layers", self.map_layers, f"in 0 .. {depth} (the depth)")
        if not self.attention and self.version == "v1":
            raise ValueError("version v1 has no patch map: attention cannot be switched off.")

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> MCTformer:
        """The version's network for ``num_classes`` foreground classes."""
        return {"v1": MCTformerV1, "v2": MCTformer, "plus": MCTformerPlus}[self.version](self, num_classes)


# ------------------------------------------------------------------------------------- recipes (mctformer.md section 6)

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=MCTformerOptions(),
        amp="fp16",  # with loss scaling; all other steps are in full precision
        fit=Fit(
            epochs=60,
            batch_size=64,
            optimiser="adamw",
            lr=6.25e-5,
            weight_decay=0.05,
            schedule="timm_cosine",
            warmup_epochs=5,
            warmup_lr=1e-6,
            final_lr=1e-5,
        ),
        augment=Augment(
            order=("resized_crop", "flip", "rand_augment", "normalize", "erase"),
            area=(0.08, 1.0),
            flip=0.5,
            policy="rand-m9-mstd0.5-inc1",
            erase=0.25,
            crop=224,
        ),
        weights=PRETRAINED,
        infer=CamInference(scales=(1.0,), flip=True, normalise="minmax"),
    ),
    # section 8; the labels' CRF sees the de-normalised, truncated image (section 4)
    refiner="psa",
    refine={
        "label.alpha_low": 1.0,
        "label.alpha_high": 12.0,
        "label.crf_truncates_image": True,
        "walk.background": "constant",
        "walk.threshold": 0.39,
        "walk.beta": 8.0,
        "walk.logt": 6,
        "fit.lr": 0.01,
        "fit.epochs": 5,
    },
    segmenter="deeplabv1_largefov",
)

_PUBLISHED_V1 = override(_PUBLISHED, {"cam.network.version": "v1"})
_PUBLISHED_PLUS = override(
    _PUBLISHED,
    {
        "cam.network.version": "plus",
        "cam.network.backbone.image_size": 448,
        "cam.augment.crop": 448,
        "cam.fit.batch_size": 32,
        "cam.fit.epochs": 45,
        "cam.fit.lr": 3.125e-5,
        "cam.infer.scales": (1.0, 0.75, 1.25),
    },
)

# trained from random weights; small patches, so that maps of small images have some detail
_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        # refined by an attention that was learned in minutes, maps cover the background; with the backbone's local
        # start the class tokens attend to themselves for too long
        network=MCTformerOptions(backbone=replace(SAMPLE_VIT, local_start=1.4), map_layers=4, affinity=False),
        fit=Fit(
            epochs=30,
            batch_size=16,
            optimiser="adamw",
            lr=1.5e-3,
            weight_decay=0.05,
            schedule="timm_cosine",
            warmup_epochs=2,
            warmup_lr=1e-4,
            final_lr=1e-5,
        ),
        augment=Augment(
            order=("resized_crop", "flip", "jitter", "normalize"),
            area=(0.4, 1.0),
            jitter=(0.2, 0.2, 0.2, 0.02),
            crop=112,
        ),
        infer=CamInference(scales=(0.5, 0.75, 1.0), flip=True, multiple=8, normalise="minmax"),
    ),
    refiner="psa",
    # products of map and attention are sharp: one hundredth of the peak is already object
    refine={"label.alpha_low": 250.0, "label.alpha_high": 1200.0, "walk.alpha": 600.0},
    segmenter="deeplabv1_largefov",
)

MCTformer.recipes = {
    "published": _PUBLISHED,
    "published_v1": _PUBLISHED_V1,
    "published_plus": _PUBLISHED_PLUS,
    "sample": _SAMPLE,
}
