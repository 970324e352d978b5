"""Regions as COCO's run lengths: numbers of pixels outside and inside in turn, down the columns, as a list or
compressed to text."""

from __future__ import annotations

from typing import Any

import numpy as np

from misc.files.schema import Number, find_fault


def read_run_lengths(counts: Any, height: int, width: int) -> np.ndarray:
    """Run lengths (R,) int64 of a region in an image, from either form; ValueError for what is none, or does not add up
    to the image's pixels."""
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    if isinstance(counts, str):
        counts = _uncompressed(counts, height * width)
    if find_fault(counts, [Number(0, whole=True)]) or sum(counts) != height * width:
        raise ValueError(f"its counts are no run lengths that add up to {height} x {width} pixels.")
    return np.array(counts, np.int64)


def region_of_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """(R,) run lengths -> (H, W) bool."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def runs_of_region(region: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (R,) int64 run lengths; the inverse of ``region_of_runs``."""
    flat = np.asarray(region, bool).T.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], ends, [len(flat)]]))
    return np.concatenate([[0], runs]) if len(flat) and flat[0] else runs


def _uncompressed(text: str, pixels: int) -> list[int]:
    """Run lengths of the compressed form: six bits a character, differences to the last but one from the third on."""
    counts: list[int] = []
    value, shift = 0, 0
    for letter in text.encode(errors="replace"):
        bits = letter - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("its counts are no compressed run lengths.")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
            if counts[-1] > pixels:
                raise ValueError("its run lengths are more than the image has pixels.")
    if shift:
        raise ValueError("its counts end too early.")
    return counts
