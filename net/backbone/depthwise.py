"""Depthwise convolutions (one filter a channel) whose backward pass is quick on a CPU.

Where filters are large or dilated, PyTorch's own backward pass takes tens of times as long as the forward pass, and
most of a training step of EfficientNet or ConvNeXt (docs/performance.md). Both gradients are convolutions, which are
quick forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

_LARGE = 5
"""Filters from this side on gain; smaller ones do where they are dilated."""


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with the numbers and gradients of ``nn.Conv2d``, equal to rounding.

    Where oneDNN computes convolutions on the CPU, in float32 and without autocast, the gradients of filters of 5 x 5
    and more and of dilated ones come from ``_Depthwise``, for strides of one; all else is ``nn.Conv2d``'s. Not for the
    transforms of ``torch.func``.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of N x C x H x W give maps of N x C x H' x W'."""
        if not (torch.is_grad_enabled() and self._is_fast_for(maps) and self._gains()):
            return super().forward(maps)
        result: Tensor = _Depthwise.apply(maps, self.weight, self.padding, self.dilation)
        return result if self.bias is None else result + self.bias[:, None, None]

    @staticmethod
    def _is_fast_for(maps: Tensor) -> bool:
        """Whether convolutions forward of such maps, a batch of at least one image, are quick."""
        if maps.device.type != "cpu" or not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
            return False
        return maps.dtype == torch.float32 and maps.dim() == 4 and len(maps) > 0

    def _gains(self) -> bool:
        """Whether the layer, whose stride, dilation and margin may have changed, has quicker gradients here."""
        if self.stride != (1, 1) or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        reaches = _reach(self.kernel_size, self.dilation)
        fits = all(margin <= reach for margin, reach in zip(self.padding, reaches, strict=True))
        return fits and (max(self.kernel_size) >= _LARGE or max(self.dilation) > 1)


class _Depthwise(Function):
    """The convolution without a bias: maps, filters, margin, dilation."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, filters: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(maps, filters)
        ctx.layout = padding, dilation
        return F.conv2d(maps, filters, None, 1, padding, dilation, len(filters))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (maps, filters), (padding, dilation) = ctx.saved_tensors, ctx.layout
        of_maps = of_filters = None
        with torch.autocast("cpu", enabled=False):  # as PyTorch's own; a compiled backward pass is traced within one
            if ctx.needs_input_grad[0]:  # every cell met the filter the other way round
                reaches = _reach(filters.shape[2:], dilation)
                margin = [reach - one for reach, one in zip(reaches, padding, strict=True)]
                of_maps = F.conv2d(gradient, filters.flip(2, 3), None, 1, margin, dilation, len(filters))
            if ctx.needs_input_grad[1]:  # an image's gradient is the filter, and the filter's dilation the stride
                each = (
                    F.conv2d(image[None].contiguous(), one[:, None].contiguous(), None, dilation, padding, 1, len(one))
                    for image, one in zip(maps, gradient, strict=True)
                )
                # in the memory layout of the filters, which DDP asks for
                of_filters = torch.empty_like(filters).copy_(sum(each).view_as(filters))
        return of_maps, of_filters, None, None


def _reach(sides: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """How far apart the first and the last weight of a filter meet the map, in cells: height and width."""
    return [step * (side - 1) for step, side in zip(dilation, sides, strict=True)]


def speed_up_depthwise(network: nn.Module) -> None:
    """Make the depthwise convolutions in a network ``DepthwiseConv2d``."""
    for layer in network.modules():
        if type(layer) is nn.Conv2d and layer.groups == layer.in_channels == layer.out_channels > 1:
            layer.__class__ = DepthwiseConv2d
