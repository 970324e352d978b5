"""The registry: names, and where in its file a method's network stands."""

from __future__ import annotations

import inspect

import pytest

from net import registry

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
