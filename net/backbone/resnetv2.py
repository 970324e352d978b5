"""The convolutional stem of the hybrid vision transformer R50+ViT-B/16 (getam.md section 2.1).

A ResNet in the layout of version 2 but without pre-activation: weight-standardised convolutions with TensorFlow's SAME
padding, group normalisation, three stages. Names are timm's (``vit_base_r50_s16_384``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# published: added to the standard deviation (timm adds 1e-8 to the variance; getam.md section 2.1)
_EPSILON = 1e-5


def _same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad as TensorFlow's SAME does: (B, C, H, W), ceil(H / stride) outputs, the odd pixel at the bottom and right."""
    margins = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
    high, wide = margins
    return F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2), value=value)


class StdConv2d(nn.Conv2d):
    """Convolution without bias whose weights are standardised per output channel: (w - mean) / (std + 1e-5), biased
    std over input channels and kernel. SAME padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.square().mean((1, 2, 3), keepdim=True).sqrt() + _EPSILON)
        return F.conv2d(_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class GroupNormAct(nn.GroupNorm):
    """Group normalisation in 32 groups (fewer only for fewer channels), then ReLU unless ``act`` is off."""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(min(32, channels), channels, eps=1e-5)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        x = super().forward(x)
        return F.relu(x) if self.act else x


class Downsample(nn.Module):
    """Projection of the shortcut: 1x1 convolution and group normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = StdConv2d(inputs, outputs, 1, stride)
        self.norm = GroupNormAct(outputs, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', h, w)."""
        return self.norm(self.conv(x))


class ResNetV2Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 at a quarter of the width; ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int, project: bool) -> None:
        super().__init__()
        inner = outputs // 4
        if project:
            self.downsample = Downsample(inputs, outputs, stride)
        self.project = project
        self.conv1, self.norm1 = StdConv2d(inputs, inner, 1), GroupNormAct(inner)
        self.conv2, self.norm2 = StdConv2d(inner, inner, 3, stride), GroupNormAct(inner)
        self.conv3, self.norm3 = StdConv2d(inner, outputs, 1), GroupNormAct(outputs, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        shortcut = self.downsample(x) if self.project else x
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


class ResNetV2Stem(nn.Module):
    """7x7 convolution of stride 2, and a 3x3 maximum of stride 2 with SAME padding where ``pool``."""

    def __init__(self, channels: int, pool: bool) -> None:
        super().__init__()
        self.conv, self.norm = StdConv2d(3, channels, 7, 2), GroupNormAct(channels)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w) at stride 4, or 2 without the pooling."""
        x = self.norm(self.conv(x))
        return F.max_pool2d(_same(x, 3, 2, float("-inf")), 3, 2) if self.pool else x


class ResNetV2Stage(nn.Module):
    """Bottlenecks of one width; the first has the stride and the projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(ResNetV2Bottleneck(outputs if i else inputs, outputs, 1 if i else stride, not i) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        return self.blocks(x)


class ResNetV2(nn.Module):
    """Stem and three stages of 4, 8 and 16 times ``base`` channels.

    Args:
        base: channels of the stem.
        depth: bottlenecks of each stage.
        pool: as ``ResNetV2Stem``; strides of the stages are 4, 8, 16, without the pooling 2, 4, 8.
    """

    def __init__(self, base: int = 64, depth: tuple[int, int, int] = (3, 4, 9), pool: bool = True) -> None:
        super().__init__()
        self.channels = [4 * base, 8 * base, 16 * base]
        self.stem = ResNetV2Stem(base, pool)
        inputs = [base, *self.channels[:2]]
        self.stages = nn.ModuleList(
            ResNetV2Stage(i, o, 2 if number else 1, n)
            for number, (i, o, n) in enumerate(zip(inputs, self.channels, depth, strict=True))
        )
        for module in self.modules():
            if isinstance(module, StdConv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> outputs of the three stages."""
        x, outputs = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs
