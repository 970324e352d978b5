"""Backbones with the five maps stem and layer1 to layer4, by the option ``backbone``: resnet, resnest, timm/NAME."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from net.backbone.resnest import ResNeSt
from net.backbone.resnet import ResNet, Stages, load_resnet
from net.backbone.timm_cnn import TimmCNN, load_timm

Backbone = Stages | TimmCNN


def make_backbone(options: Any) -> Backbone:
    """The backbone that the options name (``backbone``, and the section of that name), with random weights."""
    if options.backbone == "resnet":
        return ResNet(options.resnet)
    return ResNeSt(options.resnest) if options.backbone == "resnest" else TimmCNN(options.backbone, options.timm)


def pretrained_name(backbone: Backbone) -> str:
    """timm's name of its ImageNet weights."""
    return backbone.name if isinstance(backbone, TimmCNN) else backbone.options.pretrained


def load_backbone(network: nn.Module, weights: str, *, heads: Collection[str], owner: str) -> str:
    """``load_timm`` or ``load_resnet``, as the network's backbone needs."""
    load = load_timm if isinstance(getattr(network, owner), TimmCNN) else load_resnet
    return load(network, weights, heads=heads, owner=owner)


def place_maps(backbone: Backbone, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, K, h, w) on the cells of the last stage of images of ``size``. A CNN of timm knows where its cells lie
    and enlarges them to (B, K, H, W); a ResNet's stay as they are, and are stretched over the image as published."""
    return backbone.enlarge(maps, size) if isinstance(backbone, TimmCNN) else maps
