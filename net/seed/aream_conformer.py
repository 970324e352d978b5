"""AReAM on Conformer: adaptive re-activation of attention (arXiv 2023; aream.md).

Idea, losses and map are in net/shared/aream.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from misc.config import Augment, CamInference, Fit
from net.backbone.conformer import SAMPLE_CONFORMER, Conformer, ConformerOptions
from net.backbone.transformer import Visit
from net.contract import Network, Recipe, SeedRecipe
from net.groups import Group, decay_groups
from net.registry import seed
from net.shared.aream import PUBLISHED_REFINE, Aream, AreamOptions
from net.start_weights import REQUIRED


@seed("aream_conformer")
class AreamConformer(Conformer, Aream):
    """Conformer with ``cnn_head``, a 1x1 convolution on the map, and ``att_head`` on the class token, of C outputs."""

    published_scores = "70.7 / – / –"
    names = ("conv", "token")
    tokens = 1
    gated = False
    entropy_epsilon = 1e-6
    heads = ("cnn_head", "att_head")

    def __init__(self, options: AreamConformerOptions, num_classes: int) -> None:
        super().__init__(options.backbone)
        self.options = options
        self.cnn_head = nn.Conv2d(self.channels, num_classes, 1)
        self.att_head = nn.Linear(self.width, num_classes)
        self.initialise_heads(self.cnn_head, self.att_head)

    def forward_maps(self, images: Tensor, visit: Visit | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Classifiers on the convolution branch and on the class token; the map is signed."""
        features, token = self.forward_features(self.whole_patches(images), visit)
        maps = self.cnn_head(features).float()
        return (maps.mean((2, 3)), self.att_head(token).float()), maps.detach()

    def param_groups(self) -> list[Group]:
        """Weight decay on matrices only, except the class token; the heads have 10 times the rate."""
        return decay_groups(self, ("cls_token",), self.heads)


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class AreamConformerOptions(AreamOptions):
    """Options of AReAM on Conformer."""

    # aream.md section 2.2
    backbone: ConformerOptions = field(default_factory=lambda: ConformerOptions(double_class_token=False))
    """Conformer; without doubling the class token, though the ImageNet weights were trained with it."""

    def cross_check(self) -> None:
        """Raises ValueError for a backbone whose map and tokens have different grids."""
        super().cross_check()
        self.backbone.check_one_grid()

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> AreamConformer:
        """The network for ``num_classes`` foreground classes."""
        return AreamConformer(self, num_classes)


# ------------------------------------------------------------------------------------- recipes (aream.md section 8)

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=AreamConformerOptions(split=9, scales=(0.5, 1.0, 1.5)),
        fit=Fit(
            epochs=12, batch_size=8, optimiser="adamw", lr=5e-5, weight_decay=0.01,
            schedule="cosine", warmup_epochs=1, warmup_lr=1e-6, final_lr=1e-6,
        ),
        # cropped before normalising: the canvas is black
        augment=Augment(
            order=("scale", "flip", "jitter", "crop", "normalize"),
            scale=(0.5, 2.0), scale_filter="bicubic", flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=0.8,
            crop=384,
        ),
        weights=REQUIRED,
        infer=CamInference(
            scales=(0.5, 1.0, 1.5), truncate=True, flip=True, multiple=16, pad_first=True, normalise="rectified",
            search_to=0.79,
        ),
    ),
    refine=PUBLISHED_REFINE,
    segmenter="deeplabv1_largefov",
)  # fmt: skip


_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        network=AreamConformerOptions(
            split=4, scales=(1.0,), low=0.06, high=0.2, pair_weight=1.0, warmup=0.5,
            backbone=replace(SAMPLE_CONFORMER, double_class_token=False),
        ),
        fit=Fit(
            epochs=30, batch_size=16, optimiser="adamw", lr=1.5e-3, weight_decay=0.01,
            schedule="cosine", warmup_epochs=1, warmup_lr=1e-4, final_lr=1e-5,
        ),
        augment=Augment(
            order=("scale", "flip", "jitter", "crop", "normalize"),
            scale=(0.75, 1.1), scale_filter="bicubic", jitter=(0.2, 0.2, 0.2, 0.02), jitter_probability=0.8, crop=112,
        ),
        infer=CamInference(
            scales=(0.5, 1.0, 1.5), truncate=True, flip=True, multiple=8, pad_first=True, normalise="rectified"
        ),
    ),
    segmenter="deeplabv1_largefov",
)  # fmt: skip

AreamConformer.recipes = {"published": _PUBLISHED, "sample": _SAMPLE}
