"""The methods by the names they have on the command line.

Adding a method is one new file in net/seed, net/refine or net/segment: its class is registered by a decorator and
found by name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from net.contract import AffinityNetwork, SeedNetwork, Segmenter

SEEDS: dict[str, type[SeedNetwork]] = {}
REFINERS: dict[str, type[AffinityNetwork]] = {}
SEGMENTERS: dict[str, type[Segmenter]] = {}

OWN = "own"
"""On the command line: the segmenter is the CAM network itself."""

C = TypeVar("C", bound=type)


def _register(table: dict[str, Any], name: str) -> Callable[[C], C]:
    def add(cls: C) -> C:
        if name in table:
            raise ValueError(f"Two classes are registered as {name!r}: {table[name].__name__} and {cls.__name__}.")
        cls.name = name  # type: ignore[attr-defined]
        table[name] = cls
        return cls

    return add


def seed(name: str) -> Callable[[C], C]:
    """Register a CAM network under the name it has on the command line."""
    return _register(SEEDS, name)


def refiner(name: str) -> Callable[[C], C]:
    """Register an affinity network under the name it has on the command line."""
    return _register(REFINERS, name)


def segmenter(name: str) -> Callable[[C], C]:
    """Register a segmentation network under the name it has on the command line."""
    return _register(SEGMENTERS, name)


def load_methods() -> None:
    """Import every file of net/seed, net/refine and net/segment, which fills the registries."""
    for room in ("seed", "refine", "segment"):
        for module in pkgutil.iter_modules([str(Path(__file__).parent / room)]):
            importlib.import_module(f"net.{room}.{module.name}")
