"""What random start weights of transformers on few images need: a convolutional stem, and tokens that start local."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net.backbone.conformer import SAMPLE_CONFORMER, Conformer
from net.backbone.dpt import DPTOptions, DPTViT
from net.backbone.transformer import AttentionSums, QueryKey
from net.backbone.vit import SAMPLE_VIT, PatchEmbed, ViT, ViTOptions
from net.registry import SEEDS, load_methods


def halves() -> Tensor:
    """An image of two textures, (1, 3, 64, 64): the left half stripes, the right half noise of another colour."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 3, 64, 64)
    image[..., :32] = torch.arange(64).remainder(4).div(2).sub(1)[:, None]
    image[:, 0, :, 32:] = torch.rand(64, 32, generator=generator) * 2
    return image


def attention_to_own_half(watch: Callable[[Tensor, AttentionSums], object], depth: int) -> float:
    """Fraction of the patches' attention, summed over layers, that stays in its own half of the image."""
    sums = AttentionSums(1, [1.0] * depth, [1.0] * depth)
    with torch.no_grad():
        watch(halves(), sums)
    left = torch.arange(64).remainder(8) < 4
    own = (left[:, None] == left[None]).float()
    return ((sums.affinity[0] * own).sum() / sums.affinity[0].sum()).item()


@pytest.mark.parametrize("kind", ["vit", "conformer"])
def test_patches_attend_to_those_that_look_alike_only_from_a_local_start(kind: str) -> None:
    shares = {}
    for local in (True, False):
        torch.manual_seed(0)
        if kind == "vit":
            net: nn.Module = ViT(replace(SAMPLE_VIT, image_size=64, drop_path=0.0, local_start=2.0 * local), 1)
            depth, watch = SAMPLE_VIT.depth, net.forward_features
        else:
            net = Conformer(replace(SAMPLE_CONFORMER, local_start=2.0 * local))
            depth, watch = SAMPLE_CONFORMER.depth, net.forward_features
        shares[local] = attention_to_own_half(watch, depth)
    assert shares[True] > 0.8 and shares[False] < 0.6, shares


def test_a_patch_does_not_tell_what_is_elsewhere_from_a_local_start() -> None:
    changed = halves()
    changed[..., 32:] *= -1
    moved = {}
    for local in (True, False):
        torch.manual_seed(0)
        # no stem: a patch sees its own pixels only
        net = ViT(ViTOptions(64, 8, 96, 4, 3, local_start=2.0 * local), 0).eval()
        with torch.no_grad():
            before, after = (net.forward_features(x)[0].unflatten(1, (8, 8))[:, :, :4] for x in (halves(), changed))
        moved[local] = (F.mse_loss(after, before) / before.var()).item()
    assert moved[True] < moved[False] / 100


@pytest.mark.parametrize("kind", ["vit", "dpt"])
def test_queries_are_keys_in_every_block(kind: str) -> None:
    seen: list[QueryKey] = []
    if kind == "vit":
        body: ViT = ViT(replace(SAMPLE_VIT, image_size=32), 1)
        x = body.embed_patches(torch.randn(1, 3, 32, 32))[0]
    else:
        sizes = {"image_size": 32, "patch": 8, "width": 96, "depth": 4, "heads": 3, "patch_stem": 8}
        body = DPTViT(DPTOptions("vitb", local_start=1.0, **sizes))  # type: ignore[arg-type]
        assert body.patch_embed.stem is not None
        x = body.embed_with_stem(torch.randn(1, 3, 32, 32))[0]
    body.forward_blocks(x, lambda layer, attention: seen.append(attention))
    assert len(seen) == 4 and all(torch.equal(a.query, a.key) for a in seen)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_a_stem_has_the_grid_of_the_linear_patches(patch: int) -> None:
    images = torch.randn(2, 3, 5 * patch + 3, 3 * patch + 1)
    (plain, grid), (tokens, same) = PatchEmbed(patch, 12)(images), PatchEmbed(patch, 12, stem=2).eval()(images)
    assert grid == same == (5, 3) and plain.shape == tokens.shape == (2, 15, 12)
    with pytest.raises(ValueError, match="smaller than a patch"):
        PatchEmbed(patch, 12, stem=2)(images[..., : patch - 1])


def test_what_is_cut_off_does_not_count_with_a_stem() -> None:
    embed, images = PatchEmbed(8, 12, stem=2).eval(), torch.randn(1, 3, 20, 20)
    assert torch.equal(embed(images)[0], embed(images[..., :16, :16])[0])


@pytest.mark.parametrize("wrong", [{"stem": -1}, {"stem": 8, "patch": 12}, {"local_start": -1.0}])
def test_impossible_starts_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="stem = |local_start = "):
        ViTOptions(**wrong)


# ------------------------------------------------------------------------------ new heads on Conformer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "convolution", "linear", "outputs", "taps"),
    [
        ("transcam", "conv_cls_head", "trans_cls_head", 21, 9),
        ("aream_conformer", "cnn_head", "att_head", 20, 1),
        ("tscam", "trans_cls_head", "conv_cls_head", 20, 9),
    ],
)
def test_published_heads_start_as_the_body_does(
    method: str, convolution: str, linear: str, outputs: int, taps: int
) -> None:
    """Convolutions Kaiming normal by fan-out (0.103, 0.316, 0.105), linear ones truncated normal 0.02 and 0."""
    load_methods()
    torch.manual_seed(0)
    options = SEEDS[method].recipes["published"].cam.network
    if method == "tscam":
        options = replace(options, backbone="conformer")
    network = options.build(20, {})
    head = getattr(network, convolution)
    assert head.weight.shape[0] == outputs and head.weight[0, 0].numel() == taps
    assert head.weight.std().item() == pytest.approx((2 / (taps * outputs)) ** 0.5, rel=0.02)
    assert head.bias.any()  # PyTorch's
    head = getattr(network, linear)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.05) and not head.bias.any()


def test_sample_heads_start_small() -> None:
    network = Conformer(SAMPLE_CONFORMER)
    head = nn.Conv2d(16, 20, 3)
    network.initialise_heads(head)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.1) and not head.bias.any()
