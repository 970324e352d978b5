"""Mask values with a meaning of their own."""

from __future__ import annotations

import numpy as np

IGNORE = 255
"""Ignore label: the class is unknown, the pixel is neither trained on nor scored. 0 is background, c + 1 is class c
(0-based)."""


def holds_only_ignored(mask: np.ndarray) -> bool:
    """Whether a mask (any shape, integers) holds 255, and nothing else but background: often an object drawn as 255."""
    ignored = mask == IGNORE
    return bool(ignored.any() and (ignored | (mask == 0)).all())
