"""ResNeSt (split attention) from timm at stride 16, with the stages of net/backbone/resnet.py (puzzlecam.md section 2).

Names are timm's, which are those of the official ResNeSt files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from misc.checked import Checked, check
from net.backbone.resnet import STAGES, Stages


@dataclass(frozen=True)
class ResNeStOptions(Checked):
    """Size and training behaviour of a ResNeSt; the defaults are those of Puzzle-CAM's best result."""

    name: str = "resnest101e"
    """timm's name: resnest50d, resnest101e, resnest200e, resnest269e (also for the weights 'pretrained')."""
    norm: Literal["trained", "fixed", "frozen"] = "trained"
    """Batch normalisation. trained: as usual. fixed: uses the loaded running statistics; weight and bias are trained.
    frozen: statistics, weight and bias stay as loaded."""
    frozen: Literal["none", "stem", "layer1", "layer2", "layer3", "layer4"] = "none"
    """The stages up to and including this one get no gradient and keep their batch normalisation."""

    def cross_check(self) -> None:
        """Raises ValueError for a network that is not a ResNeSt."""
        check(self.name.startswith("resnest"), "name", self.name, "timm's name of a ResNeSt, such as resnest101e")

    @property
    def pretrained(self) -> str:
        """timm's name of the classifier that the weights 'pretrained' come from."""
        return self.name


class ResNeSt(Stages):
    """The backbone: layer4 has stride 1 and, from its second block on, dilation 2.

    Raises ValueError if timm has no network of this name.
    """

    def __init__(self, options: ResNeStOptions) -> None:
        super().__init__()
        import timm  # slow to import, and most runs don't need it

        if not timm.is_model(options.name):
            raise ValueError(f"timm has no {options.name}. There are: {', '.join(timm.list_models('resnest*'))}.")
        self.options = options
        made = timm.create_model(options.name, output_stride=16, num_classes=0)
        for name in ("conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(made, name))
        # timm's first block of layer4 differs at stride 1 (puzzlecam.md section 2.1): the official code still averages
        # after the split attention, which timm leaves out, and averages nothing in the shortcut, where timm does
        self.layer4[0].avd_last = nn.AvgPool2d(3, 1, padding=1)
        self.layer4[0].downsample[0] = nn.Identity()
        widths = [self.bn1.num_features, *(getattr(self, name)[-1].bn3.num_features for name in STAGES[1:])]
        self.channels = dict(zip(STAGES, widths, strict=True))
        self.strides = dict(zip(STAGES, (4, 4, 8, 16, 16), strict=True))
        self.freeze()
