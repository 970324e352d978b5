"""net/seed/puzzlecam.py and net/backbone/resnest.py: what the golden case doesn't say about Puzzle-CAM."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.config import override
from net.backbone.resnest import ResNeSt, ResNeStOptions
from net.backbone.resnet import STAGES, ResNetOptions
from net.registry import REFINERS, SEEDS, SEGMENTERS, load_methods
from net.seed.puzzlecam import (
    PuzzleCam,
    PuzzleCamOptions,
    divide_by_maximum,
    join_tiles,
    reconstruction_loss,
    split_tiles,
)
from net.segment.deeplabv2 import DeepLabV2
from net.start_weights import PRETRAINED

load_methods()
CLASSES = 3
SMALL = ResNetOptions(width=0.125, depth=(1, 1, 1, 1), norm="trained")
SPLIT = ResNeStOptions(name="resnest14d")


def network(**changes: object) -> PuzzleCam:
    torch.manual_seed(0)
    return PuzzleCamOptions(**{"resnet": SMALL, **changes}).build(CLASSES, {})  # type: ignore[arg-type]


def batch(size: tuple[int, int] = (64, 96)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"image": torch.randn(2, 3, *size), "tags": torch.tensor([[1.0, 0, 1], [0, 1, 0]])}


def test_name_on_the_command_line() -> None:
    assert SEEDS["puzzlecam"] is PuzzleCam


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tiles_joined_are_the_image(side: int) -> None:
    images = torch.randn(2, 5, 12, 18)
    tiles = split_tiles(images, side)
    assert tiles.shape == (2 * side * side, 5, 12 // side, 18 // side)
    assert torch.equal(join_tiles(tiles, side), images)


def test_tiles_come_one_after_the_other_row_by_row() -> None:
    images = torch.arange(2 * 4 * 6.0).view(2, 1, 4, 6)
    tiles = split_tiles(images, 2)
    corners = [images[b, 0, y, x].item() for y, x in ((0, 0), (0, 3), (2, 0), (2, 3)) for b in (0, 1)]
    assert tiles[:, 0, 0, 0].tolist() == corners


def test_images_that_make_no_equal_tiles_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="15 x 20 .*2 x 2 equal tiles.*augment.crop a multiple of 2"):
        split_tiles(torch.zeros(1, 3, 15, 20), 2)
    with pytest.raises(ValueError, match=r"\(4, 4\) cells.*\(3, 3\).*augment.crop a multiple of 2 cells"):
        network()(batch((48, 48)), 0.5)


def test_only_present_classes_are_compared() -> None:
    whole, joined = torch.randn(2, CLASSES, 4, 6), torch.randn(2, CLASSES, 4, 6)
    tags = batch()["tags"]
    other = torch.where(tags[:, :, None, None] > 0, joined, joined + 7)
    for masking in ("masking", "selection"):
        losses = [reconstruction_loss(whole, maps, tags, masking, False) for maps in (joined, other)]
        assert losses[0] == losses[1]
    # masking divides by all classes, selection by the present ones of each image: 2 of 3 and 1 of 3
    far = torch.full_like(whole, 3.0)
    near = torch.zeros_like(whole)
    assert reconstruction_loss(near, far, tags, "masking", False).item() == pytest.approx(3 * (2 / 3 + 1 / 3) / 2)
    assert reconstruction_loss(near, far, tags, "selection", False).item() == pytest.approx(3)
    assert reconstruction_loss(near, far, tags, "none", True).item() == pytest.approx(9)
    assert reconstruction_loss(near, far, 0 * tags, "selection", False).item() == 0


def test_the_reconstruction_rises_and_stays() -> None:
    model = network(alpha=2.0, alpha_rise=0.5).eval()
    made = batch()
    values = [model(made, progress)["re"].item() for progress in (0.0, 0.25, 0.5, 0.9)]
    assert values[0] == 0 and values[2] > 0
    assert values[1] == pytest.approx(values[2] / 2) and values[3] == values[2]


def test_no_side_of_the_comparison_is_detached() -> None:
    """Gradients of the reconstruction reach both maps."""
    whole = torch.randn(1, CLASSES, 4, 4, requires_grad=True)
    joined = torch.randn(1, CLASSES, 4, 4, requires_grad=True)
    reconstruction_loss(whole, joined, torch.ones(1, CLASSES), "masking", False).backward()
    assert whole.grad is not None and whole.grad.abs().min() > 0
    assert joined.grad is not None and joined.grad.abs().min() > 0


def test_the_level_cam_compares_maps_of_one_scale() -> None:
    plain, scaled = network(alpha=1.0).eval(), network(alpha=1.0, level="cam").eval()
    made = batch()
    with torch.no_grad():
        whole = divide_by_maximum(plain.forward_maps(made["image"]))
        joined = divide_by_maximum(join_tiles(plain.forward_maps(split_tiles(made["image"], 2)), 2))
        expected = reconstruction_loss(whole, joined, made["tags"], "masking", False)
        terms = scaled(made, 1.0)
        torch.testing.assert_close(terms["re"], expected)
        assert terms["cl"] == plain(made, 1.0)["cl"] and terms["pcl"] != plain(made, 1.0)["pcl"]
    assert whole.amax((2, 3)).max() <= 1 and whole.min() >= 0


def test_the_map_is_the_rectified_classifier() -> None:
    model = network().eval()
    images = torch.randn(1, 3, 37, 50)
    with torch.inference_mode():
        maps = model.cam(images, torch.ones(1, CLASSES))
        assert torch.equal(maps, model.forward_maps(images).clamp(min=0)) and (maps == 0).any()
    assert maps.shape == (1, CLASSES, 3, 4)


def test_groups() -> None:
    """Weights of the backbone, its biases, the classifier (semformer.md section 7); nothing is left out."""
    model = network()
    weights, biases, head, rest = model.param_groups()
    assert [(g.lr_scale, g.decay) for g in (weights, biases, head)] == [(1, True), (2, False), (10, True)]
    assert head.params == [model.classifier.weight] and not rest.params
    assert any(p is model.model.bn1.weight for p in weights.params)  # published: norms are decayed too
    assert any(p is model.model.bn1.bias for p in biases.params)
    assert sum(len(g.params) for g in (weights, biases, head)) == len(list(model.parameters()))


def test_published_recipe() -> None:
    recipe = PuzzleCam.recipes["published"]
    phase = recipe.cam
    assert phase.network == PuzzleCamOptions(backbone="resnest")
    assert (phase.weights, phase.init) == (PRETRAINED, "imagenet")
    assert (phase.network.tiles, phase.network.alpha, phase.network.alpha_rise) == (2, 4, 0.5)
    assert (phase.network.level, phase.network.masking, phase.network.squared) == ("feature", "masking", False)
    assert phase.network.resnet.strides == (2, 2, 2, 1) and phase.network.resnet.norm == "trained"
    fit, augment, infer = phase.fit, phase.augment, phase.infer
    assert (fit.epochs, fit.batch_size, fit.lr, fit.momentum, fit.nesterov) == (15, 32, 0.1, 1e-4, True)
    assert (fit.weight_decay, fit.power, fit.sample_order) == (1e-4, 0.9, "epochs")
    assert augment.order == ("long_side", "flip", "normalize", "crop")
    assert (augment.long_side, augment.crop) == ((320, 640), 512)
    assert (infer.scales, infer.flip, infer.normalise) == ((0.5, 1.0, 1.5, 2.0), True, "max")
    assert (infer.round_up, infer.coarse) == (16, 4)


def test_official_checkpoints_hold_the_backbone_twice(tmp_path: Path) -> None:
    source = network()
    state = dict(source.state_dict())
    for name, value in source.state_dict().items():  # stage1 = stem, stage2.0 = layer1 ...
        inner = name.removeprefix("model.")
        if inner.startswith("layer"):
            state[f"stage{int(inner[5]) + 1}.0.{inner[7:]}"] = value
        elif inner.startswith(("conv1", "bn1")):
            state[f"stage1.{'0' if inner.startswith('conv') else '1'}.{inner.split('.', 1)[1]}"] = value
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "puzzle.pth")
    model = network()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.load_weights(str(tmp_path / "puzzle.pth"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())


def test_the_segmenter_starts_from_the_sample_network(tmp_path: Path) -> None:
    """The sample recipes have one backbone; the segmenter takes all of it."""
    recipe = PuzzleCam.recipes["sample"]
    cam = recipe.cam.network.build(CLASSES, {})
    torch.save(cam.state_dict(), tmp_path / "cam.pt")
    options = override(DeepLabV2.recipes["sample"], recipe.segment)
    assert (recipe.segmenter, options.weights) == ("deeplabv2", "cam")
    segmenter = options.network.build(CLASSES, {})
    assert "0 unexpected" in segmenter.load_weights(str(tmp_path / "cam.pt"))
    cam.eval()
    segmenter.eval()
    images = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        x = images
        for stage in list(segmenter.base.children())[:5]:
            x = stage(x)
        torch.testing.assert_close(x, cam.model(images), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------ ResNeSt


def test_resnest_has_timms_names_and_stages_at_stride_16() -> None:
    net = ResNeSt(SPLIT).eval()
    theirs = timm.create_model("resnest14d", num_classes=0).state_dict()
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in theirs.items()}
    with torch.inference_mode():
        taps = net.forward_stages(torch.randn(1, 3, 70, 97))
    assert list(taps) == list(STAGES)
    for stage, value in taps.items():
        cells = [-(-side // net.strides[stage]) for side in (70, 97)]
        assert list(value.shape) == [1, net.channels[stage], *cells]


def plain_split_attention(x: Tensor, w: dict[str, Tensor], dilation: int) -> Tensor:
    """Split attention of radix 2 (puzzlecam.md section 2.1), in evaluation mode."""
    x = F.relu(plain_norm(F.conv2d(x, w["conv.weight"], padding=dilation, dilation=dilation, groups=2), w, "bn0"))
    first, second = x.chunk(2, dim=1)
    gap = (first + second).mean((2, 3), keepdim=True)
    gap = F.relu(plain_norm(F.conv2d(gap, w["fc1.weight"], w["fc1.bias"]), w, "bn1"))
    weights = F.conv2d(gap, w["fc2.weight"], w["fc2.bias"])
    weights = torch.stack(weights.chunk(2, dim=1)).softmax(0)
    return weights[0] * first + weights[1] * second


def plain_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    mean, variance, weight, bias = (w[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, variance, weight, bias)


def inside(w: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def plain_resnest(images: Tensor, w: dict[str, Tensor]) -> list[Tensor]:
    """The stem and the four stages at stride 16, written from the specification."""
    x = images
    for index, stride in ((0, 2), (3, 1)):
        x = F.conv2d(x, w[f"conv1.{index}.weight"], stride=stride, padding=1)
        x = F.relu(plain_norm(x, w, f"conv1.{index + 1}"))
    x = F.relu(plain_norm(F.conv2d(x, w["conv1.6.weight"], padding=1), w, "bn1"))
    maps = [x := F.max_pool2d(x, 3, 2, 1)]
    for stage in (1, 2, 3, 4):
        for block in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith(f"layer{stage}."))):
            b = inside(w, f"layer{stage}.{block}.")
            stride = 2 if block == 0 and stage in (2, 3) else 1
            y = F.relu(plain_norm(F.conv2d(x, b["conv1.weight"]), b, "bn1"))
            y = plain_split_attention(y, inside(b, "conv2."), 2 if stage == 4 and block > 0 else 1)
            if block == 0 and stage > 1:
                y = F.avg_pool2d(y, 3, stride, 1, count_include_pad=True)
            y = plain_norm(F.conv2d(y, b["conv3.weight"]), b, "bn3")
            if block == 0:
                x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else x
                x = plain_norm(F.conv2d(x, b["downsample.1.weight"]), b, "downsample.2")
            x = F.relu(x + y)
        maps.append(x)
    return maps


def test_every_stage_of_resnest_is_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    net = ResNeSt(ResNeStOptions(name="resnest26d")).eval()  # two blocks a stage: the second of layer4 is dilated
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.ndim == 4:
                value.normal_(std=1.4 * value[0].numel() ** -0.5, generator=generator)
            elif value.is_floating_point():
                spread = torch.randn(value.shape, generator=generator) * 0.1
                value.copy_(spread if name.endswith(("bias", "running_mean")) else 1 + spread.abs())
    images = torch.randn(2, 3, 70, 97, generator=generator)  # odd maps: incomplete windows at the borders
    with torch.inference_mode():
        taps = net.forward_stages(images)
        for (stage, value), expected in zip(taps.items(), plain_resnest(images, net.state_dict()), strict=True):
            error = (value - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, f"{stage}: off by {error:.1e} of the largest value"


@pytest.mark.parametrize(("norm", "affine"), [("trained", True), ("fixed", True), ("frozen", False)])
def test_resnest_norm(norm: str, affine: bool) -> None:
    net = ResNeSt(ResNeStOptions(name="resnest14d", norm=norm, frozen="layer1")).train()  # type: ignore[arg-type]
    assert net.layer4[0].bn1.training == (norm == "trained") and net.layer4[0].bn1.weight.requires_grad == affine
    assert not net.layer1[0].conv1.weight.requires_grad and not net.layer1[0].bn1.training
    assert net.layer2[0].conv1.weight.requires_grad


@pytest.mark.slow
def test_resnest_below_the_classifier(tmp_path: Path) -> None:
    model = network(backbone="resnest", resnest=SPLIT)
    assert {n.split(".")[0] for n in model.state_dict()} == {"model", "classifier"}
    imagenet = timm.create_model("resnest14d", num_classes=7).state_dict()
    torch.save(imagenet, tmp_path / "resnest.pth")
    model.load_weights(str(tmp_path / "resnest.pth"))
    assert torch.equal(model.model.layer3[0].conv2.fc1.weight, imagenet["layer3.0.conv2.fc1.weight"])
    terms = model.train()(batch((64, 64)), 0.5)
    assert list(terms) == ["cl", "pcl", "re"] and all(torch.isfinite(v) for v in terms.values())


@pytest.mark.parametrize("wrong", ["resnet50", "resnest13"])
def test_no_such_resnest(wrong: str) -> None:
    with pytest.raises(ValueError, match="resnest101e|resnest14d"):
        ResNeSt(ResNeStOptions(name=wrong))


@pytest.mark.parametrize(
    "wrong", [{"backbone": "vgg"}, {"level": "x"}, {"masking": "x"}, {"tiles": 0}, {"alpha": -1}, {"alpha_rise": 0}]
)
def test_options_refuse_impossible_values(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PuzzleCamOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_published_networks_share_the_backbone() -> None:
    """Refiner and segmenter are on the ResNeSt of the CAM network, on the same stage channels (128 in the stem)."""
    recipe = SEEDS["puzzlecam"].recipes["published"]
    assert recipe.cam.network.backbone == "resnest" and recipe.segmenter == "deeplabv3plus"
    refine = override(REFINERS[recipe.refiner].recipes["published"], recipe.refine)
    segment = override(SEGMENTERS[recipe.segmenter].recipes["published"], recipe.segment)
    with torch.device("meta"):
        refiner, segmenter = refine.network.build(20, {}), segment.network.build(20, {})
    assert refiner.fc_edge1[0].weight.shape == (32, 128, 1, 1)
    for backbone in (refiner.resnet50, segmenter.model):
        assert backbone.options.name == recipe.cam.network.resnest.name
        assert backbone.options.norm == "fixed" and not backbone.train().bn1.training
    assert not any(p.requires_grad for p in refiner.resnet50.parameters())
    assert all(p.requires_grad for p in segmenter.parameters())
