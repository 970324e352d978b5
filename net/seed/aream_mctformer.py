"""AReAM on MCTformer-V2: adaptive re-activation of attention (arXiv 2023; aream.md).

Idea, losses and map are in net/shared/aream.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from misc.config import Augment, CamInference, Fit
from net.backbone.transformer import Visit
from net.backbone.vit import SAMPLE_VIT, MultiClassViT, ViTOptions
from net.contract import Network, Recipe, SeedRecipe
from net.groups import Group, decay_groups
from net.registry import seed
from net.shared.aream import PUBLISHED_REFINE, Aream, AreamOptions
from net.start_weights import PRETRAINED


@seed("aream_mctformer")
class AreamMCTformer(MultiClassViT, Aream):
    """MCTformer-V2. State-dict names are those of its and AReAM's checkpoints; start weights are a DeiT's."""

    published_scores = "67.9 / – / –"
    names = ("cls", "patch")
    gated = True

    def __init__(self, options: AreamMCTformerOptions, num_classes: int) -> None:
        super().__init__(options.backbone, num_classes)
        self.options = options

    def forward_maps(self, images: Tensor, visit: Visit | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Classifiers on class tokens and patches; the map is rectified."""
        x, grid = self.forward_features(images, visit)
        maps = self.patch_maps(x, grid)
        return (self.class_token_logits(x), maps.mean((2, 3))), maps.detach().relu()

    def param_groups(self) -> list[Group]:
        """Weight decay on matrices, except ``pos_embed``; also on the class tokens, unlike MCTformer."""
        return decay_groups(self, ("pos_embed",))


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class AreamMCTformerOptions(AreamOptions):
    """Options of AReAM on MCTformer-V2; the defaults are the published ones."""

    backbone: ViTOptions = field(default_factory=ViTOptions)
    """Options of the transformer."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> AreamMCTformer:
        """The network for ``num_classes`` foreground classes."""
        return AreamMCTformer(self, num_classes)


# ------------------------------------------------------------------------------------- recipes (aream.md section 8)

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=AreamMCTformerOptions(),
        fit=Fit(
            epochs=60, batch_size=64, optimiser="adamw", lr=6.25e-5, weight_decay=0.05,
            schedule="timm_cosine", warmup_epochs=5, warmup_lr=1e-6, final_lr=1e-5,
        ),
        augment=Augment(
            order=("resized_crop", "flip", "rand_augment", "normalize", "erase"),
            area=(0.08, 1.0), flip=0.5, policy="rand-m9-mstd0.5-inc1", erase=0.25, crop=224,
        ),
        weights=PRETRAINED,
        infer=CamInference(scales=(1.0,), flip=True, multiple=16, normalise="rectified", search_to=0.79),
        selection="val_tags",
    ),
    refine=PUBLISHED_REFINE,
    segmenter="deeplabv1_largefov",
)  # fmt: skip


# trained from random weights, with small patches; the pair loss starts when the maps are usable
_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        network=AreamMCTformerOptions(
            split=2, low=0.06, high=0.2, pair_weight=1.0, warmup=0.6, backbone=SAMPLE_VIT,
        ),
        fit=Fit(
            epochs=36, batch_size=16, optimiser="adamw", lr=1.5e-3, weight_decay=0.05,
            schedule="timm_cosine", warmup_epochs=2, warmup_lr=1e-4, final_lr=1e-5,
        ),
        augment=Augment(
            order=("resized_crop", "flip", "jitter", "normalize"), area=(0.4, 1.0), jitter=(0.2, 0.2, 0.2, 0.02),
            crop=112,
        ),
        infer=CamInference(scales=(0.5, 0.75, 1.0), flip=True, multiple=8, normalise="rectified"),
    ),
    segmenter="deeplabv1_largefov",
)  # fmt: skip

AreamMCTformer.recipes = {"published": _PUBLISHED, "sample": _SAMPLE}
