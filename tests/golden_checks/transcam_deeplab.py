"""Golden case of the DeepLab v1 that TransCAM trains (transcam.md section 7)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from golden_checks.resnest import compare_gradient_norms, compare_groups, described_label

from misc.config import override
from misc.loop.fit import divide, lr_factor, make_optimiser
from net.registry import SEEDS, SEGMENTERS


def check_transcam_deeplab_train(case: Any) -> None:
    """One update of the published recipe in double precision, by the statistics of the whole batch."""
    method = SEEDS["transcam"].recipes["published"]
    cls = SEGMENTERS[method.segmenter]
    recipe = override(cls.recipes["published"], method.segment)
    assert divide(recipe.fit, 1).micro == 1  # all images of a batch go through the network together
    options = override(recipe.network, {"resnet38.dropout": (0.0, 0.0), "dropout": 0.0})
    network = options.build(case.meta["keys"]["cls_conv.weight"][0] - 1, {})
    assert case.fill.keys_of(network) == case.meta["keys"]
    case.fill.fill_(network)
    text = case.meta["input"]["weights"]
    named = re.findall(r"'(\w+)'", text)
    by_name, heads, by_head = re.search(r"multiplied by ([\d.]+), (.+) by ([\d.]+)", text).groups()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4 and any(part in name for part in named):
                parameter.mul_(float(by_name))
            if name in heads.split(" and "):
                parameter.mul_(float(by_head))
    compare_groups(case, network)
    stated = case.meta["optimiser"]
    optimiser = make_optimiser(network.param_groups(), recipe.fit, torch.device("cpu"))
    scales = [group.lr_scale for group in network.param_groups()]
    factor = lr_factor(recipe.fit, stated["iteration"], stated["of"])
    np.testing.assert_allclose([recipe.fit.lr * scale * factor for scale in scales], stated["lr_used"], rtol=1e-12)
    assert recipe.fit.momentum == stated["momentum"] and recipe.fit.steps == stated["of"]
    decays = [recipe.fit.weight_decay if group.decay else 0 for group in network.param_groups()]
    assert decays == stated["weight_decay_of_groups"]
    for group in optimiser.param_groups:
        group["lr"] *= factor
    # the published affine parameters get a gradient, which no optimiser uses; ours are switched off
    network.double().train().requires_grad_(True)
    batch = {"image": case.evaluate(case.meta["input"]["x"]).double(), "mask": described_label(case)}
    batch.update({f"counts/{name}": count for name, count in network.counts(batch).items()})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits = []
    inner = network.logits
    network.logits = lambda images: logits.append(inner(images)) or logits[-1]
    loss = network(batch, 0.0)["ce"]
    loss.backward()
    case.check("logits", logits[0])
    case.check("loss", loss)
    compare_gradient_norms(case, network)
    optimiser.step()
    parameters, after = dict(network.named_parameters()), network.state_dict()
    unchanged = [name for name in parameters if torch.equal(after[name], before[name])]
    assert unchanged == case.meta["unchanged_parameters"]
    for name in case.meta["outputs"]:
        kind, _, key = name.partition("_")
        if kind == "grad":
            case.check(name, parameters[key].grad)
        elif kind == "change":
            case.check(name, after[key] - before[key])
