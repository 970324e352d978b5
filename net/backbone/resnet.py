"""ResNet-50, -101, -152 with bottlenecks, under torchvision's names (irnet.md section 3, crt.md section 3).

A network owns a ``ResNet`` (as ``self.resnet50`` if the official checkpoint has this name, whatever the depth) and adds
its heads to the five stages: the stem and layer1 to layer4. ``load_resnet`` starts it from ImageNet weights or from the
checkpoint of any network that owns one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from misc.checked import Checked, Positive, Range
from net.backbone import scaled_channels
from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors

Stage = Literal["stem", "layer1", "layer2", "layer3", "layer4"]
STAGES: tuple[Stage, ...] = get_args(Stage)
_EXPANSION = Bottleneck.expansion
_TELLTALE = "layer1.0.conv1.weight"


@dataclass(frozen=True)
class ResNetOptions(Checked):
    """Size and training behaviour of a ResNet; the defaults are IRNet's ResNet-50."""

    depth: Annotated[tuple[int, int, int, int], Range(least=1)] = (3, 4, 6, 3)
    """Bottlenecks in layer1 to layer4. ResNet-50: 3 4 6 3, -101: 3 4 23 3, -152: 3 8 36 3."""
    width: Positive = 1.0
    """Channel multiplier; channels are rounded to multiples of 8. 1 is the published network."""
    strides: Annotated[tuple[int, int, int, int], Range(least=1)] = (2, 2, 2, 1)
    """Strides of the stem's convolution, layer2, layer3 and layer4; the stem's pooling has another 2. ImageNet: 2 2 2
    2. With 1 at the end, the last map has stride 16."""
    dilations: Annotated[tuple[int, int, int, int], Range(least=1)] = (1, 1, 1, 1)
    """Dilations of the 3x3 convolutions of layer1 to layer4; the first bottleneck of each keeps 1."""
    norm: Literal["trained", "fixed", "frozen"] = "fixed"
    """Batch normalisation. trained: as usual. fixed: uses the loaded running statistics; weight and bias are trained
    (IRNet). frozen: statistics, weight and bias stay as loaded. Training from random weights needs 'trained'."""
    frozen: Literal["none", "stem", "layer1", "layer2", "layer3", "layer4"] = "none"
    """The stages up to and including this one get no gradient and keep their batch normalisation (IRNet detaches its
    CAM network after layer2, its affinity network after layer4)."""
    pretrained: str = "resnet50.tv_in1k"
    """timm's name of the classifier for the weights 'pretrained'; *.tv_in1k are torchvision's original weights, the
    published start weights (resnet101.tv_in1k, resnet152.tv_in1k)."""


SAMPLE_RESNET = ResNetOptions(width=0.25, depth=(1, 1, 1, 1), strides=(2, 2, 1, 1), norm="trained")
"""The backbone of the sample recipes: learns small pictures from random weights within minutes on two CPU cores, at
stride 8. All recipes share it, so that a refiner or segmenter can start from the CAM network."""


def _bottleneck(cin: int, width: int, *, stride: int = 1, dilation: int = 1) -> Bottleneck:
    """torchvision's block, 1x1, 3x3, 1x1 with a shortcut and the stride in the 3x3 convolution (ResNet v1.5):
    (B, cin, h, w) -> (B, 4 width, ceil(h/stride), ceil(w/stride))."""
    cout, shortcut = width * _EXPANSION, None
    if stride != 1 or cin != cout:
        shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
    return Bottleneck(cin, width, stride, shortcut, dilation=dilation)


class Stages(nn.Module):
    """Base of ResNet and ResNeSt. A subclass creates ``conv1``, ``bn1``, ``maxpool``, ``layer1`` to ``layer4``,
    ``options`` (with ``norm`` and ``frozen``), and ``channels`` and ``strides`` of each stage.

    (B, 3, H, W) -> the map of layer4; ``forward_stages`` gives those of all stages. A subclass calls ``freeze`` in its
    constructor, so that parameter groups made before the first ``train()`` contain only trained parameters; ``train()``
    freezes again.
    """

    normalisation = "imagenet"
    channels: dict[Stage, int]
    strides: dict[Stage, int]

    def freeze(self) -> None:
        """Freeze the layers that the options name."""
        options = self.options
        if options.norm != "trained":
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.requires_grad_(options.norm == "fixed")
        if options.frozen != "none":
            for stage in STAGES[: STAGES.index(options.frozen) + 1]:
                for module in (self.conv1, self.bn1) if stage == "stem" else (getattr(self, stage),):
                    module.eval()
                    module.requires_grad_(False)

    def train(self, mode: bool = True) -> Stages:
        """Set training or evaluation mode, except for frozen layers; returns self."""
        super().train(mode)
        self.freeze()
        return self

    def stage(self, name: Stage, x: Tensor) -> Tensor:
        """Run one stage: the stem takes images (B, 3, H, W), a layer the map of the previous stage."""
        if name == "stem":
            return self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return getattr(self, name)(x)

    def forward_stages(self, x: Tensor) -> dict[Stage, Tensor]:
        """Maps of all stages of normalised images (B, 3, H, W), any H and W: {stage: (B, channels, h, w)} with
        h = ceil(H / stride) (the strides multiply up from stage to stage, and each rounds up)."""
        maps: dict[Stage, Tensor] = {}
        for name in STAGES:
            maps[name] = x = self.stage(name, x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """The map of layer4: (B, 3, H, W) -> (B, 2048 at width 1, ceil(H/16), ceil(W/16)) with the default strides."""
        for name in STAGES:
            x = self.stage(name, x)
        return x


class ResNet(Stages):
    """The backbone with bottlenecks; frozen layers are frozen at construction."""

    def __init__(self, options: ResNetOptions | None = None) -> None:
        super().__init__()
        self.options = options = options or ResNetOptions()
        stem, *widths = (scaled_channels(64 << max(0, i - 1), options.width) for i in range(5))
        self.conv1 = nn.Conv2d(3, stem, 7, options.strides[0], padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels, strides = [stem], [2 * options.strides[0]]
        per_layer = zip(STAGES[1:], options.depth, widths, (1, *options.strides[1:]), options.dilations, strict=True)
        for name, depth, width, stride, dilation in per_layer:
            blocks = [_bottleneck(channels[-1], width, stride=stride)]
            blocks += [_bottleneck(width * _EXPANSION, width, dilation=dilation) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(*blocks))
            channels.append(width * _EXPANSION)
            strides.append(strides[-1] * stride)
        self.channels = dict(zip(STAGES, channels, strict=True))
        self.strides = dict(zip(STAGES, strides, strict=True))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.freeze()


def _torchvision_name(name: str) -> str:
    """Name of a backbone tensor in the five-stage form (stage1 = stem, stage2.0 = layer1, ...) -> torchvision's."""
    stage, _, rest = name.partition(".")
    if stage == "stage1":
        index, _, rest = rest.partition(".")
        return f"{('conv1', 'bn1')[int(index)]}.{rest}"
    return f"layer{int(stage.removeprefix('stage')) - 1}.{rest.partition('.')[2]}"


def load_resnet(network: nn.Module, weights: str, *, heads: Collection[str], owner: str = "resnet50") -> str:
    """Start a network that owns a ResNet or ResNeSt: from ImageNet weights, or a checkpoint of a network that owns one.

    It recognises torchvision's names without or with a prefix (``conv1.weight`` of torchvision and timm,
    ``resnet50.conv1.weight`` of IRNet, CRT and this project, ``model.conv1.weight`` of Puzzle-CAM), and the five-stage
    form of the edge networks (``stage1.0.weight``). The official files hold each tensor up to three times; other names
    are ignored, like all tensors that the network does not have (ImageNet's ``fc``).

    Args:
        network: receives the weights; its other layers must have the official names.
        weights: a file, or 'pretrained': timm's, by the option of that name, downloaded once.
        heads: names or patterns of layers outside the backbone: these keep their values if the file lacks them or has
            them in another shape.
        owner: the attribute that holds the ResNet.

    Returns:
        A one-line report. Raises ValueError if the file does not fit, FileNotFoundError if it does not exist.
    """
    state, own = read_tensors(weights), network.state_dict()
    prefix = next((name.removesuffix(_TELLTALE) for name in state if name.endswith(_TELLTALE)), None)
    if f"{owner}.{_TELLTALE}" in state:
        prefix = f"{owner}."
    backbone = {}
    for name, value in state.items():
        if prefix is not None and name.startswith(prefix):
            backbone[f"{owner}.{name.removeprefix(prefix)}"] = value
        elif prefix is None and name.startswith("stage"):
            backbone[f"{owner}.{_torchvision_name(name)}"] = value
    deeper = [name for name in backbone if f"{owner}.layer" in name and name not in own]
    if deeper:
        raise ValueError(f"{weights}: has {deeper[0]} and more, which this network lacks. Set its depth to the file's.")
    named = {name: value for name, value in {**state, **backbone}.items() if name in own}
    for head in heads:
        wanted = [name for name in own if fnmatchcase(name, head) or fnmatchcase(name, f"{head}.*")]
        lacking = [name for name in wanted if name not in named]
        if 0 < len(lacking) < len(wanted):
            raise ValueError(f"{weights}: has a part of {head}, but not {lacking[0]}. Damaged, or of another network?")
    return str(load_tensors(network, named, allow_missing=tuple(heads), label=weights))
