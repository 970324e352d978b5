"""net/segment/deeplabv2.py: what the golden cases don't say about DeepLab v2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from training import segmenter_batch, snapshot, train_step

from misc.config import override
from misc.image.pixels import resize_mask, resize_masks
from net.registry import SEGMENTERS
from net.segment.deeplabv2 import DeepLabV2, DeepLabV2Options, from_torchvision, logits_size
from net.start_weights import REQUIRED

CLASSES = 3
SMALL = {"width": 0.125, "depth": (1, 2, 1, 1), "rates": (1, 2)}


def network(preset: str = "published", **changes: object) -> DeepLabV2:
    """The recipe's network, narrow and shallow, everything else as it is."""
    torch.manual_seed(0)
    return override(DeepLabV2.recipes[preset].network, {**SMALL, **changes}).build(CLASSES, {})


def test_name_on_the_command_line() -> None:
    assert SEGMENTERS["deeplabv2"] is DeepLabV2


def test_published_network_and_recipe() -> None:
    recipe = DeepLabV2.recipes["published"]
    assert recipe.network == DeepLabV2Options()
    with torch.device("meta"):
        net = DeepLabV2(20)
    assert sum(p.numel() for p in net.parameters()) == 44_048_532  # deeplab.md C.1
    assert len(net.state_dict()) == 632
    assert (recipe.weights, recipe.init) == (REQUIRED, "coco")
    fit, augment, infer = recipe.fit, recipe.augment, recipe.infer
    assert (fit.steps, fit.batch_size, fit.micro_batch) == (20000, 10, 5)
    assert (fit.lr, fit.momentum, fit.weight_decay) == (2.5e-4, 0.9, 5e-4)
    assert (fit.schedule, fit.power, fit.schedule_every, fit.schedule_extra) == ("poly", 0.9, 10, 0)
    assert (augment.order, augment.flip) == (("normalize", "scale", "crop", "flip"), 0.5)
    assert (augment.scale_set, augment.scale_filter) == ((0.5, 0.75, 1.0, 1.25, 1.5), "linear")
    assert (augment.scale_mask, augment.crop, augment.crop_place, augment.mask_fill) == ("pil", 321, "top_left", 255)
    assert (infer.scales, infer.flip, infer.align_corners, infer.crf_truncates_image) == ((1.0,), False, False, False)
    crf = infer.crf
    assert (crf.iterations, crf.gauss_sxy, crf.gauss_weight) == (10, 1, 3)
    assert (crf.bilateral_sxy, crf.bilateral_srgb, crf.bilateral_weight) == (67, 3, 4)


@pytest.mark.parametrize("form", ["caffe", "torchvision"])
@pytest.mark.parametrize("size", [(33, 47), (40, 24), (8, 9), (50, 65), (2, 1), (66, 4)])
def test_logits_have_the_size_that_the_grid_says(size: tuple[int, int], form: str) -> None:
    net = network(form=form, scales=()).eval()
    with torch.inference_mode():
        assert net.logits(torch.randn(1, 3, *size)).shape == (1, CLASSES + 1, *logits_size(*size))


def test_published_grids() -> None:
    assert logits_size(321, 513) == (41, 65)


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (20, 1)])
def test_images_of_a_pixel_have_logits_and_labels(size: tuple[int, int]) -> None:
    net = network("sample").eval()
    assert net.logits(torch.randn(1, 3, *size)).shape == (1, 4, *logits_size(*size))
    labels = net.resize_labels(torch.zeros(1, *size, dtype=torch.int64))
    logits = net.logits_by_size(torch.randn(1, 3, *size))
    assert [label.shape[1:] for label in labels.values()] == [x.shape[2:] for x in logits]


def test_counts_fit_the_outputs() -> None:
    """No two outputs differ in size from what the counts were made for, at any input size."""
    net = network(scales=(0.5, 0.75))
    for size in ((40, 51), (41, 64), (37, 98)):
        outputs = net.logits_by_size(torch.randn(1, 3, *size))
        labels = net.resize_labels(torch.zeros(1, *size, dtype=torch.long))
        assert [tuple(x.shape[-2:]) for x in outputs] == [tuple(x.shape[-2:]) for x in labels.values()]


def test_the_maximum_is_taken_over_all_sizes() -> None:
    net = network(scales=(0.5, 0.75)).eval()
    with torch.inference_mode():
        first, *others = net.logits_by_size(torch.randn(1, 3, 64, 64))
        merged = net.merge_sizes([first, *others])
        assert torch.equal(net.merge_sizes([first]), first)
        assert (merged >= first).all() and (merged > first).any() and (merged == first).any()
        raised = net.merge_sizes([first, others[0] + 1000, others[1]])
    assert (raised > 900).all()


def test_masks_shrink_as_pil_shrinks_them() -> None:
    mask = np.random.default_rng(0).integers(0, 256, (150, 149), dtype=np.uint8)
    for high in range(1, 150, 7):
        for size in ((high, 19), (19, high), logits_size(high, high)):
            ours = resize_masks(torch.from_numpy(mask.astype(np.int64))[None], size)[0]
            np.testing.assert_array_equal(ours.numpy(), resize_mask(mask, size))


@pytest.mark.parametrize("preset", ["published", "sample"])
def test_rates(preset: str) -> None:
    net = network(preset)
    backbone, head, biases, *affine = net.param_groups()
    scale = 10 if preset == "published" else 1
    assert [(g.lr_scale, g.decay) for g in (backbone, head, biases)] == [(1, True), (scale, True), (2 * scale, False)]
    assert {id(p) for p in head.params} == {id(layer.weight) for layer in net.base.aspp.children()}
    assert {id(p) for p in biases.params} == {id(layer.bias) for layer in net.base.aspp.children()}
    assert bool(affine) == (preset == "sample")
    grouped = [id(p) for group in net.param_groups() for p in group.params]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in net.parameters() if p.requires_grad}


def test_batch_norm_stays_as_loaded() -> None:
    net = network().train()
    changed = train_step(net, segmenter_batch(net, CLASSES))
    assert not {name for name in changed if ".bn." in name}
    assert {"base.layer1.conv1.conv.weight", "base.layer5.block1.increase.conv.weight", "base.aspp.c1.bias"} <= changed


def test_batch_norm_learns_where_asked() -> None:
    net = network(freeze_bn=False).train()
    changed = train_step(net, segmenter_batch(net, CLASSES))
    assert {"base.layer1.conv1.bn.weight", "base.layer4.block1.reduce.bn.running_mean"} <= changed
    assert all(m.momentum == 0.001 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def torchvision_resnet() -> torchvision.models.ResNet:
    """A ResNet with the shapes of SMALL, with statistics that are not the initial ones."""
    torch.manual_seed(3)
    block = torchvision.models.resnet.Bottleneck
    net = torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=7, replace_stride_with_dilation=None)
    for name, module in list(net.named_modules()):  # an eighth of the channels
        owner = net.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Conv2d):
            narrow = nn.Conv2d(
                3 if name == "conv1" else module.in_channels // 8, module.out_channels // 8, module.kernel_size,
                module.stride, module.padding, bias=False,
            )  # fmt: skip
            setattr(owner, last, narrow)
        elif isinstance(module, nn.BatchNorm2d):
            fresh = nn.BatchNorm2d(module.num_features // 8)
            nn.init.uniform_(fresh.weight, 0.5, 1)
            nn.init.uniform_(fresh.running_mean, -0.2, 0.2)
            setattr(owner, last, fresh)
    return net.eval()


def features(net: torchvision.models.ResNet, images: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    return net.layer2(net.layer1(x))


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "resnet50."])
def test_torchvision_weights_compute_what_they_computed(prefix: str, tmp_path: Path) -> None:
    """Up to the third stage, where dilation begins; odd sizes, where the pooling's rounding makes no difference."""
    imagenet = torchvision_resnet()
    state = {f"{prefix}{name}": value for name, value in imagenet.state_dict().items()}
    torch.save({**state, "classifier.weight": torch.zeros(1)} if prefix else state, tmp_path / "resnet.pth")
    net = network(form="torchvision").eval()
    assert net.normalisation == "imagenet"
    report = net.load_weights(str(tmp_path / "resnet.pth"))
    assert "0 unexpected" in report
    images = torch.randn(1, 3, 65, 49)
    with torch.inference_mode():
        ours = net.base.layer3(net.base.layer2(net.base.layer1(images)))
        torch.testing.assert_close(ours, features(imagenet, images), rtol=1e-4, atol=1e-5)
    renamed = {f"base.{from_torchvision(name)}" for name in imagenet.state_dict() if not name.startswith("fc.")}
    assert renamed == {name for name in net.state_dict() if ".aspp." not in name}


def test_weights_of_the_other_form_are_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(torchvision_resnet().state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="resnet.pth: .* form torchvision.*--seg.network.form torchvision.*--seg.init"):
        network().load_weights(str(tmp_path / "resnet.pth"))
    bare = {name.removeprefix("base."): value for name, value in network().state_dict().items()}
    torch.save(bare, tmp_path / "coco.pth")
    with pytest.raises(ValueError, match="--seg.network.form caffe"):
        network(form="torchvision").load_weights(str(tmp_path / "coco.pth"))


def test_the_coco_start_leaves_the_classifier(tmp_path: Path) -> None:
    source = network()
    nn.init.ones_(source.base.layer2.block1.reduce.conv.weight)
    bare = {name.removeprefix("base."): value for name, value in source.state_dict().items() if ".aspp." not in name}
    torch.save({**bare, "fc.weight": torch.zeros(91, 256, 1, 1)}, tmp_path / "deeplabv1_resnet101-coco.pth")
    net = network()
    before = snapshot(net)
    report = net.load_weights(str(tmp_path / "deeplabv1_resnet101-coco.pth"))
    after = net.state_dict()
    assert torch.equal(after["base.layer2.block1.reduce.conv.weight"], source.base.layer2.block1.reduce.conv.weight)
    assert torch.equal(after["base.aspp.c0.weight"], before["base.aspp.c0.weight"])
    assert "0 unexpected" in report


@pytest.mark.parametrize("preset", ["published", "sample"])
def test_its_own_checkpoint_loads_whole(preset: str, tmp_path: Path) -> None:
    source = network(preset)
    torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "whole.pth")
    net = network(preset)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    net.load_weights(str(tmp_path / "whole.pth"))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in source.state_dict().items())


def test_a_file_with_a_gap_in_the_backbone_is_refused(tmp_path: Path) -> None:
    state = {name: value for name, value in network().state_dict().items() if "layer4" not in name}
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="missing"):
        network().load_weights(str(tmp_path / "part.pth"))


@pytest.mark.parametrize(
    "wrong", [{"form": "msra"}, {"width": 0}, {"depth": (1, 1, 1)}, {"rates": ()}, {"dilations": (0, 1)},
              {"scales": (0.5, 1.0)}, {"bn_momentum": 0}],
)  # fmt: skip
def test_options_refuse_impossible_values(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DeepLabV2Options(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_sample_recipe_learns_from_random_weights() -> None:
    assert DeepLabV2.recipes["sample"].weights == "none"
    net = network("sample").train()
    made = segmenter_batch(net, CLASSES, 4, (48, 48))
    made["image"] = nn.functional.avg_pool2d(made["image"], 9, 1, 4) * 9  # smooth
    made["mask"] = (made["image"][:, 0] > 0).long()  # foreground is what is red
    made.update({f"counts/{name}": count for name, count in net.counts(made).items()})
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.005)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = sum(net(made, 0.0).values())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
