"""IRNet's CAM network: a 1x1 classifier on ResNet-50 (Ahn, Cho and Kwak, CVPR 2019; irnet.md sections 3
to 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Names, Positive, When
from misc.config import Augment, CamInference, Fit
from net.backbone.resnet import SAMPLE_RESNET, ResNetOptions
from net.backbone.stages import load_backbone, make_backbone, place_maps, pretrained_name
from net.backbone.timm_cnn import ON_TIMM, PHOTOS, PREFIX, TimmOptions
from net.contract import Batch, Network, Options, Recipe, SeedNetwork, SeedRecipe
from net.groups import Group
from net.losses import multilabel_soft_margin
from net.registry import seed
from net.shared.photos import PHOTOS_CAMS, PHOTOS_TIMM_OF_MEANS, make_photos_recipe
from net.start_weights import PRETRAINED


@seed("irn_cam")
class IRNCam(SeedNetwork):
    """The classifier; state-dict names are the official ones (each tensor once): ``resnet50``, ``classifier``."""

    published_scores = "48.3 / 66.5 / 63.5"

    def __init__(self, options: IRNCamOptions, num_classes: int) -> None:
        super().__init__()
        self.head_lr = options.head_lr
        self.resnet50 = make_backbone(options)
        self.normalisation = self.resnet50.normalisation
        self.classifier = nn.Conv2d(self.resnet50.channels["layer4"], num_classes, 1, bias=False)

    def class_logits(self, images: Tensor) -> Tensor:
        """Class scores: the features are pooled, then classified; (B, 3, H, W) -> (B, C)."""
        return self.classifier(self.resnet50(images).mean((2, 3), keepdim=True)).flatten(1)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C) -> {"cls": multi-label soft margin loss}."""
        return {"cls": multilabel_soft_margin(self.class_logits(batch["image"]), batch["tags"])}

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """Rectified maps of all classes: (B, 3, H, W) -> (B, C, ceil(H/16), ceil(W/16)) float32; on a CNN of timm
        (B, C, H, W)."""
        return place_maps(self.resnet50, F.relu(self.classifier(self.resnet50(images)).float()), images.shape[-2:])

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """Logits: (B, 3, H, W) -> (B, C) float32."""
        return self.class_logits(images).float()

    def param_groups(self) -> list[Group]:
        """Backbone at the base rate, classifier at ``head_lr`` times it; everything is decayed (irnet.md section 5)."""
        backbone = [p for p in self.resnet50.parameters() if p.requires_grad]
        return [Group(backbone), Group(list(self.classifier.parameters()), self.head_lr)]

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifier of the backbone."""
        return (pretrained_name(self.resnet50),)

    def load_weights(self, weights: str) -> str:
        """ImageNet weights ('pretrained': torchvision's by the option of the backbone, or a file), or a whole
        checkpoint; the classifier may be absent or of other classes: then it stays random, and the report says so."""
        return load_backbone(self, weights, heads=("classifier",), owner="resnet50")


@dataclass(frozen=True)
class IRNCamOptions(Options):
    """Options of the network; the defaults are the published ones."""

    backbone: Annotated[str, Names(("resnet",), PREFIX)] = "resnet"
    """Backbone; only the section with this name is used. timm/NAME: a CNN of timm."""
    resnet: Annotated[ResNetOptions, When("backbone", "resnet")] = field(
        default_factory=lambda: ResNetOptions(frozen="layer2")
    )
    """ResNet. Published: no gradient up to layer2, whose map is detached."""
    timm: Annotated[TimmOptions, ON_TIMM] = field(default_factory=TimmOptions)
    """CNN of timm, if it is the backbone."""
    head_lr: Positive = 10.0
    """Learning rate of the classifier relative to the backbone's."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> IRNCam:
        """The classifier for ``num_classes`` foreground classes."""
        return IRNCam(self, num_classes)


_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=IRNCamOptions(),
        # the momentum is the published poly-SGD's, which passes its weight decay there: with a real one of 0.9 the
        # rates are ten times too large (irnet.md section 5)
        fit=Fit(epochs=5, batch_size=16, lr=0.1, momentum=1e-4, weight_decay=1e-4),
        augment=Augment(order=("long_side", "normalize", "flip", "crop"), long_side=(320, 640), crop=512),
        weights=PRETRAINED,
        infer=CamInference(
            scales=(1.0, 0.5, 1.5, 2.0), flip=True, normalise="max", round_up=16, coarse=4, fixed_background=0.15
        ),
    ),
    refiner="irn",
    segmenter="deeplabv2",
    segment={"network.form": "torchvision", "weights": PRETRAINED, "init": "imagenet"},
)

# trained from random weights: nothing frozen
_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        network=IRNCamOptions(resnet=SAMPLE_RESNET, head_lr=1.0),
        fit=Fit(epochs=25, batch_size=16, optimiser="adamw", lr=0.003, weight_decay=0.01),
        augment=Augment(order=("long_side", "normalize", "flip", "crop"), long_side=(112, 160), crop=112),
        infer=CamInference(scales=(0.5, 1.0, 1.5, 2.0), flip=True, normalise="max", coarse=4),
    ),
    refiner="irn",
    refine={"weights": "cam"},
    segmenter="deeplabv2",
    segment={"weights": "cam"},
)

IRNCam.recipes = {
    "published": _PUBLISHED,
    "sample": _SAMPLE,
    "photos": make_photos_recipe(
        IRNCamOptions(backbone=PHOTOS, timm=PHOTOS_TIMM_OF_MEANS), replace(PHOTOS_CAMS, coarse=4)
    ),
}
