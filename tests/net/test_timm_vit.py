"""Backbones of the transformer methods by timm's names: the same numbers, and reasons where they cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from net import registry
from net.backbone.timm_vit import find_vit_sizes
from net.backbone.vit import GridViT, SemanticViT, ViT, ViTOptions

registry.load_methods()
SIDE = 64


class Plain(ViT):
    """Tokens after the final norm, as timm gives them."""

    def __init__(self, options: ViTOptions) -> None:
        super().__init__(options, 1)
        self.head = nn.Identity()


def randomised(name: str, side: int) -> Any:
    """timm's model for images of this side, every parameter (layer scale too) far from its start."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, img_size=side, num_classes=0).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "patch", "scaled"),
    [("vit_tiny_patch16_224", 16, False), ("deit3_small_patch16_224.fb_in1k", 16, True),
     ("vit_small_patch14_dinov2.lvd142m", 14, True)],
)  # fmt: skip
def test_a_vit_of_timm_gives_timm_s_numbers(name: str, patch: int, scaled: bool, tmp_path: Path) -> None:
    side = 4 * patch
    theirs = randomised(name, side)
    options = ViTOptions(image_size=side, timm=name, drop_path=0.0)
    assert options.patch == patch and bool(options.layer_scale) == scaled
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = Plain(options).eval()
    ours.load_weights(str(tmp_path / "weights.pth"))
    assert ours.pretrained_names() == (name,)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        tokens, grid = ours.forward_features(images)
        torch.testing.assert_close(ours.norm(tokens), theirs.forward_features(images), rtol=1e-4, atol=1e-4)
    assert grid == (4, 4)


def released(name: str) -> dict[str, torch.Tensor]:
    """Tensors as timm's file of this model has them: of the images that it was trained on, with its classifier."""
    torch.manual_seed(2)
    classes = 0 if "dinov2" in name else 1000
    state = timm.create_model(name, num_classes=classes).state_dict()
    return {key: torch.randn_like(value) for key, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [("deit_tiny_patch16_224.fb_in1k", "safetensors"), ("deit_tiny_patch16_224.fb_in1k", "authors"),
     ("vit_small_patch14_dinov2.lvd142m", "safetensors"), ("vit_small_patch14_dinov2.lvd142m", "authors")],
)  # fmt: skip
def test_files_as_they_are_released_are_read(name: str, form: str, tmp_path: Path) -> None:
    state = released(name)
    if form == "safetensors":  # the hub's
        save_file(state, file := tmp_path / "model.safetensors")
    else:  # DeiT's are wrapped, DINOv2's hold the token of its own training
        file = tmp_path / "weights.pth"
        torch.save({"model": state} if "deit" in name else {**state, "mask_token": torch.zeros(1, 384)}, file)
    ours = SemanticViT(ViTOptions(image_size=56, timm=name), 3)  # another grid of patches, other classes
    told = ours.load_weights(str(file))
    own = ours.state_dict()
    same = [key for key in state if key in own and torch.equal(own[key], state[key])]
    assert {key for key in state if key.startswith(("blocks.", "patch_embed."))} <= set(same), told
    assert own["pos_embed"].shape[1] != state["pos_embed"].shape[1] and torch.isfinite(own["pos_embed"]).all()
    del state["blocks.1.mlp.fc1.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="blocks.1.mlp.fc1.weight"):
        ours.load_weights(str(tmp_path / "less.pth"))


@pytest.mark.slow
def test_positions_of_another_grid_are_resized_when_they_are_loaded(tmp_path: Path) -> None:
    name = "vit_small_patch14_dinov2.lvd142m"
    theirs = randomised(name, 6 * 14)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = SemanticViT(ViTOptions(image_size=SIDE, timm=name), 3)
    ours.load_weights(str(tmp_path / "weights.pth"))
    assert ours.pos_embed.shape[1] == 1 + 4 * 4
    grid = GridViT(ViTOptions(image_size=SIDE, timm="deit3_small_patch16_224.fb_in1k"))
    state = grid.from_classifier(randomised("deit3_small_patch16_224.fb_in1k", 96).state_dict())
    assert state["grid_posembed"].shape == grid.grid_posembed.shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [("vit_base_patch14_reg4_dinov2.lvd142m", "5 tokens stand before its patches"),
     ("vit_base_patch16_siglip_224", "no class token"),
     ("vit_base_patch16_clip_224.openai", "normalised before the first block"),
     ("vit_giant_patch14_dinov2.lvd142m", "its MLP is no linear layer, GELU and linear layer"),
     ("vit_base_r50_s16_384", "embedded by a HybridEmbed"),
     ("eva02_base_patch14_224", "its blocks have other layers"),
     ("resnet50", "is a ResNet"), ("vit_of_nobody", "timm has no model 'vit_of_nobody'")],
)  # fmt: skip
def test_what_cannot_be_a_backbone_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ViTOptions(timm=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"])
def test_sizes_are_timm_s(name: str) -> None:
    model = timm.create_model(name, pretrained=False) if "small" in name else None
    sizes = find_vit_sizes(name)
    assert (sizes.width, sizes.depth, sizes.heads) == {
        "vit_small_patch16_224": (384, 12, 6), "vit_base_patch16_224": (768, 12, 12),
        "vit_large_patch16_224": (1024, 24, 16),
    }[name]  # fmt: skip
    assert model is None or len(model.blocks) == sizes.depth


def transformers() -> list[str]:
    """Methods with a ViTOptions named backbone, deit or transformer."""
    found = []
    for method, cls in registry.SEEDS.items():
        network = cls.recipes["sample"].cam.network
        if any(isinstance(getattr(network, n, None), ViTOptions) for n in ("backbone", "deit", "transformer")):
            found.append(method)
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("method", transformers())
def test_every_method_of_a_vit_takes_one_of_timm(method: str) -> None:
    network = registry.SEEDS[method].recipes["sample"].cam.network
    (field,) = [n for n in ("backbone", "deit", "transformer") if isinstance(getattr(network, n, None), ViTOptions)]
    options = ViTOptions(image_size=56, timm="vit_small_patch14_dinov2.lvd142m", drop_path=0.0)
    changed = replace(network, **{field: options})
    if method == "semformer":
        pytest.skip("its autoencoder is trained first")
    net = changed.build(3, {}).eval()
    with torch.inference_mode():
        maps = net.cam(torch.randn(1, 3, 56, 84), torch.ones(1, 3))
    assert maps.shape[:2] == (1, 3) and torch.isfinite(maps).all()
