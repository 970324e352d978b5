"""Imported first by scripts that are called as files too, such as ``python scripts/look.py``: Python's path then begins
with this folder, and the packages of the checkout would not be found."""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[1])
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)
