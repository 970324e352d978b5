"""net/backbone/depthwise.py: the same numbers and gradients as PyTorch's convolution, wherever it is used."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net.backbone import depthwise
from net.backbone.depthwise import DepthwiseConv2d, speed_up_depthwise

LAYOUTS = {
    "large": {"kernel_size": 5, "padding": 2},
    "larger": {"kernel_size": 7, "padding": 3},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "large and dilated": {"kernel_size": 5, "padding": 4, "dilation": 2},
    "one way": {"kernel_size": (5, 3), "padding": (1, 3), "dilation": (3, 2)},
    "without a margin": {"kernel_size": 5, "dilation": 2},
    "with a bias": {"kernel_size": 5, "padding": 2, "bias": True},
    "small": {"kernel_size": 3, "padding": 1},
    "with a stride": {"kernel_size": 5, "padding": 2, "stride": 2},
    "wide margin": {"kernel_size": 5, "padding": 5},
    "named margin": {"kernel_size": 5, "padding": "same", "dilation": 2},
    "reflected": {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"},
}
OWN = list(LAYOUTS)[:7]


def pair(**layout: object) -> tuple[nn.Conv2d, DepthwiseConv2d]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(6, 6, groups=6, **{"bias": False, **layout}))  # type: ignore[arg-type]
    quick = copy.deepcopy(plain)
    speed_up_depthwise(quick)
    assert isinstance(quick[0], DepthwiseConv2d)
    return plain[0], quick[0]


def results(layer: nn.Module, images: Tensor) -> list[Tensor]:
    """Map, and the gradients of some function of it."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    maps = layer(images)
    (maps.sin() * torch.arange(1, 1 + maps.shape[-1])).sum().backward()
    return [maps.detach(), images.grad, *(p.grad for p in layer.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_maps_and_gradients_are_those_of_pytorch(name: str, memory: torch.memory_format) -> None:
    plain, quick = (layer.to(memory_format=memory) for layer in pair(**LAYOUTS[name]))
    images = torch.randn(3, 6, 13, 16).to(memory_format=memory)
    wanted, found = results(plain, images), results(quick, images)
    assert len(wanted) == len(found) == (4 if "bias" in LAYOUTS[name] else 3)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_own_gradients_where_they_are_quicker(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, quick = pair(**LAYOUTS[name])
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    called = []
    own = depthwise._Depthwise.apply
    monkeypatch.setattr(depthwise._Depthwise, "apply", lambda *inputs: called.append(1) or own(*inputs))
    images = torch.randn(2, 6, 13, 16)
    quick(images)
    assert bool(called) == (name in OWN)
    called.clear()
    with torch.no_grad():
        quick(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(images).dtype == torch.bfloat16
    quick(images[0])
    quick(images[:0])
    copy.deepcopy(quick).double()(images.double())
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    quick(images)
    assert not called


def test_the_gradients_are_float32_within_autocast() -> None:
    """As PyTorch's own; a compiled backward pass is traced within the autocast of the forward pass."""
    plain, quick = pair(**LAYOUTS["large and dilated"])
    images = torch.randn(2, 6, 13, 16, requires_grad=True)
    found = []
    for layer in (plain, quick):
        loss = layer(images).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.autograd.grad(loss, (images, layer.weight)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_the_filters_gradient_lies_in_memory_as_they_do(memory: torch.memory_format) -> None:
    _, quick = pair(**LAYOUTS["dilated"])
    quick.to(memory_format=memory)
    (found,) = torch.autograd.grad(quick(torch.randn(2, 6, 9, 9)).sum(), quick.weight)
    assert found.stride() == quick.weight.stride()


@pytest.mark.parametrize("name", OWN)
def test_gradients_of_gradients(name: str) -> None:
    _, quick = pair(**LAYOUTS[name])
    quick.double()
    images = torch.randn(2, 6, 14, 12, dtype=torch.double, requires_grad=True)
    weights = quick.weight.detach().requires_grad_()
    function = lambda x, w: depthwise._Depthwise.apply(x, w, quick.padding, quick.dilation)  # noqa: E731
    assert torch.autograd.gradcheck(function, (images, weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (images, weights), fast_mode=True)


def test_only_the_gradients_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    _, quick = pair(**LAYOUTS["dilated"])
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    images = torch.randn(1, 6, 8, 8)
    for of_images, of_weights in ((True, False), (False, True), (True, True)):
        quick.weight.requires_grad_(of_weights)
        loss = quick(images.requires_grad_(of_images)).sum()
        calls: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(depthwise.F, "conv2d", lambda *a, own=F.conv2d, c=calls: c.append(1) or own(*a))
            loss.backward()
        assert len(calls) == of_images + of_weights


def test_a_layout_that_changes_later_counts() -> None:
    """Backbones are trained at one stride and used at another."""
    plain, quick = pair(kernel_size=3, padding=1, stride=2)
    images = torch.randn(1, 6, 12, 12)
    for layer in (plain, quick):
        layer.stride, layer.dilation, layer.padding = (1, 1), (2, 2), (2, 2)
    for a, b in zip(results(plain, images), results(quick, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_network_stays_what_it_was() -> None:
    """Parameters, their names, random numbers; other layers are let alone."""
    torch.manual_seed(0)
    others = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)), nn.Conv2d(8, 8, 1)
    network = nn.Sequential(nn.Conv2d(4, 4, 5, groups=4), *others)
    before, layers = dict(network.named_parameters()), list(network.modules())
    state = torch.get_rng_state()
    speed_up_depthwise(network)
    after = dict(network.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert torch.equal(state, torch.get_rng_state()) and list(network.modules()) == layers
    assert type(network[0]) is DepthwiseConv2d
    assert type(network[1][0]) is type(network[2]) is nn.Conv2d
