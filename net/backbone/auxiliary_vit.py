"""The network of ToCo and MoRe: a vision transformer with patch tokens taken at two depths, two classifiers on their
maxima, and a LargeFOV decoder (toco.md section 2, more.md section 2).

Maps come from the final tokens; auxiliary maps come from an earlier block, whose tokens are less alike. Names are those
of the official checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net.backbone.vit import ViT, ViTOptions


class AuxiliaryViT(ViT):
    """Vision transformer that returns class and patch tokens after the final norm, and the patch tokens of an earlier
    block without norm.

    Args:
        options: size.
        tokens: number of class tokens.
        aux_layer: block of the auxiliary tokens; negative from the end, -3 is the block two before the last.
        classes: size of the linear head, which is never used and exists only to load checkpoints.
    """

    unused = ("head",)

    def __init__(self, options: ViTOptions, tokens: int, aux_layer: int, classes: int) -> None:
        super().__init__(options, tokens)
        self.aux_block = range(options.depth)[aux_layer]
        self.head = nn.Linear(options.width, classes).requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> class tokens (B, n, D), patch tokens (B, D, h, w), auxiliary patch tokens (B, D, h, w)."""
        x, grid = self.embed_patches(images)
        auxiliary = x
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == self.aux_block:
                auxiliary = x
        x = self.norm(x)
        patches, auxiliary = (
            part[:, self.tokens :].transpose(1, 2).unflatten(2, grid) for part in (x, auxiliary)
        )  # (B, D, h, w) each
        return x[:, : self.tokens], patches, auxiliary


class LargeFovHead(nn.Module):
    """Decoder on patch tokens: two dilated 3x3 convolutions and a classifier, none with a bias.

    (B, D, h, w) -> (B, C + 1, h, w), background first. toco.md section 2.2.
    """

    def __init__(self, width: int, classes: int, hidden: int = 512, dilation: int = 5) -> None:
        super().__init__()
        self.conv6 = nn.Conv2d(width, hidden, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv7 = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv8 = nn.Conv2d(hidden, classes, 1, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits of every patch."""
        return self.conv8(F.relu(self.conv7(F.relu(self.conv6(patches)))))


class MaxClassifier(nn.Conv2d):
    """A classifier without bias on the maximum of every channel over the patches; applied to each patch it gives class
    maps. toco.md section 2.2."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes, 1, bias=False)

    def class_logits(self, patches: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C) float32."""
        return super().forward(patches.amax((2, 3), keepdim=True))[:, :, 0, 0].float()

    def class_maps(self, patches: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, h, w) float32, signed."""
        return super().forward(patches).float()


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose weight rows have norm ``weight_g``, which stays 1: for inputs of norm 1 an output
    is a cosine. (..., in) -> (..., out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(outputs, 1), requires_grad=False)
        self.weight_v = nn.Parameter(nn.Linear(inputs, outputs, bias=False).weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Returns products of the rows' directions with ``x``, times ``weight_g``."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class ProjectionHead(nn.Module):
    """Projection of class tokens for their contrast: (n, D) -> (n, out) (toco.md section 2.2). Its layers are twice as
    wide as the output, its bottleneck a quarter of it."""

    def __init__(self, width: int, outputs: int = 1024) -> None:
        super().__init__()
        hidden, bottleneck = 2 * outputs, outputs // 4
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class tokens (n, D) -> projections (n, out), not normalised."""
        return self.last_layer(F.normalize(self.mlp(tokens), dim=1))
