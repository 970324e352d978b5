"""Conformer: a ResNet-like and a ViT branch side by side, which exchange features in every block (transcam.md 2).

Names are those of the official checkpoints. A method subclasses ``Conformer`` and adds its heads. There is no position
embedding, so any image whose sides are multiples of the patch works, square or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, Count, DropProbability, Positive, Range, Weight, check
from net.backbone.transformer import See, TransformerBlock, Visit, start_local
from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors

# of all norms except the stem's batch norm and the final layer norm, which have PyTorch's 1e-5 (transcam.md section 8,
# trap 3)
_BN_EPSILON = 1e-6
_LN_EPSILON = 1e-6


@dataclass(frozen=True)
class ConformerOptions(Checked):
    """Size and structure of a Conformer; the defaults are Conformer-S as in TransCAM."""

    patch: Literal[4, 8, 16] = 16
    """Stride of the tokens and of the last map, in pixels. The stages have strides 4, 8 and 16, but never more than
    this. Published: 16."""
    base: Count = 64
    """Channels of the stem."""
    ratio: Count = 4
    """Channels of the first stage relative to the stem; the second and third stage double them. Published: 1 tiny,
    4 small, 6 base."""
    width: Count = 384
    """Width of a token (embedding dimension)."""
    depth: Annotated[int, Range(least=3, multiple=3)] = 12
    """Number of blocks, a third of them in each stage."""
    heads: Count = 6
    """Attention heads of a transformer block."""
    mlp_ratio: Positive = 4.0
    """Hidden width of a transformer block's MLP relative to a token's width."""
    drop_path: DropProbability = 0.1
    """Stochastic depth rate of the last transformer block; it increases linearly from 0 at the first."""
    last_stride: Literal[1, 2] = 1
    """Stride of the last fusion: 1 in CAM networks, 2 in the ImageNet classifier. Both have the same weights but
    different last maps."""
    double_class_token: bool = True
    """Double the class token at the input of each block except the first, as in the ImageNet classifier and TransCAM.
    Off in AReAM, where the same weights then compute something different."""
    local_start: Weight = 0.0
    """Random start weights. 0: as published. Else the gain of ``transformer.start_local``; the tokens' contribution to
    the map then also starts small."""
    head_std: Annotated[float | None, Range(above=0)] = None
    """Standard deviation of the initial weights of convolutions in new heads, whose biases start at 0. None: Kaiming
    normal by fan-out as in the backbone, as published (logits then start at about 10)."""

    def cross_check(self) -> None:
        """Raises ValueError for an impossible combination of values."""
        if self.base * self.ratio % 4:
            raise ValueError(f"base x ratio must be a multiple of 4, got {self.base} x {self.ratio}.")
        check(self.width % self.heads == 0, "width", self.width, f"a multiple of heads = {self.heads}")

    def check_one_grid(self) -> None:
        """Raises ValueError if the map and the tokens have different grids."""
        if self.last_stride != 1:
            raise ValueError("backbone.last_stride must be 1: the map and the tokens share a grid.")


SAMPLE_CONFORMER = ConformerOptions(
    patch=8, base=16, ratio=4, width=48, depth=6, heads=3, mlp_ratio=2, drop_path=0.0, local_start=2.0, head_std=0.02
)
"""The backbone of the sample recipes: learns small images from random weights within minutes on two CPU cores."""


class ConvBlock(nn.Module):
    """Bottleneck: (B, cin, h, w) -> (B, cout, ceil(h/stride), ceil(w/stride)) (transcam.md section 2.2).

    ``projected``: the shortcut is a convolution with the block's stride, otherwise the identity.
    """

    def __init__(self, cin: int, cout: int, *, stride: int = 1, projected: bool = False) -> None:
        super().__init__()
        middle = cout // 4
        self.conv1 = nn.Conv2d(cin, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle, eps=_BN_EPSILON)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle, eps=_BN_EPSILON)
        self.conv3 = nn.Conv2d(middle, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout, eps=_BN_EPSILON)
        self.projected = projected
        if projected:
            self.residual_conv = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.residual_bn = nn.BatchNorm2d(cout, eps=_BN_EPSILON)

    def forward(self, x: Tensor, x_t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the block's output and its middle activation, (B, cout / 4, ...), which goes to the tokens.

        ``x_t`` (B, cout / 4, h, w): the tokens' contribution, added before the 3x3 convolution.
        """
        middle = F.relu(self.bn1(self.conv1(x)), inplace=True)
        middle = F.relu(self.bn2(self.conv2(middle if x_t is None else middle + x_t)), inplace=True)
        shortcut = self.residual_bn(self.residual_conv(x)) if self.projected else x
        return F.relu(self.bn3(self.conv3(middle)) + shortcut, inplace=True), middle


class Squeeze(nn.Module):
    """Map to patch tokens: (B, cin, h * cells, w * cells) -> (B, h * w, D) (transcam.md section 2.4)."""

    def __init__(self, cin: int, width: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.conv_project = nn.Conv2d(cin, width, 1)
        self.ln = nn.LayerNorm(width, eps=_LN_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Pool before the projection; published: after it. The two commute, and this is cells^2 times cheaper."""
        x = self.conv_project(F.avg_pool2d(x, self.cells))  # (B, D, h, w)
        return F.gelu(self.ln(x.flatten(2).transpose(1, 2)))


class Expand(nn.Module):
    """Patch tokens to a map: (B, h * w, D) -> (B, cout, h * cells, w * cells) (transcam.md section 2.4)."""

    def __init__(self, width: int, cout: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.conv_project = nn.Conv2d(width, cout, 1)
        self.bn = nn.BatchNorm2d(cout, eps=_BN_EPSILON)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """``grid``: h and w. Nearest-neighbour upsampling (transcam.md section 8, trap 4)."""
        x = tokens.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        x = F.relu(self.bn(self.conv_project(x)), inplace=True)
        return F.interpolate(x, scale_factor=self.cells, mode="nearest") if self.cells > 1 else x


class ConvTransBlock(nn.Module):
    """One step of both branches (transcam.md section 2.5).

    ``stride`` is that of the first convolution block, ``last_stride`` that of the fusion, which is None for the
    identity shortcut; ``cells``: map cells per token side.
    """

    def __init__(
        self, cin: int, cout: int, options: ConformerOptions, *,
        stride: int, cells: int, last_stride: int | None, drop_path: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.doubled = options.double_class_token
        self.cnn_block = ConvBlock(cin, cout, stride=stride, projected=cin != cout)
        self.fusion_block = ConvBlock(cout, cout, stride=last_stride or 1, projected=last_stride is not None)
        self.squeeze_block = Squeeze(cout // 4, options.width, cells)
        self.expand_block = Expand(options.width, cout // 4, cells)
        self.trans_block = TransformerBlock(options.width, options.heads, options.mlp_ratio, drop_path)

    def forward(
        self, x: Tensor, tokens: Tensor, grid: tuple[int, int], see: See | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map (B, cin, ...) and tokens (B, 1 + h * w, D), class token first -> the same after the block."""
        x, middle = self.cnn_block(x)
        first, patches = tokens[:, :1], tokens[:, 1:]
        # as published, the class token is put before the map's contribution, which is then added to all tokens: this
        # doubles
        first = 2 * first if self.doubled else first
        tokens = self.trans_block(torch.cat([first, patches + self.squeeze_block(middle)], 1), see)
        x, _ = self.fusion_block(x, self.expand_block(tokens[:, 1:], grid))
        return x, tokens


def initialise_layer(layer: nn.Module) -> None:
    """Published initialisation of a layer, also in heads (transcam.md section 2.6): linear layers truncated normal
    0.02, bias 0; convolutions Kaiming normal by fan-out, bias as in PyTorch."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class Conformer(nn.Module):
    """The body of a Conformer, without heads.

    ``channels``: of the last map; ``width``: of a token; ``patch``: what an image's sides must be multiples of.
    """

    normalisation = "imagenet"
    heads: tuple[str, str]
    """Names of a method's two heads; that of the map, a convolution, first."""

    def __init__(self, options: ConformerOptions | None = None) -> None:
        super().__init__()
        options = options or ConformerOptions()
        self.patch, self.width, self.depth = options.patch, options.width, options.depth
        self.head_std = options.head_std
        self.cls_token = nn.Parameter(torch.zeros(1, 1, options.width))
        self.trans_norm = nn.LayerNorm(options.width)
        self.conv1 = nn.Conv2d(3, options.base, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(options.base)
        # channels and strides of the three stages
        widths = [options.base * options.ratio << stage for stage in range(3)]
        pixels = [min(4 << stage, options.patch) for stage in range(3)]
        self.conv_1 = ConvBlock(options.base, widths[0], projected=True)
        self.trans_patch_conv = nn.Conv2d(options.base, options.width, options.patch // 4, options.patch // 4)
        self.trans_1 = TransformerBlock(options.width, options.heads, options.mlp_ratio, 0.0)
        for number in range(2, options.depth + 1):
            before, stage = ((block - 1) * 3 // options.depth for block in (number - 1, number))
            block = ConvTransBlock(
                widths[before],
                widths[stage],
                options,
                stride=pixels[stage] // pixels[before],
                cells=options.patch // pixels[stage],
                last_stride=options.last_stride if number == options.depth else None,
                drop_path=options.drop_path * (number - 1) / (options.depth - 1),
            )
            self.add_module(f"conv_trans_{number}", block)
        self.channels = widths[-1]
        self._initialise()
        if options.local_start:
            start_local(self, options.local_start)
            for module in self.modules():
                if isinstance(module, Expand):
                    nn.init.constant_(module.bn.weight, 0.05)

    def _initialise(self) -> None:
        """Published initialisation of the backbone (transcam.md section 2.6): ``initialise_layer``, and the class token
        truncated normal 0.02."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            initialise_layer(module)

    def initialise_heads(self, *heads: nn.Module) -> None:
        """Initialise new heads like the backbone, or with the small convolutions of the options."""
        for head in heads:
            initialise_layer(head)
            if isinstance(head, nn.Conv2d) and self.head_std is not None:
                nn.init.trunc_normal_(head.weight, std=self.head_std)
                nn.init.zeros_(head.bias)

    def load_weights(self, weights: str) -> str:
        """Conformer's ImageNet weights without their heads (``Conformer_small_patch16.pth``), or a method's whole
        checkpoint, which must fit completely. A checkpoint's first head is a convolution."""
        head = read_tensors(weights).get(f"{self.heads[0]}.weight")
        if head is not None and head.ndim == 4:
            return str(load_tensors(self, weights))

        def rename(name: str) -> str | None:
            return None if name.startswith(("conv_cls_head", "trans_cls_head")) else name

        return str(load_tensors(self, weights, rename=rename, allow_missing=self.heads))

    def whole_patches(self, images: Tensor) -> Tensor:
        """Stretch images to the next multiples of the patch; images that fit are unchanged.

        Stretched instead of padded, so that the map covers exactly the image, and neither attention nor pooling sees a
        margin.
        """
        height, width = (-(-side // self.patch) * self.patch for side in images.shape[-2:])
        if (height, width) == images.shape[-2:]:
            return images
        return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)

    def forward_features(self, images: Tensor, visit: Visit | None = None) -> tuple[Tensor, Tensor]:
        """Outputs of both branches for normalised images (ImageNet mean and standard deviation, RGB).

        Args:
            images: (B, 3, H, W), H and W multiples of ``patch``.
            visit: called with every layer's queries and keys; without it no attention matrix is computed.

        Returns:
            The last map, (B, channels, H / patch, W / patch), or half that size, rounded up, with ``last_stride`` 2;
            the class token after the final layer norm, (B, width).

        Raises:
            ValueError: a side is not a multiple of ``patch``.
        """
        x, tokens = self.forward_branches(images, visit)
        return x, tokens[:, 0]

    def forward_branches(self, images: Tensor, visit: Visit | None = None) -> tuple[Tensor, Tensor]:
        """As ``forward_features``, with all tokens, the class token first and the patches row-major:
        (B, 1 + h * w, width).

        Raises:
            ValueError: a side is not a multiple of ``patch``.
        """
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"Conformer needs sides that are multiples of {self.patch}, got {height} x {width}: pad or resize."
            )
        grid = (height // self.patch, width // self.patch)
        watchers = [visit and partial(visit, layer) for layer in range(self.depth)]
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images)), inplace=True), 3, 2, padding=1)  # (B, base, H/4, W/4)
        patches = self.trans_patch_conv(x).flatten(2).transpose(1, 2)  # (B, h * w, D), from the stem
        x, _ = self.conv_1(x)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)
        tokens = self.trans_1(tokens, watchers[0])
        for layer in range(1, self.depth):
            x, tokens = self.get_submodule(f"conv_trans_{layer + 1}")(x, tokens, grid, watchers[layer])
        return x, self.trans_norm(tokens)
