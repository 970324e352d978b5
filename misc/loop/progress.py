"""Progress bars: a moving bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL = 30.0
"""Seconds between two lines if the output is not a terminal."""


class Progress(tqdm):
    """tqdm on stderr. If that is not a terminal (a file, a scheduler's log), it writes whole lines with the remaining
    time, at most one per ``LOG_INTERVAL`` seconds, the first after that time: short work writes none."""

    _begun = False

    def __init__(self, iterable: Iterable[Any] | None = None, **settings: Any):
        self.in_log = not sys.stderr.isatty()
        if self.in_log:
            # miniters 1: only the time decides when a line is written
            how: dict[str, Any] = {"mininterval": LOG_INTERVAL, "maxinterval": LOG_INTERVAL, "delay": LOG_INTERVAL,
                                   "miniters": 1, "ncols": 100}  # fmt: skip
        else:
            how = {"dynamic_ncols": True}
        super().__init__(iterable, file=sys.stderr, **settings, **how)
        self._begun = True

    def __del__(self) -> None:
        if self._begun:  # else Ctrl-C came first, and there is nothing to close
            super().__del__()

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
