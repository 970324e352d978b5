"""misc/loop/pool.py: worker processes, whichever of them is killed, and when."""

from __future__ import annotations

import multiprocessing.connection
import os
import random
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from misc.loop.pool import WorkerKilled, in_workers


class Unportable(Exception):
    def __init__(self, one: int, two: int):
        super().__init__(one)


def halve(item: int) -> int:
    if item == 3:
        raise ValueError("odd")
    if item == 5:
        raise Unportable(5, 6)
    time.sleep(0.02 * (item == 0))
    return item // 2


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_outcomes_come_in_order_with_the_errors_of_their_items(workers: int) -> None:
    outcomes = list(in_workers(halve, range(7), workers, "fork"))
    assert [outcomes[i].result() for i in (0, 1, 2, 4, 6)] == [0, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="odd") as caught:
        outcomes[3].result()
    assert "in halve" in str(caught.value.__cause__)  # where, in the worker
    with pytest.raises(RuntimeError, match="Unportable: 5"):
        outcomes[5].result()
    assert not multiprocessing.active_children() and not list(in_workers(halve, [], workers, "fork"))


def test_at_an_end_before_the_last_item_what_is_in_work_is_finished(tmp_path: Path) -> None:
    def touch(item: int) -> bytes:
        time.sleep(0.2 * (item > 0))
        (tmp_path / str(item)).touch()
        return bytes(10**6)  # more than a pipe holds

    with pytest.raises(KeyboardInterrupt), closing(in_workers(touch, range(50), 2, "fork")) as outcomes:
        next(outcomes)
        raise KeyboardInterrupt
    made = {int(path.name) for path in tmp_path.iterdir()}
    assert {0, 1, 2} <= made and len(made) < 6 and not multiprocessing.active_children()


def die(item: int) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_one_that_is_killed_is_told_with_what_was_in_work() -> None:
    with pytest.raises(WorkerKilled) as caught:
        list(in_workers(die, range(40), 2, "fork"))
    assert 2 in caught.value.items and not multiprocessing.active_children()


def end_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """Kills the process that unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return end_now, ()


class Large:
    """More than a pipe holds, in a worker that is killed before it has read all."""

    def __init__(self) -> None:
        self.first, self.rest = Deadly(), bytes(10_000_000)

    def __call__(self, item: int) -> int:
        return item


def test_one_that_is_killed_at_its_start_is_told() -> None:
    with pytest.raises(WorkerKilled):
        list(in_workers(Large(), range(3), 2, "spawn"))
    assert not multiprocessing.active_children()


def wait_for_the_first(item: int) -> int:
    time.sleep(0.5 * (item == 0))
    return time.monotonic_ns()


def test_nobody_runs_far_ahead_of_a_slow_item() -> None:
    ends = [outcome.result() for outcome in in_workers(wait_for_the_first, range(40), 2, "fork")]
    assert sum(end < ends[0] for end in ends) <= 7  # four for each worker, the slow one aside


def return_a_function(item: int) -> object:
    return lambda: item


def test_a_result_that_cannot_be_sent_is_an_error_of_its_item() -> None:
    (outcome,) = in_workers(return_a_function, [1], 1, "fork")
    with pytest.raises(Exception, match="pickle"):
        outcome.result()


def test_ctrl_c_in_the_middle_of_an_answer_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocessing.connection.Connection, "recv_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(in_workers(large, range(8), 3, "fork"))
    assert not multiprocessing.active_children()


def large(item: int) -> bytes:
    time.sleep(0.002)
    return bytes(200_000)  # in several pieces


def test_a_kill_at_any_moment_ends_in_all_results_or_an_error() -> None:
    rng, ends = random.Random(0), set()
    for _ in range(12):
        outcomes = in_workers(large, range(30), 3, "fork")
        next(outcomes)
        victim = rng.choice(multiprocessing.active_children())
        killer = threading.Timer(rng.uniform(0, 0.1), victim.kill)
        killer.start()
        try:
            assert all(len(outcome.result()) == 200_000 for outcome in outcomes)
            ends.add("all")
        except WorkerKilled:
            ends.add("killed")
        killer.join()
    assert "killed" in ends and not multiprocessing.active_children()
