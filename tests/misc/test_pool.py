"""misc/loop/pool.py: a pool of worker processes that always ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from misc.loop import pool as module
from misc.loop.pool import worker_pool


def be_slow(folder: Path) -> None:
    (folder / "begun").touch()
    time.sleep(0.5)
    (folder / "done").touch()


def test_what_is_in_work_is_waited_for_and_the_rest_is_dropped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), worker_pool(1, multiprocessing.get_context("fork"), int) as pool:
        waiting = [pool.submit(be_slow, tmp_path)]
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        waiting += [pool.submit(time.sleep, 60) for _ in range(5)]
        raise KeyboardInterrupt
    assert (tmp_path / "done").exists() and not multiprocessing.active_children()
    assert waiting[-1].cancelled()


def test_a_pool_ends_where_one_is_killed_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, the others wait for what it holds; here for the signal that never comes."""
    monkeypatch.setattr(module, "_LAST_WAIT", 0.5)
    begin = time.monotonic()
    with worker_pool(2, multiprocessing.get_context("fork"), int) as pool:
        assert list(pool.map(abs, (-1, 2))) == [1, 2]
        first, second = multiprocessing.active_children()
        os.kill(second.pid, signal.SIGSTOP)  # it does not end by itself
    assert time.monotonic() - begin < 20 and not multiprocessing.active_children()
