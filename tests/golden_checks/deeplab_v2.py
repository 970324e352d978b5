"""Golden cases of DeepLab v2 and of the Caffe files it starts from (deeplab.md C)."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from misc.config import Fit
from misc.loop.fit import lr_factor
from net.foreign.reading import read_tensors
from net.segment.deeplabv2 import DeepLabV2, from_caffe

CLASSIFIER = "base.aspp.c0.weight"


def _network(case: Any) -> DeepLabV2:
    """The published network with the case's weights, in evaluation mode; its state dict must be the official one."""
    options = DeepLabV2.recipes["published"].network
    network = options.build(case.meta["keys"][CLASSIFIER][0] - 1, {})
    assert case.fill.keys_of(network) == case.meta["keys"]
    case.fill.fill_(network)
    found = re.search(r"every 4-D parameter whose name contains '(\w+)' is multiplied by ([\d.]+)",
                      case.meta["input"]["weights"])  # fmt: skip
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4 and found[1] in name:
                parameter.mul_(float(found[2]))
    return network


def check_deeplabv2_msc(case: Any) -> None:
    """Stem, logits of one size and the merged ones, in evaluation mode."""
    network = _network(case)
    images = case.evaluate(case.meta["input"]["x"])
    with torch.inference_mode():
        case.check("stem", network.base.layer1(images))
        case.check("base", network.base(images))
        case.check("logits", network.logits(images))


def _label(case: Any) -> Tensor:
    """The mask that the case describes: an arg-max, 255 where another image exceeds a number."""
    pictures = re.findall(r"fill\.image\([^)]*\)", case.meta["input"]["label"])
    limit = float(re.search(r"> ([\d.]+)", case.meta["input"]["label"])[1])
    labels, ignored = (case.evaluate(text) for text in pictures)
    return labels.argmax(1).masked_fill(ignored[:, 0] > limit, 255)


def check_deeplabv2_loss(case: Any) -> None:
    """A training step: groups, logits, targets and loss of every size, gradients of half the loss."""
    network = _network(case).train()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = {f"{group.lr_scale:g}x": [names[id(p)] for p in group.params] for group in network.param_groups()}
    assert groups == case.meta["parameter_groups"]
    # the published affine parameters get a gradient, which no optimiser uses; ours are switched off
    network.requires_grad_(True)
    batch = {"image": case.evaluate(case.meta["input"]["x"]), "mask": _label(case)}
    batch.update({f"counts/{name}": count for name, count in network.counts(batch).items()})
    seen: list[list[Tensor]] = []
    inner = network.logits_by_size
    network.logits_by_size = lambda images: seen.append(inner(images)) or seen[-1]
    terms = network(batch, 0.0)
    loss = sum(terms.values())
    (loss / 2).backward()
    outputs = [*seen[0], network.merge_sizes(seen[0])]
    labels = list(network.resize_labels(batch["mask"]).values())
    for number, (logits, label, term) in enumerate(zip(outputs, [*labels, labels[0]], terms.values(), strict=True)):
        case.check(f"logits_{number}", logits)
        case.compare(f"label_{number}", label)
        case.check(f"loss_{number}", term)
    case.check("loss", loss)
    parameters = dict(network.named_parameters())
    assert parameters.keys() == case.meta["grad_norms"].keys()
    for name, norm in case.meta["grad_norms"].items():
        case.compare(f"grad_norms/{name}", parameters[name].grad.norm(), norm, relative=case.tolerance)
    for name in case.meta["outputs"]:
        if name.startswith("grad_"):
            case.check(name, parameters[name.removeprefix("grad_")].grad)


def check_deeplabv2_poly_lr(case: Any) -> None:
    """The rate of every group after each iteration."""
    rates, rest = case.meta["constructor"].removeprefix("base rates ").split(", ", 1)
    rates = [float(rate) for rate in rates.split(" and ")]
    every, total, power = re.search(r"step (\d+), max (\d+), power ([\d.]+)", rest).groups()
    # the last rate, 0, is that of an update after the end: of a training that has one update more than its schedule
    recipe = Fit(power=float(power), schedule_every=int(every), schedule_extra=-1)
    factors = [lr_factor(recipe, step, int(total) + 1) for step in range(1, int(total) + 1)]
    case.check("lr", np.outer(factors, rates))


def check_deeplabv2_caffe_names(case: Any) -> None:
    """Both tables of layer names, and the state dicts they lead to."""
    with torch.device("meta"):
        network = DeepLabV2(case.meta["keys"][CLASSIFIER][0] - 1)
    own = case.fill.keys_of(network)
    assert own == case.meta["keys"]
    backbone = {name.removeprefix("base."): shape for name, shape in own.items() if ".aspp." not in name}
    coco = case.meta["keys_coco_init"]
    assert backbone == {name: shape for name, shape in coco.items() if not name.startswith("fc.")}
    for table, prefix in (("names_voc12_msc", "base."), ("names_coco_init", "")):
        for layer, wanted in case.meta[table].items():
            assert f"{prefix}{from_caffe(f'{layer}.weight')}" == f"{wanted}.weight"
    case.compare("n_tensors", [len(own), len(coco)])


def check_caffemodel_parse(case: Any) -> None:
    """The tensors of a small file under the names of DeepLab v2."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.caffemodel"
        path.write_bytes(case.input("caffemodel").tobytes())
        read = read_tensors(path)
    renamed = {from_caffe(name): value for name, value in read.items()}
    renamed.pop(None, None)
    expected = {name.removeprefix("out/base.") for name in case.names if name.startswith("out/")}
    assert set(renamed) == expected
    for name, value in renamed.items():
        case.check(f"out/base.{name}", value)
