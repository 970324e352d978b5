"""Options of the test run, and what many tests start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import make_set, run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", type=Path, default=Path(__file__).parent / "golden", help="folder of golden cases to check"
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set in VOC's layout; not to be changed."""
    return make_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``running.TINY`` on it; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert run(data, out) == 0
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def own(data: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to be damaged."""
    return shutil.copytree(data, tmp_path / "own")


@pytest.fixture
def no_default_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a run would write to its default places lands in the test's folder."""
    monkeypatch.chdir(tmp_path)
