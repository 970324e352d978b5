"""How long a help text and a mistyped flag take: ``python -m scripts.startup``.

The list of flags is made first where it is not there yet (step/lib/choices.py): that takes an import of PyTorch, once
after every change of a source file, and is printed too.
"""

from __future__ import annotations

import subprocess
import sys
import time

from scripts import ROOT
from step.lib import choices

_CALLS = 3

STARTED_COMMANDS = (
    "run_sample.py --help",
    "run_sample.py seam --cam.fit.lrr 0.1",
    "run_sample.py nosuch",
    "predict.py --help",
    "evaluation.py --help",
    "run_sample.py seam --help-all",
)
"""The last one imports the methods, and with them PyTorch."""


def quickest_call(command: str) -> float:
    """Seconds of the quickest of ``_CALLS`` calls."""
    times = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the times."""
    start = time.perf_counter()
    choices.known_flags("seam")
    print(f"{time.perf_counter() - start:7.2f} s  the list of flags: made after a change of a source, else read")
    for command in STARTED_COMMANDS:
        print(f"{quickest_call(command):7.2f} s  python {command}", flush=True)


if __name__ == "__main__":
    main()
