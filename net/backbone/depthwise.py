"""Depthwise convolutions (one filter a channel) whose backward pass is quick on a CPU.

PyTorch's own backward pass takes up to fifty times as long as the forward pass where filters are large or dilated
(docs/performance.md), and is most of a training step of EfficientNet or ConvNeXt. Both gradients are convolutions,
which forward are quick.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

_LARGE = 5
"""Filters from this side on gain; smaller ones do where they are dilated."""


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with the numbers of ``nn.Conv2d``, its gradients equal to rounding.

    They are computed here on the CPU, without autocast, for strides of one and filters of 5 x 5 and more or dilated
    ones; all else is ``nn.Conv2d``'s.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of N x C x H x W give maps of N x C x H' x W'."""
        if not (self._gains() and maps.device.type == "cpu" and torch.is_grad_enabled()):
            return super().forward(maps)
        if maps.dim() != 4 or torch.is_autocast_enabled("cpu"):
            return super().forward(maps)
        result: Tensor = _Depthwise.apply(maps, self.weight, self.padding, self.dilation)
        return result if self.bias is None else result + self.bias[:, None, None]

    def _gains(self) -> bool:
        """Whether the layer, whose stride, dilation and margin may have changed, has quicker gradients here."""
        if self.stride != (1, 1) or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        reaches = _reach(self.weight, self.dilation)
        fits = all(margin <= reach for margin, reach in zip(self.padding, reaches, strict=True))
        return fits and (max(self.kernel_size) >= _LARGE or max(self.dilation) > 1)


class _Depthwise(Function):
    """The convolution without a bias."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, maps: Tensor, weights: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(maps, weights)
        ctx.layout = padding, dilation  # type: ignore[attr-defined]
        return F.conv2d(maps, weights, None, 1, padding, dilation, len(weights))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (maps, weights), (padding, dilation) = ctx.saved_tensors, ctx.layout
        of_maps = of_weights = None
        if ctx.needs_input_grad[0]:  # every input met the filter the other way round
            margin = [reach - one for reach, one in zip(_reach(weights, dilation), padding, strict=True)]
            of_maps = F.conv2d(gradient, weights.flip(2, 3), None, 1, margin, dilation, len(weights))
        if ctx.needs_input_grad[1]:  # an image's gradient is the filter, and the filter's dilation the stride
            count, channels, *size = maps.shape
            images = maps.reshape(1, count * channels, *size)
            filters = gradient.reshape(count * channels, 1, *gradient.shape[2:])
            each = F.conv2d(images, filters, None, dilation, padding, 1, count * channels)
            of_weights = each.view(count, *weights.shape).sum(0)
        return of_maps, of_weights, None, None


def _reach(weights: Tensor, dilation: tuple[int, ...]) -> list[int]:
    """How far apart the first and the last weight of a filter meet the map, in cells: height and width."""
    return [step * (side - 1) for step, side in zip(dilation, weights.shape[2:], strict=True)]


def speed_up_depthwise(network: nn.Module) -> None:
    """Make the depthwise convolutions in a network ``DepthwiseConv2d``, with the same parameters."""
    for name, child in network.named_children():
        if type(child) is nn.Conv2d and child.groups == child.in_channels == child.out_channels > 1:
            made = DepthwiseConv2d(
                child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding, child.dilation,
                child.groups, child.bias is not None, child.padding_mode, device="meta",
            )  # fmt: skip
            made.weight, made.bias = child.weight, child.bias
            setattr(network, name, made.train(child.training))
        else:
            speed_up_depthwise(child)
