"""A whole CAM method in forty lines, as a user would write it: what tests/net/test_new_method.py adds to net/seed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from misc.config import Augment, CamInference, Fit
from net.contract import Batch, Network, Options, Recipe, SeedNetwork, SeedRecipe
from net.losses import multilabel_soft_margin
from net.registry import seed


@seed("three_layers")
class ThreeLayers(SeedNetwork):
    """Class maps of three convolutions, trained by their means."""

    def __init__(self, options: ThreeLayerOptions, num_classes: int) -> None:
        super().__init__()
        w = options.width
        self.body = nn.Sequential(nn.Conv2d(3, w, 3, 2, 1), nn.ReLU(), nn.Conv2d(w, w, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(w, num_classes, 1)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """{"cls": multi-label soft margin loss}."""
        return {"cls": multilabel_soft_margin(self.head(self.body(batch["image"])).mean((2, 3)), batch["tags"])}

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))."""
        return self.head(self.body(images)).relu().float()


@dataclass(frozen=True)
class ThreeLayerOptions(Options):
    """Three convolutions."""

    width: int = 16
    """Channels of the three layers."""

    def build(self, num_classes: int, earlier: dict[str, Network]) -> ThreeLayers:
        """The network for ``num_classes`` foreground classes."""
        return ThreeLayers(self, num_classes)


_FIT, _AUGMENT = Fit(epochs=2, batch_size=4, optimiser="adamw", lr=1e-3), Augment(long_side=(64, 90), crop=64)
_CAM = SeedRecipe(ThreeLayerOptions(), _FIT, _AUGMENT, infer=CamInference(scales=(1.0,)))
ThreeLayers.recipes = {"published": Recipe(cam=_CAM), "sample": Recipe(cam=_CAM)}
