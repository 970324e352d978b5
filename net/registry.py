"""The methods by their names on the command line.

To add a method, add one file (or package) in net/seed, net/refine or net/segment: a decorator registers its class under
the file's name. No other file changes.
"""

from __future__ import annotations

import importlib
import pkgutil
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from net.contract import Preset, Refiner, SeedNetwork, Segmenter

SEEDS: dict[str, type[SeedNetwork]] = {}
REFINERS: dict[str, type[Refiner]] = {}
SEGMENTERS: dict[str, type[Segmenter]] = {}
BROKEN: dict[str, str] = {}
"""Files (net/seed/NAME.py) that could not be imported, and why."""

ROOMS: dict[str, dict[str, Any]] = {"seed": SEEDS, "refine": REFINERS, "segment": SEGMENTERS}
"""Folder of net -> its registry."""

T = TypeVar("T", bound=type)


def _register(room: str, name: str) -> Callable[[T], T]:
    table = ROOMS[room]

    def add(cls: T) -> T:
        if name in table:
            raise ValueError(f"Two classes are registered as {name!r}: {table[name].__name__} and {cls.__name__}.")
        home, _, rest = cls.__module__.partition(f"net.{room}.")
        if not home and rest.partition(".")[0] != name:
            raise ValueError(f"{cls.__name__} is registered as {name!r}: the name must be that of its file.")
        cls.name = name  # type: ignore[attr-defined]
        table[name] = cls
        return cls

    return add


def seed(name: str) -> Callable[[T], T]:
    """Register a CAM network under its name on the command line, which is that of its file.

    Its recipes follow at the end of the file: ``TheNetwork.recipes = {"published": ..., "sample": ...}``. The decorator
    raises ValueError if the name is taken or not the file's.
    """
    return _register("seed", name)


def refiner(name: str) -> Callable[[T], T]:
    """Register a refiner under its name on the command line; see ``seed``."""
    return _register("refine", name)


def segmenter(name: str) -> Callable[[T], T]:
    """Register a segmentation network under its name on the command line; see ``seed``."""
    return _register("segment", name)


def load_methods() -> None:
    """Import every file and package of net/seed, net/refine and net/segment, which fills the registries.

    A file that does not import, registers nothing or has no recipe is reported in a warning and in
    ``BROKEN``; the others are registered.
    """
    for room, table in ROOMS.items():
        for module in pkgutil.iter_modules([str(Path(__file__).parent / room)]):
            file = f"net/{room}/{module.name}" + ("/__init__.py" if module.ispkg else ".py")
            if module.name in table or file in BROKEN:
                continue
            try:
                importlib.import_module(f"net.{room}.{module.name}")
                if module.name not in table:
                    raise ValueError(f"no class in it is registered as {module.name!r}")
                if not getattr(table[module.name], "recipes", {}):
                    raise ValueError(f"{table[module.name].__name__}.recipes has no recipe")
            except Exception as error:
                table.pop(module.name, None)
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                if isinstance(error, SyntaxError):
                    where = f"{Path(error.filename or '').name}:{error.lineno}"
                BROKEN[file] = f"{type(error).__name__}: {error} ({where})"
                warnings.warn(f"{file} is left out because it does not import: {BROKEN[file]}", stacklevel=2)


def find_method(table: Mapping[str, T], name: str, what: str) -> T:
    """The class registered under a name. Its ValueError lists the known names and the files that do not import."""
    if name in table:
        return table[name]
    for file, error in BROKEN.items():
        if file.split("/")[2].removesuffix(".py") == name:
            raise ValueError(f"The {what} {name!r} can't be used, {file} does not import: {error}")
    raise ValueError(f"There is no {what} {name!r}. There are: {', '.join(sorted(table))}.")


def find_recipe(cls: type, preset: Preset, base: Preset | None = None) -> Any:
    """The recipe of a registered class by the name of the preset; if it has none of that name and a ``base`` is given,
    the one of that name, or else its first.

    Raises ValueError with the known names where there is no base either.
    """
    recipes: Mapping[Preset, Any] = cls.recipes  # type: ignore[attr-defined]
    for name in (preset, base, *(recipes if base else ())):
        if name in recipes:
            return recipes[name]
    raise ValueError(f"{cls.name} has no preset {preset!r}. There are: {', '.join(recipes)}.")  # type: ignore[attr-defined]
