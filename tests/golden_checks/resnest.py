"""Golden cases on ResNeSt: Puzzle-CAM's backbone (puzzlecam.md section 2.1) and its DeepLab v3+ (deeplab.md part D)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from misc.config import Fit, override
from misc.loop.fit import lr_factor, make_optimiser
from net.backbone.resnest import ResNeSt, ResNeStOptions
from net.backbone.resnet import STAGES
from net.segment.deeplabv3plus import DeepLabV3Plus

TIMM_NAMES = {"50": "resnest50d", "101": "resnest101e", "200": "resnest200e", "269": "resnest269e"}


def _fill(case: Any, network: nn.Module, keys: Mapping[str, list[int]]) -> None:
    """Give the network the case's weights; its state dict must be the official one."""
    assert case.fill.keys_of(network) == keys
    case.fill.fill_(network)
    factors = case.meta["scaled_4d"]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4:
                parameter.mul_(factors[max((end for end in factors if name.endswith(end)), key=len)])


def check_puzzlecam_resnest_stages(case: Any) -> None:
    """The stem and the four stages of the backbone that the case names."""
    text = case.meta["constructor"]
    network = ResNeSt(ResNeStOptions(name=TIMM_NAMES[re.search(r"ResNeSt-(\d+)", text)[1]], norm="fixed"))
    depth = [len(getattr(network, name)) for name in STAGES[1:]]
    assert depth == [int(n) for n in re.search(r"blocks ([\d, ]+)", text)[1].split(",")]
    _fill(case, network, case.meta["keys"])
    with torch.inference_mode():
        taps = network.forward_stages(case.evaluate(case.meta["input"]["x"]))
    for stage, value in taps.items():
        case.check(stage, value)


def _network(case: Any, constructor: str, norm: str) -> DeepLabV3Plus:
    """The published network on the case's backbone, dropout off, with the case's weights."""
    options = override(
        DeepLabV3Plus.recipes["published"].network,
        {
            "resnest.name": TIMM_NAMES[re.search(r"ResNeSt-(\d+)", constructor)[1]],
            "dropout": (0.0, 0.0, 0.0),
            "norm": norm,
        },
    )
    keys = {name: shape for name, shape in case.meta["keys"].items() if not name.startswith("stage")}
    if norm == "batch":
        keys.update(case.meta["keys_bn"])
    network = options.build(keys["decoder.classifier.8.bias"][0] - 1, {})
    own = case.fill.keys_of(network)
    assert own == keys  # whatever the order
    _fill(case, network, own)
    return network


def check_deeplabv3plus_forward(case: Any) -> None:
    """Pyramid, decoder and logits in evaluation mode, with both norms."""
    images = case.evaluate(case.meta["input"]["x"])
    for norm, ending in (("group", ""), ("batch", "_bn")):
        network = _network(case, case.meta["constructor"], norm)
        with torch.inference_mode():
            taps = network.model.forward_stages(images)
            pyramid = network.aspp(taps["layer4"])
            case.check(f"aspp{ending}", pyramid)
            case.check(f"decoder{ending}", network.decoder(pyramid, taps["layer1"]))
            case.check(f"logits{ending}", network.logits(images))


def described_label(case: Any) -> Tensor:
    """The mask that a case describes: an arg-max, 255 where another image exceeds a number."""
    text = case.meta["input"]["label"]
    labels, ignored = (case.evaluate(part) for part in re.findall(r"fill\.image\([^)]*\)", text))
    label = labels.argmax(1).masked_fill(ignored[:, 0] > float(re.search(r"> ([\d.]+)", text)[1]), 255)
    case.compare("label", label)
    return label


def compare_groups(case: Any, network: nn.Module) -> None:
    """The parameter groups, in the order that the case states."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group.params] for group in network.param_groups()]
    assert groups == case.meta["parameter_groups"]


def compare_gradient_norms(case: Any, network: nn.Module) -> None:
    """The norm of every gradient."""
    parameters = dict(network.named_parameters())
    assert parameters.keys() == case.meta["grad_norms"].keys()
    for name, norm in case.meta["grad_norms"].items():
        case.compare(f"grad_norms/{name}", parameters[name].grad.norm(), norm, relative=case.tolerance)


def check_deeplabv3plus_train(case: Any) -> None:
    """The published updates in double precision: groups, rates, losses, the first gradients, changes of the values."""
    stated = case.meta["optimiser"]
    network = _network(case, case.meta["description"], "group").double().train()
    recipe = DeepLabV3Plus.recipes["published"].fit
    factor, total = re.search(r"t/(\d+)\)\^([\d.]+)", stated["schedule"]).groups()[::-1]
    assert (recipe.momentum, recipe.nesterov, recipe.power) == (stated["momentum"], stated["nesterov"], float(factor))
    compare_groups(case, network)
    optimiser = make_optimiser(network.param_groups(), recipe, torch.device("cpu"))
    assert [group["weight_decay"] for group in optimiser.param_groups] == stated["weight_decay_of_groups"]
    np.testing.assert_allclose([group["lr"] for group in optimiser.param_groups], stated["lr_of_groups"], rtol=1e-12)
    mask = described_label(case)
    batch = {"image": case.evaluate(case.meta["input"]["x"]).double(), "mask": mask}
    batch.update({f"counts/{name}": count for name, count in network.counts(batch).items()})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    losses = []
    for step, rates in enumerate(stated["lr_used"]):
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * group["lr_scale"] * lr_factor(Fit(power=recipe.power), step, int(total))
        np.testing.assert_allclose([group["lr"] for group in optimiser.param_groups], rates, rtol=1e-12)
        optimiser.zero_grad()
        loss = network(batch, 0.0)["ce"]
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            compare_gradient_norms(case, network)
            parameters = dict(network.named_parameters())
            for name in case.meta["outputs"]:
                if name.startswith("grad_"):
                    case.check(name, parameters[name.removeprefix("grad_")].grad)
            with torch.no_grad():
                case.check("logits", network.logits(batch["image"]))
        optimiser.step()
    case.check("loss", np.array(losses))
    after = network.state_dict()
    for name in case.meta["outputs"]:
        if name.startswith("change_"):
            key = name.removeprefix("change_")
            case.check(name, after[key] - before[key])
    for name, value in after.items():
        if "running" in name:
            assert torch.equal(value, before[name]), name
