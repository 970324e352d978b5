"""TransCAM: the class map of Conformer's convolution branch, refined by its transformer branch (Li et al., JVCIR
2023; transcam.md).

Conformer is trained as a multi-label classifier. The map of the convolution branch's head is multiplied by the
patch-to-patch attention of the transformer branch, averaged over heads and summed over all layers: shallow layers
contribute low-level similarity, deep ones context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from misc.config import Augment, CamInference, Fit
from net.backbone.conformer import SAMPLE_CONFORMER, Conformer, ConformerOptions
from net.backbone.transformer import QueryKey, spread_maps
from net.contract import Batch, Network, Options, Recipe, SeedNetwork, SeedRecipe
from net.losses import multilabel_soft_margin
from net.registry import seed
from net.start_weights import REQUIRED

Method = Literal["transcam", "convcam", "clsattn", "attnagg"]


@seed("transcam")
class TransCam(Conformer, SeedNetwork):
    """Conformer with two heads, of C + 1 outputs each: ``conv_cls_head`` on the map, ``trans_cls_head`` on the class
    token. The first output stands for the background, is never supervised and is dropped everywhere.

    State-dict names are those of the official checkpoints. transcam.md section 3.
    """

    published_scores = "64.9 / 70.2 / 69.3"
    heads = ("conv_cls_head", "trans_cls_head")

    def __init__(self, options: TransCamOptions, num_classes: int) -> None:
        super().__init__(options.backbone)
        self.method: Method = options.method
        self.trans_cls_head = nn.Linear(self.width, num_classes + 1)
        self.conv_cls_head = nn.Conv2d(self.channels, num_classes + 1, 3, padding=1)
        self.initialise_heads(self.trans_cls_head, self.conv_cls_head)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C) -> {"cls": multi-label soft margin loss of the summed scores}."""
        convolution, token = self.class_logits(batch["image"])
        return {"cls": multilabel_soft_margin((convolution + token)[:, 1:], batch["tags"])}

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """The map of the option ``method``, signed: (B, 3, H, W) -> (B, C, ceil(H / patch), ceil(W / patch)) float32.

        The attention is summed layer by layer and head by head: only a few matrices of (B, T, T) exist at a time.
        """
        total = images.new_zeros(())

        def add(layer: int, attention: QueryKey) -> None:
            nonlocal total
            total = attention.mean_weights().add_(total)

        features, _ = self.forward_features(self.whole_patches(images), None if self.method == "convcam" else add)
        maps = self.conv_cls_head(features)[:, 1:].float()  # (B, C, h, w)
        if self.method == "convcam":
            return maps
        return refine_map(maps, total, self.method)

    def class_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the convolution branch and of the class token: (B, 3, H, W) -> two (B, C + 1), background first."""
        features, token = self.forward_features(self.whole_patches(images))
        return self.conv_cls_head(features).float().mean((2, 3)), self.trans_cls_head(token).float()

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """The summed scores of both branches, which the loss trains: (B, 3, H, W) -> (B, C)."""
        convolution, token = self.class_logits(images)
        return (convolution + token)[:, 1:]


def refine_map(maps: Tensor, attention: Tensor, method: Method) -> Tensor:
    """A class map after the attention (transcam.md section 3).

    Args:
        maps: (B, K, h, w), signed: not rectified before the product.
        attention: (B, 1 + h * w, 1 + h * w), rows attend to columns, the class token first.
        method: see ``TransCamOptions``.

    Returns:
        (B, K, h, w).
    """
    patches = attention[:, 1:, 1:]  # (B, N, N)
    match method:
        case "transcam":
            return spread_maps(patches, maps)
        case "attnagg":
            return spread_maps(patches.transpose(1, 2), maps)
        case "clsattn":
            return (maps.flatten(2) * attention[:, :1, 1:]).view_as(maps)
    return maps


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class TransCamOptions(Options):
    """Options of network and map; the defaults are the published ones."""

    backbone: ConformerOptions = field(default_factory=ConformerOptions)
    """Options of the Conformer backbone."""
    method: Method = "transcam"
    """The map. transcam: the convolution branch's, spread by the patch-to-patch attention. convcam: that map unchanged.
    clsattn: times the class token's attention to the patches. attnagg: as transcam with the attention transposed."""

    def cross_check(self) -> None:
        """Raises ValueError for a backbone whose map and tokens have different grids."""
        super().cross_check()
        self.backbone.check_one_grid()

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> TransCam:
        """TransCAM for ``num_classes`` foreground classes."""
        return TransCam(self, num_classes)


# ------------------------------------------------------------------------------ recipes (transcam.md sections 4 to 7)

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=TransCamOptions(),
        # weight decay on all parameters, including norms and biases
        fit=Fit(epochs=20, batch_size=8, optimiser="adamw", lr=5e-5, schedule="constant", weight_decay=5e-4),
        augment=Augment(
            order=("long_side", "flip", "jitter", "normalize", "crop"),
            long_side=(320, 640),
            flip=0.5,
            jitter=(0.3, 0.3, 0.3, 0.1),
            crop=512,
        ),
        weights=REQUIRED,
        # squares: the aspect ratio is not kept
        infer=CamInference(scales=(256, 512, 768), square=True, flip=True, normalise="shifted"),
    ),
    refiner="psa",
    refine={
        "label.background": "constant",
        "label.threshold_low": 0.6,
        "label.threshold_high": 0.25,
        "label.crf.bilateral_sxy": 50.0,
        "label.crf.bilateral_srgb": 5.0,
        "label.crf_unary": "labels",
        "label.crf_labels": 21,
        "walk.background": "constant",
        "walk.threshold": 0.42,
        "walk.beta": 14.0,
        "walk.logt": 7,
        "walk.shrink_early": True,
        "walk.crf.iterations": 10,
        "walk.crf.bilateral_sxy": 50.0,
        "walk.crf.bilateral_srgb": 5.0,
        "walk.crf_unary": "labels",
        "fit.lr": 0.01,
        "fit.epochs": 8,
    },
    segmenter="deeplabv1",
    segment={"fit.micro_batch": None},  # one GPU: batch statistics of all 10 images
)

# trained from random weights; smaller patches, because the images are, and narrow tokens, so that the map is learnt by
# the convolutions
_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        network=TransCamOptions(backbone=SAMPLE_CONFORMER),
        fit=Fit(epochs=30, batch_size=16, optimiser="adamw", lr=1.5e-3, schedule="poly", weight_decay=5e-4),
        augment=Augment(long_side=(112, 160), jitter=(0.2, 0.2, 0.2, 0.02), crop=112),
        infer=CamInference(scales=(80, 128), square=True, flip=True, normalise="shifted"),
    ),
    refiner="psa",
    # spread maps are broad: one sixth of the peak is still object
    refine={"label.alpha_low": 7.0, "label.alpha_high": 28.0, "walk.alpha": 11.0},
    segmenter="deeplabv1",
)

TransCam.recipes = {"published": _PUBLISHED, "sample": _SAMPLE}
