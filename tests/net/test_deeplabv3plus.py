"""net/segment/deeplabv3plus.py: what the golden cases don't say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from misc.config import override
from net.backbone.resnest import ResNeStOptions
from net.backbone.resnet import ResNetOptions
from net.registry import SEGMENTERS
from net.seed.puzzlecam import PuzzleCamOptions
from net.segment.deeplabv3plus import DeepLabV3Plus, DeepLabV3PlusOptions

SMALL = ResNetOptions(width=0.125, depth=(1, 1, 1, 1))


def network(**changes: object) -> DeepLabV3Plus:
    torch.manual_seed(0)
    options = {"backbone": "resnet", "resnet": SMALL, "channels": 16, "low_channels": 8, **changes}
    return DeepLabV3PlusOptions(**options).build(3, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "batch"}, {"backbone": "resnest", "resnest": ResNeStOptions(name="resnest14d")}]
)
def test_logits_have_the_size_of_the_image(changes: dict[str, object]) -> None:
    model = network(**changes).eval()
    with torch.inference_mode():
        assert model.logits(torch.randn(1, 3, 45, 70)).shape == (1, 4, 45, 70)
    assert SEGMENTERS["deeplabv3plus"] is DeepLabV3Plus


@pytest.mark.parametrize("norm", ["trained", "fixed", "frozen"])
def test_batch_norm_of_the_head_is_trained_as_the_backbones(norm: str) -> None:
    model = network(norm="batch", resnet=override(SMALL, {"norm": norm})).train()
    for layer in (model.model.bn1, model.aspp.bn1, model.decoder.classifier[5]):
        assert layer.training == (norm == "trained") and layer.weight.requires_grad == (norm != "frozen")


def test_published_groups_and_recipe() -> None:
    """deeplab.md D.2: of ResNeSt-101 311, 205, 19 and 10 tensors; 63,070,165 parameters."""
    recipe = DeepLabV3Plus.recipes["published"]
    with torch.device("meta"):
        model = recipe.network.build(20, {})
    groups = model.param_groups()
    assert [len(group.params) for group in groups] == [311, 205, 19, 10]
    assert [(group.lr_scale, group.decay) for group in groups] == [(1, True), (2, False), (10, True), (20, False)]
    assert sum(p.numel() for p in model.parameters()) == 63_070_165
    assert (recipe.fit.epochs, recipe.fit.batch_size, recipe.fit.lr, recipe.fit.momentum) == (50, 32, 0.007, 4e-5)
    assert recipe.fit.nesterov and recipe.fit.weight_decay == 4e-5
    assert recipe.augment.long_side == (256, 1024) and recipe.augment.crop == 512 and recipe.augment.mask_fill == 255
    infer = recipe.infer
    assert (infer.scales, infer.flip, infer.resize, infer.merge) == ((0.5, 1, 1.5, 2), True, "bicubic", "sum_logits")
    assert not infer.align_corners and infer.crf.iterations == 10 and infer.crf.bilateral_sxy == 80


def test_starts_from_a_puzzle_cam_and_from_a_whole_network(tmp_path: Path) -> None:
    cam = PuzzleCamOptions(resnet=SMALL).build(3, {})
    torch.save(cam.state_dict(), tmp_path / "cam.pt")
    model = network()
    before = model.decoder.conv1.weight.clone()
    model.load_weights(str(tmp_path / "cam.pt"))
    assert torch.equal(model.model.layer3[0].conv2.weight, cam.model.layer3[0].conv2.weight)
    assert torch.equal(model.decoder.conv1.weight, before)
    # the official files hold the backbone twice
    state = model.state_dict()
    twice = {
        name.replace("model.layer4.", "stage5.0."): value for name, value in state.items() if "model.layer4" in name
    }
    torch.save({**state, **twice}, tmp_path / "whole.pth")
    other = network(dropout=(0.0, 0.0, 0.0))
    other.load_weights(str(tmp_path / "whole.pth"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize(
    "wrong",
    [{"backbone": "vgg"}, {"norm": "layer"}, {"rates": ()}, {"channels": 6}, {"dropout": (1.0, 0.0, 0.0)}],
)
def test_options_refuse_impossible_values(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DeepLabV3PlusOptions(**wrong)  # type: ignore[arg-type]
