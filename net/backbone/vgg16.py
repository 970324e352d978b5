"""VGG16 in its LargeFOV form with 20 million parameters, stride 8 (psa.md sections 2.2 and 5.1).

Names are those of the official PSA checkpoints and of ``vgg16_20M.caffemodel``; a method's network subclasses
``VGG16`` or owns an instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, DropProbability, Positive
from net.backbone import scaled_channels

# stage -> its number of 3x3 convolutions
_STAGES = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}
# about the standard deviation of pixel values 0..255 around the mean colour
_PIXEL_SCALE = 64.0


@dataclass(frozen=True)
class VGG16Options(Checked):
    """Size and training behaviour of VGG16; the defaults are the published classification backbone."""

    width: Positive = 1.0
    """Channel multiplier; channels are rounded to multiples of 8. 1 is the published network."""
    fc6_dilation: Literal[1, 4] = 1
    """Dilation of the 3x3 convolution fc6: 1 in PSA's classifier, 4 in its affinity network."""
    dropout: DropProbability = 0.5
    """Channel dropout probability between fc6 and fc7."""
    frozen: Literal["none", "conv2"] = "conv2"
    """Freeze the layers up to and including this stage."""


class VGG16(nn.Module):
    """The backbone: (B, 3, H, W) -> the taps conv4_3, conv5_3 and fc7.

    A subclass with its own ``forward`` calls ``forward_stages``. ``channels`` gives the channels of each tap. The
    first layers are frozen at construction already, and again by ``train()``. The two poolings after conv5_3 that the
    public code creates and never uses are left out (psa.md section 2.2).
    """

    normalisation = "caffe_bgr"
    """BGR, 0..255, mean (104.008, 116.669, 122.675) subtracted, no scaling."""

    def __init__(self, options: VGG16Options | None = None) -> None:
        super().__init__()
        self.options = options = options or VGG16Options()
        cin = 3
        for stage, count in _STAGES.items():
            cout = scaled_channels(min(64 << (stage - 1), 512), options.width)
            dilation = 2 if stage == 5 else 1
            for k in range(1, count + 1):
                self.add_module(f"conv{stage}_{k}", nn.Conv2d(cin, cout, 3, padding=dilation, dilation=dilation))
                cin = cout
        self.pool1, self.pool2, self.pool3 = (nn.MaxPool2d(3, stride=2, padding=1) for _ in range(3))
        self.pool4 = nn.MaxPool2d(3, stride=1, padding=1)
        wide, dilation = scaled_channels(1024, options.width), options.fc6_dilation
        self.fc6 = nn.Conv2d(cin, wide, 3, padding=dilation, dilation=dilation)
        self.drop6 = nn.Dropout2d(options.dropout)
        self.fc7 = nn.Conv2d(wide, wide, 1)
        self.channels = {"conv4_3": cin, "conv5_3": cin, "fc7": wide}
        self._initialise()
        self.freeze()

    def _convs(self, stage: int) -> list[nn.Conv2d]:
        """The convolutions of a stage in order."""
        return [getattr(self, f"conv{stage}_{k}") for k in range(1, _STAGES[stage] + 1)]

    @torch.no_grad()
    def _initialise(self) -> None:
        """Kaiming normal by fan-in, zero biases; the first layer also scales pixel values 0..255 to unit variance.

        Not published (the published networks start from ImageNet weights).
        """
        for convolution in (*(c for stage in _STAGES for c in self._convs(stage)), self.fc6, self.fc7):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)
        self.conv1_1.weight.div_(_PIXEL_SCALE)

    def freeze(self) -> None:
        """Switch off the gradients of the layers that the options freeze."""
        if self.options.frozen == "conv2":
            for convolution in (*self._convs(1), *self._convs(2)):
                convolution.requires_grad_(False)

    def train(self, mode: bool = True) -> VGG16:
        """Set training or evaluation mode, except for frozen layers; returns self."""
        super().train(mode)
        self.freeze()
        return self

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        for convolution in self._convs(stage):
            x = F.relu(convolution(x), inplace=True)
        return x

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps of images normalised as ``normalisation`` says, any H and W.

        Args:
            x: (B, 3, H, W).

        Returns:
            conv4_3 (B, 512, h, w), conv5_3 (B, 512, h, w) and fc7 (B, 1024, h, w) after their ReLU, with
            h = ceil(H/8), w = ceil(W/8); channels at width 1.
        """
        for stage, pool in ((1, self.pool1), (2, self.pool2), (3, self.pool3)):
            x = pool(self._stage(stage, x))
        conv4_3 = self._stage(4, x)
        conv5_3 = self._stage(5, self.pool4(conv4_3))
        x = self.drop6(F.relu(self.fc6(conv5_3), inplace=True))
        return {"conv4_3": conv4_3, "conv5_3": conv5_3, "fc7": F.relu(self.fc7(x), inplace=True)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The taps of ``x``; see ``forward_stages``."""
        return self.forward_stages(x)
