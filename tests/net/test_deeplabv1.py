"""net/segment/deeplabv1.py: what the golden cases don't say about the two DeepLab v1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from training import segmenter_batch, snapshot, train_step

from misc.config import override
from net.backbone.resnet38 import ResNet38, ResNet38Options
from net.contract import Segmenter
from net.registry import SEGMENTERS
from net.segment.deeplabv1 import DeepLabV1, DeepLabV1Options
from net.segment.deeplabv1_largefov import LargeFOV, LargeFOVOptions
from net.start_weights import REQUIRED

CLASSES = 3
SMALL = {"resnet38.width": 0.125, "resnet38.depth": (1, 1, 1, 1), "fov_channels": 16}
BOTH = [DeepLabV1, LargeFOV]


def network(cls: type[Segmenter], preset: str = "published", **changes: object) -> Segmenter:
    """The recipe's network, narrow and shallow, everything else as it is."""
    torch.manual_seed(0)
    return override(cls.recipes[preset].network, {**SMALL, **changes}).build(CLASSES, {})


def test_names_on_the_command_line() -> None:
    assert SEGMENTERS["deeplabv1"] is DeepLabV1
    assert SEGMENTERS["deeplabv1_largefov"] is LargeFOV


def test_logits_of_form_a_have_the_images_size_of_form_b_an_eighth() -> None:
    images = torch.randn(1, 3, 41, 50)
    assert network(DeepLabV1).eval().logits(images).shape == (1, CLASSES + 1, 41, 50)
    assert network(LargeFOV).eval().logits(images).shape == (1, CLASSES + 1, 6, 7)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("preset", ["published", "sample"])
def test_every_weight_is_in_one_group_or_frozen(cls: type[Segmenter], preset: str) -> None:
    net = network(cls, preset)
    names = {id(p): name for name, p in net.named_parameters()}
    grouped = [names[id(p)] for group in net.param_groups() for p in group.params]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {name for name, p in net.named_parameters() if p.requires_grad}
    frozen = set(names.values()) - set(grouped)
    if preset == "sample":
        assert not frozen
    else:
        assert all("bn" in name or name == "conv1a.weight" for name in frozen)


def test_rates_of_form_a() -> None:
    net = network(DeepLabV1)
    backbone, none, head, bias = net.param_groups()
    assert [(g.lr_scale, g.decay) for g in (backbone, head, bias)] == [(1, True), (10, True), (20, False)]
    assert not none.params
    assert any(p is net.backbone.conv1a.weight for p in backbone.params)
    assert bias.params == [net.cls_conv.bias]


def test_rates_of_form_b() -> None:
    net = network(LargeFOV)
    backbone, head = net.param_groups()
    assert (backbone.lr_scale, head.lr_scale) == (1, 10)
    layers = (net.fc8_seg_conv1, net.fc8_seg_conv2)
    assert {id(p) for p in head.params} == {id(p) for layer in layers for p in layer.parameters()}
    assert any(p is net.b2.conv_branch1.weight for p in backbone.params)


def test_form_a_trains_on_batch_statistics_and_leaves_the_affine_alone() -> None:
    net = network(DeepLabV1).train()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.training and norm.momentum == 0.0003 for norm in norms)
    changed = train_step(net, segmenter_batch(net, CLASSES))
    assert {"backbone.conv1a.weight", "bn_fov.running_mean", "backbone.bn7.running_var", "cls_conv.bias"} <= changed
    assert not {name for name in changed if "bn" in name and name.endswith(("weight", "bias"))}


def test_form_a_trains_the_affine_where_asked() -> None:
    net = network(DeepLabV1, train_affine=True).train()
    assert {"backbone.bn7.weight", "bn_fov.bias"} <= train_step(net, segmenter_batch(net, CLASSES))


def test_form_b_keeps_conv1a_and_all_batch_norm() -> None:
    net = network(LargeFOV).train()
    changed = train_step(net, segmenter_batch(net, CLASSES))
    assert not {name for name in changed if "bn" in name or name.startswith("conv1a")}
    assert {"b2.conv_branch2a.weight", "fc8_seg_conv1.bias", "fc8_seg_conv2.weight"} <= changed


def test_dropout_is_active_in_training_only() -> None:
    images = torch.randn(2, 3, 40, 48)
    for cls, changes in ((DeepLabV1, {"dropout": 0.5, "resnet38.dropout": (0.0, 0.0)}), (LargeFOV, {})):
        net = network(cls, **changes).train()
        assert not torch.equal(net.logits(images), net.logits(images))
        net.eval()
        assert torch.equal(net.logits(images), net.logits(images))


def test_published_recipe_of_form_a() -> None:
    recipe = DeepLabV1.recipes["published"]
    assert recipe.weights == REQUIRED
    fit, augment, infer = recipe.fit, recipe.augment, recipe.infer
    assert (fit.steps, fit.batch_size, fit.lr, fit.momentum, fit.weight_decay) == (20000, 10, 0.001, 0.9, 5e-4)
    assert (fit.schedule, fit.power, fit.schedule_extra, fit.sample_order) == ("poly", 0.9, 1, "epochs")
    assert augment.order == ("hsv", "flip", "scale", "normalize", "crop")
    assert (augment.hsv, augment.scale, augment.scale_filter, augment.crop) == (10, (0.5, 1.5), "cubic", 448)
    assert (augment.crop_place, augment.mask_fill, augment.scale_per_batch) == ("random", 255, False)
    assert infer.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    assert (infer.flip, infer.resize, infer.merge) == (True, "cubic", "mean_logits")
    assert infer.align_corners
    assert infer.crf_truncates_image
    crf = infer.crf
    assert (crf.iterations, crf.gauss_sxy, crf.gauss_weight) == (1, 3, 3)
    assert (crf.bilateral_sxy, crf.bilateral_srgb, crf.bilateral_weight) == (32, 13, 10)


def test_published_recipe_of_form_b() -> None:
    recipe = LargeFOV.recipes["published"]
    assert recipe.weights == REQUIRED
    fit, augment, infer = recipe.fit, recipe.augment, recipe.infer
    assert fit.epochs * (10582 // fit.batch_size) == 79350
    assert (fit.steps, fit.sample_order, fit.batch_size, fit.lr) == (None, "stream", 4, 0.0007)
    assert (fit.momentum, fit.weight_decay, fit.power, fit.schedule_extra) == (1e-5, 0, 0.9, 0)
    assert augment.order == ("scale", "flip", "normalize", "crop")
    assert (augment.scale, augment.scale_filter, augment.scale_per_batch) == ((0.7, 1.3), "linear", True)
    assert (augment.crop, augment.crop_place, augment.mask_fill) == (321, "corner", 0)
    assert infer.scales == (0.5, 0.75, 1.0, 1.25, 1.5)
    assert (infer.flip, infer.resize, infer.merge, infer.align_corners) == (False, "linear", "max_softmax", False)
    assert not infer.crf_truncates_image
    crf = infer.crf
    assert (crf.iterations, crf.gauss_sxy, crf.gauss_weight) == (10, 4, 3)
    assert (crf.bilateral_sxy, crf.bilateral_srgb, crf.bilateral_weight) == (83, 5, 3)


@pytest.mark.slow
@pytest.mark.parametrize("cls", BOTH)
def test_the_sample_recipe_learns_from_random_weights(cls: type[Segmenter]) -> None:
    assert cls.recipes["sample"].weights == "none"
    net = network(cls, "sample", **{"fov_channels": 32}).train()
    made = segmenter_batch(net, CLASSES, 4, (48, 48))
    made["image"] = nn.functional.avg_pool2d(made["image"], 9, 1, 4) * 9  # smooth
    made["mask"] = (made["image"][:, 0] > 0).long()  # foreground is what is red
    made["counts/pixels"] = net.counts(made)["pixels"]
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = net(made, 0.0)["ce"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("cls", BOTH)
def test_weights_of_a_bare_backbone_leave_the_head(cls: type[Segmenter], tmp_path: Path) -> None:
    torch.manual_seed(2)
    classifier = ResNet38(ResNet38Options(width=0.125, depth=(1, 1, 1, 1)))
    torch.save({**classifier.state_dict(), "fc8.weight": torch.zeros(20, 512, 1, 1)}, tmp_path / "res38_cls.pth")
    net = network(cls)
    head = {name: value for name, value in snapshot(net).items() if "fov" in name or name.startswith(("fc8", "cls"))}
    report = net.load_weights(str(tmp_path / "res38_cls.pth"))
    backbone = net.backbone if isinstance(net, DeepLabV1) else net
    torch.testing.assert_close(backbone.b7.conv_branch1.weight, classifier.b7.conv_branch1.weight)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in head.items())
    assert "fc8.weight" in report


def mxnet_name(name: str) -> str:
    """Name of a ResNet38 tensor in the ImageNet ``.params`` file (seam.md section 2.1)."""
    layer, value = name.rsplit(".", 1)
    if layer == "conv1a":
        return "arg:conv1a_weight"
    kinds = {"running_mean": "aux:{}_moving_mean", "running_var": "aux:{}_moving_var", "bias": "arg:{}_beta"}
    if layer == "bn7":
        return {**kinds, "weight": "arg:{}_gamma"}[value].format("bn7")
    block, _, branch = layer.partition(".")
    kind, branch = branch.split("_", 1)
    stage, _, index = block.removeprefix("b").partition("_")
    place = f"{stage}b{index}" if index else f"{stage}a"
    if kind == "conv":
        return f"arg:res{place}_{branch}_weight"
    return {**kinds, "weight": "arg:{}_gamma"}[value].format(f"bn{place}_{branch}")


@pytest.mark.parametrize("cls", BOTH)
def test_imagenet_names_are_understood(cls: type[Segmenter], tmp_path: Path) -> None:
    torch.manual_seed(2)
    imagenet = ResNet38(ResNet38Options(width=0.125, depth=(2, 1, 1, 1)))
    state = {mxnet_name(n): value for n, value in imagenet.state_dict().items() if "num_batches" not in n}
    torch.save({**state, "arg:linear1000_weight": torch.zeros(1000, 512)}, tmp_path / "imagenet.params")
    net = network(cls, **{"resnet38.depth": (2, 1, 1, 1)})
    report = net.load_weights(str(tmp_path / "imagenet.params"))
    backbone = net.backbone if isinstance(net, DeepLabV1) else net
    for name, value in imagenet.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name
    assert "0 unexpected" in report


@pytest.mark.parametrize("cls", BOTH)
def test_its_own_checkpoint_loads_whole(cls: type[Segmenter], tmp_path: Path) -> None:
    source = network(cls)
    torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "whole.pth")
    net = network(cls)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    net.load_weights(str(tmp_path / "whole.pth"))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize("cls", BOTH)
def test_a_file_without_a_backbone_is_refused(cls: type[Segmenter], tmp_path: Path) -> None:
    net = network(cls)
    state = {name: value for name, value in net.state_dict().items() if "b7" not in name}
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="missing"):
        net.load_weights(str(tmp_path / "part.pth"))


def test_published_defaults_are_the_published_network() -> None:
    assert DeepLabV1.recipes["published"].network == DeepLabV1Options()
    assert LargeFOV.recipes["published"].network == LargeFOVOptions()
    with torch.device("meta"):
        count = sum(p.numel() for p in LargeFOV(20).parameters())
    assert count == 124_042_581  # deeplab.md B.1
