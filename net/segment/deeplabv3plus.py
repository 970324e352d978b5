"""DeepLab v3+ of Puzzle-CAM: atrous spatial pyramid pooling at stride 16 and a decoder at stride 4, on a ResNeSt or a
ResNet (deeplab.md part D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Names, Positive, Range, When
from misc.config import Augment, Fit, SegInference
from misc.crf.dense import CRFSettings
from misc.image.labels import IGNORE
from misc.precision import at_least_float32
from net.backbone.resnest import ResNeStOptions
from net.backbone.resnet import SAMPLE_RESNET, ResNetOptions
from net.backbone.stages import load_backbone, make_backbone, pretrained_name
from net.backbone.timm_cnn import ON_TIMM, PHOTOS, PREFIX, TimmCNN, TimmOptions, to_stride
from net.contract import Network, Options, Segmenter, SegmentRecipe
from net.groups import Group, name_groups
from net.registry import segmenter
from net.shared.photos import PHOTOS_TIMM, make_photos_segment_recipe
from net.start_weights import PRETRAINED


@segmenter("deeplabv3plus")
class DeepLabV3Plus(Segmenter):
    """A backbone ``model``, a pyramid ``aspp`` and a ``decoder``.

    State-dict names are those of the official checkpoints, which hold the backbone twice (``model.*``, ``stage1.*`` to
    ``stage5.*``); here it is once. deeplab.md D.1.

    Args:
        num_classes: foreground classes.
        options: size and training behaviour.
    """


    def __init__(self, num_classes: int, options: DeepLabV3PlusOptions | None = None) -> None:
        super().__init__()
        self.options = options = options or DeepLabV3PlusOptions()
        self.model = make_backbone(options)
        self.normalisation = self.model.normalisation
        channels = self.model.channels
        self.aspp = AtrousPyramid(options, channels["layer4"])
        strides = self.model.strides if isinstance(self.model, TimmCNN) else None
        ratio = strides and strides["layer4"] // strides["layer1"]
        self.decoder = Decoder(options, channels["layer1"], num_classes + 1, ratio)
        for part in (self.aspp, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
        self._freeze()

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C + 1, H, W): upsampled inside the network, with aligned corners."""
        taps = self.model.forward_stages(images)
        scores = self.decoder(self.aspp(taps["layer4"]), taps["layer1"])  # (B, C + 1, h, w), h = ceil(H / 4)
        scores = at_least_float32(scores)
        if isinstance(self.model, TimmCNN):
            return self.model.enlarge(scores, images.shape[-2:], "layer1")
        return F.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=True)

    def _freeze(self) -> None:
        """Batch normalisation of the head, if any, is trained or fixed like the backbone's."""
        if self.model.options.norm != "trained":
            for part in (self.aspp, self.decoder):
                for module in part.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eval()
                        module.requires_grad_(self.model.options.norm == "fixed")

    def train(self, mode: bool = True) -> DeepLabV3Plus:
        """Set training or evaluation mode, except for fixed layers; returns self."""
        super().train(mode)
        self._freeze()
        return self

    def param_groups(self) -> list[Group]:
        """Weights and other parameters of the backbone, then those of pyramid and decoder (deeplab.md D.2)."""
        return name_groups(self, ("model",), self.options.head_lr)

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifier of the backbone."""
        return (pretrained_name(self.model),)

    def load_weights(self, weights: str) -> str:
        """Start from an ImageNet file of torchvision, timm or ResNeSt, a Puzzle-CAM on the same backbone, or a whole
        ``deeplabv3plus``; 'pretrained': timm's file."""
        return load_backbone(self, weights, heads=("aspp", "decoder"), owner="model")


# ---------------------------------------------------------------------------------------------- layers (deeplab.md D.1)

_GROUPS = 4


def _norm(options: DeepLabV3PlusOptions, channels: int) -> nn.Module:
    """The normalisation layer that the options name."""
    return nn.GroupNorm(_GROUPS, channels) if options.norm == "group" else nn.BatchNorm2d(channels)


class PyramidBranch(nn.Module):
    """Convolution ``atrous_conv`` without bias, ``bn``, ReLU: (B, cin, h, w) -> (B, channels, h, w).

    ``rate`` 1 is a 1x1 convolution, other rates are dilations of a 3x3 one.
    """

    def __init__(self, options: DeepLabV3PlusOptions, cin: int, rate: int) -> None:
        super().__init__()
        kernel, padding = (1, 0) if rate == 1 else (3, rate)
        self.atrous_conv = nn.Conv2d(cin, options.channels, kernel, padding=padding, dilation=rate, bias=False)
        self.bn = _norm(options, options.channels)

    def forward(self, x: Tensor) -> Tensor:
        """The forward pass, as described for the class."""
        return F.relu(self.bn(self.atrous_conv(x)))


class AtrousPyramid(nn.Module):
    """The pyramid of a map: (B, cin, h, w) -> (B, channels, h, w).

    ``aspp1`` on, one branch each for rate 1 and the options' rates, then the mean of the map.
    """

    def __init__(self, options: DeepLabV3PlusOptions, cin: int) -> None:
        super().__init__()
        rates = (1, *options.rates)
        self.branch_names = [f"aspp{number}" for number in range(1, len(rates) + 1)]
        for name, rate in zip(self.branch_names, rates, strict=True):
            self.add_module(name, PyramidBranch(options, cin, rate))
        width = options.channels
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(cin, width, 1, bias=False), _norm(options, width), nn.ReLU()
        )
        self.conv1 = nn.Conv2d(width * (len(rates) + 1), width, 1, bias=False)
        self.bn1 = _norm(options, width)
        self.dropout = nn.Dropout(options.dropout[0])

    def forward(self, x: Tensor) -> Tensor:
        """The forward pass, as described for the class."""
        branches = [getattr(self, name)(x) for name in self.branch_names]
        mean = self.global_avg_pool(x).expand(-1, -1, *x.shape[-2:])  # (B, channels, 1, 1) -> (B, channels, h, w)
        return self.dropout(F.relu(self.bn1(self.conv1(torch.cat([*branches, mean], dim=1)))))


class Decoder(nn.Module):
    """Class scores at the size of the first stage: (B, channels, h, w) and (B, low, h', w') -> (B, cout, h', w').

    ``ratio``: cells of the first stage per cell of the last, whose places are kept where the last ones reach beyond the
    image. None: the last map is stretched over the first with aligned corners, as published.
    """

    def __init__(self, options: DeepLabV3PlusOptions, low: int, cout: int, ratio: int | None = None) -> None:
        super().__init__()
        self.ratio = ratio
        width, narrow = options.channels, options.low_channels
        self.conv1 = nn.Conv2d(low, narrow, 1, bias=False)
        self.bn1 = _norm(options, narrow)
        self.classifier = nn.Sequential(
            nn.Conv2d(width + narrow, width, 3, padding=1, bias=False),
            _norm(options, width),
            nn.ReLU(),
            nn.Dropout(options.dropout[1]),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            _norm(options, width),
            nn.ReLU(),
            nn.Dropout(options.dropout[2]),
            nn.Conv2d(width, cout, 1),
        )

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        """The forward pass, as described for the class."""
        low = F.relu(self.bn1(self.conv1(low)))
        if self.ratio is None:
            x = F.interpolate(x, size=low.shape[-2:], mode="bilinear", align_corners=True)
        else:
            x = to_stride(x, self.ratio, 1)[..., : low.shape[-2], : low.shape[-1]]
        return self.classifier(torch.cat([x, low], dim=1))


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class DeepLabV3PlusOptions(Options):
    """Network of ``deeplabv3plus``; the defaults are the published ones."""
    # deeplab.md D.1

    backbone: Annotated[str, Names(("resnest", "resnet"), PREFIX)] = "resnest"
    """Backbone; only the section with this name is used. The published scores are for resnest. timm/NAME: a CNN of
    timm."""
    resnest: Annotated[ResNeStOptions, When("backbone", "resnest")] = field(
        default_factory=lambda: ResNeStOptions(norm="fixed")
    )
    """Options of the ResNeSt, if it is the backbone."""
    resnet: Annotated[ResNetOptions, When("backbone", "resnet")] = field(default_factory=ResNetOptions)
    """Options of the ResNet, if it is the backbone."""
    timm: Annotated[TimmOptions, ON_TIMM] = field(default_factory=TimmOptions)
    """CNN of timm, if it is the backbone."""
    rates: Annotated[tuple[int, ...], Range(least=1, filled=True)] = (6, 12, 18)
    """Dilations of the parallel 3x3 convolutions, in cells of 16 pixels; parallel to them are a 1x1 convolution and the
    mean of the whole map."""
    channels: Annotated[int, Range(least=_GROUPS, multiple=_GROUPS)] = 256
    """Channels of the pyramid and of the decoder."""
    low_channels: Annotated[int, Range(least=_GROUPS, multiple=_GROUPS)] = 48
    """Channels to which the map of the first stage is reduced."""
    norm: Literal["group", "batch"] = "group"
    """Normalisation of pyramid and decoder. group: over 4 groups of channels, as published. batch: batch normalisation,
    trained or fixed like the backbone's."""
    dropout: Annotated[tuple[float, float, float], Range(least=0, below=1)] = (0.5, 0.5, 0.1)
    """Dropout probabilities: after the pyramid, and after each of the decoder's 3x3 convolutions."""
    head_lr: Positive = 10.0
    """Learning rate of pyramid and decoder relative to the backbone's; biases learn twice as fast as weights."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> DeepLabV3Plus:
        """The network for ``num_classes`` foreground classes."""
        return DeepLabV3Plus(num_classes, self)


# ---------------------------------------------------------------------------------------------- the network

_CRF = CRFSettings(iterations=10, gauss_sxy=3, gauss_weight=3, bilateral_sxy=80, bilateral_srgb=13, bilateral_weight=10)

DeepLabV3Plus.recipes = {
    # Published: after each epoch the published code keeps the network with the best score on val's true masks; here
    # it is the last one. Momentum: the published optimiser uses the weight decay as momentum (deeplab.md D.2,
    # semformer.md section 7).
    "published": SegmentRecipe(
        network=DeepLabV3PlusOptions(),
        fit=Fit(epochs=50, batch_size=32, lr=0.007, momentum=4e-5, nesterov=True, weight_decay=4e-5, power=0.9),
        augment=Augment(
            order=("long_side", "flip", "normalize", "crop"),
            long_side=(256, 1024),
            flip=0.5,
            crop=512,
            crop_place="random",
            mask_fill=IGNORE,
        ),
        weights=PRETRAINED,
        init="imagenet",
        infer=SegInference(
            scales=(0.5, 1.0, 1.5, 2.0),
            flip=True,
            resize="bicubic",
            merge="sum_logits",
            align_corners=False,
            crf=_CRF,
        ),
    ),
    "sample": SegmentRecipe(
        amp="fast",
        network=DeepLabV3PlusOptions(
            backbone="resnet",
            resnet=SAMPLE_RESNET,
            rates=(1, 2, 3),
            channels=64,
            low_channels=16,
            dropout=(0.1, 0.1, 0.1),
            head_lr=1.0,
        ),
        fit=Fit(epochs=18, batch_size=16, optimiser="adamw", lr=0.002, weight_decay=0.01),
        augment=Augment(
            order=("hsv", "flip", "scale", "normalize", "crop"), scale=(0.75, 1.25), scale_filter="cubic", crop=112
        ),
        infer=SegInference(
            scales=(0.75, 1.0, 1.25),
            flip=True,
            align_corners=False,
            crf=CRFSettings(iterations=1, bilateral_sxy=32),
        ),
    ),
    "photos": make_photos_segment_recipe(
        DeepLabV3PlusOptions(
            backbone=PHOTOS, timm=PHOTOS_TIMM, rates=(3, 6, 9), channels=128, low_channels=32, dropout=(0.1, 0.1, 0.1)
        )
    ),
}
