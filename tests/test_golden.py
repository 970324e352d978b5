"""Every golden case against its checker: the function ``check_PREFIX`` of tests/golden_checks whose PREFIX is the
longest that the case's name starts with. A case without a checker fails, unless its method is listed as pending."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_case import Case

PENDING = (
    "caae_", "caffemodel_", "deeplabv2_", "getam_f", "getam_l", "getam_m", "getam_po", "getam_ps", "getam_t",
    "puzzlecam_", "semformer_",
)
"""Families whose methods are not built yet; this list only shrinks."""


def checkers() -> dict[str, Callable[[Case], None]]:
    found = {}
    here = Path(__file__).parent / "golden_checks"
    for module in pkgutil.iter_modules([str(here)]):
        for name, value in vars(importlib.import_module(f"golden_checks.{module.name}")).items():
            if name.startswith("check_"):
                assert name not in found, f"two checkers {name}"
                found[name.removeprefix("check_")] = value
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_path" in metafunc.fixturenames:
        paths = sorted(metafunc.config.getoption("golden").glob("*.json"))
        assert paths, "no golden cases"
        metafunc.parametrize("case_path", paths, ids=[p.stem for p in paths])


def test_golden(case_path: Path) -> None:
    table = checkers()
    fitting = [prefix for prefix in table if case_path.stem.startswith(prefix)]
    if not fitting and case_path.stem.startswith(PENDING):
        pytest.skip(f"pending: {case_path.stem}")
    assert fitting, f"{case_path.stem} has no checker"
    table[max(fitting, key=len)](Case(case_path))


def test_pending_families_have_no_checker() -> None:
    """A family that is checked must leave the list."""
    for prefix in checkers():
        assert not any(p.startswith(prefix) and not p.endswith("_") for p in PENDING), prefix
        assert not prefix.startswith(PENDING), f"{prefix} is checked: take it off the pending list"
