"""Any CNN of timm as a backbone: where its cells lie, its weights, and every place that takes one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from misc.config import override
from misc.files import store
from net import registry
from net.backbone import timm_cnn
from net.backbone.depthwise import DepthwiseConv2d
from net.backbone.resnet import STAGES
from net.backbone.timm_cnn import TimmCNN, TimmOptions, find_geometry, load_timm

FAMILIES = {
    "resnet18": 16, "resnet26": 8, "test_efficientnet": 16, "tf_efficientnet_lite0": 16, "test_convnext": 16,
    "convnext_atto": 8, "regnetx_002": 16, "regnety_002": 8, "mobilenetv3_small_050": 32,
}  # fmt: skip
"""A member of each family, small, with the stride of its last map."""
NAME = "test_efficientnet"
registry.load_methods()


def network(name: str, stride: int = 16, **options: Any) -> TimmCNN:
    """With random weights that depend on the name only."""
    torch.manual_seed(0)
    return TimmCNN(f"timm/{name}", TimmOptions(stride=stride, **options)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_cells_cover_their_pixels(name: str) -> None:
    net = network(name, FAMILIES[name])
    timm_cnn._make_linear(net.model)
    size, first = (128, 192), 64
    ramps = torch.stack(torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")) + 0.5  # (2, H, W)
    inputs = torch.cat([ramps, torch.ones(1, *size)])[:, None].expand(-1, 3, -1, -1)  # (3, 3, H, W)
    for stage, maps in net.forward_stages(inputs).items():
        stride = net.strides[stage]
        assert maps.shape[2:] == (size[0] // stride, size[1] // stride)
        rows, columns, ones = maps.sum(1)[:, first // stride]  # (w,) each
        middle = slice(len(ones) // 2 - 1, len(ones) // 2 + 2)
        centres = (torch.arange(len(ones)) + 0.5) * stride
        assert ((columns / ones - centres)[middle].abs() <= 0.15 * stride + 0.01).all(), stage
        assert ((rows / ones)[middle] - (first + stride / 2)).abs().max() <= 0.15 * stride + 0.01, stage


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_bright_square_has_its_peak_on_it(name: str) -> None:
    net = network(name, FAMILIES[name])
    timm_cnn._make_linear(net.model)
    image = torch.zeros(1, 3, 160, 256)
    image[:, :, 64:96, 160:192] = 1  # off the middle
    peak = net.enlarge(net(image).sum(1, keepdim=True), (160, 256))[0, 0].flatten().argmax()
    row, column = divmod(int(peak), 256)
    assert 64 <= row < 96 and 160 <= column < 192


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_maps_of_a_picture_and_of_its_mirror_image_agree(name: str) -> None:
    net = network(name, FAMILIES[name])
    _use_symmetric_kernels(net)
    image = _blob((160, 256))
    plain, mirrored = net.forward_stages(image), net.forward_stages(image.flip(-1))
    for stage in STAGES:
        here, there = (net.enlarge(x, (160, 256), stage) for x in (plain[stage], mirrored[stage]))
        assert _shift(here, there.flip(-1), net.strides[stage]) <= net.strides[stage] / 4, stage


def _blob(size: tuple[int, int]) -> Tensor:
    """A soft bright spot off the middle: (1, 3, H, W)."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij")
    spot = (-((rows - 0.45 * size[0]) ** 2 + (columns - 0.3 * size[1]) ** 2) / (2 * 20.0**2)).exp()
    return spot.expand(1, 3, -1, -1)


def _use_symmetric_kernels(net: nn.Module) -> None:
    """Random kernels look different to the left and to the right; these do not."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_((module.weight + module.weight.flip(-1)) / 2)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(1)  # some are zero at first: then shortcuts alone count


def _shift(here: Tensor, there: Tensor, most: int) -> int:
    """By how many pixels two maps (1, C, H, W) must be shifted along the rows to agree best."""
    middle, here, there = slice(2 * most, -2 * most), here[:, :16], there[:, :16]
    errors = {d: (here - there.roll(d, -1))[..., middle].abs().mean() for d in range(-most, most + 1)}
    return abs(min(errors, key=errors.__getitem__))


def test_a_margin_of_the_wrong_side_is_noticed() -> None:
    geometry = find_geometry("tf_efficientnet_lite0", 16)
    assert geometry.centres["layer4"] == 15.5  # TensorFlow's SAME: half a cell to the right, less half a pixel
    assert find_geometry("resnet18", 16).centres["layer4"] == 0.5  # a margin of 1: half a cell to the left
    assert find_geometry("convnext_atto", 32).centres["layer4"] == 16  # patches
    assert find_geometry("convnext_atto", 16).centres["layer4"] == 16  # the dilated 2x2 convolution adds half a cell
    assert [geometry.place(stage)[0] for stage in STAGES] == [3, 1, 0, 0, 0]
    assert geometry.margins(224) == (7, 9)


@pytest.mark.parametrize("size", [(64, 96), (63, 33), (17, 130)])
def test_any_size_is_covered(size: tuple[int, int]) -> None:
    net = network(NAME)
    with torch.no_grad():
        for stage, maps in net.forward_stages(torch.randn(1, 3, *size)).items():
            stride = net.strides[stage]
            assert maps.shape == (1, net.channels[stage], -(-size[0] // stride), -(-size[1] // stride))
        assert net.enlarge(maps, size).shape[2:] == size


@pytest.mark.slow
@pytest.mark.parametrize("name, stride, told", [
    ("nosuch", 16, "timm has no model 'nosuch': give a name of timm.list_models"),
    ("vit_tiny_patch16_224", 16, "timm can't give vit_tiny_patch16_224 a last map of stride 16: use a CNN"),
    ("vit_tiny_patch16_224", 32, "timm's vit_tiny_patch16_224 can't be the backbone"),
    ("mobilenetv3_small_050", 16, "network.timm.stride 32"),
    ("vgg11", 32, "a CNN with maps at strides 4, 8 and 16 is needed"),
])  # fmt: skip
def test_networks_that_can_not_be_a_backbone_are_refused_with_the_reason(name: str, stride: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TimmCNN(name, TimmOptions(stride=stride))


def test_normalisation_is_the_networks_own() -> None:
    assert network("test_resnet").normalisation == "half" and network(NAME).normalisation == "imagenet"


def test_freezing() -> None:
    net = network(NAME, frozen="layer1", norm="fixed").train()
    frozen = {".".join(name.split(".")[:2]) for name, p in net.model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv_stem.weight", "bn1.weight", "bn1.bias", "blocks.0", "blocks.1"}
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(p.requires_grad for p in network(NAME, frozen="layer4").parameters())
    assert all(p.requires_grad for p in network(NAME).parameters())


@pytest.mark.parametrize("name", [NAME, "test_convnext"])
def test_training_at_another_stride_is_that_network_by_the_same_weights(name: str) -> None:
    net, images = network(name, training_stride=32, norm="fixed"), torch.rand(1, 3, 70, 96)
    for stride, mode in ((32, True), (16, False), (32, True)):
        plain = network(name, stride, norm="fixed")
        assert plain.load_state_dict(net.state_dict())
        maps = net.train(mode).forward_stages(images)
        assert net.strides == plain.strides
        assert all(torch.equal(maps[stage], expected) for stage, expected in plain.forward_stages(images).items())


@pytest.mark.parametrize(("name", "options"), [
    ("tf_efficientnet_lite0", TimmOptions(stride=16)),
    ("tf_efficientnet_lite0", TimmOptions(stride=16, training_stride=32)),
    ("convnext_atto", TimmOptions(stride=32)),
])  # fmt: skip
def test_depthwise_layers_have_quick_gradients(name: str, options: TimmOptions) -> None:
    """Networks with such layers have some of that kind, and the gradients of one without."""
    torch.manual_seed(0)
    network = TimmCNN(name, options)
    plain, images, found = copy.deepcopy(network), torch.randn(2, 3, 64, 96), []
    quick = [layer for layer in plain.modules() if isinstance(layer, DepthwiseConv2d)]
    assert len(quick) >= 10
    for layer in quick:
        layer.__class__ = nn.Conv2d  # type: ignore[assignment]
    for one in (plain, network):
        maps = one(images)
        maps.square().mean().backward()
        found.append([maps.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    largest = max(float(gradient.abs().max()) for gradient in found[0][1:])
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * largest)


def test_a_network_whose_layers_depend_on_the_stride_is_not_trained_at_another() -> None:
    with pytest.raises(ValueError, match="resnet26d can't be trained at another stride than 16.*training-stride at 0"):
        network("resnet26d", training_stride=32)


class Owner(nn.Module):
    """A network that owns a backbone."""

    def __init__(self, name: str = NAME) -> None:
        super().__init__()
        self.body = network(name)
        self.head = nn.Conv2d(self.body.channels["layer4"], 3, 1)


def _as_released(path: Path, name: str, change: Callable[[dict[str, Tensor]], Any] = dict) -> str:
    """A file as timm releases it, with its classifier."""
    torch.manual_seed(3)
    state = timm.create_model(name).state_dict()
    change(state)
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", NAME, "test_convnext", "regnetx_002"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timms_files_load_strictly(tmp_path: Path, name: str, suffix: str) -> None:
    owner, file = Owner(name), _as_released(tmp_path / f"model{suffix}", name)
    load_timm(owner, file, heads=("head",), owner="body")
    torch.manual_seed(3)
    wanted = timm.create_model(name).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in owner.body.model.state_dict().items())

    def lacking(state: dict[str, Tensor]) -> None:
        del state[sorted(key for key in state if key.endswith("weight") and "head" not in key and "fc" not in key)[-1]]

    with pytest.raises(ValueError, match="tensors are missing"):
        load_timm(owner, _as_released(tmp_path / f"less{suffix}", name, lacking), heads=("head",), owner="body")
    more = _as_released(tmp_path / f"more{suffix}", name, lambda s: s.update({"blocks.9.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match="1 tensors that timm's .* lacks, such as blocks.9.weight"):
        load_timm(owner, more, heads=("head",), owner="body")


PLACES = {
    "psa": "seed", "irn_cam": "seed", "seam": "seed", "puzzlecam": "seed", "psa refiner": "refine", "irn": "refine",
    "edge": "refine", "deeplabv1": "segment", "deeplabv2": "segment", "deeplabv3plus": "segment",
}  # fmt: skip


def _build(place: str, name: str = NAME) -> Any:
    cls = registry.ROOMS[PLACES[place]][place.split()[0]]
    recipe = cls.recipes["published"]
    options = (recipe.cam if PLACES[place] == "seed" else recipe).network
    torch.manual_seed(1)
    return override(options, {"backbone": f"timm/{name}"}).build(2, {})


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_every_place_takes_one_and_starts_from_the_cam_network(place: str, tmp_path: Path) -> None:
    net, size = _build(place).eval(), (50, 70)
    images = torch.randn(1, 3, *size)
    assert net.pretrained_names() == (NAME,)
    if PLACES[place] == "seed":
        assert net.cam(images, torch.ones(1, 2)).shape == (1, 2, *size) and net.classify(images, 2).shape == (1, 2)
    elif PLACES[place] == "segment":
        assert net.logits(images).shape == (1, 3, *size)
    for seed in ("irn_cam", "seam", "psa"):
        start = _build(seed)
        for parameter in start.parameters():
            parameter.add_(1)
        store.write_model(tmp_path / "cam.pt", start.state_dict(), {})
        net.load_weights(str(tmp_path / "cam.pt"))
        ours, theirs = (
            next(m for m in one.modules() if isinstance(m, TimmCNN)).model.state_dict() for one in (net, start)
        )
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("place", [p for p, kind in PLACES.items() if kind == "seed"])
@torch.no_grad()
def test_class_maps_of_mirror_images_agree(place: str) -> None:
    net = _build(place).eval()
    _use_symmetric_kernels(net)
    image = _blob((128, 192))

    def maps(x: Tensor) -> Tensor:
        if place == "seam":  # of random weights the spread maps are all but constant
            return net.enlarge(net.forward_both_maps(x)[0], (128, 192))
        return net.cam(x, torch.ones(1, 2))

    plain, mirrored = maps(image), maps(image.flip(-1))
    assert _shift(plain, mirrored.flip(-1), 16) <= 4


def test_the_edge_network_averages_a_stem_of_stride_2() -> None:
    edge = _build("edge")
    assert edge.resnet50.strides["stem"] == 2
    with torch.no_grad():
        logits = edge.eval().edge_logits(edge.resnet50.forward_stages(torch.randn(1, 3, 64, 96)))
    assert logits.shape == (1, 1, 16, 24)


def test_a_network_may_be_built_without_memory() -> None:
    find_geometry.cache_clear()
    with torch.device("meta"):
        assert all(p.is_meta for p in _build("irn_cam").parameters())
    assert find_geometry(NAME, 16).centres["layer4"] == find_geometry("efficientnet_b0", 16).centres["layer4"]


def test_an_unknown_backbone_is_refused() -> None:
    options = registry.SEEDS["irn_cam"].recipes["published"].cam.network
    with pytest.raises(ValueError, match="backbone = 'resnet51' is not possible: it must be one of resnet, timm/NAME"):
        replace(options, backbone="resnet51")
