"""Progress in a log and on a terminal."""

from __future__ import annotations

import gc
import io
import re
import sys

import pytest

from misc.loop import progress
from misc.loop.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that bars see, in seconds."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(total=1000, desc="cam", unit="update") as bar:
        for _ in range(1000):
            clock[0] += 0.1
            bar.update()
    lines = log.getvalue().splitlines()
    assert len(lines) == 3 and "\r" not in log.getvalue()  # 100 seconds
    assert re.search(r"cam:  30%.* 300/1000 \[00:30<01:10, 10.00update/s", lines[0]), lines[0]


@pytest.mark.parametrize("place", ["begin", "middle"])
def test_a_bar_that_ctrl_c_did_not_let_begin_says_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(io.StringIO):
        def isatty(self) -> bool:
            raise KeyboardInterrupt

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    if place == "begin":
        monkeypatch.setattr(sys, "stderr", Interrupting())
    else:
        monkeypatch.setattr(Progress, "_get_free_pos", interrupt)
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    try:
        Progress(total=3)
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail("it was not interrupted")
    gc.collect()
    assert not lost


def test_quick_work_writes_nothing_into_a_log(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for _ in Progress(range(50), desc="quick"):
        clock[0] += (progress.LOG_INTERVAL - 1) / 50
    assert log.getvalue() == ""


def test_slow_work_writes_no_more_than_it_does(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for _ in Progress(range(4), desc="slow"):
        clock[0] += 100
    assert len(log.getvalue().splitlines()) <= 4


def test_a_terminal_gets_a_moving_bar(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in Progress(range(20), desc="cam"):
        clock[0] += 1
    assert terminal.getvalue().count("\r") > 10 and terminal.getvalue().count("\n") == 1
