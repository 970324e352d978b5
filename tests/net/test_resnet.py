"""The ResNet backbone: the function and the names of torchvision's, what is frozen, where its weights come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from net.backbone.resnet import STAGES, ResNet, ResNetOptions, load_resnet

TINY = ResNetOptions(width=0.125, depth=(2, 1, 1, 2))


class Owner(nn.Module):
    """A network with a ResNet and a head."""

    def __init__(self, options: ResNetOptions = TINY, classes: int = 3) -> None:
        super().__init__()
        self.resnet50 = ResNet(options)
        self.classifier = nn.Conv2d(self.resnet50.channels["layer4"], classes, 1, bias=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "name"), [((3, 4, 6, 3), "resnet50"), ((3, 4, 23, 3), "resnet101"), ((3, 8, 36, 3), "resnet152")]
)
def test_names_and_shapes_are_torchvisions(depth: tuple[int, int, int, int], name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
        ours = ResNet(ResNetOptions(depth=depth)).state_dict()
    wanted = {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.items()} == wanted


@pytest.mark.slow
def test_with_imagenet_strides_the_function_is_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50().eval()
    ours = ResNet(ResNetOptions(strides=(2, 2, 2, 2))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(1, 3, 65, 97)
    wanted = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for stage in STAGES[1:]:
        wanted = getattr(theirs, stage)(wanted)
    assert torch.equal(ours(x), wanted)


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (5, 8)])
@pytest.mark.parametrize("strides", [(2, 2, 2, 1), (2, 2, 1, 1), (1, 2, 2, 2)])
def test_taps_have_the_promised_channels_and_sizes(size: tuple[int, int], strides: tuple[int, int, int, int]) -> None:
    net = ResNet(ResNetOptions(width=0.125, depth=(1, 1, 1, 1), strides=strides)).eval()
    x = torch.randn(1, 3, *size)
    taps = net.forward_stages(x)
    assert list(taps) == list(STAGES)
    for stage, value in taps.items():
        cells = [-(-side // net.strides[stage]) for side in size]
        assert list(value.shape) == [1, net.channels[stage], *cells]
    assert torch.equal(net(x), taps["layer4"])


def test_dilation_leaves_out_the_first_bottleneck() -> None:
    net = ResNet(ResNetOptions(width=0.125, depth=(1, 1, 2, 3), strides=(2, 2, 1, 1), dilations=(1, 1, 2, 4)))
    assert [block.conv2.dilation[0] for block in net.layer3] == [1, 2]
    assert [block.conv2.dilation[0] for block in net.layer4] == [1, 4, 4]


@pytest.mark.parametrize(("norm", "statistics", "affine"), [("trained", True, True), ("fixed", False, True),
                                                           ("frozen", False, False)])  # fmt: skip
def test_batch_norm_moves_as_the_option_says(norm: str, statistics: bool, affine: bool) -> None:
    net = ResNet(ResNetOptions(width=0.125, depth=(1, 1, 1, 1), norm=norm)).train()  # type: ignore[arg-type]
    before = net.bn1.running_mean.clone()
    net(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert torch.equal(net.bn1.running_mean, before) != statistics
    assert (net.bn1.weight.grad is not None) == affine
    assert net.conv1.weight.grad is not None


@pytest.mark.parametrize("frozen", ["none", *STAGES])
def test_frozen_stages_get_no_gradient_and_keep_their_statistics(frozen: str) -> None:
    net = ResNet(ResNetOptions(width=0.125, depth=(1, 1, 1, 1), norm="trained", frozen=frozen))  # type: ignore[arg-type]
    trained = {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    later = STAGES[STAGES.index(frozen) + 1 :] if frozen != "none" else STAGES  # type: ignore[arg-type]
    assert trained == {part for stage in later for part in (("conv1", "bn1") if stage == "stem" else (stage,))}
    before = net.bn1.running_mean.clone()
    net.train()(torch.randn(2, 3, 32, 32))
    assert torch.equal(net.bn1.running_mean, before) == (frozen != "none")


def _five_stages(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official edge networks' names of a ResNet's tensors."""
    renamed = {}
    for name, value in state.items():
        layer, _, rest = name.partition(".")
        stage = {"conv1": "stage1.0", "bn1": "stage1.1"}.get(layer) or f"stage{int(layer[-1]) + 1}.0"
        renamed[f"{stage}.{rest}"] = value
    return renamed


@pytest.mark.parametrize("form", ["torchvision", "own", "model", "five stages", "official"])
def test_starts_from_every_naming(form: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, network = Owner(), Owner()
    for value in source.resnet50.buffers():
        value.copy_(torch.rand(value.shape))
    backbone = source.resnet50.state_dict()
    state = {
        "torchvision": {**backbone, "fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)},
        "own": source.state_dict(),
        "model": {f"model.{name}": value for name, value in backbone.items()},
        "five stages": _five_stages(backbone),
        # three names a tensor, as in IRNet's released files
        "official": {**source.state_dict(), **{f"backbone.0.{name}": 0 * value for name, value in backbone.items()},
                     "newly_added.0.weight": torch.zeros(3, 8, 1, 1)},
    }[form]  # fmt: skip
    torch.save(state, tmp_path / "w.pth")
    head = network.classifier.weight.clone()
    report = load_resnet(network, str(tmp_path / "w.pth"), heads=("classifier",))
    assert "0 unexpected" in report
    for name, value in network.resnet50.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, backbone[name]), name
    wanted = source.classifier.weight if form in ("own", "official") else head
    assert torch.equal(network.classifier.weight, wanted)


@pytest.mark.parametrize(
    ("depth", "message"),
    [((1, 1, 1, 1), "missing.*Is this the checkpoint of another network"), ((3, 1, 1, 2), "Set its depth")],
)
def test_weights_of_another_depth_are_refused(depth: tuple[int, int, int, int], message: str, tmp_path: Path) -> None:
    torch.save(Owner(ResNetOptions(width=0.125, depth=depth)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_resnet(Owner(), str(tmp_path / "w.pth"), heads=("classifier",))


@pytest.mark.parametrize("wrong", [{"width": 0}, {"depth": (1, 1, 1)}, {"strides": (2, 2, 2, 0)}, {"norm": "live"},
                                   {"frozen": "conv1"}, {"dilations": (1, 1, 2)}])  # fmt: skip
def test_options_refuse_impossible_values(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ResNetOptions(**wrong)  # type: ignore[arg-type]
