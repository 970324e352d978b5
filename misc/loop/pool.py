"""Worker processes for per-image work, each with a pipe of its own: whichever is killed, at whatever moment, takes
nothing along that the others or the main process wait for. ``concurrent.futures`` waits for ever where a process is
killed that holds the lock of the common queue, or that has written a part of a large result."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any, Generic, TypeVar, cast

from misc.commandline import holding_interrupts
from misc.distributed import quiet_threads

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class WorkerKilled(RuntimeError):
    """A worker process was killed or crashed. ``items``: what was in work then."""

    def __init__(self, items: Sequence[Any]):
        super().__init__("a worker process died")
        self.items = items


class _InWorker(Exception):
    """The traceback of a worker process, as text: the cause of the error that it sent."""


@dataclass(frozen=True)
class Outcome(Generic[Answer]):
    """What came of one item."""

    value: Answer | None
    error: Exception | None = None
    trace: str = ""

    def result(self) -> Answer:
        """The value, or the item's error, raised."""
        if self.error is not None:
            raise self.error from _InWorker(f"\n{self.trace}")
        return self.value  # type: ignore[return-value]


def in_workers(
    work: Callable[[Item], Answer], items: Sequence[Item], workers: int, method: str
) -> Iterator[Outcome[Answer]]:
    """Calls ``work`` for every item in worker processes and gives the outcomes in the items' order. Closed early
    (``contextlib.closing``), or at an error, what is in work is finished and the rest is dropped.

    Args:
        work: picklable where processes are spawned; given to each of them once.
        workers: largest number of processes.
        method: how they are started, "fork" or "spawn".

    Raises:
        WorkerKilled: one of them died.
    """
    context = multiprocessing.get_context(method)
    forked = context.get_start_method() == "fork"
    if not forked:
        resource_tracker.ensure_running()  # when it starts, Ctrl-C is no longer held
    crew: list[tuple[Any, connection.Connection]] = []
    in_work: dict[connection.Connection, int] = {}
    outcomes: dict[int, Outcome[Answer]] = {}
    given = 0
    try:
        for _ in range(min(workers, len(items))):
            with holding_interrupts():
                ours, theirs = context.Pipe()
                # a forked worker has the main process's ends of all pipes so far; each end must have one owner, so that
                # its death is the pipe's end. A spawned one is sent its work, by a pipe that ends if it is killed
                inherited = [*(pipe for _, pipe in crew), ours] if forked else []
                process = context.Process(target=_serve, args=(theirs, inherited, work if forked else None))
                process.start()
                theirs.close()
                crew.append((process, ours))
        try:
            idle = [pipe for _, pipe in crew]
            for pipe in idle if not forked else ():
                pipe.send(work)
            for number in range(len(items)):
                while True:
                    while idle and given < min(len(items), number + 4 * workers):
                        pipe = idle.pop()
                        in_work[pipe] = given
                        pipe.send(items[given])
                        given += 1
                    if number in outcomes:
                        break
                    for pipe in cast(list[connection.Connection], connection.wait(list(in_work))):
                        outcome = pickle.loads(pipe.recv_bytes())
                        outcomes[in_work.pop(pipe)] = outcome
                        idle.append(pipe)
                yield outcomes.pop(number)
        except (EOFError, OSError):  # before, or in, an answer
            raise WorkerKilled([items[number] for number in sorted(in_work.values())]) from None
    finally:
        with holding_interrupts():
            for _, pipe in crew:
                pipe.close()  # each worker finishes what it is at, and finds nobody to answer or to ask
        for process, _ in crew:
            process.join()


def _serve(
    pipe: connection.Connection, inherited: Sequence[connection.Connection], work: Callable[[Any], Any] | None
) -> None:
    for end in inherited:
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which waits for images
    end_with_parent()
    quiet_threads()
    with suppress(EOFError, ConnectionError):  # when nobody asks any more
        work = pipe.recv() if work is None else work
        while True:
            item = pipe.recv()
            try:
                answer = pickle.dumps(Outcome(work(item)))
            except Exception as error:
                answer = pickle.dumps(Outcome(None, _portable(error), traceback.format_exc()))
            pipe.send_bytes(answer)


def _portable(error: Exception) -> Exception:
    """The error itself, where it survives the way to the parent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def end_with_parent() -> None:
    """Makes this worker process end when its parent is killed, whatever it is at."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
