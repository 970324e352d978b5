"""PSA's plain CAM networks: a classifier on ResNet38 or VGG16 whose class weights give the maps (Ahn and Kwak,
CVPR 2018; psa.md section 2)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import DropProbability, Names, Positive, When
from misc.config import Augment, CamInference, Fit, override
from net.backbone.resnet38 import SAMPLE_RESNET38, ResNet38, ResNet38Options
from net.backbone.timm_cnn import ON_TIMM, PHOTOS, PREFIX, TimmCNN, TimmOptions, load_timm
from net.backbone.vgg16 import VGG16, VGG16Options
from net.contract import Batch, Network, Options, Recipe, SeedNetwork, SeedRecipe
from net.foreign.loading import load_tensors
from net.groups import Group, conv_groups
from net.losses import multilabel_soft_margin
from net.registry import seed
from net.shared.photos import PHOTOS_TIMM_OF_MEANS, make_photos_recipe
from net.start_weights import REQUIRED


@seed("psa")
class PlainCam(SeedNetwork):
    """Base of both classifiers; ``CamOptions.build`` creates one of them.

    State-dict names are those of the official checkpoints.
    """

    published_scores = "48.0 / 58.1 / 61.7 †"
    head_lr: float

    @abstractmethod
    def class_logits(self, images: Tensor) -> Tensor:
        """Class scores: (B, 3, H, W) -> (B, C)."""

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C) -> {"cls": multi-label soft margin loss}."""
        return {"cls": multilabel_soft_margin(self.class_logits(batch["image"]), batch["tags"])}

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """Logits: (B, 3, H, W) -> (B, C) float32."""
        return self.class_logits(images).float()

    def param_groups(self) -> list[Group]:
        """The published four groups; the classifier is the new layer."""
        return conv_groups(self, ("fc8",), self.head_lr)

    def load_weights(self, weights: str) -> str:
        """ImageNet weights of the backbone (``.params``, ``.caffemodel``) or a whole classifier.

        ``fc8`` may be missing or have other classes: then it stays random, and the report says so.
        """
        return str(load_tensors(self, weights, allow_missing=("fc8",)))


class CamResNet38(PlainCam, ResNet38):
    """The classifier on ResNet38 (psa.md section 2.1)."""

    normalisation = ResNet38.normalisation

    def __init__(self, options: CamOptions, num_classes: int) -> None:
        super().__init__(options.resnet38)
        self.head_lr = options.head_lr
        self.dropout7 = nn.Dropout2d(options.dropout)
        self.fc8 = nn.Conv2d(self.channels["conv6"], num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)

    def class_logits(self, images: Tensor) -> Tensor:
        """Class scores: the features are pooled, then classified; (B, 3, H, W) -> (B, C)."""
        pooled = self.dropout7(self.forward_stages(images)["conv6"]).mean((2, 3), keepdim=True)  # (B, 4096, 1, 1)
        return self.fc8(pooled).flatten(1)

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """Rectified maps of all classes: (B, 3, H, W) -> (B, C, ceil(H/8), ceil(W/8)) float32."""
        return F.relu(self.fc8(self.forward_stages(images)["conv6"]).float())


class CamVGG16(PlainCam, VGG16):
    """The classifier on VGG16 (psa.md section 2.2)."""

    normalisation = VGG16.normalisation

    def __init__(self, options: CamOptions, num_classes: int) -> None:
        super().__init__(options.vgg16)
        self.head_lr = options.head_lr
        self.drop7 = nn.Dropout2d(options.dropout)
        self.fc8 = nn.Conv2d(self.channels["fc7"], num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)

    def class_logits(self, images: Tensor) -> Tensor:
        """Class scores: the maps are pooled; (B, 3, H, W) -> (B, C)."""
        return self.fc8(self.drop7(self.forward_stages(images)["fc7"])).mean((2, 3))

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """Square root of the rectified maps: (B, 3, H, W) -> (B, C, ceil(H/8), ceil(W/8)) float32."""
        return F.relu(self.fc8(self.forward_stages(images)["fc7"]).float()).sqrt()


class CamTimm(PlainCam):
    """The classifier on a CNN of timm; the features are pooled, then classified, as on ResNet38."""

    def __init__(self, options: CamOptions, num_classes: int) -> None:
        super().__init__()
        self.head_lr = options.head_lr
        self.backbone = TimmCNN(options.backbone, options.timm)
        self.normalisation = self.backbone.normalisation
        self.dropout7 = nn.Dropout2d(options.dropout)
        self.fc8 = nn.Conv2d(self.backbone.channels["layer4"], num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)

    def class_logits(self, images: Tensor) -> Tensor:
        """Class scores: (B, 3, H, W) -> (B, C)."""
        return self.fc8(self.dropout7(self.backbone(images).mean((2, 3), keepdim=True))).flatten(1)

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """Rectified maps of all classes at the size of the images: (B, 3, H, W) -> (B, C, H, W) float32."""
        return self.backbone.enlarge(F.relu(self.fc8(self.backbone(images)).float()), images.shape[-2:])

    def pretrained_names(self) -> tuple[str, ...]:
        """The backbone, by timm's name."""
        return (self.backbone.name,)

    def load_weights(self, weights: str) -> str:
        """timm's weights of the backbone, or a network here with the same one."""
        return load_timm(self, weights, heads=("fc8",), owner="backbone")


@dataclass(frozen=True)
class CamOptions(Options):
    """Options of the network; the defaults are the published ones."""

    backbone: Annotated[str, Names(("resnet38", "vgg16"), PREFIX)] = "resnet38"
    """Backbone; only the section with this name is used. With vgg16 the published
    learning rate is 0.1: preset published_vgg16. timm/NAME: a CNN of timm."""
    resnet38: Annotated[ResNet38Options, When("backbone", "resnet38")] = field(
        default_factory=lambda: ResNet38Options(frozen="b2")
    )
    """Options of the ResNet38 backbone."""
    vgg16: Annotated[VGG16Options, When("backbone", "vgg16")] = field(default_factory=VGG16Options)
    """Options of the VGG16 backbone."""
    timm: Annotated[TimmOptions, ON_TIMM] = field(default_factory=TimmOptions)
    """CNN of timm."""
    dropout: DropProbability = 0.5
    """Channel dropout probability before the classifier."""
    head_lr: Positive = 10.0
    """Learning rate of the new layers relative to the pre-trained ones."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> PlainCam:
        """The classifier for ``num_classes`` foreground classes."""
        return {"resnet38": CamResNet38, "vgg16": CamVGG16}.get(self.backbone, CamTimm)(self, num_classes)


_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=CamOptions(),
        # lr: published is 0.1, which is for VGG16 only; ResNet38 needs 0.01 (psa.md section 2.3).
        # momentum: the published optimiser uses the weight decay as momentum (seam.md section 7.1).
        fit=Fit(epochs=15, batch_size=16, lr=0.01, momentum=5e-4, weight_decay=5e-4, schedule="poly", power=0.9),
        augment=Augment(
            order=("long_side", "flip", "jitter", "normalize", "crop"),
            long_side=(256, 512),
            flip=0.5,
            jitter=(0.3, 0.3, 0.3, 0.1),
            crop=448,
        ),
        weights=REQUIRED,
        infer=CamInference(scales=(1.0, 0.5, 1.5, 2.0), flip=True, normalise="max"),
    ),
    # psa.md sections 4 to 6, the rows of PSA's code
    refiner="psa",
    refine={
        "label.alpha_low": 4.0,
        "label.alpha_high": 32.0,
        "walk.background": "power",
        "walk.alpha": 16.0,
        "walk.beta": 8.0,
        "walk.logt": 8,
        "fit.epochs": 8,
    },
    segmenter="deeplabv1",
)

# psa.md sections 2.3 and 5.5: the published rate of both trainings is VGG16's
_PUBLISHED_VGG16 = override(
    _PUBLISHED,
    {
        "cam.network.backbone": "vgg16",
        "cam.fit.lr": 0.1,
        "refine": {**_PUBLISHED.refine, "network.backbone": "vgg16", "fit.lr": 0.1},
    },
)

# trained from random weights: nothing frozen, and no dropout, which only adds noise in so few steps
_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        network=CamOptions(
            resnet38=SAMPLE_RESNET38,
            vgg16=VGG16Options(width=0.25, dropout=0.0, frozen="none"),
            dropout=0.0,
            head_lr=4.0,
        ),
        fit=Fit(epochs=20, batch_size=16, optimiser="adamw", lr=0.0015, weight_decay=0.01),
        augment=Augment(long_side=(112, 160), jitter=(0.2, 0.2, 0.2, 0.02), crop=112),
        infer=CamInference(scales=(0.5, 1.0, 1.5, 2.0), flip=True, normalise="max"),
    ),
    refiner="psa",
    refine={"weights": "cam"},
    segmenter="deeplabv1",
    segment={"weights": "cam"},
)

PlainCam.recipes = {
    "published": _PUBLISHED,
    "published_vgg16": _PUBLISHED_VGG16,
    "sample": _SAMPLE,
    "photos": make_photos_recipe(CamOptions(backbone=PHOTOS, timm=PHOTOS_TIMM_OF_MEANS, dropout=0.2)),
}
