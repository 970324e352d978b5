"""Pools of worker processes for per-image work."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import BaseContext
from typing import Any

_LAST_WAIT = 30.0
"""Seconds that worker processes have for what is in work, once one of them has ended."""


@contextmanager
def worker_pool(
    workers: int, context: BaseContext, initializer: Callable[..., None], *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool of worker processes that always ends: at the end of the block what is not begun is dropped, and the
    processes are waited for. One that is killed just then can take a lock along that the others wait for: they are
    killed ``_LAST_WAIT`` seconds after the first has ended. Files are written whole or not at all.

    Args:
        workers: largest number of processes.
        context: how they are started.
        initializer: called in each as initializer(*arguments).
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer, arguments)
    try:
        yield pool
    finally:
        mine = [process for process in multiprocessing.active_children() if process not in before]
        pool.shutdown(wait=False, cancel_futures=True)
        living = {process.sentinel: process for process in mine}
        left: float | None = None
        while living:
            ended = connection.wait(list(living), left)
            for process in living.values() if not ended else ():
                process.kill()
            for sentinel in ended:
                del living[sentinel]  # type: ignore[arg-type]
            left = _LAST_WAIT if ended else None
        for process in mine:
            process.join()
