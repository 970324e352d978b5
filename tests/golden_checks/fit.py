"""Golden checks of misc/loop/fit.py."""

from __future__ import annotations

import re

import numpy as np
import torch
from golden_case import Case

from misc.config import Fit
from misc.loop.fit import make_optimiser, set_lr
from net.groups import Group


def check_psa_poly_optimizer(case: Case) -> None:
    """The published poly-SGD as it behaves: the momentum is the weight decay's number, rates stay at the end."""
    text = case.meta["constructor"]
    groups = re.findall(r"group \d+: (\w+), lr ([\d.]+), weight decay ([\d.]+)", text)
    found = re.search(r"global lr ([\d.]+), weight decay ([\d.]+), max_step (\d+)", text)
    assert found
    lr, decay, total = float(found[1]), float(found[2]), int(found[3])
    start = case.meta["input"]
    values = {name: torch.nn.Parameter(torch.tensor(start[name])) for name, _, _ in groups}
    listed = [Group([values[n]], lr_scale=float(r) / lr, decay=float(d) > 0) for n, r, d in groups]
    recipe = Fit(lr=lr, momentum=case.meta["effective_momentum"], weight_decay=decay)
    optimiser = make_optimiser(listed, recipe, torch.device("cpu"))
    w, b = values["w"], values["b"]
    params, rates = [], []
    for step in range(start["steps"]):
        set_lr(optimiser, recipe, step, total)
        rates.append([group["lr"] for group in optimiser.param_groups])
        optimiser.zero_grad()
        ((w**2).sum() / 2 + ((b - 1) ** 2).sum() / 2 + w[0] * b[0]).backward()
        optimiser.step()
        params.append(torch.cat([w, b]).detach().numpy().copy())
    case.check("params", np.stack(params))
    case.check("lr", np.array(rates))
