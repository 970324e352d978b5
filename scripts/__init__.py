"""Studies, benchmarks and measurements: `python -m scripts.NAME` from the checkout."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from misc import commandline

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""


def options_with_flags(kind: Callable[..., Any], **texts: str) -> Any:
    """A script's options; what stands behind ``--`` becomes their field ``flags``, which run_sample.py is given. Raises
    WrongCall."""
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    return replace(commandline.parse_options(kind, argv[:end], **texts), flags=tuple(argv[end + 1 :]))
