"""ResNet38 ("Wider or Deeper", model A1) at stride 8 (seam.md section 2).

Names are those of the official SEAM, PSA and DeepLab v1 checkpoints. A method whose checkpoint holds the backbone
without a prefix subclasses ``ResNet38``; one that holds it under ``backbone.`` owns an instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, Count, Positive, Range, When
from net.backbone import scaled_channels


@dataclass(frozen=True)
class ResNet38Options(Checked):
    """Size and training behaviour of ResNet38; the defaults are the published plain backbone."""

    width: Positive = 1.0
    """Channel multiplier; channels are rounded to multiples of 8. 1 is the published network."""
    late_width: Annotated[float | None, Range(above=0)] = None
    """Channel multiplier inside and after b6 and b7, the most expensive blocks of a narrow network. None: ``width``."""
    depth: Annotated[tuple[int, int, int, int], Range(least=1)] = (3, 3, 6, 3)
    """Number of residual blocks in the stages b2, b3, b4 and b5."""
    dilation: Count = 4
    """Dilation of the 3x3 convolutions of b6 and b7, in cells of 8 pixels; b5 has half of it. Published: 4, for crops
    of 448 pixels."""
    dropout: Annotated[tuple[float, float], Range(least=0, below=1)] = (0.3, 0.5)
    """Channel dropout probability inside b6 and b7."""
    freeze_bn: bool = True
    """Keep all batch normalisation (statistics and affine) as loaded. Turn off to train from random weights."""
    frozen: Literal["none", "conv1a", "b2"] = "conv1a"
    """Freeze the layers up to and including this one. SEAM and PSA freeze to b2, LargeFOV to conv1a."""
    bn_momentum: Annotated[float, Range(above=0, most=1), When("freeze_bn", False)] = 0.1
    """Momentum of the running statistics (SEAM's DeepLab v1 uses 0.0003)."""


SAMPLE_RESNET38 = ResNet38Options(
    width=0.25, late_width=0.0625, depth=(1, 1, 1, 1), dilation=1, dropout=(0.0, 0.0), freeze_bn=False, frozen="none"
)
"""The backbone of the sample recipes: learns small pictures from random weights within minutes on two CPU cores. All
recipes share it, so that a refiner or segmenter can start from the CAM network."""


def _bn_relu(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    return F.relu(bn(x), inplace=True)


def _conv3x3(cin: int, cout: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, stride, padding=dilation, dilation=dilation, bias=False)


class ResBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions: (B, cin, h, w) -> (B, cout, ceil(h/stride), ceil(w/stride)).

    ``dilation`` is that of the first and of the second convolution. seam.md section 2.
    """

    def __init__(
        self, cin: int, cmid: int, cout: int, *, stride: int = 1, dilation: tuple[int, int], momentum: float
    ) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(cin, momentum=momentum)
        self.conv_branch2a = _conv3x3(cin, cmid, stride, dilation[0])
        self.bn_branch2b1 = nn.BatchNorm2d(cmid, momentum=momentum)
        self.conv_branch2b1 = _conv3x3(cmid, cout, 1, dilation[1])
        self.conv_branch1: nn.Conv2d | None = None
        if cin != cout or stride != 1:
            self.conv_branch1 = nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the block's output and its input activation ReLU(BN(x)), which may be used as a tap."""
        entry = _bn_relu(x, self.bn_branch2a)
        main = self.conv_branch2b1(_bn_relu(self.conv_branch2a(entry), self.bn_branch2b1))
        # a projected shortcut starts from the activation, an identity one from x
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(entry)
        return main + shortcut, entry


class BottleneckBlock(nn.Module):
    """Pre-activation bottleneck 1x1, 3x3, 1x1 with dropout, stride 1: (B, cin, h, w) -> (B, cout, h, w).

    ``channels`` are (cin, after the 1x1, after the 3x3, cout). seam.md section 2.
    """

    def __init__(self, channels: tuple[int, int, int, int], *, dilation: int, dropout: float, momentum: float) -> None:
        super().__init__()
        cin, squeezed, wide, cout = channels
        self.bn_branch2a = nn.BatchNorm2d(cin, momentum=momentum)
        self.conv_branch2a = nn.Conv2d(cin, squeezed, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(squeezed, momentum=momentum)
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = _conv3x3(squeezed, wide, 1, dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(wide, momentum=momentum)
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = nn.Conv2d(wide, cout, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(cin, cout, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the block's output and its input activation ReLU(BN(x)), which may be used as a tap."""
        entry = _bn_relu(x, self.bn_branch2a)
        main = self.dropout_2b1(_bn_relu(self.conv_branch2a(entry), self.bn_branch2b1))
        main = self.dropout_2b2(_bn_relu(self.conv_branch2b1(main), self.bn_branch2b2))
        return self.conv_branch2b2(main) + self.conv_branch1(entry), entry


class ResNet38(nn.Module):
    """The backbone: (B, 3, H, W) -> the taps conv3, conv4, conv5 and conv6.

    A subclass with its own ``forward`` calls ``forward_stages``. ``channels`` gives the channels of each tap. Batch
    normalisation and the first layers are frozen as the options say, at construction, so that parameter groups made
    before the first ``train()`` contain only trained parameters; ``train()`` freezes again, which also covers batch
    normalisation that a subclass added. (The published code collects its groups before freezing; parameters without
    gradient never move, so the effect is the same: seam.md section 4.2.)
    """

    normalisation = "imagenet"

    def __init__(self, options: ResNet38Options | None = None) -> None:
        super().__init__()
        self.options = options = options or ResNet38Options()
        momentum = options.bn_momentum
        c64, c128, c256, c512, c1024 = (scaled_channels(64 << i, options.width) for i in range(5))
        late = options.width if options.late_width is None else options.late_width
        m512, m1024, c2048, c4096 = (scaled_channels(512 << i, late) for i in range(4))
        half = max(1, options.dilation // 2)
        self.channels = {"conv3": c256, "conv4": c512, "conv5": c1024, "conv6": c4096}
        self.conv1a = _conv3x3(3, c64)
        # (input, middle, output channels), stride, dilation of the first block and of the others
        stages = {
            "b2": ((c64, c128, c128), 2, (1, 1), (1, 1)),
            "b3": ((c128, c256, c256), 2, (1, 1), (1, 1)),
            "b4": ((c256, c512, c512), 2, (1, 1), (1, 1)),
            "b5": ((c512, c512, c1024), 1, (1, half), (half, half)),
        }
        self._names = {"b6": ["b6"], "b7": ["b7"]}
        for count, (stage, ((cin, cmid, cout), stride, first, rest)) in zip(options.depth, stages.items(), strict=True):
            self._names[stage] = [stage] + [f"{stage}_{k}" for k in range(1, count)]
            self.add_module(stage, ResBlock(cin, cmid, cout, stride=stride, dilation=first, momentum=momentum))
            for name in self._names[stage][1:]:
                self.add_module(name, ResBlock(cout, cmid, cout, dilation=rest, momentum=momentum))
        drop6, drop7 = options.dropout
        dilation = options.dilation
        self.b6 = BottleneckBlock((c1024, m512, m1024, c2048), dilation=dilation, dropout=drop6, momentum=momentum)
        self.b7 = BottleneckBlock((c2048, m1024, c2048, c4096), dilation=dilation, dropout=drop7, momentum=momentum)
        self.bn7 = nn.BatchNorm2d(c4096, momentum=momentum)
        self._initialise()
        self.freeze()

    def _blocks(self, stage: str) -> list[ResBlock | BottleneckBlock]:
        """The blocks of a stage in order: b4, b4_1, b4_2, ..."""
        return [getattr(self, name) for name in self._names[stage]]

    @torch.no_grad()
    def _initialise(self) -> None:
        """Random weights that keep the scale of the activations through the depth.

        Not published (the published networks start from ImageNet weights). Kaiming normal by fan-in; the two branches
        of a projecting block share the variance, and each of the L identity blocks adds 1/L of it, so that activations
        stay in range even with frozen, untrained batch normalisation.
        """
        nn.init.kaiming_normal_(self.conv1a.weight, nonlinearity="linear")
        blocks = [block for stage in ("b2", "b3", "b4", "b5", "b6", "b7") for block in self._blocks(stage)]
        identities = sum(block.conv_branch1 is None for block in blocks)
        for block in blocks:
            convolutions = [m for m in block.children() if isinstance(m, nn.Conv2d) and m is not block.conv_branch1]
            for convolution in convolutions:
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            if block.conv_branch1 is None:
                convolutions[-1].weight.mul_(identities**-0.5)
            else:
                nn.init.kaiming_normal_(block.conv_branch1.weight, nonlinearity="relu")
                convolutions[-1].weight.mul_(0.5**0.5)
                block.conv_branch1.weight.mul_(0.5**0.5)

    def freeze(self) -> None:
        """Freeze the layers that the options name: no gradient, batch normalisation by its running statistics."""
        if self.options.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.requires_grad_(False)
        if self.options.frozen != "none":
            self.conv1a.requires_grad_(False)
        if self.options.frozen == "b2":
            for block in self._blocks("b2"):
                block.eval()
                block.requires_grad_(False)

    def train(self, mode: bool = True) -> ResNet38:
        """Set training or evaluation mode, keep frozen what is frozen, return self."""
        super().train(mode)
        self.freeze()
        return self

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps of normalised images (ImageNet mean and standard deviation, RGB), any H and W.

        Args:
            x: (B, 3, H, W).

        Returns:
            conv3 (B, 256, ceil(H/4), ceil(W/4)); conv4 (B, 512, h, w), conv5 (B, 1024, h, w) and
            conv6 (B, 4096, h, w) with h = ceil(H/8), w = ceil(W/8); channels at width 1. All are ReLU(BN(.)), the
            first three those at the entry of b4, b5 and b6.
        """
        taps = {}
        x = self.conv1a(x)
        for stage, tap in (("b2", None), ("b3", None), ("b4", "conv3"), ("b5", "conv4"), ("b6", "conv5"), ("b7", None)):
            for index, block in enumerate(self._blocks(stage)):
                x, entry = block(x)
                if tap and index == 0:
                    taps[tap] = entry
        taps["conv6"] = _bn_relu(x, self.bn7)
        return taps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The taps of ``x``; see ``forward_stages``."""
        return self.forward_stages(x)
