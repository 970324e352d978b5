"""Vision transformers of timm by name: their sizes, or the reason why the networks here can't be built on them.

The networks have blocks, names and positions of the plain ViT: ViT and DeiT of any size, DeiT III and DINOv2 (layer
scale). Nothing is downloaded to find that out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

_BLOCK = {
    *(f"{layer}.{kind}" for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
      for kind in ("weight", "bias")),
}  # fmt: skip
_LAYER_SCALE = {"ls1.gamma", "ls2.gamma"}
_EPSILON = 1e-6


@dataclass(frozen=True)
class ViTSizes:
    """What makes a plain vision transformer; see ``net.backbone.vit.ViTOptions``."""

    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    layer_scale: float


@cache
def find_vit_sizes(name: str) -> ViTSizes:
    """Sizes of timm's model ``name`` (with or without the name of its weights).

    Raises ValueError with the reason where timm has no such model, or the networks here can't be built on it.
    """
    import timm  # slow to import, and most runs don't need it
    import torch

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: give a name of timm.list_models('vit_*') or of its other ViTs.")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    if reason := _misfit(model):
        raise ValueError(
            f"timm's {name} can't be the backbone: {reason}. A plain ViT is needed, such as DeiT, DeiT III, DINOv2 "
            "without registers, or ViT-S/B/L."
        )
    block = model.blocks[0]
    scale = getattr(block.ls1, "init_values", 1e-5) if _LAYER_SCALE <= set(block.state_dict()) else 0.0
    return ViTSizes(
        patch=model.patch_embed.patch_size[0], width=model.embed_dim, depth=len(model.blocks),
        heads=block.attn.num_heads, mlp_ratio=block.mlp.fc1.out_features / model.embed_dim, layer_scale=float(scale),
    )  # fmt: skip


def _misfit(model: Any) -> str | None:
    """Why a model of timm is no plain vision transformer; None where it is one."""
    from timm.layers import PatchEmbed
    from torch import nn

    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not hasattr(model, "embed_dim"):
        return f"it is a {type(model).__name__}, no vision transformer of equal blocks"
    patch, names = model.patch_embed, set(blocks[0].state_dict())
    sizes = getattr(patch, "patch_size", (0, 0))
    positions = getattr(model, "pos_embed", None)
    reasons = {
        f"its patches are embedded by a {type(patch).__name__}": type(patch) is not PatchEmbed,
        f"its patches of {tuple(sizes)} are not square": len(set(sizes)) != 1,
        "it has no class token": getattr(model, "cls_token", None) is None,
        f"{getattr(model, 'num_prefix_tokens', 0)} tokens stand before its patches, not one class token": (
            getattr(model, "num_prefix_tokens", 1) != 1
        ),
        "it has no table of positions": positions is None,
        f"its blocks have other layers ({', '.join(sorted(names ^ _BLOCK - _LAYER_SCALE)[:4])})": (
            names - _LAYER_SCALE != _BLOCK
        ),
        "its patches are normalised before the first block": not isinstance(
            getattr(model, "norm_pre", nn.Identity()), nn.Identity
        ),
        "its tokens are not normalised after the last block": not isinstance(
            getattr(model, "norm", None), nn.LayerNorm
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    mlp, norm = blocks[0].mlp, blocks[0].norm1
    if type(mlp.act) is not nn.GELU or mlp.fc2.in_features != mlp.fc1.out_features:
        kind = f"{type(mlp).__name__} with {type(mlp.act).__name__}"
        return f"its MLP is no linear layer, GELU and linear layer, but a {kind}"
    if norm.eps != _EPSILON:
        return f"its norms add {norm.eps:g}, not {_EPSILON:g}"
    return None
