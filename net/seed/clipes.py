"""CLIP-ES: class maps of a frozen CLIP, with nothing trained (Lin et al., 2023; clipes.md).

CLIP scores an image against the texts of its tags and of background words. The gradient of a tag's probability p_c,
with respect to the normalised tokens U that enter the last block, weighs their channels:

    s_c = scaled( relu( sum over k of w_ck U_k ) ),   w_ck = mean over the patches of dp_c / dU_k

and the mean attention A of the last eight blocks spreads the map from the rectangles m_c around its strong parts, where
S is A made doubly stochastic and symmetric:

    r_c = scaled( S S (m_c s_c) )
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from misc.checked import Count, Fraction, check
from misc.config import CamInference, Fit, override
from misc.loop.trainable import Batch
from misc.precision import full_precision
from misc.propagate.caa import refine_by_attention, scale_to_unit
from net.backbone.clip import ClipOptions
from net.backbone.clip_maps import FrozenClip
from net.backbone.clip_text import TextOptions, Texts
from net.backbone.transformer import AttentionSums
from net.contract import Network, Options, Recipe, SeedNetwork, SeedRecipe
from net.foreign.openai import read_clip
from net.registry import seed
from net.start_weights import PRETRAINED


@seed("clipes")
class Clipes(SeedNetwork):
    """A frozen image tower and the features of texts. Its file needs neither text tower nor tokeniser."""

    published_scores = "70.8 / 75.0 / 71.1"
    normalisation = "clip"
    map_needs_gradient = True

    def __init__(self, options: ClipesOptions, num_classes: int) -> None:
        super().__init__()
        self.options = options
        self.texts = Texts((), (), options.texts.templates)
        self.encoder = FrozenClip(options.clip, num_classes)

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

    def set_class_texts(self, names: Sequence[str], own: Mapping[str, str]) -> None:
        """Choose the texts; until weights are loaded their features are random directions."""
        self.texts = self.options.texts.choose(names, own)
        self.encoder.draw_texts(len(self.texts.background))

    def notes(self) -> dict[str, Any]:
        """The texts that were encoded."""
        return {"texts": self.texts.record()}

    def pretrained_names(self) -> tuple[str, ...]:
        """The whole CLIP of ``options.clip``, as open_clip has it."""
        return (f"open_clip:{self.options.clip.pretrained}",)

    def load_weights(self, weights: str) -> str:
        """A whole CLIP: a file, or ``open_clip:NAME``. Its text tower encodes the texts."""
        return self.encoder.load_clip(read_clip(weights), self.texts, weights)

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """Scaled cosines with the classes' texts: (B, 3, H, W) -> (B, C)."""
        return self.encoder.text_logits(images)[:, :num_classes]


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class ClipesOptions(Options):
    """CLIP, its texts and the map; the defaults are the published ones for VOC."""

    clip: ClipOptions = field(default_factory=ClipOptions)
    """Size of the image tower."""
    texts: TextOptions = field(default_factory=TextOptions)
    """Texts of classes and background."""
    cut: Fraction = 0.4
    """Share of a map's maximum above which its parts lie in the rectangles that it spreads from. Published: 0.4 for
    VOC, 0.7 for COCO."""
    blocks: Count = 8
    """Number of last blocks whose attention is averaged."""
    reads_class_texts = True

    def cross_check(self) -> None:
        """Raises ValueError for more blocks than there are."""
        check(self.blocks <= self.clip.layers, "blocks", self.blocks, f"at most the network's {self.clip.layers}")

    @property
    def keeps_start_weights(self) -> bool:
        """Nothing is trained."""
        return True

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> Clipes:
        """CLIP-ES for ``num_classes`` foreground classes."""
        return Clipes(self, num_classes)


# ------------------------------------------------------------------------------ recipes (clipes.md sections 4 to 8)

_INFER = CamInference(scales=(1.0,), flip=False, stretch=16, normalise="none")
_CONFIDENT = {"ignore_below": 0.95}
"""The segmentation network is not trained where the CRF is less sure than this."""

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=ClipesOptions(texts=TextOptions(published=True)),
        fit=Fit(steps=0),
        weights=PRETRAINED,
        init="clip",
        infer=_INFER,
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

# people's own photographs: masks as published; a segmentation network that fits one GPU, from a classifier that timm
# fetches. Its training was not tried on photographs
_PHOTOS = override(
    _PUBLISHED,
    {
        "data": "folder",
        "segmenter": "deeplabv3plus",
        "segment": {
            "weights": PRETRAINED, "init": "imagenet", "network.backbone": "resnet", "fit.epochs": 30,
            "fit.batch_size": 8, "fit.lr": 0.002,
        },
    },
)  # fmt: skip

# random weights, because none can be had without the internet: this shows that the pipeline runs, the maps mean nothing
_SAMPLE = Recipe(
    cam=SeedRecipe(
        network=ClipesOptions(clip=ClipOptions(image_size=112, width=64, layers=4, embed=32), blocks=3),
        fit=Fit(steps=0),
        infer=_INFER,
    ),
    refiner="crf",
    segmenter="deeplabv2",
    segment={"fit.epochs": 2},
)

Clipes.recipes = {"published": _PUBLISHED, "published_coco": _COCO, "photos": _PHOTOS, "sample": _SAMPLE}
