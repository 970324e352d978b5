"""Studies, benchmarks and measurements: `python -m scripts.NAME` from the checkout."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from misc import commandline

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""


def options_and_flags(kind: Callable[..., Any], **texts: str) -> tuple[Any, tuple[str, ...]]:
    """A script's own options and, behind ``--``, flags that it hands on to run_sample.py. Raises WrongCall."""
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    return commandline.parse_options(kind, argv[:end], **texts), tuple(argv[end + 1 :])
