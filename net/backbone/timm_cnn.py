"""Any CNN of timm by name, as the backbone of a CAM network, a refiner or a segmentation network.

**Where a cell lies.** Everything here takes cell i of a map of stride s to cover the pixels s i to s (i + 1), so that
its centre is s (i + 1/2). The cells of timm's networks lie elsewhere, and not all in the same place: a 3x3 convolution
of stride 2 with a margin of 1 puts its cells on the even pixels, TensorFlow's SAME puts them on the odd ones, patches
of ConvNeXt on the centres; dilated stages mostly add nothing. At stride 16 that is up to half a cell, in one direction,
and the maps of an image and of its mirror image are then a whole cell apart. ``find_geometry`` measures the centres.
The image gets a margin that puts the cells of the last map on their centres; the finer maps are moved there by
interpolation between two neighbours. (Where a shortcut averages pixels that the convolutions beside it do not, as in
ResNet-D and -T, the two disagree; the mean counts, as if both had the same weight.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, When
from misc.image.pixels import name_normalisation
from misc.precision import at_least_float32
from net.backbone.depthwise import speed_up_depthwise
from net.backbone.resnet import STAGES, Stage
from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors

PREFIX = "timm/"
"""What the option ``backbone`` begins with where it names one of these networks."""
ON_TIMM = When("backbone", PREFIX)
"""Marks options that apply to a backbone of timm alone."""
PHOTOS = "timm/tf_efficientnet_lite0.in1k"
"""The backbone of the recipes photos: small, quick on CPUs, its weights fetch themselves (18 MB)."""
_NEAR = 0.1
"""Cells that are moved by less than this fraction of themselves stay where they are."""
_PROBE = 224
_LAYOUT = ("stride", "dilation", "padding")
_GATES = re.compile(r"SE[A-Z]|Squeeze|Eca|Cbam|Context|GatherExcite|Attn|Attention|ResponseNorm")
"""Class names of layers that weigh channels or places by what is elsewhere in the map."""


@dataclass(frozen=True)
class TimmOptions(Checked):
    """Stride and training behaviour of a CNN of timm."""

    stride: Literal[8, 16, 32] = 16
    """Stride of the last map. Below 32 the last stages are dilated instead, which some families of timm can't."""
    training_stride: Literal[0, 8, 16, 32] = 0
    """Stride of the last map in training, where it takes most of the time. 0: the same. A larger one computes fewer
    cells, by the same weights."""
    norm: Literal["trained", "fixed", "frozen"] = "trained"
    """Batch normalisation. trained: as usual. fixed: uses the loaded running statistics; weight and bias are trained.
    frozen: statistics, weight and bias stay as loaded."""
    frozen: Literal["none", "stem", "layer1", "layer2", "layer3", "layer4"] = "none"
    """The stages up to and including this one get no gradient and keep their batch normalisation."""


@dataclass(frozen=True)
class Geometry:
    """Channels and cells of a network's maps, by stage."""

    channels: Mapping[Stage, int]
    strides: Mapping[Stage, int]
    centres: Mapping[Stage, float]
    """Centre of the first cell in pixels of the network's input, whose first pixel covers 0 to 1."""
    lead: int
    """Pixels of margin at the left and at the top that put the last map's cells on their centres."""

    def place(self, stage: Stage) -> tuple[int, float]:
        """First cell of a map to use, and the fraction by which cells are moved to the next one."""
        stride = self.strides[stage]
        start = (self.lead + stride / 2 - self.centres[stage]) / stride
        first = int(start + _NEAR) if start + _NEAR >= 0 else -1
        part = start - first
        return first, part if part > _NEAR else 0.0

    def margins(self, side: int) -> tuple[int, int]:
        """Pixels before and after a side of an image, so that every map has the cells that cover it."""
        total = max(self.strides.values())
        needed = 0
        for stage, stride in self.strides.items():
            first, part = self.place(stage)
            needed = max(needed, stride * (first + cells(side, stride) + int(part > 0)))
        return self.lead, cells(needed, total) * total - self.lead - side


class TimmCNN(nn.Module):
    """The network without its classifier, under ``model``; names within are timm's.

    It has the interface of ``net.backbone.resnet.Stages``: the maps stem (stride 2 or 4), layer1 (4), layer2 (8),
    layer3 and layer4, which is the last map before the pooling. Networks without a map before their first stage
    (ConvNeXt) give that of layer1 twice. Unlike a ResNet's, cells cover their pixels: see the text above.

    Args:
        name: timm's, with or without PREFIX and the name of its weights.
        options: stride and training behaviour.

    Raises ValueError with the reason where timm has no such network, or it can't be a backbone here.
    """

    def __init__(self, name: str, options: TimmOptions | None = None) -> None:
        super().__init__()
        self.options = options or TimmOptions()
        self.name = name.removeprefix(PREFIX)
        strides = {False: self.options.stride, True: self.options.training_stride or self.options.stride}
        self._geometries = {mode: find_geometry(self.name, stride) for mode, stride in strides.items()}
        self.channels = self._geometries[False].channels
        self.model = _create(self.name, self.options.stride)
        self._layouts = {True: {}, False: {}} if strides[True] == strides[False] else self._find_layouts(strides[True])
        speed_up_depthwise(self.model)
        config = self.model.pretrained_cfg
        self.normalisation = name_normalisation(config["mean"], config["std"])
        named = config.get("classifier") or ()
        self.classifier = (named,) if isinstance(named, str) else tuple(named)
        modules = [info["module"] for info in _feature_info(self.model)]
        self._ends = dict(zip(STAGES[-len(modules) :], modules, strict=True))
        self.train()

    @property
    def geometry(self) -> Geometry:
        """Of the present mode, training or evaluation."""
        return self._geometries[self.training]

    @property
    def strides(self) -> Mapping[Stage, int]:
        """Stride of the map of each stage, in the present mode."""
        return self.geometry.strides

    def _find_layouts(self, stride: int) -> dict[bool, dict[str, dict[str, Any]]]:
        """What the two modes differ in: {training?: {convolution: {attribute: value}}}."""
        from timm.layers import Conv2dSame

        with torch.device("meta"):
            other = _create(self.name, stride)
        found: dict[bool, dict[str, dict[str, Any]]] = {True: {}, False: {}}
        for (path, here), there in zip(self.model.named_modules(), other.modules(), strict=True):
            pair = ((False, here), (True, there))
            if isinstance(here, nn.Conv2d):
                if isinstance(there, Conv2dSame) and type(here) is nn.Conv2d:  # timm's form of it at stride 1
                    here.__class__, here.padding = Conv2dSame, (0, 0)
                layouts = {mode: {name: getattr(one, name) for name in _LAYOUT} for mode, one in pair}
                if layouts[True] != layouts[False]:
                    for mode in found:
                        found[mode][path] = layouts[mode]
            elif next(here.children(), None) is None and repr(here) != repr(there):
                raise ValueError(
                    f"timm's {self.name} can't be trained at another stride than {self.options.stride}, since its "
                    f"layer {path} is another one there: leave network.timm.training-stride at 0."
                )
        return found

    def freeze(self) -> None:
        """Freeze the layers that the options name."""
        if self.options.norm != "trained":
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.requires_grad_(self.options.norm == "fixed")
        for module in self._frozen_modules():
            module.train(False)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def _frozen_modules(self) -> list[nn.Module]:
        """Modules of timm's network up to the end of the frozen stage, without those that also hold trained ones."""
        frozen = self.options.frozen
        if frozen == "layer4":
            return list(self.model.modules())
        end = self._ends.get(frozen)
        if end is None:
            return []
        names = [name for name, _ in self.model.named_modules()]
        last = max(number for number, name in enumerate(names) if name == end or name.startswith(f"{end}."))
        return [self.model.get_submodule(n) for n in names[1 : last + 1] if not end.startswith(f"{n}.")]

    def train(self, mode: bool = True) -> TimmCNN:
        """Set training or evaluation mode, except for frozen layers; returns self."""
        super().train(mode)
        for path, layout in self._layouts[mode].items():
            for name, value in layout.items():
                setattr(self.model.get_submodule(path), name, value)
        self.freeze()
        return self

    def forward_stages(self, images: Tensor) -> dict[Stage, Tensor]:
        """Maps of all stages of normalised images (B, 3, H, W), any H and W: {stage: (B, channels, ceil(H / stride),
        ceil(W / stride))}."""
        height, width = images.shape[-2:]
        rows, columns = self.geometry.margins(height), self.geometry.margins(width)
        last, maps = self.model.forward_intermediates(F.pad(images, (*columns, *rows)))
        maps = [*([maps[0]] * (len(STAGES) - len(maps))), *maps[:-1], last]
        return {stage: self._move(x, stage, (height, width)) for stage, x in zip(STAGES, maps, strict=True)}

    def maps_at(self, images: Tensor, stages: Sequence[Stage], stride: int) -> list[Tensor]:
        """The maps of some stages of images (B, 3, H, W) on cells of one stride: (B, channels, ceil(H / stride),
        ceil(W / stride)) each; finer maps are averaged, coarser ones interpolated."""
        taps, (height, width) = self.forward_stages(images), images.shape[-2:]
        return [
            to_stride(taps[stage], self.strides[stage], stride)[..., : cells(height, stride), : cells(width, stride)]
            for stage in stages
        ]

    def _move(self, x: Tensor, stage: Stage, size: tuple[int, int]) -> Tensor:
        """The cells that cover an image of ``size``, on their centres: (B, C, h', w') -> (B, C, h, w)."""
        first, part = self.geometry.place(stage)
        for axis, side in zip((2, 3), size, strict=True):
            count = cells(side, self.strides[stage])
            here = x.narrow(axis, first, count)
            x = here if part == 0 else here.lerp(x.narrow(axis, first + 1, count), part)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """The last map: (B, 3, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""
        return self.forward_stages(images)["layer4"]

    def enlarge(self, maps: Tensor, size: tuple[int, int], stage: Stage = "layer4") -> Tensor:
        """Maps on the cells of a stage at the size of the image: (B, K, h, w) -> (B, K, H, W), bilinear. What lies
        beyond the image in the last cells is cut off, so that the cells keep their places."""
        stride = self.strides[stage]
        whole = [side * stride for side in maps.shape[-2:]]
        maps = F.interpolate(at_least_float32(maps), size=whole, mode="bilinear", align_corners=False)
        return maps[..., : size[0], : size[1]]


def cells(side: int, stride: int) -> int:
    """Cells that cover so many pixels. Without negative numbers, whose division ONNX rounds up."""
    return (side + stride - 1) // stride


def to_stride(x: Tensor, old: int, new: int) -> Tensor:
    """A map of one stride on cells of another, of which one is a multiple of the other: (B, C, h, w) -> means of its
    cells (B, C, ceil(h old / new), ...), or bilinear between them (B, C, h old / new, ...)."""
    if old < new:
        return F.avg_pool2d(x, new // old, ceil_mode=True, count_include_pad=False)
    if old > new:
        return F.interpolate(x, scale_factor=old // new, mode="bilinear", align_corners=False)
    return x


def load_timm(network: nn.Module, weights: str, *, heads: Collection[str], owner: str) -> str:
    """Start a network that owns a ``TimmCNN``: from timm's own weights, or from any network here that owns the same.

    Args:
        network: receives the weights.
        weights: a file (timm's safetensors or pth, or a run's weights/*.pt), or ``timm:NAME``.
        heads: names or patterns of the layers outside the backbone: these keep their values if the file lacks them or
            has them in another shape.
        owner: the attribute that holds the backbone.

    Returns:
        A one-line report. Raises ValueError if the file does not fit, FileNotFoundError if it does not exist.
    """
    backbone = network.get_submodule(owner)
    state, own = read_tensors(weights), network.state_dict()
    names = set(backbone.model.state_dict())
    telltale = next(iter(backbone.model.state_dict()))
    prefixes = {name.removesuffix(telltale) for name in state if name.endswith(telltale)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    fits = {prefix: sum(f"{prefix}{name}" in state for name in names) for prefix in prefixes}
    prefix = max(fits, key=lambda one: (fits[one], -len(one)), default="")
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    unknown = [] if prefix == f"{owner}.model." else [
        name for name in inner
        if name not in names and not name.startswith(tuple(f"{one}." for one in backbone.classifier))
    ]  # fmt: skip
    if unknown and fits.get(prefix) and (not prefix or prefix.endswith(".model.")):
        raise ValueError(
            f"{weights}: has {len(unknown)} tensors that timm's {backbone.name} lacks, such as {unknown[0]}: it is of "
            "another network, or of another version of it."
        )
    named = {f"{owner}.model.{name}": value for name, value in inner.items() if name in names}
    if prefix:  # a network of this project: its other layers may be this one's too
        named |= {name: value for name, value in state.items() if name in own and not name.startswith(f"{owner}.")}
    return str(load_tensors(network, named, allow_missing=tuple(heads), label=weights))


# ------------------------------------------------------------------------------------------------ geometry


def _create(name: str, stride: int) -> Any:
    """timm's network without its classifier, with random weights."""
    import timm  # slow to import, and most runs don't need it

    more = {} if stride == 32 else {"output_stride": stride}
    return timm.create_model(name, pretrained=False, num_classes=0, **more)


def _feature_info(model: Any) -> list[dict[str, Any]]:
    info = model.feature_info
    return list(info) if isinstance(info, list) else list(info.info)


@cache
def find_geometry(name: str, stride: int) -> Geometry:
    """Channels, strides and centres of the cells of timm's CNN ``name`` with a last map of this stride.

    Raises ValueError with the reason where there is no such network, or it can't be the backbone.
    """
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: give a name of timm.list_models(), as {PREFIX}NAME.")
    # the run's random numbers must not depend on whether this is remembered; a network may be built without memory
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return _find_geometry(name, stride)


@torch.no_grad()
def _find_geometry(name: str, stride: int) -> Geometry:
    try:
        model = _create(name, stride).eval()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"a {type(model).__name__} of timm has no feature taps")
        _make_linear(model)
        side = 8 * max(stride, 32)
        ramp = (torch.arange(side, dtype=torch.float32) + 0.5).expand(3, side, side)
        last, maps = model.forward_intermediates(torch.stack([torch.ones_like(ramp), ramp]))
        maps = [*maps[:-1], last]
        found = [side / x.shape[-1] for x in maps]
        if len(maps) not in (4, 5) or found[-4:-2] != [4, 8] or found[-1] != stride or found[0] not in (2, 4):
            raise ValueError(f"its maps have the strides {', '.join(f'{s:g}' for s in found)}")
        missing = len(STAGES) - len(maps)
        by_stage = [
            dict(zip(STAGES, [values[0]] * missing + values, strict=True))
            for values in ([x.shape[1] for x in maps], [int(s) for s in found], [_centre(x, side) for x in maps])
        ]
        return _with_lead(Geometry(*by_stage, lead=0))  # type: ignore[arg-type]
    except TypeError as error:
        if "output_stride" not in str(error):
            raise
        remedy = "network.timm.stride 32" if _has_taps(name) else "a CNN, such as a ResNet, EfficientNet or ConvNeXt"
        raise ValueError(f"timm can't give {name} a last map of stride {stride}: use {remedy}.") from None
    except Exception as error:  # each family of timm fails in its own way
        raise ValueError(
            f"timm's {name} can't be the backbone ({str(error) or type(error).__name__}): a CNN with maps at strides "
            "4, 8 and 16 is needed, such as a ResNet, RegNet, EfficientNet or ConvNeXt."
        ) from error


def _has_taps(name: str) -> bool:
    """Whether a network has maps at strides 4 and 8 where nothing is asked of its last one."""
    try:
        _, maps = _create(name, 32).eval().forward_intermediates(torch.zeros(1, 3, _PROBE, _PROBE))
    except Exception:  # each family of timm fails in its own way
        return False
    return {_PROBE // 4, _PROBE // 8} <= {x.shape[-1] for x in maps}


def _with_lead(geometry: Geometry) -> Geometry:
    """With the smallest margin that puts the cells of the last map at most half a pixel off their centres, and under
    which no map lacks its first cells."""
    stride = geometry.strides["layer4"]
    for lead in range(3 * stride):
        found = replace(geometry, lead=lead)
        offset = (lead + stride / 2 - geometry.centres["layer4"]) % stride
        if min(offset, stride - offset) <= 0.5 and all(found.place(stage)[0] >= 0 for stage in STAGES):
            return found
    raise ValueError(f"the cells of its maps seem to lie at {', '.join(f'{c:g}' for c in geometry.centres.values())}")


def _centre(maps: Tensor, side: int) -> float:
    """Centre of the first cell of a map, in pixels: the mean place of what a cell is made of.

    Args:
        maps: (2, C, h, w) of a linear network (``_make_linear``), of an image of ones and of one whose pixels are their
            places in their rows.
        side: of the image.
    """
    cell = maps.shape[-1] // 2
    one, place = maps[:, :, cell, cell].double().sum(1).tolist()
    if not (math.isfinite(one) and one > 0):
        raise ValueError("where the cells of its maps lie can't be measured")
    return round(2 * (place / one - cell * side / maps.shape[-1])) / 2


def _make_linear(model: nn.Module) -> None:
    """Make a network linear: convolutions of stride 1 take the pixel under the middle of their kernel, those of a
    larger stride (or with no pixel in the middle) are means, poolings too; other layers do nothing."""
    from timm.layers import AvgPool2dSame, Conv2dSame

    for parameter in model.parameters():
        parameter.fill_(1.0)
    for path, module in list(model.named_modules()):
        kind = type(module)
        new: nn.Module | None = None
        if isinstance(module, nn.Conv2d | nn.Linear):
            _take_mean(module.weight, centre=isinstance(module, nn.Conv2d) and max(module.stride) == 1)
            if module.bias is not None:
                module.bias.zero_()
            if "Std" in kind.__name__:  # weights that are all equal have no deviation
                module.__class__ = Conv2dSame if "Same" in kind.__name__ else nn.Conv2d
        elif isinstance(module, nn.MaxPool2d):
            shape = (module.kernel_size, module.stride, module.padding)
            new = AvgPool2dSame(*shape[:2]) if "Same" in kind.__name__ else nn.AvgPool2d(*shape)
        elif path and (_GATES.search(kind.__name__) or "activation" in kind.__module__ or _is_norm(module)):
            new = nn.Identity()
        if new is not None:
            above, _, last = path.rpartition(".")
            setattr(model.get_submodule(above), last, new)


def _take_mean(weight: Tensor, centre: bool) -> None:
    """Weights (cout, cin, ...) that give the mean of the inputs, or of those under the kernel's middle if there is
    one."""
    if centre and all(side % 2 for side in weight.shape[2:]):
        height, width = weight.shape[2:]
        weight.zero_()
        weight[:, :, height // 2, width // 2] = 1 / weight.shape[1]
    else:
        weight.fill_(1 / weight[0].numel())


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation (perhaps with an activation), and not a block that contains one."""
    parts = module.modules()
    return "Norm" in type(module).__name__ and not any(isinstance(part, nn.Conv2d | nn.Linear) for part in parts)
