"""What CLIP-ES and WeCLIP share: networks on a frozen CLIP that knows classes by texts (net/backbone/clip_maps.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from misc.checked import Count, Fraction, check
from misc.config import CamInference
from net.backbone.clip import ClipOptions
from net.backbone.clip_maps import FrozenClip
from net.backbone.clip_text import TextOptions, Texts
from net.contract import Options, SeedNetwork
from net.foreign.openai import read_clip


class TextedNetwork(SeedNetwork):
    """A frozen image tower and the features of texts. Its file needs neither text tower nor tokeniser."""

    map_needs_gradient = True

    def __init__(self, options: TextedOptions, num_classes: int) -> None:
        super().__init__()
        self.options = options
        self.texts = Texts((), (), options.texts.templates)
        self.encoder = FrozenClip(options.clip, num_classes)

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """Scaled cosines with the classes' texts: (B, 3, H, W) -> (B, C)."""
        return self.encoder.text_logits(images)[:, :num_classes]

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


@dataclass(frozen=True)
class TextedOptions(Options):
    """CLIP, its texts and the map; the defaults are the published ones for VOC."""

    clip: ClipOptions = field(default_factory=ClipOptions)
    """Size of the image tower."""
    texts: TextOptions = field(default_factory=TextOptions)
    """Texts of classes and background."""
    cut: Fraction = 0.4
    """Fraction of a map's maximum above which its parts lie in the rectangles that it spreads from. Published: 0.4 for
    VOC, 0.7 for COCO."""
    blocks: Count = 8
    """Number of last blocks whose attention is averaged; in WeCLIP, before the switch."""
    reads_class_texts = True

    def cross_check(self) -> None:
        """Raises ValueError for more blocks than there are."""
        super().cross_check()
        check(self.blocks <= self.clip.layers, "blocks", self.blocks, f"at most the network's {self.clip.layers}")

    @property
    def keeps_start_weights(self) -> bool:
        """CLIP is frozen."""
        return True


TEXTED_INFER = CamInference(scales=(1.0,), flip=False, stretch=16, normalise="none")
"""Inference of the CAMs in all recipes (clipes.md section 4, weclip.md section 5)."""
