"""net/seed/psa.py: what the golden cases don't say about PSA's classifiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from misc.config import override
from net.backbone.resnet38 import ResNet38Options
from net.backbone.vgg16 import VGG16Options
from net.refine.psa import PSA
from net.seed.psa import CamOptions, PlainCam
from step.lib.config import default_config

CLASSES = 3
BACKBONES = ("resnet38", "vgg16")


def network(backbone: str, dropout: float = 0.0) -> PlainCam:
    torch.manual_seed(0)
    resnet38 = ResNet38Options(width=0.125, depth=(1, 1, 1, 1), dropout=(0.0, 0.0), frozen="b2")
    vgg16 = VGG16Options(width=0.125, dropout=0.0)
    return CamOptions(backbone=backbone, resnet38=resnet38, vgg16=vgg16, dropout=dropout).build(CLASSES, {})


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 37, 50)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_scores_are_means_of_the_maps(backbone: str) -> None:
    """Pooling before or after the linear classifier is the same; the maps are its positive part."""
    model = network(backbone).eval()
    with torch.inference_mode():
        raw = model.fc8(model.forward_stages(images())[{"resnet38": "conv6", "vgg16": "fc7"}[backbone]])  # (2, C, 5, 7)
        maps = model.cam(images(), torch.ones(2, CLASSES))
        torch.testing.assert_close(model.class_logits(images()), raw.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert maps.shape == (2, CLASSES, 5, 7)
    torch.testing.assert_close(maps.square() if backbone == "vgg16" else maps, raw.clamp(min=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_training(backbone: str) -> None:
    """Frozen layers get no gradient, all others do; dropout is on in training only."""
    model = network(backbone, dropout=0.5).train()
    batch = {"image": images(), "tags": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])}
    losses = model(batch, 0.0)
    assert list(losses) == ["cls"]
    losses["cls"].backward()
    trained = {p for group in model.param_groups() for p in group.params}
    assert {p for p in model.parameters() if p.grad is not None} == trained
    first = model.conv1a.weight if backbone == "resnet38" else model.conv2_2.weight
    assert first not in trained and model.fc8.weight in model.param_groups()[2].params
    assert not torch.equal(model(batch, 0.0)["cls"], losses["cls"])
    model.eval()
    assert torch.equal(model(batch, 0.0)["cls"], model(batch, 0.0)["cls"])


def test_biases_train_twice_as_fast_without_decay() -> None:
    model = network("vgg16")
    weights, biases, new, new_biases = model.param_groups()
    assert (biases.lr_scale, biases.decay, new.lr_scale, new.decay) == (2, False, 10, True)
    assert any(p is model.fc6.bias for p in biases.params) and any(p is model.fc6.weight for p in weights.params)
    assert [*new.params] == [model.fc8.weight] and not new_biases.params


def test_each_backbone_names_its_normalisation() -> None:
    assert [network(b).normalisation for b in BACKBONES] == ["imagenet", "caffe_bgr"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_of_other_classes_keep_the_backbone(tmp_path: Path, backbone: str) -> None:
    state = {k: v + 1 for k, v in network(backbone).state_dict().items()}
    state["fc8.weight"] = state["fc8.weight"].repeat(2, 1, 1, 1)
    torch.save(state, tmp_path / "w.pth")
    model = network(backbone)
    before = model.fc8.weight.clone()
    assert "fc8" in model.load_weights(str(tmp_path / "w.pth"))
    assert torch.equal(model.fc8.weight, before)
    for name, value in model.state_dict().items():
        assert name == "fc8.weight" or torch.equal(value, state[name])


def test_impossible_backbone() -> None:
    with pytest.raises(ValueError, match="one of resnet38, vgg16"):
        CamOptions(backbone="resnet50")  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["published", "sample"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_recipes_fit_their_refiner_and_build(preset: str, backbone: str) -> None:
    recipe = PlainCam.recipes[preset]
    refine = override(PSA.recipes[preset], recipe.refine)
    if preset == "published":
        assert (refine.label.alpha_high, refine.walk.logt, refine.walk.alpha) == (32, 8, 16)
    with torch.device("meta"):
        model = override(recipe.cam.network, {"backbone": backbone}).build(20, {})
    assert model.fc8.weight.shape[0] == 20


def test_the_published_recipe_on_vgg16_sets_both_networks_and_rates() -> None:
    """psa.md sections 2.3 and 5.5."""
    config = default_config("psa", "published_vgg16")
    assert (config.cam.network.backbone, config.cam.fit.lr) == ("vgg16", 0.1)
    assert (config.aff.network.backbone, config.aff.fit.lr) == ("vgg16", 0.1)
    plain = default_config("psa", "published")
    assert (plain.cam.network.backbone, plain.cam.fit.lr, plain.aff.fit.lr) == ("resnet38", 0.01, 0.01)
    assert config.aff.label == plain.aff.label and config.aff.walk == plain.aff.walk
