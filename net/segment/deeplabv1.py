"""DeepLab v1 on ResNet38 as SEAM and TransCAM re-train it (deeplab.md A).

The classifier follows a dilated 3x3 and a 1x1 convolution with batch normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Count, DropProbability, Names, Positive, When
from misc.config import Augment, Fit, SegInference
from misc.crf.dense import CRFSettings
from misc.image.labels import IGNORE
from misc.precision import at_least_float32
from net.backbone.resnet38 import SAMPLE_RESNET38, ResNet38, ResNet38Options
from net.backbone.timm_cnn import ON_TIMM, PHOTOS, PREFIX, TimmCNN, TimmOptions, load_timm
from net.contract import Network, Options, Segmenter, SegmentRecipe
from net.foreign.loading import load_tensors
from net.foreign.mxnet import resnet38_from_mxnet
from net.groups import Group, conv_groups
from net.registry import segmenter
from net.shared.photos import PHOTOS_TIMM, make_photos_segment_recipe
from net.start_weights import REQUIRED


@segmenter("deeplabv1")
class DeepLabV1(Segmenter):
    """SEAM's DeepLab v1 (deeplab.md A).

    In training all batch normalisation uses batch statistics, conv1a learns and all dropout is active: the published
        loop never calls ``train()``, so the backbone is never frozen. Its optimiser contains no batch normalisation
        parameter (deeplab.md A.2). Both are options here.

    Args:
        num_classes: foreground classes.
        options: size and training behaviour.
    """

    def __init__(self, num_classes: int, options: DeepLabV1Options | None = None) -> None:
        super().__init__()
        options = options or DeepLabV1Options()
        channels, dilation = options.fov_channels, options.fov_dilation
        self.head_lr = options.head_lr
        self.backbone: ResNet38 | TimmCNN
        if options.backbone == "resnet38":
            self.backbone, self.last, momentum = ResNet38(options.resnet38), "conv6", options.resnet38.bn_momentum
        else:
            self.backbone, self.last, momentum = TimmCNN(options.backbone, options.timm), "layer4", 0.1
        self.normalisation = self.backbone.normalisation
        cin = self.backbone.channels[self.last]
        self.conv_fov = nn.Conv2d(cin, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_fov = nn.BatchNorm2d(channels, momentum=momentum)
        self.conv_fov2 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn_fov2 = nn.BatchNorm2d(channels, momentum=momentum)
        self.drop = nn.Dropout(options.dropout)
        self.cls_conv = nn.Conv2d(channels, num_classes + 1, 1)
        for convolution in (self.conv_fov, self.conv_fov2, self.cls_conv):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        if not options.train_affine:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C + 1, H, W): upsampled inside the network, with aligned corners as published; the cells
        of a CNN of timm keep their places."""
        x = self.backbone.forward_stages(images)[self.last]  # (B, 4096, h, w), h = ceil(H / 8)
        x = F.relu(self.bn_fov(self.conv_fov(x)))
        x = F.relu(self.bn_fov2(self.conv_fov2(x)))
        x = at_least_float32(self.cls_conv(self.drop(x)))  # (B, C + 1, h, w)
        if isinstance(self.backbone, TimmCNN):
            return self.backbone.enlarge(x, images.shape[-2:])
        return F.interpolate(x, size=images.shape[-2:], mode="bilinear", align_corners=True)

    def param_groups(self) -> list[Group]:
        """Convolutions of the backbone and of the head (deeplab.md A.2; the published group of backbone biases is
        empty), and the affine parameters of batch normalisation if they are trained."""
        return conv_groups(self, ("conv_fov", "conv_fov2", "cls_conv"), self.head_lr)

    def pretrained_names(self) -> tuple[str, ...]:
        """A CNN of timm, by its name."""
        return (self.backbone.name,) if isinstance(self.backbone, TimmCNN) else ()

    def load_weights(self, weights: str) -> str:
        """Start from a ResNet38 file (ImageNet ``.params``, PSA's or SEAM's classifier) or a whole ``deeplabv1``; a CNN
        of timm from its own weights, or from any network here with the same one."""
        head = ("conv_fov", "bn_fov", "conv_fov2", "bn_fov2", "cls_conv")
        if isinstance(self.backbone, TimmCNN):
            return load_timm(self, weights, heads=head, owner="backbone")

        def rename(name: str) -> str | None:
            if name.split(".")[0] in ("backbone", *head):
                return name
            inner = resnet38_from_mxnet(name)
            return None if inner is None else f"backbone.{inner}"

        return str(load_tensors(self, weights, rename=rename, allow_missing=head))


@dataclass(frozen=True)
class DeepLabV1Options(Options):
    """Network of ``deeplabv1``; the defaults are the published ones."""
    # deeplab.md A.1

    backbone: Annotated[str, Names(("resnet38",), PREFIX)] = "resnet38"
    """Backbone; only the section with this name is used. timm/NAME: a CNN of timm."""
    resnet38: Annotated[ResNet38Options, When("backbone", "resnet38")] = field(
        default_factory=lambda: ResNet38Options(freeze_bn=False, frozen="none", bn_momentum=0.0003)
    )
    """ResNet38; its bn_momentum also applies to the head."""
    timm: Annotated[TimmOptions, ON_TIMM] = field(default_factory=TimmOptions)
    """CNN of timm, if it is the backbone."""
    fov_channels: Count = 512
    """Channels of the head."""
    fov_dilation: Count = 12
    """Dilation of the head's 3x3 convolution, in cells of 8 pixels (of a CNN of timm: of its stride)."""
    dropout: DropProbability = 0.5
    """Dropout before the classifier."""
    train_affine: bool = False
    """Train the weights and biases of batch normalisation. The published optimiser does not contain them."""
    head_lr: Positive = 10.0
    """Learning rate of the head's weights relative to the backbone's; the classifier's bias learns twice as fast."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> DeepLabV1:
        """The network for ``num_classes`` foreground classes."""
        return DeepLabV1(num_classes, self)


DeepLabV1.recipes = {
    "published": SegmentRecipe(
        network=DeepLabV1Options(),
        fit=Fit(
            steps=20000,
            batch_size=10,
            micro_batch=5,  # batch statistics of 5 images, as on the two GPUs of the paper without synchronisation
            lr=0.001,
            momentum=0.9,
            weight_decay=5e-4,
            power=0.9,
            schedule_extra=1,
        ),
        augment=Augment(
            order=("hsv", "flip", "scale", "normalize", "crop"),
            hsv=10,
            flip=0.5,
            scale=(0.5, 1.5),
            scale_filter="cubic",
            scale_by="factor",
            crop=448,
            crop_place="random",
            mask_fill=IGNORE,
        ),
        weights=REQUIRED,  # ImageNet: ilsvrc-cls_rna-a1_cls1000_ep-0001.params
        infer=SegInference(
            scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
            flip=True,
            resize="cubic",
            merge="mean_logits",
            align_corners=True,
            crf_truncates_image=True,
            crf=CRFSettings(
                iterations=1,
                gauss_sxy=3,
                gauss_weight=3,
                bilateral_sxy=32,
                bilateral_srgb=13,
                bilateral_weight=10,
            ),
        ),
    ),
    "sample": SegmentRecipe(
        amp="fast",
        network=DeepLabV1Options(
            resnet38=SAMPLE_RESNET38,
            fov_channels=64,
            fov_dilation=3,
            dropout=0.1,
            train_affine=True,
            head_lr=1.0,
        ),
        fit=Fit(epochs=18, batch_size=16, optimiser="adamw", lr=0.002, weight_decay=0.01),
        augment=Augment(
            order=("hsv", "flip", "scale", "normalize", "crop"),
            scale=(0.75, 1.25),
            scale_filter="cubic",
            crop=112,
        ),
        infer=SegInference(
            scales=(0.75, 1.0, 1.25),
            flip=True,
            crf_truncates_image=True,
            crf=CRFSettings(iterations=1, bilateral_sxy=32),
        ),
    ),
    "photos": make_photos_segment_recipe(
        DeepLabV1Options(
            backbone=PHOTOS, timm=PHOTOS_TIMM, fov_channels=256, fov_dilation=6, dropout=0.1, train_affine=True
        )
    ),
}
