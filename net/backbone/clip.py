"""CLIP's two towers under the names of the official files (Radford et al., 2021; clipes.md section 2): ViT-B/16 and any
other size, images of any shape, fused attention unless a visitor asks for a block's queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, Count, Range, check
from net.backbone.transformer import QueryKey, Visit
from net.backbone.vit import Grid, resize_positions

_HEAD = 64
"""Channels of an attention head, in both towers of every CLIP."""


@dataclass(frozen=True)
class ClipOptions(Checked):
    """Size of CLIP's image tower; the defaults are ViT-B/16's."""

    image_size: Count = 224
    """Side of the square images that the position embedding was trained for. Pixels."""
    patch: Count = 16
    """Side of a patch. Pixels."""
    width: Annotated[int, Range(least=_HEAD, multiple=_HEAD)] = 768
    """Channels of a token: 64 times the number of heads."""
    layers: Annotated[int, Range(least=2)] = 12
    """Number of blocks."""
    embed: Count = 512
    """Channels of the space that images and texts share."""
    pretrained: str = "ViT-B-16-quickgelu"
    """open_clip's name of the model that the weights 'pretrained' come from (OpenAI's)."""

    def cross_check(self) -> None:
        """Raises ValueError for images that hold no patch."""
        check(self.image_size >= self.patch, "image_size", self.image_size, f"at least a patch of {self.patch} pixels")

    @property
    def grid(self) -> Grid:
        """Rows and columns of the position embedding."""
        return (self.image_size // self.patch,) * 2


class ClipAttention(nn.Module):
    """Multi-head self-attention, fused. (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, see: Callable[[QueryKey], object] | None = None, causal: bool = False) -> Tensor:
        """``see`` gets the queries and keys, without gradient. ``causal``: a token sees itself and those before it."""
        joined = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = joined.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, n, T, d) each
        if see is not None:
            with torch.no_grad():
                see(QueryKey(query.detach(), key.detach()))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class ClipMlp(nn.Module):
    """Two linear layers with QuickGELU, x sigmoid(1.702 x), between them: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """The activation is in no file: the exact GELU would load as well and give worse maps (clipes.md 2.3)."""
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class ClipBlock(nn.Module):
    """Pre-norm transformer block: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = ClipAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = ClipMlp(width, 4 * width)

    def forward(self, x: Tensor, see: Callable[[QueryKey], object] | None = None, causal: bool = False) -> Tensor:
        """Arguments as for ``ClipAttention``."""
        return self.after_norm(x, self.ln_1(x), see, causal)

    def after_norm(
        self, x: Tensor, normalised: Tensor, see: Callable[[QueryKey], object] | None = None, causal: bool = False
    ) -> Tensor:
        """The block from its first layer norm's output on, which the attention reads beside the tokens x that it is
        added to: where a gradient with respect to that output is asked for."""
        x = x + self.attn(normalised, see, causal)
        return x + self.mlp(self.ln_2(x))


class ClipTransformer(nn.Module):
    """Blocks one after the other: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, visit: Visit | None = None, causal: bool = False) -> Tensor:
        """``visit`` gets the queries and keys of every block."""
        for layer, block in enumerate(self.resblocks):
            x = block(x, None if visit is None else _of_layer(visit, layer), causal)
        return x


def _of_layer(visit: Visit, layer: int) -> Callable[[QueryKey], object]:
    return lambda attention: visit(layer, attention)


class VisionTower(nn.Module):
    """CLIP's image tower: tokens of patches behind a class token."""

    def __init__(self, options: ClipOptions) -> None:
        super().__init__()
        self.grid = options.grid
        width = options.width
        cells = self.grid[0] * self.grid[1]
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + cells, width) * width**-0.5)
        self.proj = nn.Parameter(torch.randn(width, options.embed) * width**-0.5)
        self.conv1 = nn.Conv2d(3, width, options.patch, options.patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = ClipTransformer(width, width // _HEAD, options.layers)
        self.ln_post = nn.LayerNorm(width)

    def positions(self, grid: Grid) -> Tensor:
        """Position embedding for a grid of (h, w) patches: (1 + h w, D), the class token's first."""
        first, table = self.positional_embedding[:1], self.positional_embedding[1:]
        if grid == self.grid:
            return self.positional_embedding
        return torch.cat([first, resize_positions(table[None], self.grid, grid, mode="bilinear")[0]])

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens that enter the first block: (B, 3, H, W) -> (B, 1 + N, D) and the grid (H // patch, W // patch), at
        least 1 x 1. Rows and columns beyond the last whole patch are cut off; an image smaller than a patch is filled
        up with the mean colour."""
        patch, (height, width) = self.conv1.stride[0], images.shape[-2:]
        # arithmetic instead of max(): an exported network must do it for every size
        images = F.pad(images, (0, (patch - width) * (width < patch), 0, (patch - height) * (height < patch)))
        maps = self.conv1(images)  # (B, D, h, w)
        grid = (maps.shape[2], maps.shape[3])
        patches = maps.flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = torch.cat([self.class_embedding.expand(patches.shape[0], 1, -1), patches], 1)
        return self.ln_pre(tokens + self.positions(grid)), grid

    def forward_features(
        self, images: Tensor, visit: Visit | None = None, each: Callable[[int, Tensor], object] | None = None
    ) -> tuple[Tensor, Grid]:
        """Tokens that enter the last block.

        Args:
            images: (B, 3, H, W) normalised, any H and W.
            visit: gets the queries and keys of every block but the last.
            each: gets the number of every block but the last and its output (B, 1 + N, D).

        Returns:
            (B, 1 + N, D) and the grid of the N patches.
        """
        x, grid = self.embed(images)
        for layer, block in enumerate(self.transformer.resblocks[:-1]):
            x = block(x, None if visit is None else _of_layer(visit, layer))
            if each is not None:
                each(layer, x)
        return x, grid

    def forward(self, images: Tensor) -> Tensor:
        """CLIP's own image feature, of the class token: (B, 3, H, W) -> (B, E), not normalised."""
        tokens = self.transformer.resblocks[-1](self.forward_features(images)[0])
        return self.ln_post(tokens[:, 0]) @ self.proj


TEXT_TENSORS = (
    "positional_embedding", "text_projection", "token_embedding.weight", "ln_final.weight", "ln_final.bias",
    "transformer.resblocks.0.ln_1.weight",
)  # fmt: skip
"""Tensors of the text tower in a CLIP in official names, of its blocks one."""


class TextTower(nn.Module):
    """CLIP's text tower. In the official files its tensors have no prefix of their own.

    Args:
        width: channels of a token, 64 times the heads. layers: number of blocks. context: longest text in tokens.
        vocabulary: number of tokens. embed: channels of the space that images and texts share.
    """

    def __init__(self, width: int, layers: int, context: int, vocabulary: int, embed: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(context, width) * 0.01)
        self.text_projection = nn.Parameter(torch.randn(width, embed) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(100.0).log())
        self.transformer = ClipTransformer(width, width // _HEAD, layers)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.ln_final = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @classmethod
    def like(cls, state: dict[str, Tensor]) -> TextTower:
        """A tower with the sizes and the values of a CLIP state dict in official names (others in it are passed over);
        KeyError where it holds no text tower."""
        width, embed = state["text_projection"].shape
        prefix = "transformer.resblocks."
        layers = 1 + max(int(name[len(prefix) :].partition(".")[0]) for name in state if name.startswith(prefix))
        vocabulary, context = len(state["token_embedding.weight"]), len(state["positional_embedding"])
        tower = cls(width, layers, context, vocabulary, embed)
        tower.load_state_dict({name: state[name].float() for name in tower.state_dict()})
        return tower.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (n, context), the end mark the largest of each row -> text features (n, E), not normalised."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x, causal=True))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection
