"""Transformer blocks of ViT, DeiT and Conformer under timm's names, with access to their attention.

Attention is fused; the matrix is computed only on request, layer by layer, from queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from misc.precision import full_precision

_EPSILON = 1e-6


@dataclass(frozen=True)
class QueryKey:
    """Queries and keys of one attention layer, (B, n, T, d) each (after ``first`` fewer queries); they give its
    attention matrix.

    Nothing of size T x T is computed until it is requested. The means over the heads never hold more than one head's
    matrix (12 layers x 6 heads of a 768 px image would take 1.5 GB: transcam.md section 8, trap 6).
    """

    query: Tensor
    key: Tensor

    def first_weights(self, rows: int) -> Tensor:
        """Softmax over keys of the first ``rows`` queries: (B, n, rows, T)."""
        return (self._scaled[:, :, :rows] @ self.key.transpose(2, 3)).softmax(-1)

    @property
    def _scaled(self) -> Tensor:
        return self.query * self.query.shape[-1] ** -0.5

    def products(self) -> Tensor:
        """Scaled dot products before the softmax: (B, n, T, T), rows attend to columns."""
        return self._scaled @ self.key.transpose(2, 3)

    def mean_logits(self) -> Tensor:
        """Mean over heads of the logits: (B, T, T). One product over the joined heads, differentiable."""
        query, key = (x.transpose(1, 2).flatten(2) for x in (self._scaled, self.key))  # (B, T, n * d)
        return query @ key.transpose(1, 2) / self.query.shape[1]

    def first(self, count: int) -> QueryKey:
        """The first ``count`` tokens as queries, all as keys: the first rows of every matrix."""
        return QueryKey(self.query[:, :, :count], self.key)

    def mean_weights(self) -> Tensor:
        """Mean over heads of the softmax over keys: (B, T, T) float32, rows sum to one."""
        batch, heads, rows, _ = self.query.shape
        total = self.query.new_zeros((batch, rows, self.key.shape[2]), dtype=torch.float32)
        for query, key in zip(self._scaled.unbind(1), self.key.unbind(1), strict=True):  # (B, T, d) each
            total.add_((query @ key.transpose(1, 2)).softmax(-1, dtype=torch.float32))
        return total.div_(heads)


See = Callable[[QueryKey], Tensor | None]
"""A visitor may return attention weights of the first r tokens, (B, n, r, T). They replace the layer's own, so that
gradients with respect to them can be computed."""
Visit = Callable[[int, QueryKey], Tensor | None]
"""Called for every layer in order with its index (from 0) and its queries and keys."""


class AttentionSums:
    """Visitor that adds up the head means of the attention over layers; one (B, T, T) matrix exists at a time.

    Args:
        tokens: number of class tokens, which come first.
        class_weights: weight of each layer in ``to_patches``; 0 leaves a layer out.
        patch_weights: weight of each layer in ``affinity``.
    """

    to_patches: Tensor
    """(B, tokens, N) float32: attention of the class tokens to the patches. Set once a layer with a weight has run."""
    affinity: Tensor
    """(B, N, N) float32: attention of the patches, rows to columns, not normalised. Set once a layer with a weight has
    run."""

    def __init__(self, tokens: int, class_weights: Sequence[float], patch_weights: Sequence[float]) -> None:
        self.tokens = tokens
        self.class_weights, self.patch_weights = class_weights, patch_weights

    def __call__(self, layer: int, attention: QueryKey) -> None:
        """Add the attention of a layer."""
        weights = {"to_patches": self.class_weights[layer], "affinity": self.patch_weights[layer]}
        if not any(weights.values()):
            return
        c = self.tokens
        # the patches' rows are computed only if needed
        mean = (attention if weights["affinity"] else attention.first(c)).mean_weights()  # (B, T or c, T)
        parts = {"to_patches": mean[:, :c, c:], "affinity": mean[:, c:, c:]}
        for name, weight in weights.items():
            if weight and hasattr(self, name):
                getattr(self, name).add_(parts[name], alpha=weight)
            elif weight:
                setattr(self, name, parts[name] * weight)


def spread_maps(affinity: Tensor, maps: Tensor) -> Tensor:
    """Maps refined by the patches' attention: R_c(i) = sum over j of P(i, j) M_c(j) (mctformer.md section 4).

    affinity (B, N, N), maps (B, C, h, w) with h w = N -> (B, C, h, w) float32, also under mixed precision.
    """
    with full_precision(maps.device.type):
        return (maps.float().flatten(2) @ affinity.float().transpose(1, 2)).view_as(maps)


class Attention(nn.Module):
    """Multi-head self-attention, fused: the matrix is never computed here. (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, see: See | None = None) -> Tensor:
        """``see`` is called with the queries and keys."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, n, T, d) each
        first = None if see is None else see(QueryKey(query, key))
        if first is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            rest = F.scaled_dot_product_attention(query[:, :, first.shape[2] :], key, value)
            mixed = torch.cat([first @ value, rest], 2)  # (B, n, T, d)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) -> (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learnt factor for every channel, as in DeiT III and DINOv2: (..., D) -> (..., D)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) -> (B, T, D)."""
        return x * self.gamma


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: (B, T, D) -> (B, T, D) (mctformer.md section 2.1, transcam.md section 2.3).

    Args:
        width: D. heads: divide it. mlp_ratio: width inside the MLP over D.
        drop_path: probability, in training, that a sample skips the attention; the same for the MLP.
        eps: of the layer norms.
        layer_scale: initial value of LayerScale, learned factors per channel after attention and MLP; 0: none.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, drop_path: float, eps: float = _EPSILON,
        layer_scale: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.drop_path = StochasticDepth(drop_path, "row")
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls1, self.ls2 = (LayerScale(width, layer_scale) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, see: See | None = None) -> Tensor:
        """``see`` is called with the queries and keys."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), see)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


_SHARE = 0.1
"""Factor of the last weights of attention and MLP in a local start."""


@torch.no_grad()
def start_local(network: nn.Module, gain: float) -> None:
    """Random start weights of all transformer blocks in a network, for few images: tokens first describe their own
    patch. Ours, in the spirit of Trockman and Kolter, Mimetic initialization of self-attention layers, 2023.

    Queries equal keys (a scaled rotation of the tokens), so that patches attend to similar patches, and the
    contributions of attention and MLP start small. The published random start mixes all tokens evenly. A classifier
    that averages over patches then soon makes every patch describe the whole image, and its map is flat; from ImageNet
    weights, whose tokens are local, it is not.

    Args:
        network: contains the blocks.
        gain: of queries and keys over the normalised tokens. With 2 a token attends only to similar tokens, and a class
            token at first to itself; with 1 all other tokens get about half of the attention.
    """
    for block in network.modules():
        if isinstance(block, TransformerBlock):
            query, key, _ = block.attn.qkv.weight.chunk(3)
            nn.init.orthogonal_(query, gain=gain)
            key.copy_(query)
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.mul_(_SHARE)
