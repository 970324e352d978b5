"""Training steps of small networks, for the tests of methods."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from misc.loop.trainable import Batch, Trainable
from net.contract import SeedNetwork, Segmenter


def segmenter_batch(net: Segmenter, classes: int, images: int = 2, size: tuple[int, int] = (40, 51)) -> Batch:
    """Random images and masks with ignored rows at the top, and the counts that the loop adds."""
    torch.manual_seed(1)
    made = {"image": torch.randn(images, 3, *size), "mask": torch.randint(0, classes + 1, (images, *size))}
    made["mask"][:, :7] = 255
    return with_counts(net, made)


def with_counts(net: Trainable, batch: Batch) -> Batch:
    """The batch with ``net.counts`` as the loop adds them."""
    return {**batch, **{f"counts/{name}": count for name, count in net.counts(batch).items()}}


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of the state dict."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def train_step(net: Trainable, batch: Batch, lr: float = 0.1) -> set[str]:
    """Names of what one plain gradient step on the parameter groups, and the forward pass, change."""
    before = snapshot(net)
    groups = net.param_groups()
    optimiser = torch.optim.SGD([{"params": g.params, "lr": lr * g.lr_scale} for g in groups], lr=lr)
    sum(net(batch, 0.0).values()).backward()
    optimiser.step()
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def mean_terms(net: SeedNetwork, batches: list[Batch], progress: float) -> dict[str, float]:
    """Mean terms of micro-batches, whose counts are shared as the loop does."""
    prepared = [{**batch, **net.prepare(batch, progress)} for batch in batches]
    counts = [net.counts(batch) for batch in prepared]
    for batch in prepared:
        batch |= {f"counts/{k}": sum(c[k] for c in counts) / len(counts) for k in counts[0]}
    found = [net(batch, progress) for batch in prepared]
    return {k: sum(terms[k].item() for terms in found) / len(found) for k in found[0]}


def check_division(net: SeedNetwork, batch_of: Callable[[int, int], Batch], progress: float) -> dict[str, float]:
    """The terms of four samples at once, which must be those of two halves and of four single samples.

    ``batch_of``: start, count -> samples that are functions of their numbers alone.
    """
    whole = mean_terms(net, [batch_of(0, 4)], progress)
    for parts in ([batch_of(0, 2), batch_of(2, 2)], [batch_of(i, 1) for i in range(4)]):
        assert whole == pytest.approx(mean_terms(net, parts, progress), rel=1e-5, abs=1e-7)
    return whole
