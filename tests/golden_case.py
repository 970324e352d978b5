"""A golden case as its checker sees it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
"""The project's own cases."""


@contextlib.contextmanager
def several_threads() -> Iterator[None]:
    """PyTorch's arithmetic with two threads at least, as the cases were recorded: with one, the enlargement in
    fill.image and sums have other last bits, and these move gradients behind many ReLUs by more than the tolerance."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_fill(folder: Path) -> ModuleType:
    """The module fill.py of a folder of golden cases."""
    spec = importlib.util.spec_from_file_location("golden_fill", folder / "fill.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Allowed:
    """How far a value may be from what is expected: at least the fraction ``share`` of its entries is within
    ``absolute`` + ``relative`` * |expected| + ``of_largest`` * max |expected|. With ``joint`` all entries along the
    first axis count as one, which is within where all of them are: a pixel of (C, H, W) maps."""

    absolute: float = 0.0
    relative: float = 0.0
    of_largest: float = 0.0
    share: float = 1.0
    joint: bool = False

    def excess(self, got: np.ndarray, expected: np.ndarray) -> str | None:
        """None where ``got`` is as expected, otherwise what is wrong with it."""
        if got.shape != expected.shape:
            return f"shape {got.shape}, expected {expected.shape}"
        if not expected.size:
            return None
        got, expected = got.astype(np.float64), expected.astype(np.float64)
        apart, largest = np.abs(got - expected), np.abs(expected).max()
        within = apart <= self.absolute + self.relative * np.abs(expected) + self.of_largest * largest
        within |= np.isnan(got) & np.isnan(expected)
        within = within.all(axis=0) if self.joint else within
        if within.mean() >= self.share:
            return None
        return (f"{within.mean():.2%} of the entries are within {self}; the largest error is {np.nanmax(apart):.3g}, "
                f"the largest expected value {largest:.3g}")  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A value that passed its check, what was expected, and how far it might have been from it."""

    name: str
    got: np.ndarray
    expected: np.ndarray
    allowed: Allowed

    def blind_to(self) -> list[str]:
        """The wrong values that would have passed as well: zeros and the negated array, on either side."""
        got, expected = (array.astype(np.float64) for array in (self.got, self.expected))
        wrong = {
            "zeros computed": (0 * got, expected), "the negative computed": (-got, expected),
            "zeros expected": (got, 0 * expected), "the negative expected": (got, -expected),
        }  # fmt: skip
        return [name for name, pair in wrong.items() if self.allowed.excess(*pair) is None]


class Case:
    """A golden case: ``meta`` is the JSON, ``fill`` the module that makes weights and inputs.

    The arrays of the npz are reached in three ways: ``input`` (given to the code under test), ``check`` and ``compare``
    (expected of it), ``stored`` (only looked at, for its shape say). ``compared`` and ``inputs`` say afterwards what
    the checker did, so that an output that nobody compares is found.
    """

    def __init__(self, path: Path):
        self.name = path.stem
        self.path = path
        self.meta: dict[str, Any] = json.loads(path.read_text())
        self.tolerance, self.of_largest = _tolerance(self.meta["tolerance"])
        self.compared: list[Comparison] = []
        self.inputs: set[str] = set()

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path.with_suffix(".npz")) as stored:
            return {k: stored[k] for k in stored.files}

    @property
    def names(self) -> list[str]:
        """Names of all arrays, outputs and inputs."""
        return list(self._arrays)

    def stored(self, name: str) -> np.ndarray:
        """An array to take a size or a position from; reading it compares nothing."""
        return self._arrays[name]

    def input(self, name: str) -> np.ndarray:
        """An array that the code under test is given."""
        self.inputs.add(name)
        return self._arrays[name]

    def untouched(self) -> list[str]:
        """Arrays that were neither compared nor given."""
        compared = {comparison.name for comparison in self.compared}
        return [name for name in self._arrays if name not in compared | self.inputs]

    @cached_property
    def fill(self) -> ModuleType:
        here = self.path.parent
        return load_fill(here if (here / "fill.py").exists() else GOLDEN)

    def other(self, name: str) -> Case:
        """Another case that this one refers to: beside it, or in the project's own folder."""
        beside = self.path.with_name(f"{name}.json")
        return Case(beside if beside.exists() else GOLDEN / f"{name}.json")

    def expect_published(self, stated: Any, ours: Any) -> None:
        """A setting that the case states is that of the published recipe. A further case of the family, which is not
        among the project's own, may state another one."""
        assert stated == ours or not (GOLDEN / f"{self.name}.json").exists(), f"{self.name}: {stated}, ours: {ours}"

    def evaluate(self, text: str) -> torch.Tensor:
        """The tensor that an expression of the JSON describes, such as ``2 * fill.image('a', 1, 3, 8, 8)``."""
        names = {"fill": self.fill, "np": np, "torch": torch, "zeros": torch.zeros, "sigmoid": torch.sigmoid,
                 "relu": torch.relu}
        with several_threads():
            return eval(text, {"__builtins__": {}}, names)  # noqa: S307 - our own test data

    def sample(self, name: str, value: Any) -> np.ndarray:
        """The stored part of a full value: all of it, or the strided sample that the JSON names."""
        value = array(value)
        output = self.meta["outputs"].get(name, {})
        if "stored" in output:  # then the shape is that of the full value
            assert list(value.shape) == output["shape"], f"{name}: {value.shape}"
        stored = output.get("stored") or output.get("sampled")
        if stored and (text := re.search(r"\[(.*?)\]", stored)):
            value = value[tuple(_index(part.strip()) for part in text[1].split(","))]
        return value

    def check(
        self, name: str, value: Any, tolerance: float | None = None, *, of_largest: float | None = None
    ) -> None:
        """Compare a full value with the stored output of that name, at the case's tolerance: relative to the largest
        value of the output (where the case says so, and where all values are below one: an absolute tolerance would
        let small gradients be anything), or absolute plus relative to each entry.

        ``of_largest``: what float32 reaches of the largest value where that is more than the tolerance, and all values
        are below one. It is never more than the absolute tolerance allows.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        expected = self._arrays[name]
        largest = np.abs(expected.astype(np.float64)).max(initial=0)
        if self.of_largest or largest < 1:
            if of_largest is not None and not self.of_largest:
                assert of_largest * largest <= tolerance, f"{name}: {of_largest} of the largest loosens the tolerance"
                tolerance = of_largest
            allowed = Allowed(of_largest=tolerance)
        else:
            allowed = Allowed(tolerance, tolerance)
        self._record(name, self.sample(name, value), expected, allowed)

    def compare(
        self, name: str, value: Any, expected: Any = None, *, absolute: float = 0.0, relative: float = 0.0,
        of_largest: float = 0.0, share: float = 1.0, joint: bool = False,
    ) -> None:  # fmt: skip
        """Compare a value with the stored array of that name or with ``expected``, which was made from it: exactly, or
        as far apart as stated (see ``Allowed``)."""
        expected = self._arrays[name] if expected is None else expected
        self._record(name, array(value), array(expected), Allowed(absolute, relative, of_largest, share, joint))

    def _record(self, name: str, got: np.ndarray, expected: np.ndarray, allowed: Allowed) -> None:
        wrong = allowed.excess(got, expected)
        assert wrong is None, f"{self.name}: {name}: {wrong}"
        self.compared.append(Comparison(name, got, expected, allowed))


def array(value: Any) -> np.ndarray:
    """A tensor, a list of numbers or an array as an array."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _tolerance(stated: Any) -> tuple[float, bool]:
    """The number in what a case states, NaN (which nothing meets) where there is none, and whether it is relative to
    the largest value of an output."""
    for key in ("max_abs_error_over_max_abs", "rtol"):
        if isinstance(stated, dict) and key in stated:
            return float(stated[key]), True
    number = re.search(r"[\d.]+e-\d+", stated) if isinstance(stated, str) else None
    value = stated if isinstance(stated, int | float) else number[0] if number else "nan"
    return float(value), isinstance(stated, str) and stated.startswith("relative")


def _index(part: str) -> Any:
    if ":" not in part:
        return ... if part == "..." else int(part)
    return slice(*(int(v) if v else None for v in part.split(":")))
