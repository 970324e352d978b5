"""Vision transformers with any number of class tokens (mctformer.md section 2), and the multi-class-token network of
MCTformer and AReAM.

Names are those of timm's ViT and DeiT and of the official MCTformer checkpoints. A method subclasses what it needs and
reads the attention by a visitor, which gets the queries and keys of one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, Count, DropProbability, Positive, Range, Weight, check
from net.backbone.timm_vit import find_vit_sizes
from net.backbone.transformer import AttentionSums, TransformerBlock, Visit, start_local
from net.foreign.loading import load_tensors
from net.foreign.pytorch import State
from net.foreign.reading import read_tensors

Grid = tuple[int, int]
"""Rows and columns of the patches."""


@dataclass(frozen=True)
class ViTOptions(Checked):
    """Size of a vision transformer; the defaults are DeiT-S for images of 224 pixels."""

    image_size: int = 224
    """Side of the square training images, for which the position embedding is defined. Pixels."""
    patch: Count = 16
    """Side of a patch. Pixels."""
    width: Count = 384
    """Channels of a token."""
    depth: Count = 12
    """Number of blocks."""
    heads: Count = 6
    """Attention heads; must divide the width."""
    mlp_ratio: Positive = 4.0
    """Hidden width of a block's MLP relative to a token's width."""
    drop_path: DropProbability = 0.1
    """Stochastic depth rate of the last block; it increases linearly from 0 at the first."""
    pretrained: str = "deit_small_patch16_224"
    """timm's name of the classifier that the weights 'pretrained' come from."""
    timm: str = ""
    """Name of a plain vision transformer of timm, such as deit3_base_patch16_224.fb_in22k_ft_in1k or
    vit_base_patch14_dinov2.lvd142m: its sizes take the place of patch, width, depth, heads, mlp_ratio and layer_scale,
    its weights that of pretrained. Empty: the sizes here."""
    layer_scale: Weight = 0.0
    """Start value of learnt factors of what attention and MLP add, one a channel (DeiT III, DINOv2). 0: none."""
    stem: Annotated[int, Range(least=0)] = 0
    """0: patch embedding by one linear layer, as published. Else pairs of 3x3 convolutions precede it, the first of
    each pair with stride 2. The first pair has this many channels, each further pair twice as many, until a cell is a
    patch. This is ours, for random start weights and few images (after Xiao et al., Early convolutions help
    transformers see better, 2021)."""
    local_start: Weight = 0.0
    """Random start weights. 0: as published. Else the gain of ``transformer.start_local``."""

    def __post_init__(self) -> None:
        if self.timm:
            for name, value in vars(find_vit_sizes(self.timm)).items():
                object.__setattr__(self, name, value)
            object.__setattr__(self, "pretrained", self.timm)
        super().__post_init__()

    def cross_check(self) -> None:
        """Raises ValueError for values that make no network together."""
        check(self.width % self.heads == 0, "width", self.width, f"a multiple of heads = {self.heads}")
        check(self.image_size >= self.patch, "image_size", self.image_size, f"at least a patch of {self.patch} pixels")
        whole = not self.stem or not self.patch & (self.patch - 1)
        check(whole, "stem", self.stem, f"0 where the patch, {self.patch}, is no power of 2")

    @property
    def grid(self) -> Grid:
        """Grid of a training image."""
        return (self.image_size // self.patch,) * 2


SAMPLE_VIT = ViTOptions(
    image_size=112, patch=8, width=96, depth=4, heads=3, mlp_ratio=2, drop_path=0.6, stem=24, local_start=2.0
)
"""The backbone of the sample recipes: learns small pictures from random weights within minutes on two CPU cores. A high
stochastic depth rate keeps the patch tokens local."""


def resize_positions(
    table: Tensor, source: Grid, target: Grid, *, offset: float = 0.0,
    mode: Literal["bicubic", "bilinear", "nearest"] = "bicubic",
) -> Tensor:
    """Resize a position embedding to another grid: (1, h0 * w0, D), row-major -> (1, h * w, D).

    Args:
        offset: the target is sampled as if it were larger by this many cells: at (i + 0.5) * h0 / (h + offset) - 0.5.
            0.1 is the published oddity of MCTformer and AReAM (mctformer.md section 2.2). With 0 the result has the
            right size for every grid (mctformer.md section 9, trap 6).
        mode: bicubic (a = -0.75, not antialiased), bilinear (align_corners False) or nearest.
    """
    maps = table.unflatten(1, source).permute(0, 3, 1, 2)  # (1, D, h0, w0)
    align = {} if mode == "nearest" else {"align_corners": False}
    if offset:
        if torch.jit.is_tracing():  # an ONNX resize takes no factors that depend on the image's size
            check(mode == "bicubic", "mode", mode, "bicubic where positions are resized by a factor in an ONNX graph")
            rows, columns = (cubic_weights(old, side, offset) for old, side in zip(source, target, strict=True))
            return (rows @ maps @ columns.T).flatten(2).transpose(1, 2)
        factors = tuple((side + offset) / old for side, old in zip(target, source, strict=True))
        maps = F.interpolate(maps, scale_factor=factors, mode=mode, **align)
    else:
        maps = F.interpolate(maps, size=target, mode=mode, **align)
    return maps.flatten(2).transpose(1, 2)


def cubic_weights(source: int, target: int, offset: float) -> Tensor:
    """The bicubic resize of ``resize_positions`` in one direction as a matrix (target, source), of operations that a
    traced graph repeats for every ``target``."""
    place = (torch.arange(target) + 0.5) * source / (target + offset) - 0.5  # (target,)
    first, a = place.floor(), -0.75
    weights = torch.zeros(1)
    for tap in range(-1, 3):
        x = (place - first - tap).abs()
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        cell = (first + tap).clamp(0, source - 1)  # the border is repeated
        here = cell[:, None] == torch.arange(source)
        weights = weights + torch.where(x <= 1, near, far)[:, None] * here
    return weights


def fit_positions(patches: Tensor, grid: Grid, mode: Literal["bicubic", "nearest"] = "bicubic") -> Tensor:
    """Resize a file's patch positions (1, h0 * h0, D), whose grid is square, to the training grid."""
    side = round(patches.shape[1] ** 0.5)
    if (side, side) == grid or side * side != patches.shape[1]:
        return patches  # a grid that is not square cannot fit; loading reports it
    return resize_positions(patches, (side, side), grid, mode=mode)


def split_positions(table: Tensor) -> tuple[Tensor, Tensor]:
    """A classifier's position embedding, (1, 1 + h * h, D), as that of its class token, (1, 1, D), and of its patches.
    Where the table has none for the class token, as in DeiT III, (1, h * h, D), it is zero."""
    side = round(table.shape[1] ** 0.5)
    if side * side == table.shape[1]:
        return torch.zeros_like(table[:, :1]), table
    return table[:, :1], table[:, 1:]


class PatchEmbed(nn.Module):
    """Patches as tokens: (B, 3, H, W) -> (B, N, D), row-major, and their grid (H // patch, W // patch)."""

    def __init__(self, patch: int, width: int, stem: int = 0) -> None:
        super().__init__()
        self.patch = patch
        self.stem: nn.Sequential | None = None
        if not stem:
            self.proj = nn.Conv2d(3, width, patch, patch)
            return
        layers: list[nn.Module] = []
        before = 3
        for channels in (stem << level for level in range(patch.bit_length() - 1)):
            for stride in (2, 1):
                layers += [nn.Conv2d(before, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels)]
                layers.append(nn.ReLU(inplace=True))
                before = channels
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(before, width, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Rows and columns beyond the last whole patch are cropped. Raises ValueError for images smaller than a
        patch."""
        if min(images.shape[-2:]) < self.patch:
            height, width = images.shape[-2:]
            raise ValueError(f"An image of {height} x {width} is smaller than a patch of {self.patch}: enlarge it.")
        if self.stem is not None:
            height, width = (side // self.patch * self.patch for side in images.shape[-2:])
            images = self.stem(images[..., :height, :width])
        maps = self.proj(images)  # (B, D, h, w)
        return maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3])


class ViTBody(nn.Module):
    """Base of all vision transformers here: patch embedding, blocks and final ``norm``."""

    def __init__(self, options: ViTOptions) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(options.patch, options.width, options.stem)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                options.width, options.heads, options.mlp_ratio, options.drop_path * i / max(1, options.depth - 1),
                layer_scale=options.layer_scale,
            )
            for i in range(options.depth)
        )
        self.norm = nn.LayerNorm(options.width, eps=1e-6)
        for module in self.modules():  # convolutions keep PyTorch's default (mctformer.md section 2.1)
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if options.local_start:
            start_local(self, options.local_start)

    def forward_blocks(self, x: Tensor, visit: Visit | None = None) -> Tensor:
        """All blocks, without the final norm: (B, T, D) -> the same shape; ``visit`` gets every layer's queries and
        keys."""
        for number, block in enumerate(self.blocks):
            x = block(x, None if visit is None else partial(visit, number))
        return x


class GridViT(nn.Module):
    """A vision transformer whose patch positions are a separate parameter, ``grid_posembed``, and whose class tokens,
    if any, are given by the caller. The other layers are under ``model.``: names of the official SemFormer checkpoints.
    semformer.md sections 3.1 and 4.1.
    """

    def __init__(self, options: ViTOptions) -> None:
        super().__init__()
        self.grid = options.grid
        self.grid_posembed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], options.width))
        self.model = ViTBody(options)
        nn.init.trunc_normal_(self.grid_posembed, std=0.02)

    def forward(self, images: Tensor, front: Tensor | None = None, visit: Visit | None = None) -> tuple[Tensor, Grid]:
        """Normalised images (B, 3, H, W), and tokens (1, n, D) to put before the patches, positions already added ->
        tokens after the final norm (B, n + N, D), and the grid; ``visit`` as in ``ViTBody.forward_blocks``."""
        x, grid = self.model.patch_embed(images)
        x = x + (self.grid_posembed if grid == self.grid else resize_positions(self.grid_posembed, self.grid, grid))
        if front is not None:
            x = torch.cat([front.expand(len(x), -1, -1), x], 1)
        return self.model.norm(self.model.forward_blocks(x, visit)), grid

    def from_classifier(self, state: State) -> State:
        """An ImageNet classifier's tensors (DeiT, distilled or not; ViT) under the names of this network; tensors that
        it does not use keep their names."""
        table = state["pos_embed"]
        patches = table[:, 2:] if "dist_token" in state else split_positions(table)[1]
        moved = {f"model.{k}" if k.startswith(("patch_embed.", "blocks.", "norm.")) else k: v for k, v in state.items()}
        return {**moved, "grid_posembed": fit_positions(patches, self.grid)}


class ViT(ViTBody):
    """Body of a vision transformer with ``tokens`` class tokens in front of the patches.

    The final ``norm`` is in the state dict; the method decides whether to apply it (MCTformer does not).
    """

    normalisation = "imagenet"
    position_offset = 0.0
    """See ``resize_positions``."""

    def __init__(self, options: ViTOptions, tokens: int) -> None:
        super().__init__(options)
        self.tokens, self.width, self.grid = tokens, options.width, options.grid
        self.pretrained = options.pretrained
        self.cls_token = nn.Parameter(torch.zeros(1, tokens, options.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + self.grid[0] * self.grid[1], options.width))
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def positions(self, grid: Grid, as_trained: bool) -> Tensor:
        """Position embedding of all tokens, (1, T, D), float32; ``as_trained``: the grid needs no resize."""
        if as_trained:
            return self.pos_embed
        first, patches = self.pos_embed.split([self.tokens, self.grid[0] * self.grid[1]], dim=1)
        return torch.cat([first, resize_positions(patches, self.grid, grid, offset=self.position_offset)], 1)

    def embed_patches(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Normalised images (B, 3, H, W) -> [class tokens; patches] with their positions (B, T, D), and the grid."""
        patches, grid = self.patch_embed(images)
        # published: resized also if a non-square image has the same number of patches
        as_trained = grid == self.grid and images.shape[2] == images.shape[3] and not torch.jit.is_tracing()
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], 1)
        return tokens + self.positions(grid, as_trained), grid

    def forward_features(self, images: Tensor, visit: Visit | None = None) -> tuple[Tensor, Grid]:
        """Images (B, 3, H, W) -> tokens after the last block (B, T, D), and the grid; ``visit`` as in
        ``forward_blocks``."""
        x, grid = self.embed_patches(images)
        return self.forward_blocks(x, visit), grid

    head: nn.Module
    """Names of the layers added by the method; only these may differ in an ImageNet classifier's file."""
    unused: tuple[str, ...] = ()
    """Names that a subclass keeps in its state dict only because official checkpoints have them."""

    def from_classifier(self, state: State) -> State:
        """Adapt the tensors of an ImageNet classifier with one class token (mctformer.md section 3).

        The class token and its position are repeated, so that all class tokens start equal; the patches' positions are
        resized if the grid differs.
        """
        first, patches = split_positions(state["pos_embed"])
        return {
            **state,
            "cls_token": state["cls_token"].repeat(1, self.tokens, 1),
            "pos_embed": torch.cat([first.repeat(1, self.tokens, 1), fit_positions(patches, self.grid)], 1),
        }

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifier that the network was derived from."""
        return (self.pretrained,)

    def load_weights(self, weights: str) -> str:
        """A whole checkpoint of this network, strictly, or an ImageNet classifier (DeiT, ViT) without its head.

        Args:
            weights: a file, or 'pretrained': timm's, by the option of that name, downloaded once.

        Returns:
            A one-line report. Raises ValueError if the file does not fit, FileNotFoundError if it does not exist.
        """
        state = read_tensors(weights)
        if self._is_classifier(state):
            state = self.from_classifier(state)
            return str(load_tensors(self, state, label=weights, allow_missing=("head", *self.unused)))
        return str(load_tensors(self, state, label=weights))

    def _is_classifier(self, state: State) -> bool:
        """Whether these are an ImageNet classifier's tensors: one class token, a linear head or none."""
        token, head = state.get("cls_token"), state.get("head.weight")
        one = token is not None and "pos_embed" in state and token.shape[1] == 1
        return one and (head is None or head.ndim == 2)


class SemanticViT(ViT):
    """The network of TS-CAM: one class token, and instead of the linear head a 3x3 convolution ``head`` on the patches
    after the final norm, with PyTorch's initialisation. wsol.md section 2, crt.md section 4."""

    def __init__(self, options: ViTOptions, num_classes: int) -> None:
        super().__init__(options, 1)
        self.head = nn.Conv2d(options.width, num_classes, 3, padding=1)

    def semantic_maps(self, images: Tensor, visit: Visit | None = None) -> Tensor:
        """Images (B, 3, H, W) -> signed maps (B, C, H // patch, W // patch) float32; their means are the logits."""
        x, grid = self.forward_features(images, visit)
        patches = self.norm(x[:, 1:]).transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        return self.head(patches).float()

    def coupled_maps(self, images: Tensor) -> Tensor:
        """The semantic maps times the class token's attention, averaged over heads, summed over layers (and rounds):
        signed, (B, 3, H, W) -> (B, C, h, w) float32. One layer's class-token row exists at a time."""
        sums = AttentionSums(1, [1.0] * len(self.blocks), [0.0] * len(self.blocks))
        maps = self.semantic_maps(images, sums)
        return maps * sums.to_patches.unflatten(2, maps.shape[-2:])


class MultiClassViT(ViT):
    """The network of MCTformer-V2: one class token per class, and a 3x3 convolution ``head`` on the patches.

    The final norm exists but is neither applied nor trained. mctformer.md sections 2.1 to 2.4, aream.md section 2.1.
    """

    position_offset = 0.1

    def __init__(self, options: ViTOptions, num_classes: int) -> None:
        super().__init__(options, num_classes)
        self.head = nn.Conv2d(options.width, num_classes, 3, padding=1)
        self.norm.requires_grad_(False)

    def class_token_logits(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) -> (B, C) float32: the channel means of the class tokens."""
        return x[:, : self.tokens].float().mean(2)

    def patch_maps(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, T, D) -> the head's maps of the patches (B, C, h, w) float32, signed."""
        patches = x[:, self.tokens :].transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        return self.head(patches).float()
