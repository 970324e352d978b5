"""A golden case as its checker sees it."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch


def load_fill(folder: Path) -> ModuleType:
    """The module fill.py of a folder of golden cases."""
    spec = importlib.util.spec_from_file_location("golden_fill", folder / "fill.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Case:
    """``meta`` is the JSON, ``arrays`` the npz, ``fill`` the module that makes weights and inputs."""

    def __init__(self, path: Path):
        self.name = path.stem
        self.path = path
        self.meta: dict[str, Any] = json.loads(path.read_text())
        self.tolerance, self.of_largest = _tolerance(self.meta["tolerance"])

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path.with_suffix(".npz")) as stored:
            return {k: stored[k] for k in stored.files}

    @cached_property
    def fill(self) -> ModuleType:
        here = self.path.parent
        return load_fill(here if (here / "fill.py").exists() else Path(__file__).parent / "golden")

    def evaluate(self, text: str) -> torch.Tensor:
        """The tensor that an expression of the JSON describes, such as ``2 * fill.image('a', 1, 3, 8, 8)``."""
        names = {"fill": self.fill, "np": np, "torch": torch, "zeros": torch.zeros, "sigmoid": torch.sigmoid,
                 "relu": torch.relu}
        threads = torch.get_num_threads()
        # the cases were recorded with several threads: the enlargement in fill.image has other last bits with one, and
        # these move gradients behind many ReLUs by more than the tolerance
        torch.set_num_threads(max(2, threads))
        try:
            return eval(text, {"__builtins__": {}}, names)  # noqa: S307 - our own test data
        finally:
            torch.set_num_threads(threads)

    def sample(self, name: str, value: Any) -> np.ndarray:
        """The stored part of a full value: all of it, or the strided sample that the JSON names."""
        value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        output = self.meta["outputs"].get(name, {})
        if "stored" in output:  # then the shape is that of the full value
            assert list(value.shape) == output["shape"], f"{name}: {value.shape}"
        stored = output.get("stored") or output.get("sampled")
        if stored and (text := re.search(r"\[(.*?)\]", stored)):
            value = value[tuple(_index(part.strip()) for part in text[1].split(","))]
        return value

    def check(self, name: str, value: Any, tolerance: float | None = None) -> None:
        """Compare a full value with the stored output of that name, at the case's tolerance: absolute plus relative to
        each entry, or (``of_largest``) relative to the largest of them."""
        tolerance = self.tolerance if tolerance is None else tolerance
        expected = self.arrays[name]
        got = self.sample(name, value)
        assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
        rtol, atol = (0, tolerance * abs(expected).max()) if self.of_largest else (tolerance, tolerance)
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=f"{self.name}: {name}")


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
