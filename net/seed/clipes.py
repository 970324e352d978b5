"""CLIP-ES: class maps of a frozen CLIP, with nothing trained (Lin et al., CVPR 2023; clipes.md).

CLIP scores an image against the texts of its tags and of background words. The gradient of a tag's probability p_c,
with respect to the normalised tokens U that enter the last block, weighs their channels:

    s_c = scaled( relu( sum over k of w_ck U_k ) ),   w_ck = mean over the patches of dp_c / dU_k

and the mean attention A of the last eight blocks spreads the map from the rectangles m_c around its strong parts, where
S is A made doubly stochastic and symmetric:

    r_c = scaled( S S (m_c s_c) )
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from misc.config import Fit, override
from misc.crf.dense import CRFSettings
from misc.loop.trainable import Batch
from misc.precision import full_precision
from misc.propagate.caa import refine_by_attention, scale_to_unit
from net.backbone.clip import ClipOptions
from net.backbone.clip_text import TextOptions
from net.backbone.transformer import AttentionSums
from net.contract import Network, Recipe, SeedRecipe
from net.registry import seed
from net.shared.texted import TEXTED_INFER, TextedNetwork, TextedOptions
from net.start_weights import PRETRAINED


@seed("clipes")
class Clipes(TextedNetwork):
    """A frozen image tower and the features of texts; there is nothing to train."""

    published_scores = "70.8 / 75.0 / 71.1"
    normalisation = "clip"
    options: ClipesOptions

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Never called: there is nothing to train."""
        raise ValueError("CLIP-ES has nothing to train: leave --cam.fit.steps at 0.")

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """Spread and scaled class maps on the grid of patches: (B, 3, H, W), (B, C) -> (B, C, h, w) float32 in [0, 1),
        0 for absent classes."""
        layers, blocks = self.encoder.layers, self.options.blocks
        attention = AttentionSums(1, [0] * layers, [0] * (layers - blocks) + [1 / blocks] * blocks)
        with torch.no_grad(), full_precision(images.device.type):
            tokens, grid = self.encoder.visual.forward_features(images.float(), attention)
        found = self.encoder.class_gradients(tokens, tags, lambda seen: attention(layers - 1, seen))
        maps = found.maps(grid)
        for image, affinity, present in zip(maps, attention.affinity, tags > 0, strict=True):
            image[present] = scale_to_unit(refine_by_attention(image[present], affinity, self.options.cut))
        return maps


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class ClipesOptions(TextedOptions):
    """Options of CLIP-ES: CLIP, its texts and the map."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> Clipes:
        """CLIP-ES for ``num_classes`` foreground classes."""
        return Clipes(self, num_classes)


# ------------------------------------------------------------------------------ recipes (clipes.md sections 4 to 8)

_CONFIDENT = {"ignore_below": 0.95}
"""Pixels whose probability after the CRF is below this are ignored when the segmentation network is trained."""

_PUBLISHED_CRF = {
    "walk.background": "power",
    "walk.unary": "scores",
    "walk.crf": CRFSettings(
        iterations=10, gauss_sxy=1, gauss_weight=3, bilateral_sxy=67, bilateral_srgb=3, bilateral_weight=4
    ),
}
"""The refiner crf's published recipe, for presets in which it has another of its own."""

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=ClipesOptions(texts=TextOptions(published=True)),
        fit=Fit(steps=0),
        weights=PRETRAINED,
        init="clip",
        infer=TEXTED_INFER,
    ),
    refiner="crf",
    refine=_CONFIDENT,
    segmenter="deeplabv2",
    # from an ImageNet classifier; that of its own recipe starts from COCO's pixel masks, which is no comparison
    segment={"fit.lr": 2e-4, "init": "imagenet"},
)

# COCO: cut and texts as published (the rule for background words leaves the published 23). The settings of the
# segmentation network are in the paper's appendix, which was not seen: VOC's are taken (clipes.md section 11)
_COCO = override(_PUBLISHED, {"cam.network.cut": 0.7, "data": "coco14"})

# people's own photographs: maps and masks as published (the CRF's own recipe photos is made for the maps of CNNs); the
# segmentation network of the recipes photos, but from a classifier that timm fetches, as CLIP is no CNN whose weights
# it could start from. Attention needs memory by the square of an image's pixels, so large photographs are shrunk as
# there. The training was not tried on photographs
_PHOTOS = override(
    _PUBLISHED,
    {
        "data": "folder",
        "long_side": 1024,
        "refine": {**_CONFIDENT, **_PUBLISHED_CRF},
        "segmenter": "deeplabv3plus",
        "segment": {"weights": PRETRAINED, "init": "imagenet"},
    },
)

# random weights, because none can be had without the internet: this shows that the pipeline runs, the maps mean nothing
_SAMPLE = Recipe(
    cam=SeedRecipe(
        network=ClipesOptions(clip=ClipOptions(image_size=112, width=64, layers=4, embed=32), blocks=3),
        fit=Fit(steps=0),
        infer=TEXTED_INFER,
    ),
    refiner="crf",
    segmenter="deeplabv2",
    segment={"fit.epochs": 2},
)

Clipes.recipes = {"published": _PUBLISHED, "published_coco": _COCO, "photos": _PHOTOS, "sample": _SAMPLE}
