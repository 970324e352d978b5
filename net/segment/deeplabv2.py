"""DeepLab v2: a ResNet-101 at stride 8, atrous spatial pyramid pooling, and the maximum over three sizes of the input
(deeplab.md C).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Names, Positive, Range, When
from misc.config import Augment, Fit, SegInference
from misc.crf.dense import CRFSettings
from misc.image.labels import IGNORE
from misc.image.pixels import resize_masks
from misc.precision import at_least_float32
from net.backbone import scaled_channels
from net.backbone.timm_cnn import ON_TIMM, PHOTOS, PREFIX, TimmCNN, TimmOptions, load_timm
from net.contract import Batch, Network, Options, Segmenter, SegmentRecipe
from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors
from net.groups import Group, conv_groups
from net.registry import segmenter
from net.shared.photos import PHOTOS_TIMM, make_photos_segment_recipe
from net.start_weights import REQUIRED

Form = Literal["caffe", "torchvision"]
RESNET = When("backbone", "resnet")


@segmenter("deeplabv2")
class DeepLabV2(Segmenter):
    """DeepLab v2 with multi-scale inputs; state-dict names are those of the official checkpoint, ``base.*``.

    Args:
        num_classes: foreground classes.
        options: size and training behaviour.
    """

    def __init__(self, num_classes: int, options: DeepLabV2Options | None = None) -> None:
        super().__init__()
        self.options = options = options or DeepLabV2Options()
        if options.backbone == "resnet":
            self.normalisation = {"caffe": "caffe_bgr", "torchvision": "imagenet"}[options.form]
            self.base: DeepLabBase | TimmBase = DeepLabBase(options, num_classes + 1)
        else:
            self.base = TimmBase(options, num_classes + 1)
            self.normalisation = self.base.backbone.normalisation
        if isinstance(self.base, DeepLabBase):
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = options.bn_momentum
        self._freeze()

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, H, W), mask (B, H, W) int64 with 255 = ignore -> {"ce_1", "ce_0.5", ..., "ce_max"}:
        cross entropy of each size and of their maximum, at the outputs' own sizes (deeplab.md C.3)."""
        logits = self.logits_by_size(batch["image"])
        labels = self.resize_labels(batch["mask"])
        pairs = list(zip(labels, logits, strict=True))
        terms = {}
        for term, (scale, x) in zip((*labels, "max"), [*pairs, ("1", self.merge_sizes(logits))], strict=True):
            total = F.cross_entropy(x.float(), labels[scale], ignore_index=IGNORE, reduction="sum")
            terms[f"ce_{term}"] = total / batch[f"counts/pixels_{scale}"].clamp(min=1e-5)
        return terms

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C + 1, *logits_size(H, W)): about an eighth of the sides; on a CNN of timm the sides."""
        return self.merge_sizes(self.logits_by_size(images))

    def _freeze(self) -> None:
        """Freeze batch normalisation if the options say so."""
        if self.options.freeze_bn and isinstance(self.base, DeepLabBase):
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.requires_grad_(False)

    def train(self, mode: bool = True) -> DeepLabV2:
        """Set training or evaluation mode, except for frozen layers; returns self."""
        super().train(mode)
        self._freeze()
        return self

    def logits_by_size(self, images: Tensor) -> list[Tensor]:
        """Logits of every size of the input, 1 first: (B, 3, H, W) -> (B, C + 1, *logits_size(size)) each."""
        smaller = (shrink_images(images, factor) for factor in self.options.scales)
        return [at_least_float32(self.base(scaled)) for scaled in (images, *smaller)]

    @staticmethod
    def merge_sizes(logits: list[Tensor]) -> Tensor:
        """Maximum over the sizes, at the size of the first: (B, C + 1, h, w)."""
        size = logits[0].shape[-2:]
        resized = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in logits[1:]]
        return torch.stack([logits[0], *resized]).amax(0)

    def resize_labels(self, mask: Tensor) -> dict[str, Tensor]:
        """The mask at the size of each output, PIL nearest: {"1": (B, h, w), "0.5": ...}."""
        height, width = mask.shape[-2:]
        labels = {}
        for scale in (1, *self.options.scales):
            labels[f"{scale}"] = resize_masks(mask, self.base.logits_size(*shrunk_size((height, width), scale)))
        return labels

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Number of cells with a label, per output."""
        labels = self.resize_labels(batch["mask"])
        return {f"pixels_{scale}": (label != IGNORE).sum() for scale, label in labels.items()}

    def param_groups(self) -> list[Group]:
        """Convolutions of layers 1 to 5, weights of the classifier, its biases (deeplab.md C.3), and the affine
        parameters of batch normalisation if they are trained."""
        return [group for group in conv_groups(self, ("base.aspp",), self.options.head_lr) if group.params]

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifier of the backbone."""
        return (self.base.backbone.name if isinstance(self.base, TimmBase) else self.options.pretrained,)

    def load_weights(self, weights: str) -> str:
        """Start from the official files (``init.caffemodel``, ``train2_iter_20000.caffemodel`` and the ``.pth`` made of
        them), torchvision's ResNet, or a CAM network of this project on a ResNet.

        The classifier may be missing. Raises ValueError if the file has the other ``form`` (a whole ``deeplabv2``,
        whose form cannot be seen from its names, is accepted).
        """
        if isinstance(self.base, TimmBase):
            return load_timm(self, weights, heads=("base.aspp",), owner="base.backbone")
        state = read_tensors(weights)
        stem = next((name for name in state if name.endswith("layer1.0.conv1.weight")), None)
        form: Form = "caffe" if stem is None else "torchvision"
        if form != self.options.form and not any(name.startswith("base.") for name in state):
            raise ValueError(
                f"{weights}: its weights have the form {form}, the network is built for {self.options.form}. Give "
                f"--seg.network.form {form}, and --seg.init with what they were trained on."
            )
        # a CAM network has its backbone under a prefix, and a classifier
        prefix = "" if stem is None else stem.removesuffix("layer1.0.conv1.weight")

        def rename(name: str) -> str | None:
            if stem is not None:
                inner = from_torchvision(name.removeprefix(prefix)) if name.startswith(prefix) else None
            else:
                inner = from_caffe(name.removeprefix("base."))
            return None if inner is None or inner.startswith("fc.") else f"base.{inner}"

        return str(load_tensors(self, state, rename=rename, allow_missing=("base.aspp",), label=weights))


# ---------------------------------------------------------------------------------------------- layers (deeplab.md C.1)


class DeepLabBase(nn.Sequential):
    """The network of one size, (B, 3, H, W) -> (B, cout, h, w) with (h, w) = ``logits_size``: ``layer1`` to ``layer5``
    and ``aspp``. Names are those of the official checkpoints."""

    def __init__(self, options: DeepLabV2Options, cout: int) -> None:
        super().__init__()
        channels = scaled_channels(64, options.width)
        stem = OrderedDict(conv1=ConvBn(3, channels, 7, 2), pool=nn.MaxPool2d(3, 2, 1, ceil_mode=True))
        self.layer1 = nn.Sequential(stem)
        # stride and dilation of each stage
        fourth, fifth = options.dilations
        stages = {"layer2": (1, 1), "layer3": (2, 1), "layer4": (1, fourth), "layer5": (1, fifth)}
        for number, (name, (stride, dilation)) in enumerate(stages.items()):
            middle, wide = (scaled_channels(c << number, options.width) for c in (64, 256))
            blocks = nn.Sequential()
            for block in range(options.depth[number]):
                project = block == 0
                made = DeepLabBottleneck(
                    channels, middle, wide, stride=stride if project else 1, dilation=dilation, project=project,
                    form=options.form,
                )
                blocks.add_module(f"block{block + 1}", made)
                channels = wide
            self.add_module(name, blocks)
        self._initialise()
        self.aspp = ASPP(channels, cout, options.rates)

    @staticmethod
    def logits_size(height: int, width: int) -> tuple[int, int]:
        """``logits_size`` of this file."""
        return logits_size(height, width)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Random weights that keep the scale of the activations through the depth, also with frozen, untrained batch
        normalisation. Not published: the published network starts from trained weights."""
        blocks = [module for module in self.modules() if isinstance(module, DeepLabBottleneck)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for block in blocks:
            block.increase.conv.weight.mul_(len(blocks) ** -0.5)


class TimmBase(nn.Module):
    """The network of one size on a CNN of timm: (B, 3, H, W) -> (B, cout, H, W), every cell in its place."""

    def __init__(self, options: DeepLabV2Options, cout: int) -> None:
        super().__init__()
        self.backbone = TimmCNN(options.backbone, options.timm)
        self.aspp = ASPP(self.backbone.channels["layer4"], cout, options.rates)

    def forward(self, images: Tensor) -> Tensor:
        """The forward pass, as described for the class."""
        return self.backbone.enlarge(self.aspp(self.backbone(images)), images.shape[-2:])

    @staticmethod
    def logits_size(height: int, width: int) -> tuple[int, int]:
        """That of the input."""
        return height, width


class ConvBn(nn.Sequential):
    """``conv`` without bias and ``bn``, then a ReLU if ``relu``."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int = 1, dilation: int = 1, *, relu: bool = True
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        if relu:
            self.relu = nn.ReLU(inplace=True)


class DeepLabBottleneck(nn.Module):
    """(B, cin, h, w) -> (B, cout, ceil(h / stride), ceil(w / stride)); ``form`` says which convolution has the stride.

    A block with ``project`` has a convolution on its shortcut: the first of each stage.
    """

    def __init__(
        self, cin: int, cmid: int, cout: int, *, stride: int, dilation: int, project: bool, form: Form
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if form == "caffe" else (1, stride)
        self.reduce = ConvBn(cin, cmid, 1, first)
        self.conv3x3 = ConvBn(cmid, cmid, 3, second, dilation)
        self.increase = ConvBn(cmid, cout, 1, relu=False)
        self.shortcut = ConvBn(cin, cout, 1, stride, relu=False) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The forward pass, as described for the class."""
        return F.relu(self.increase(self.conv3x3(self.reduce(x))) + self.shortcut(x))


class ASPP(nn.Module):
    """The classifier: the sum of parallel dilated 3x3 convolutions, (B, cin, h, w) -> (B, cout, h, w)."""

    def __init__(self, cin: int, cout: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        for number, rate in enumerate(rates):
            convolution = nn.Conv2d(cin, cout, 3, padding=rate, dilation=rate)
            nn.init.normal_(convolution.weight, std=0.01)
            nn.init.zeros_(convolution.bias)
            self.add_module(f"c{number}", convolution)

    def forward(self, x: Tensor) -> Tensor:
        """The forward pass, as described for the class."""
        return torch.stack([branch(x) for branch in self.children()]).sum(0)


def shrunk_size(size: Sequence[int], factor: float) -> tuple[int, int]:
    """(H, W) times a factor, truncated to whole pixels, at least one."""
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def shrink_images(images: Tensor, factor: float) -> Tensor:
    """(B, 3, H, W) -> (B, 3, *smaller_size), bilinear."""
    size = images.shape[-2:]
    if min(size) * factor < 1:
        return F.interpolate(images, size=shrunk_size(size, factor), mode="bilinear", align_corners=False)
    # samples are placed by the factor itself, not by the ratio of the rounded sizes (deeplab.md C.2)
    return F.interpolate(images, scale_factor=factor, mode="bilinear", recompute_scale_factor=False)


def logits_size(height: int, width: int) -> tuple[int, int]:
    """Size of the logits of one input: 321 -> 41, 513 -> 65 (deeplab.md C.1)."""

    def side(n: int) -> int:
        n = (n - 1) // 2 + 1  # conv1
        n = -(-(n - 1) // 2) + 1 if n > 1 else 1  # the pooling rounds up
        return (n - 1) // 2 + 1  # layer3

    return side(height), side(width)


# ---------------------------------------------------------------------------------------------- names (deeplab.md C.5)

_CAFFE_RESIDUAL = re.compile(r"(res|bn)(\d)([abc])(\d*)_branch(1|2a|2b|2c)\.(.+)")
_TORCHVISION_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.+)")
_UNITS = {"1": "shortcut", "2a": "reduce", "2b": "conv3x3", "2c": "increase"}


def from_caffe(name: str) -> str | None:
    """Name of a tensor of the official caffemodels -> its name in ``DeepLabBase`` (``fc`` for the classifier of the
    COCO file); None for the copies of the network that share its weights. Other names come back as they are."""
    if "res075" in name or "res05" in name:
        return None
    layer, _, value = name.partition(".")
    if layer in ("conv1", "bn_conv1"):
        return f"layer1.conv1.{'conv' if layer == 'conv1' else 'bn'}.{value}"
    if match := _CAFFE_RESIDUAL.fullmatch(name):
        kind, stage, letter, number, branch, value = match.groups()
        # blocks are a, b, c, or if there are many a, b1, b2, ...
        block = int(number) + 1 if number else "abc".index(letter) + 1
        return f"layer{stage}.block{block}.{_UNITS[branch]}.{'conv' if kind == 'res' else 'bn'}.{value}"
    if match := re.fullmatch(r"fc1_\w+_(c\d+)\.(.+)", name):
        return f"aspp.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"fc1_[^_]+\.(.+)", name):
        return f"fc.{match[1]}"
    return name


def from_torchvision(name: str) -> str:
    """Name of a tensor of torchvision's ResNets -> its name in ``DeepLabBase``. Other names come back as they are."""
    if match := re.fullmatch(r"(conv|bn)1\.(.+)", name):
        return f"layer1.conv1.{match[1]}.{match[2]}"
    if match := _TORCHVISION_BLOCK.fullmatch(name):
        stage, block, kind, number, value = match.groups()
        if kind == "downsample.":
            unit, layer = "shortcut", ("conv", "bn")[int(number)]
        else:
            unit, layer = _UNITS[f"2{'abc'[int(number) - 1]}"], kind
        return f"layer{int(stage) + 1}.block{int(block) + 1}.{unit}.{layer}.{value}"
    return name


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class DeepLabV2Options(Options):
    """Network of ``deeplabv2``; the defaults are the published ones."""
    # deeplab.md C.1, C.2

    # deeplab.md C.6
    form: Annotated[Form, RESNET] = "caffe"
    """Form of the backbone's weights. caffe: images are BGR, 0 to 255, minus the mean, and a stage's stride is in the
    first 1x1 convolution. torchvision: images are normalised RGB, and the stride is in the 3x3 convolution (also for
    the CAM networks on a ResNet of this project). Weights of one form do not suit the other: training then ends at
    about 20 mIoU."""
    width: Annotated[float, Range(above=0), RESNET] = 1.0
    """Channel multiplier; 1 is the published network."""
    depth: Annotated[tuple[int, int, int, int], Range(least=1), RESNET] = (3, 4, 23, 3)
    """Blocks in layer2 to layer5."""
    dilations: Annotated[tuple[int, int], Range(least=1), RESNET] = (2, 4)
    """Dilations of the 3x3 convolutions of layer4 and layer5, in cells of 8 pixels."""
    rates: Annotated[tuple[int, ...], Range(least=1, filled=True)] = (6, 12, 18, 24)
    """Dilations of the parallel convolutions of the classifier, in cells of 8 pixels (of a CNN of timm: of its
    stride)."""
    scales: Annotated[tuple[float, ...], Range(above=0, below=1)] = (0.5, 0.75)
    """Factors of the input size in addition to 1, in training and testing."""
    freeze_bn: Annotated[bool, RESNET] = True
    """Keep all batch normalisation (statistics and affine) as loaded. Turn off to train from random weights."""
    bn_momentum: Annotated[float, Range(above=0, most=1), When("freeze_bn", False)] = 0.001
    """Momentum of the running statistics, if they are not frozen."""
    head_lr: Positive = 10.0
    """Learning rate of the classifier's weights relative to the backbone's; its biases learn twice as fast."""
    pretrained: Annotated[str, When("form", "torchvision")] = "resnet101.tv_in1k"
    """timm's name of the ImageNet classifier for the weights 'pretrained' (form torchvision)."""
    backbone: Annotated[str, Names(("resnet",), PREFIX)] = "resnet"
    """Backbone: the published ResNet, which the options above describe, or timm/NAME, a CNN of timm."""
    timm: Annotated[TimmOptions, ON_TIMM] = field(default_factory=TimmOptions)
    """CNN of timm, if it is the backbone."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> DeepLabV2:
        """The network for ``num_classes`` foreground classes."""
        return DeepLabV2(num_classes, self)


# ------------------------------------------------------------------------------------- recipes

DeepLabV2.recipes = {
    "published": SegmentRecipe(
        network=DeepLabV2Options(),
        fit=Fit(
            steps=20000,
            batch_size=10,
            micro_batch=5,  # published: each half is averaged over its own pixels, here over all pixels
            lr=2.5e-4,
            momentum=0.9,
            weight_decay=5e-4,
            power=0.9,
            schedule_every=10,
        ),
        augment=Augment(
            order=("normalize", "scale", "crop", "flip"),  # published: scaled in floating point
            scale_set=(0.5, 0.75, 1.0, 1.25, 1.5),
            scale_filter="linear",
            scale_mask="pil",
            crop=321,
            crop_place="top_left",
            mask_fill=IGNORE,
            flip=0.5,
        ),
        weights=REQUIRED,  # init.caffemodel or deeplabv1_resnet101-coco.pth
        init="coco",  # trained on COCO's pixel masks: not for comparisons of methods that learn only from tags
        infer=SegInference(
            scales=(1.0,),
            align_corners=False,
            # on the raw image; the published code hands over the mean-subtracted one, wrapped (deeplab.md C.4)
            crf=CRFSettings(
                iterations=10,
                gauss_sxy=1,
                gauss_weight=3,
                bilateral_sxy=67,
                bilateral_srgb=3,
                bilateral_weight=4,
            ),
        ),
    ),
    "sample": SegmentRecipe(
        amp="fast",
        network=DeepLabV2Options(
            # the shape of SAMPLE_RESNET, the backbone of the sample recipes of CAM networks on a ResNet
            form="torchvision",
            width=0.25,
            depth=(1, 1, 1, 1),
            dilations=(1, 1),
            rates=(1, 2, 3, 4),
            freeze_bn=False,
            bn_momentum=0.1,
            head_lr=1.0,
        ),
        fit=Fit(epochs=18, batch_size=16, optimiser="adamw", lr=0.002, weight_decay=0.01, schedule_every=10),
        augment=Augment(
            order=("hsv", "flip", "scale", "normalize", "crop"),
            scale_set=(0.75, 1.0, 1.25),
            scale_filter="linear",
            scale_mask="pil",
            crop=112,
            crop_place="top_left",
        ),
        infer=SegInference(
            scales=(1.0,),
            align_corners=False,
            crf=CRFSettings(
                iterations=5,
                gauss_sxy=1,
                gauss_weight=3,
                bilateral_sxy=32,
                bilateral_srgb=13,
                bilateral_weight=4,
            ),
        ),
    ),
    "photos": make_photos_segment_recipe(
        DeepLabV2Options(backbone=PHOTOS, timm=PHOTOS_TIMM, rates=(3, 6, 9, 12), scales=(0.75,))
    ),
}
