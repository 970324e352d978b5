"""DeepLab-LargeFOV on ResNet38 as MCTformer and AReAM re-train it (deeplab.md B).

Two dilated 3x3 convolutions on the backbone, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Count, Positive
from misc.config import Augment, Fit, SegInference
from misc.crf.dense import CRFSettings
from net.backbone.resnet38 import SAMPLE_RESNET38, ResNet38, ResNet38Options
from net.contract import Network, Options, Segmenter, SegmentRecipe
from net.foreign.loading import load_tensors
from net.groups import Group
from net.registry import segmenter
from net.start_weights import REQUIRED


@segmenter("deeplabv1_largefov")
class LargeFOV(Segmenter, ResNet38):
    """LargeFOV of MCTformer and AReAM (deeplab.md B); the backbone's tensors carry no prefix.

    conv1a and all batch normalisation are frozen, b2 is trained.

    Args:
        num_classes: foreground classes.
        options: size and training behaviour.
    """

    loss_align_corners = False

    def __init__(self, num_classes: int, options: LargeFOVOptions | None = None) -> None:
        options = options or LargeFOVOptions()
        super().__init__(options.resnet38)
        channels, dilation = options.fov_channels, options.fov_dilation
        self.head_lr = options.head_lr
        self.fc8_seg_conv1 = nn.Conv2d(self.channels["conv6"], channels, 3, padding=dilation, dilation=dilation)
        self.fc8_seg_conv2 = nn.Conv2d(channels, num_classes + 1, 3, padding=dilation, dilation=dilation)
        for convolution in (self.fc8_seg_conv1, self.fc8_seg_conv2):
            nn.init.xavier_uniform_(convolution.weight)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C + 1, ceil(H / 8), ceil(W / 8))."""
        return self.fc8_seg_conv2(F.relu(self.fc8_seg_conv1(self.forward_stages(images)["conv6"])))

    def param_groups(self) -> list[Group]:
        """The trained part of the backbone, and the head at ``head_lr`` times its rate (deeplab.md B.2)."""
        backbone, head = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (head if name.startswith("fc8_seg_") else backbone).append(parameter)
        return [Group(backbone), Group(head, lr_scale=self.head_lr)]

    def load_weights(self, weights: str) -> str:
        """Start from PSA's or SEAM's classifier (its fc8 is left out), ImageNet ``.params`` or a whole LargeFOV."""
        return str(load_tensors(self, weights, allow_missing=("fc8_seg_conv1", "fc8_seg_conv2")))


@dataclass(frozen=True)
class LargeFOVOptions(Options):
    """Network of ``deeplabv1_largefov``; the defaults are the published ones."""
    # deeplab.md B.1

    resnet38: ResNet38Options = field(default_factory=lambda: ResNet38Options(freeze_bn=True, frozen="conv1a"))
    """Options of the ResNet38 backbone."""
    fov_channels: Count = 512
    """Channels between the two convolutions of the head."""
    fov_dilation: Count = 12
    """Dilation of both convolutions of the head, in cells of 8 pixels."""
    head_lr: Positive = 10.0
    """Learning rate of the head relative to the backbone's."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> LargeFOV:
        """The network for ``num_classes`` foreground classes."""
        return LargeFOV(num_classes, self)


_CRF = CRFSettings(
    iterations=10, gauss_sxy=4, gauss_weight=3, bilateral_sxy=83, bilateral_srgb=5, bilateral_weight=3
)

LargeFOV.recipes = {
    "published": SegmentRecipe(
        network=LargeFOVOptions(),
        fit=Fit(
            epochs=30,
            batch_size=4,
            sample_order="stream",
            lr=0.0007,
            # 1e-5 was meant as weight decay; the published optimiser uses it as momentum, and its groups have no
            # decay (deeplab.md B.2, seam.md 7.1)
            momentum=1e-5,
            weight_decay=0.0,
            power=0.9,
        ),
        augment=Augment(
            order=("scale", "flip", "normalize", "crop"),
            scale=(0.7, 1.3),
            scale_filter="linear",
            scale_per_batch=True,
            flip=0.5,
            crop=321,
            crop_place="corner",
            mask_fill=0,  # the published padding is background, not ignored (deeplab.md B.2)
        ),
        weights=REQUIRED,  # PSA's VOC classifier: res38_cls.pth
        infer=SegInference(
            scales=(0.5, 0.75, 1.0, 1.25, 1.5),
            flip=False,
            resize="linear",
            merge="max_softmax",
            align_corners=False,
            crf=_CRF,
        ),
    ),
    "sample": SegmentRecipe(
        amp="fast",
        network=LargeFOVOptions(resnet38=SAMPLE_RESNET38, fov_channels=64, fov_dilation=3, head_lr=1.0),
        fit=Fit(epochs=30, batch_size=16, sample_order="stream", optimiser="adamw", lr=0.002, weight_decay=0.01),
        augment=Augment(
            order=("scale", "flip", "normalize", "crop"),
            scale=(0.75, 1.25),
            scale_filter="linear",
            scale_per_batch=True,
            crop=112,
            crop_place="corner",
            mask_fill=0,
        ),
        infer=SegInference(
            scales=(0.75, 1.0, 1.25),
            resize="linear",
            merge="max_softmax",
            align_corners=False,
            crf=_CRF,
        ),
    ),
}
