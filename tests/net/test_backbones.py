"""ResNet38 and VGG16: official names, geometry, freezing, initial weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from net.backbone.resnet38 import ResNet38, ResNet38Options
from net.backbone.vgg16 import VGG16, VGG16Options

GOLDEN = Path(__file__).parents[1] / "golden"
NARROW = ResNet38Options(width=0.125, depth=(1, 2, 1, 2), freeze_bn=False, frozen="none")
TINY_VGG = VGG16Options(width=0.125)


def golden_keys(case: str, heads: tuple[str, ...]) -> dict[str, list[int]]:
    """Official state-dict keys with shapes, without those of the layers named ``heads``."""
    keys = json.loads((GOLDEN / f"{case}.json").read_text())["keys"]
    return {name: shape for name, shape in keys.items() if name.split(".")[0] not in heads}


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def trained(module: nn.Module) -> set[str]:
    """First parts of the names of the parameters that have a gradient."""
    return {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


# ------------------------------------------------------------------ ResNet38


def test_resnet38_has_the_official_names_and_shapes() -> None:
    with torch.device("meta"):
        net = ResNet38()
    expected = golden_keys("seam_net", ("fc8", "f8_3", "f8_4", "f9"))
    assert list(shapes_of(net).items()) == list(expected.items())
    assert sum(p.numel() for p in net.parameters()) == 105_070_912
    assert all(m.eps == 1e-5 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


class Method(ResNet38):
    """A method's network as the official SEAM and PSA code has it: the backbone without a prefix, another forward."""

    def __init__(self) -> None:
        super().__init__(ResNet38Options(width=0.125, depth=(1, 1, 1, 1), frozen="b2"))
        self.fc8 = nn.Conv2d(self.channels["conv6"], 5, 1, bias=False)
        self.bn_head = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_head(self.fc8(self.forward_stages(x)["conv6"]))


def test_resnet38_serves_as_base_class_and_as_part() -> None:
    net = Method()
    assert {"conv1a.weight", "b6.conv_branch2b2.weight", "fc8.weight"} <= set(net.state_dict())
    assert net(torch.randn(2, 3, 20, 30)).shape == (2, 5, 3, 4)
    net.train()
    assert net.fc8.weight.requires_grad and not net.bn_head.training

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = ResNet38(ResNet38Options(width=0.125, depth=(1, 1, 1, 1)))
            self.bn_fov = nn.BatchNorm2d(self.backbone.channels["conv6"])

    net = Segmenter().train()
    assert "backbone.b2.conv_branch1.weight" in net.state_dict()
    assert net.bn_fov.training and not net.backbone.bn7.training


@pytest.mark.parametrize("size", [(33, 47), (40, 24), (8, 9)])
def test_resnet38_taps_have_ceil_sizes(size: tuple[int, int]) -> None:
    net = ResNet38(NARROW).eval()
    taps = net(torch.randn(2, 3, *size))
    assert list(taps) == ["conv3", "conv4", "conv5", "conv6"]
    for name, tap in taps.items():
        stride = 4 if name == "conv3" else 8
        assert tap.shape == (2, net.channels[name], -(-size[0] // stride), -(-size[1] // stride)), name
        assert tap.min() >= 0
    assert net.channels == {"conv3": 32, "conv4": 64, "conv5": 128, "conv6": 512}


def test_resnet38_taps_are_entry_activations() -> None:
    net = ResNet38(NARROW).eval()
    for bn in (net.b4.bn_branch2a, net.b5.bn_branch2a, net.b6.bn_branch2a, net.bn7):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    entries: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        entries[name] = value.detach().clone()

    for tap, bn in (("conv3", net.b4.bn_branch2a), ("conv4", net.b5.bn_branch2a), ("conv5", net.b6.bn_branch2a)):
        bn.register_forward_hook(lambda module, args, out, tap=tap: keep(tap, out))
    net.bn7.register_forward_hook(lambda module, args, out: keep("conv6", out))
    for name, tap in net(torch.randn(1, 3, 24, 24)).items():
        torch.testing.assert_close(tap, F.relu(entries[name]))


def test_resnet38_shortcut_starts_from_the_activation_only_where_projected() -> None:
    net = ResNet38(NARROW).eval()
    for block in (net.b3, net.b3_1):
        nn.init.zeros_(block.conv_branch2b1.weight)
    x = torch.randn(1, 16, 9, 9)
    out, entry = net.b3(x)
    torch.testing.assert_close(out, net.b3.conv_branch1(F.relu(net.b3.bn_branch2a(x))))
    again, _ = net.b3_1(out)
    torch.testing.assert_close(again, out)
    assert entry.shape == x.shape


def test_resnet38_dilations() -> None:
    net = ResNet38(NARROW)
    found = {name: m.dilation[0] for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.dilation[0] > 1}
    assert found == {
        "b5.conv_branch2b1": 2, "b5_1.conv_branch2a": 2, "b5_1.conv_branch2b1": 2,
        "b6.conv_branch2b1": 4, "b7.conv_branch2b1": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("frozen", "layers"), [("none", set()), ("conv1a", {"conv1a"}), ("b2", {"conv1a", "b2", "b2_1"})]
)
def test_resnet38_freezes_at_construction_and_again_in_train(frozen: str, layers: set[str]) -> None:
    net = ResNet38(ResNet38Options(width=0.125, depth=(2, 1, 1, 1), frozen=frozen))  # type: ignore[arg-type]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]

    def check() -> None:
        assert not any(m.training or m.weight.requires_grad or m.bias.requires_grad for m in norms)
        convolutions = {name.split(".")[0] for name, p in net.named_parameters() if p.ndim == 4}
        assert trained(net) == convolutions - layers

    check()
    net.requires_grad_(True)
    assert net.train() is net and net.training and net.b6.dropout_2b1.training
    check()
    assert not net.eval().b6.dropout_2b1.training


def test_resnet38_frozen_parts_do_not_move() -> None:
    net = ResNet38(ResNet38Options(width=0.125, depth=(2, 1, 1, 1), frozen="b2")).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    net(torch.randn(2, 3, 16, 16))["conv6"].sum().backward()
    optimiser.step()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {n for n, p in net.named_parameters() if p.ndim == 4 and n.split(".")[0][:2] not in ("co", "b2")}


def test_resnet38_trains_batch_norm_on_request() -> None:
    net = ResNet38(ResNet38Options(width=0.125, depth=(1, 1, 1, 1), freeze_bn=False, frozen="none", bn_momentum=0.0003))
    assert all(p.requires_grad for p in net.parameters())
    net.train()(torch.randn(2, 3, 16, 16))
    assert net.bn7.num_batches_tracked == 1 and not torch.all(net.bn7.running_mean == 0)
    assert all(m.momentum == 0.0003 for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    frozen = ResNet38(ResNet38Options(width=0.125, depth=(1, 1, 1, 1), freeze_bn=False, frozen="b2")).train()
    frozen(torch.randn(2, 3, 16, 16))
    assert frozen.b2.bn_branch2a.num_batches_tracked == 0 and frozen.b3.bn_branch2a.num_batches_tracked == 1


def test_resnet38_dropout_acts_in_both_bottlenecks_in_training_only() -> None:
    torch.manual_seed(0)
    net = ResNet38(ResNet38Options(width=0.125, depth=(1, 1, 1, 1), dropout=(0.3, 0.5)))
    x = torch.randn(1, 3, 16, 16)
    found = {name: m.p for name, m in net.named_modules() if isinstance(m, nn.Dropout2d)}
    assert found == {"b6.dropout_2b1": 0.3, "b6.dropout_2b2": 0.3, "b7.dropout_2b1": 0.5, "b7.dropout_2b2": 0.5}
    net.train()
    assert torch.equal(net(x)["conv5"], net(x)["conv5"]) and not torch.equal(net(x)["conv6"], net(x)["conv6"])
    net.eval()
    assert torch.equal(net(x)["conv6"], net(x)["conv6"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [ResNet38Options(), NARROW], ids=["full", "narrow"])
@torch.no_grad()
def test_resnet38_initial_activations_have_a_sane_scale(options: ResNet38Options) -> None:
    torch.manual_seed(0)
    net = ResNet38(options).eval()  # running statistics 0 and 1: batch normalisation does nothing
    for name, tap in net(torch.randn(2, 3, 48, 40)).items():
        assert 0.3 < rms(tap) < 2.5, (name, rms(tap))


def test_resnet38_runs_channels_last() -> None:
    net = ResNet38(NARROW).eval()
    x = torch.randn(2, 3, 17, 23)
    plain = net(x)["conv6"]
    net.to(memory_format=torch.channels_last)
    again = net(x.contiguous(memory_format=torch.channels_last))["conv6"]
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ VGG16


def test_vgg16_has_the_official_names_and_shapes() -> None:
    with torch.device("meta"):
        net = VGG16()
    assert list(shapes_of(net).items()) == list(golden_keys("psa_cls_vgg16", ("fc8",)).items())
    assert 20e6 < sum(p.numel() for p in net.parameters()) < 21e6
    assert net.normalisation == "caffe_bgr" and ResNet38.normalisation == "imagenet"


@pytest.mark.parametrize("dilation", [1, 4])
def test_vgg16_taps_have_ceil_sizes(dilation: int) -> None:
    net = VGG16(VGG16Options(width=0.125, fc6_dilation=dilation)).eval()  # type: ignore[arg-type]
    taps = net(100 * torch.randn(2, 3, 33, 47))
    assert {name: tuple(tap.shape) for name, tap in taps.items()} == {
        "conv4_3": (2, 64, 5, 6), "conv5_3": (2, 64, 5, 6), "fc7": (2, 128, 5, 6),
    }  # fmt: skip
    assert net.channels == {name: tap.shape[1] for name, tap in taps.items()}
    assert all(tap.min() >= 0 for tap in taps.values())
    assert net.fc6.dilation == net.fc6.padding == (dilation, dilation)
    assert net.conv5_1.dilation == net.conv5_3.dilation == (2, 2) and net.conv4_3.dilation == (1, 1)


def test_vgg16_freezes_the_first_two_stages() -> None:
    net = VGG16(TINY_VGG)
    first = {"conv1_1", "conv1_2", "conv2_1", "conv2_2"}
    everything = {name.split(".")[0] for name, _ in net.named_parameters()}
    assert trained(net) == everything - first
    net.requires_grad_(True)
    assert net.train() is net and trained(net) == everything - first
    assert trained(VGG16(VGG16Options(width=0.125, frozen="none")).train()) == everything


def test_vgg16_dropout_sits_between_fc6_and_fc7() -> None:
    torch.manual_seed(0)
    net = VGG16(TINY_VGG).train()
    x = 60 * torch.randn(1, 3, 24, 24)
    assert torch.equal(net(x)["conv5_3"], net(x)["conv5_3"]) and not torch.equal(net(x)["fc7"], net(x)["fc7"])
    net.eval()
    assert torch.equal(net(x)["fc7"], net(x)["fc7"])


@pytest.mark.parametrize("width", [1.0, 0.125])
@torch.no_grad()
def test_vgg16_initial_activations_have_a_sane_scale(width: float) -> None:
    torch.manual_seed(0)
    net = VGG16(VGG16Options(width=width)).eval()
    for name, tap in net(255 * torch.rand(2, 3, 48, 40) - 115).items():
        assert 0.2 < rms(tap) < 5, (name, rms(tap))


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0},
        {"depth": (3, 3, 0, 3)},
        {"depth": (3, 3)},
        {"dropout": (0.3, 1.0)},
        {"frozen": "b9"},
        {"bn_momentum": 0},
    ],
)
def test_resnet38_options_refuse_impossible_values(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ResNet38Options(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"width": -1}, {"fc6_dilation": 2}, {"dropout": 1.0}, {"frozen": "conv1"}])
def test_vgg16_options_refuse_impossible_values(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VGG16Options(**wrong)  # type: ignore[arg-type]


def test_options_are_command_line_sections() -> None:
    words = "--width 0.25 --depth 1 1 2 1 --no-freeze-bn --frozen none".split()
    assert tyro.cli(ResNet38Options, args=words) == ResNet38Options(
        width=0.25, depth=(1, 1, 2, 1), freeze_bn=False, frozen="none"
    )
    assert tyro.cli(VGG16Options, args=["--fc6-dilation", "4"]) == VGG16Options(fc6_dilation=4)
