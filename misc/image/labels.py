"""Mask values with a meaning of their own."""

from __future__ import annotations

IGNORE = 255
"""Ignore label: the class is unknown, the pixel is neither trained on nor scored. 0 is background, c + 1 is class c
(0-based)."""
