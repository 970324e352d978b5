"""Values that pixels of masks have."""

from __future__ import annotations

IGNORE = 255
"""A pixel whose class is unknown: not trained on, not scored. 0 is background, c + 1 class c (0-based)."""
