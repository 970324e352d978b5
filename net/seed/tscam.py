"""TS-CAM: token semantic coupled attention map (Gao et al., ICCV 2021; wsol.md sections 2 and 5).

A DeiT with a 3x3 convolution on the patches instead of its linear head: the maps of this head are class-specific but do
not localise. The class token's attention localises but is class-agnostic. Their product does both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from torch import Tensor, nn

from misc.checked import When
from misc.config import Augment, BoxInference, CamInference, Fit
from net.backbone.conformer import SAMPLE_CONFORMER, Conformer, ConformerOptions
from net.backbone.transformer import AttentionSums, Visit
from net.backbone.vit import SAMPLE_VIT, SemanticViT, ViTOptions
from net.contract import Batch, Network, Options, Recipe, SeedNetwork, SeedRecipe
from net.groups import Group, decay_groups
from net.losses import ClassLoss, class_loss
from net.registry import seed
from net.start_weights import PRETRAINED


@seed("tscam")
class TsCam(SeedNetwork):
    """Base for both backbones; ``TsCamOptions.build`` creates one of them."""

    published_scores = "71.3 Top-1, 87.7 GT-known"
    loss: ClassLoss

    @abstractmethod
    def coupled_maps(self, images: Tensor) -> Tensor:
        """Semantic maps times the class token's attention: (B, 3, H, W) -> (B, C, h, w) float32, signed."""

    @abstractmethod
    def class_logits(self, images: Tensor) -> Tensor:
        """Class scores, of training and test alike: (B, 3, H, W) -> (B, C) float32."""

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C) -> {"cls": the recipe's classification loss}."""
        return {"cls": class_loss(self.class_logits(batch["image"]), batch["tags"], self.loss)}

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """The coupled map: (B, 3, H, W) -> (B, C, h, w) float32. Signed and not rectified (wsol.md section 2)."""
        return self.coupled_maps(images)

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """Logits: (B, 3, H, W) -> (B, C)."""
        return self.class_logits(images)

    def param_groups(self) -> list[Group]:
        """Weight decay on matrices, except class token and ``pos_embed`` (wsol.md section 5)."""
        return decay_groups(self, ("pos_embed", "cls_token"))


class TsCamDeiT(SemanticViT, TsCam):
    """On DeiT. State-dict names are those of the official checkpoints, which load strictly; start weights are a
    DeiT's."""

    def __init__(self, options: TsCamOptions, num_classes: int) -> None:
        super().__init__(options.deit, num_classes)
        self.loss = options.loss

    def class_logits(self, images: Tensor) -> Tensor:
        """Means of the semantic maps."""
        return self.semantic_maps(images).mean((2, 3))


class TsCamConformer(Conformer, TsCam):
    """On Conformer: ``trans_cls_head`` is the convolution on the patch tokens, ``conv_cls_head`` a linear layer on the
    pooled features of the other branch (wsol.md section 2)."""

    heads = ("trans_cls_head", "conv_cls_head")

    def __init__(self, options: TsCamOptions, num_classes: int) -> None:
        super().__init__(options.conformer)
        self.loss = options.loss
        self.trans_cls_head = nn.Conv2d(self.width, num_classes, 3, padding=1)
        self.conv_cls_head = nn.Linear(self.channels, num_classes)
        self.initialise_heads(self.trans_cls_head, self.conv_cls_head)

    def forward_heads(self, images: Tensor, visit: Visit | None = None) -> tuple[Tensor, Tensor]:
        """Semantic maps (B, C, h, w) and the convolution branch's logits (B, C), both float32."""
        images = self.whole_patches(images)
        features, tokens = self.forward_branches(images, visit)
        grid = tuple(side // self.patch for side in images.shape[-2:])
        patches = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        return self.trans_cls_head(patches).float(), self.conv_cls_head(features.mean((2, 3))).float()

    def class_logits(self, images: Tensor) -> Tensor:
        """Means of the semantic maps plus the convolution branch's logits."""
        maps, convolution = self.forward_heads(images)
        return maps.mean((2, 3)) + convolution

    def coupled_maps(self, images: Tensor) -> Tensor:
        """See ``TsCam``; the attention is the sum over all blocks."""
        sums = AttentionSums(1, [1.0] * self.depth, [0.0] * self.depth)
        maps, _ = self.forward_heads(images, sums)
        return maps * sums.to_patches.unflatten(2, maps.shape[-2:])


@dataclass(frozen=True)
class TsCamOptions(Options):
    """Network and loss; the defaults are the published DeiT-S on CUB-200-2011."""

    backbone: Literal["deit", "conformer"] = "deit"
    """The transformer; only the section with this name is used."""
    deit: Annotated[ViTOptions, When("backbone", "deit")] = field(default_factory=ViTOptions)
    """Options of the DeiT, if it is the backbone. Tiny: width 192, 3 heads; base: width 768, 12 heads."""
    conformer: Annotated[ConformerOptions, When("backbone", "conformer")] = field(
        default_factory=lambda: ConformerOptions(last_stride=2)
    )
    """Options of the Conformer, if it is the backbone."""
    loss: ClassLoss = "cross_entropy"
    """cross_entropy: one class per image, as published. soft_margin: several classes per image."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> TsCam:
        """TS-CAM for ``num_classes`` classes."""
        return {"deit": TsCamDeiT, "conformer": TsCamConformer}[self.backbone](self, num_classes)


_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=TsCamOptions(),
        fit=Fit(
            epochs=60, batch_size=128, last_batch="keep", optimiser="adamw", lr=5e-5, weight_decay=0.05,
            schedule="step", step_epochs=(30,), step_factor=0.1,
        ),
        augment=Augment(order=("square", "crop", "flip", "normalize"), square=256, crop=224, flip=0.5),
        weights=PRETRAINED,
        # minmax is what step localise does for boxes (wsol.md section 6): the signed map is not rectified
        infer=CamInference(scales=(224,), square=True, resize="bilinear", flip=False, normalise="minmax"),
        boxes=BoxInference(side=224, threshold=0.1, interval=0.001),
    ),
    data="cub200",
)  # fmt: skip

# trained from random weights; small patches, so that maps of small images have some detail
_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        network=TsCamOptions(
            deit=SAMPLE_VIT,
            conformer=SAMPLE_CONFORMER,
        ),
        fit=Fit(epochs=24, batch_size=16, optimiser="adamw", lr=1e-3, weight_decay=0.05),
        augment=Augment(
            order=("square", "crop", "flip", "jitter", "normalize"), square=128, crop=112, jitter=(0.2, 0.2, 0.2, 0.02)
        ),
        infer=CamInference(scales=(112,), square=True, resize="bilinear", flip=False, normalise="minmax"),
        boxes=BoxInference(side=112, threshold=0.1),
    ),
    data="sample_cub",
)

TsCam.recipes = {"published": _PUBLISHED, "sample": _SAMPLE}
