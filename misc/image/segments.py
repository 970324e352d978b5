"""Class-agnostic segments of an image, such as SAM makes: regions that may overlap and that need not cover it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from misc.files.runlengths import region_of_runs, runs_of_region


@dataclass(frozen=True)
class Segments:
    """n regions of an image, kept as run lengths, so that hundreds of them in a large image need little memory.

    size: (H, W). runs: run lengths of each (misc/files/runlengths.py).
    """

    size: tuple[int, int]
    runs: tuple[np.ndarray, ...]

    @classmethod
    def of_masks(cls, masks: Iterable[np.ndarray], size: tuple[int, int]) -> Segments:
        """Of masks (H, W) bool."""
        return cls(size, tuple(runs_of_region(mask) for mask in masks))

    def __len__(self) -> int:
        return len(self.runs)

    def mask(self, number: int) -> np.ndarray:
        """One of them: (H, W) bool."""
        return region_of_runs(self.runs[number], *self.size)

    def at_size(self, size: tuple[int, int]) -> Segments:
        """The same segments of the image resized to (h, w), by the nearest pixel."""
        if size == self.size:
            return self
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, self.size, strict=True)
        )
        return Segments.of_masks((self.mask(number)[np.ix_(rows, columns)] for number in range(len(self))), size)
