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
from multiprocessing import connection
from typing import Any, Generic, TypeVar

from misc.commandline import holding_interrupts
from misc.distributed import quiet_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerKilled(RuntimeError):
    """A worker process was killed or crashed. ``items``: what was in work then."""

    def __init__(self, items: Sequence[Any]):
        super().__init__("a worker process died")
        self.items = items


class _InWorker(Exception):
    """The traceback of a worker process, as text: the cause of the error that it sent."""


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What came of one item."""

    value: Result | None
    error: Exception | None = None
    trace: str = ""

    def result(self) -> Result:
        """The value, or the item's error, raised."""
        if self.error is not None:
            raise self.error from _InWorker(f"\n{self.trace}")
        return self.value  # type: ignore[return-value]


def in_workers(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, method: str
) -> Iterator[Outcome[Result]]:
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
    crew: list[tuple[Any, connection.Connection]] = []
    in_work: dict[connection.Connection, int] = {}
    outcomes: dict[int, Outcome[Result]] = {}
    rest = iter(range(len(items)))

    def give(pipe: connection.Connection) -> None:
        number = next(rest, None)
        if number is not None:
            in_work[pipe] = number
            pipe.send((items[number],))

    try:
        for _ in range(min(workers, len(items))):
            with holding_interrupts():
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work))
                process.start()
                theirs.close()  # the worker's is the only one, so that its death is the pipe's end
                crew.append((process, ours))
        try:
            for _, pipe in crew:
                give(pipe)
            for number in range(len(items)):
                while number not in outcomes:
                    for pipe in connection.wait(list(in_work)):
                        outcome = pipe.recv()  # type: ignore[union-attr]
                        outcomes[in_work.pop(pipe)] = outcome  # type: ignore[arg-type]
                        give(pipe)  # type: ignore[arg-type]
                yield outcomes.pop(number)
        except (EOFError, OSError):  # before, or in, an answer
            raise WorkerKilled([items[number] for number in sorted(in_work.values())]) from None
    finally:
        for _, pipe in crew:
            with suppress(OSError):
                pipe.send(None)
        for process, pipe in crew:
            with suppress(EOFError, OSError):
                while True:  # an answer that nobody waits for any more would keep its worker from ending
                    pipe.recv_bytes()
            process.join()
            pipe.close()


def _serve(pipe: connection.Connection, work: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which waits for images
    end_with_parent()
    quiet_threads()
    with suppress(EOFError, ConnectionError):  # without a parent there is nothing to do
        while (task := pipe.recv()) is not None:
            try:
                outcome = Outcome(work(*task))
            except Exception as error:
                outcome = Outcome(None, _portable(error), traceback.format_exc())
            pipe.send(outcome)


def _portable(error: Exception) -> Exception:
    """The error itself, where it survives the way to the parent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def end_with_parent() -> None:
    """Makes this worker process end when its parent is killed, whatever it is at. Forked workers hold the ends of each
    other's pipes, by which they would wait for each other."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
