"""Backbones that several methods share; each keeps the state-dict names of the official checkpoints."""

from __future__ import annotations


def scaled_channels(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded to a multiple of 8 and at least 8."""
    return max(8, round(channels * width / 8) * 8)
