"""Progress bars: a moving bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL = 30.0
"""Seconds between two lines if the output is not a terminal."""


class Progress(tqdm):
    """tqdm on stderr. If that is not a terminal (a file, a scheduler's log), it writes whole lines with the remaining
    time, at most one per ``LOG_INTERVAL`` seconds, the first after that time: short work writes none."""

    def __init__(self, iterable: Iterable[Any] | None = None, **settings: Any):
        self.in_log = not sys.stderr.isatty()
        if self.in_log:
            # miniters 1: only the time decides when a line is written
            how: dict[str, Any] = {"mininterval": LOG_INTERVAL, "maxinterval": LOG_INTERVAL, "delay": LOG_INTERVAL,
                                   "miniters": 1, "ncols": 100}  # fmt: skip
        else:
            how = {"dynamic_ncols": True}
        super().__init__(iterable, file=sys.stderr, **settings, **how)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """The function that writes a state of the bar: over the last one, or in a log on a line of its own."""
        if file.isatty():
            return tqdm.status_printer(file)

        def write_line(state: str) -> None:
            file.write(f"{state}\n")
            file.flush()

        return write_line

    def close(self) -> None:
        """Leave the last state on a terminal; write nothing more in a log."""
        if self.in_log:
            self.delay = float("inf")  # tqdm writes no last state of a bar that was not shown
        super().close()


class Speed:
    """Images per second, as a moving average over the last updates."""

    _SHARE = 0.1

    def __init__(self) -> None:
        self.mean = 0.0
        self._since = time.perf_counter()

    def count(self, images: int) -> float:
        """Count images that were processed since the last call; returns their images per second."""
        now = time.perf_counter()
        speed = images / max(now - self._since, 1e-9)
        self._since = now
        self.mean = self.mean + self._SHARE * (speed - self.mean) if self.mean else speed
        return speed

    def restart(self) -> None:
        """Leave out the time since the last call, which went into something else."""
        self._since = time.perf_counter()
