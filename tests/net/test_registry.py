"""The registry: names, and where in its file a method's network stands."""

from __future__ import annotations

import inspect

import pytest
import torch

from net import registry
from net.contract import SeedNetwork
from scripts.measured_networks import build, tasks

registry.load_methods()

METHODS = [(room, name) for room, table in registry.ROOMS.items() for name in sorted(table)]
TOLD_FIRST = ("forward", "cam", "logits", "refine", "affinity")
"""Methods that tell what a network does."""
FIRST_LINES = 120


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="Two classes are registered as 'seam'"):
        registry.seed("seam")(type("Second", (), {}))


@pytest.mark.slow
@pytest.mark.parametrize(("room", "name"), METHODS)
def test_the_network_stands_at_the_top_of_its_file(room: str, name: str) -> None:
    """Before its losses, options and recipes; what it inherits from net/shared stands at the top there."""
    cls = registry.ROOMS[room][name]
    classes = [c for c in cls.__mro__ if c is cls or c.__module__.startswith(("net.shared", f"net.{room}.{name}"))]
    told = [(c, vars(c)[word]) for c in classes for word in TOLD_FIRST if word in vars(c)]
    lines = {f"{c.__module__}: {f.__qualname__}": inspect.unwrap(f).__code__.co_firstlineno for c, f in told}
    assert lines or cls.__mro__[1].__module__.startswith("net.shared")
    assert {where: line for where, line in lines.items() if line > FIRST_LINES} == {}
    assert inspect.getsourcelines(cls)[1] <= 80


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*registry.SEEDS, *registry.SEGMENTERS}))
def test_images_of_a_batch_are_treated_apart(name: str) -> None:
    """At test time: several images are computed at once where that is faster (--machine.images)."""
    network = build(next(task for task in tasks("sample") if task.name == name), torch.device("cpu")).eval()
    images, tags = torch.randn(3, 3, 64, 80, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 20)
    tags[[0, 0, 1, 2, 2], [1, 7, 7, 0, 3]] = 1

    def compute(at: slice) -> torch.Tensor:
        if isinstance(network, SeedNetwork):
            return network.cam(images[at], tags[at]).detach()
        return network.logits(images[at]).detach()

    together, apart = compute(slice(3)), torch.cat([compute(slice(n, n + 1)) for n in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4 * float(apart.abs().max()))
    if isinstance(network, SeedNetwork) and hasattr(network, "logits"):
        with torch.no_grad():
            one = torch.cat([network.logits(images[n : n + 1]) for n in range(3)])
            torch.testing.assert_close(network.logits(images), one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
