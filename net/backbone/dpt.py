"""DPT, a dense-prediction transformer: a vision transformer whose tokens at four depths are reassembled into maps and
fused by a convolutional decoder (getam.md section 2).

Names are those of the official GETAM checkpoints, hence timm's below ``pretrained.model``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, Count, DropProbability, Positive, Range, Weight, When, check
from net.backbone.resnetv2 import ResNetV2
from net.backbone.vit import Grid, ViT, ViTOptions, resize_positions
from net.foreign.loading import load_tensors
from net.foreign.pytorch import State
from net.foreign.reading import read_tensors

DPTBackbone = Literal["vitb_hybrid", "vitb", "deitb", "deitb_distilled"]

_TIMM = {
    "vitb_hybrid": "vit_base_r50_s16_384.orig_in21k_ft_in1k",
    "vitb": "vit_base_patch16_384.orig_in21k_ft_in1k",
    "deitb": "deit_base_patch16_384.fb_in1k",
    "deitb_distilled": "deit_base_distilled_patch16_384.fb_in1k",
}
"""timm's names of the published ImageNet classifiers (getam.md section 2.1)."""


@dataclass(frozen=True)
class DPTOptions(Checked):
    """Kind and size; the defaults are published for ``vitb_hybrid``, and except for the kind also for the others."""

    backbone: DPTBackbone = "vitb_hybrid"
    """vitb_hybrid: ViT on the features of a ResNet, whose first two stages are two of the four maps. vitb, deitb: plain
    ViT (the same network, other ImageNet weights). deitb_distilled: with a distillation token."""
    image_size: Count = 384
    """Side of the square images for which the position embedding is defined; for other sizes it is resized. Pixels."""
    patch: Annotated[int, Range(least=8, multiple=4)] = 16
    """Side of a patch. Pixels. With 8 the hybrid's stem has no pooling."""
    width: Count = 768
    """Channels of a token."""
    depth: Annotated[int, Range(least=4, multiple=4)] = 12
    """Number of blocks, a multiple of 4: tokens are taken after each quarter (in the hybrid after the last two)."""
    heads: Count = 12
    """Attention heads; must divide the width."""
    mlp_ratio: Positive = 4.0
    """Hidden width of a block's MLP relative to a token's width."""
    stem: Annotated[int, Range(least=8, multiple=8), When("backbone", "vitb_hybrid")] = 64
    """vitb_hybrid: channels of the ResNet's stem."""
    stem_depth: Annotated[tuple[int, int, int], Range(least=1), When("backbone", "vitb_hybrid")] = (3, 4, 9)
    """vitb_hybrid: bottlenecks of the ResNet's stages."""
    patch_stem: Annotated[int, Range(least=0)] = 0
    """Kinds other than vitb_hybrid: 0, published, or channels of convolutions before the patches
    (``ViTOptions.stem``)."""
    features: Count = 256
    """Channels of the decoder."""
    dropout: DropProbability = 0.1
    """Dropout before the decoder's last layer."""
    local_start: Weight = 0.0
    """Random start weights. 0: as published. Else the gain of ``transformer.start_local``."""

    def cross_check(self) -> None:
        """Raises ValueError for values that make no network together (see also ``ViTOptions``)."""
        check(not self.hybrid or self.patch in (8, 16), "patch", self.patch, "8 or 16 for vitb_hybrid")
        if self.hybrid and self.patch_stem:
            raise ValueError("patch_stem must be 0 for vitb_hybrid, whose stem is a ResNet.")
        self.vit()

    @property
    def hybrid(self) -> bool:
        """Whether the patches are features of a ResNet."""
        return self.backbone == "vitb_hybrid"

    @property
    def hooks(self) -> tuple[int, ...]:
        """Blocks (from 0) whose outputs become maps: of twelve 2, 5, 8, 11, in the hybrid 8 and 11."""
        quarters = tuple((i + 1) * self.depth // 4 - 1 for i in range(4))
        return quarters[2:] if self.hybrid else quarters

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of the four maps."""
        if self.hybrid:
            return 4 * self.stem, 8 * self.stem, self.width, self.width
        return self.width // 8, self.width // 4, self.width // 2, self.width

    def vit(self) -> ViTOptions:
        """The transformer alone."""
        return ViTOptions(
            self.image_size, self.patch, self.width, self.depth, self.heads, self.mlp_ratio, drop_path=0.0,
            pretrained=_TIMM[self.backbone], stem=self.patch_stem, local_start=self.local_start,
        )


class HybridEmbed(nn.Module):
    """Patches of a ResNet's features: (B, 3, H, W) -> tokens (B, N, D), their grid, and the first two stages' maps."""

    def __init__(self, options: DPTOptions) -> None:
        super().__init__()
        self.backbone = ResNetV2(options.stem, options.stem_depth, pool=options.patch == 16)
        self.proj = nn.Conv2d(self.backbone.channels[-1], options.width, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid, list[Tensor]]:
        """Sides must be multiples of the patch."""
        *early, last = self.backbone(images)
        maps = self.proj(last)  # (B, D, h, w)
        return maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3]), early


class DPTViT(ViT):
    """The transformer with its ImageNet heads and final norm, which are not used and exist only to load checkpoints.

    Token order: class, (distillation,) patches; ``tokens`` is the number of those before the patches.
    """

    unused = ("head", "head_dist", "norm")

    def __init__(self, options: DPTOptions) -> None:
        super().__init__(options.vit(), 1)
        self.hybrid, self.distilled = options.hybrid, options.backbone == "deitb_distilled"
        if self.distilled:
            self.tokens = 2
            self.dist_token = nn.Parameter(torch.zeros(1, 1, self.width))
            self.pos_embed = nn.Parameter(torch.zeros(1, 2 + self.grid[0] * self.grid[1], self.width))
            for parameter in (self.dist_token, self.pos_embed):
                nn.init.trunc_normal_(parameter, std=0.02)
            self.head_dist = nn.Linear(self.width, 1000)
        if self.hybrid:
            self.patch_embed = HybridEmbed(options)
        self.head = nn.Linear(self.width, 1000)
        for name, parameter in self.named_parameters():
            # without gradient, as in the published training; weight decay would shrink them (section 9, trap 12)
            if name.startswith(self.unused):
                parameter.requires_grad_(False)

    def positions(self, grid: Grid, as_trained: bool) -> Tensor:
        """(1, T, D): the prefix unchanged, the grid resized bilinearly (getam.md section 2.1)."""
        if grid == self.grid:
            return self.pos_embed
        first, patches = self.pos_embed.split([self.tokens, self.grid[0] * self.grid[1]], dim=1)
        return torch.cat([first, resize_positions(patches, self.grid, grid, mode="bilinear")], 1)

    def embed_with_stem(self, images: Tensor) -> tuple[Tensor, Grid, list[Tensor]]:
        """Normalised images (B, 3, H, W), sides multiples of the patch -> tokens before the first block (B, T, D), the
        grid, and the ResNet's first two maps (none without a ResNet)."""
        patches, grid, *early = self.patch_embed(images)
        prefix = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        tokens = torch.cat([*(token.expand(images.shape[0], -1, -1) for token in prefix), patches], 1)
        return tokens + self.positions(grid, True), grid, early[0] if early else []

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifier that the transformer was derived from."""
        return (self.pretrained,)

    def load_weights(self, weights: str) -> str:
        """An ImageNet classifier of the same kind (timm's names), or timm's own by 'pretrained'; positions of another
        grid size are resized. Raises as ``net.foreign.loading.load_tensors``."""
        return str(load_tensors(self, self.fit_state(read_tensors(weights)), label=weights, allow_missing=self.unused))

    def fit_state(self, state: State) -> State:
        """A classifier's tensors with the positions resized to this grid."""
        if "pos_embed" not in state:
            return state  # loading reports what is missing
        first, patches = state["pos_embed"][:, : self.tokens], state["pos_embed"][:, self.tokens :]
        side = round(patches.shape[1] ** 0.5)
        if (side, side) == self.grid or side * side != patches.shape[1]:
            return state
        table = resize_positions(patches, (side, side), self.grid, mode="bilinear")
        return {**state, "pos_embed": torch.cat([first, table], 1)}


class _Readout(nn.Module):
    """Combine every patch with the class token: (B, T, D) -> (B, N, D). A distillation token is dropped."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, self.tokens :]
        return self.project(torch.cat([patches, x[:, :1].expand_as(patches)], 2))


class Reassemble(nn.ModuleDict):
    """Reassembles tokens of one depth into a map (getam.md section 2.2): readout, grid, 1x1 convolution, resampling.

    State-dict keys are positions in the published sequence.

    Args:
        tokens: number of tokens before the patches.
        channels: of the map.
        factor: of the grid's resolution: 4 or 2 (transposed convolution), 1, or 0.5 (3x3 convolution of stride 2).
    """

    def __init__(self, width: int, tokens: int, channels: int, factor: float) -> None:
        layers: dict[str, nn.Module] = {"0": _Readout(width, tokens), "3": nn.Conv2d(width, channels, 1)}
        if factor > 1:
            layers["4"] = nn.ConvTranspose2d(channels, channels, int(factor), int(factor))
        elif factor < 1:
            layers["4"] = nn.Conv2d(channels, channels, 3, 2, 1)
        super().__init__(layers)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, T, D) -> (B, C, h * factor, w * factor)."""
        maps = self["3"](self["0"](x).transpose(1, 2).unflatten(2, grid))  # (B, C, h, w)
        return self["4"](maps) if "4" in self else maps


class DPTEncoder(nn.Module):
    """Transformer and reassembling, ``pretrained`` in the state dict: images -> four maps at 1/4, 1/2, 1 and 2 times
    the patch's stride."""

    def __init__(self, options: DPTOptions) -> None:
        super().__init__()
        self.hooks = options.hooks
        self.model = DPTViT(options)
        factors = (4, 2, 1, 0.5)
        first = 3 if options.hybrid else 1
        self.numbers = range(first, 5)
        for number in self.numbers:
            module = Reassemble(options.width, self.model.tokens, options.channels[number - 1], factors[number - 1])
            setattr(self, f"act_postprocess{number}", module)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W), sides multiples of twice the patch -> maps (B, C_i, H / s_i, W / s_i)."""
        x, grid, maps = self.model.embed_with_stem(images)
        maps = list(maps)
        numbers = iter(self.numbers)
        for index, block in enumerate(self.model.blocks):
            x = block(x)
            if index in self.hooks:
                maps.append(getattr(self, f"act_postprocess{next(numbers)}")(x, grid))
        return maps


class _ResidualUnit(nn.Module):
    """x + BN(conv(ReLU(BN(conv(ReLU(x)))))): the skip carries x itself, not its ReLU."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(features), nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(F.relu(x))))))


class _Fusion(nn.Module):
    """Adds a map to the coarser fused map, and doubles the resolution."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        self.resConfUnit1, self.resConfUnit2 = _ResidualUnit(features), _ResidualUnit(features)

    def forward(self, own: Tensor, below: Tensor | None = None) -> Tensor:
        x = own if below is None else below + self.resConfUnit1(own)
        x = F.interpolate(self.resConfUnit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class DPTDecoder(nn.Module):
    """``scratch`` in the state dict: the four maps fused from the coarsest on (getam.md section 2.4)."""

    def __init__(
        self, channels: tuple[int, int, int, int], features: int, outputs: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        for number, width in enumerate(channels, 1):
            setattr(self, f"layer{number}_rn", nn.Conv2d(width, features, 3, padding=1, bias=False))
            setattr(self, f"refinenet{number}", _Fusion(features))
        self.output_conv = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1, bias=False), nn.BatchNorm2d(features), nn.ReLU(),
            nn.Dropout(dropout), nn.Conv2d(features, outputs, 1),
        )  # fmt: skip
        self.refinenet4.resConfUnit1.requires_grad_(False)  # in the checkpoints, never used

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps -> (B, features, h, w) at half the stride of the first."""
        x = None
        for number in (4, 3, 2, 1):
            own = getattr(self, f"layer{number}_rn")(maps[number - 1])
            x = getattr(self, f"refinenet{number}")(own, x)
        return x


class ChannelGate(nn.Module):
    """``cam_module`` in the state dict: two convolutions, each channel gated by its mean, added to the input."""

    def __init__(self, features: int, reduction: int = 16) -> None:
        super().__init__()
        inner = max(1, features // reduction)
        self.fc = nn.Sequential(
            nn.Linear(features, inner, bias=False), nn.ReLU(), nn.Linear(inner, features, bias=False), nn.Sigmoid()
        )
        self.body = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(), nn.Conv2d(features, features, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        y = self.body(x)
        return x + y * self.fc(y.mean((2, 3)))[:, :, None, None]
