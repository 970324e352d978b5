"""The class activation maps of one image, as passed between steps, refiners and evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from misc.image.pixels import resize_maps


@dataclass(frozen=True)
class Cam:
    """The CAMs of one image.

    keys (K,) int64, present classes, 0-based, ascending; maps (K, h, w) float32, in [0, 1] when they come from a file;
    size: height H and width W of the image; coarse (K, h', w') float32, the same maps added up on a coarser grid of
    cells, if the CAM method's recipe keeps them (``infer.coarse``), else None. K is 0 for an image without a tag.
    """

    keys: np.ndarray
    maps: np.ndarray
    size: tuple[int, int]
    coarse: np.ndarray | None = None

    @classmethod
    def of_maps(cls, keys: np.ndarray, maps: np.ndarray, coarse: np.ndarray | None = None) -> Cam:
        """CAMs whose maps (K, H, W) have the size of the image."""
        return cls(keys, maps, tuple(maps.shape[1:]), coarse)  # type: ignore[arg-type]

    def full_maps(self) -> np.ndarray:
        """The maps at image size: (K, H, W) float32, bilinear with align_corners False."""
        return _resized(self.maps, self.size)

    def at_image_size(self) -> Cam:
        """The same CAMs with their maps at image size, as refiners take them."""
        return replace(self, maps=self.full_maps())

    def on_grid(self, size: tuple[int, int]) -> np.ndarray:
        """The maps on a grid of (h, w) cells: (K, h, w) float32. ``coarse`` if it has that size, else the maps resized,
        bilinear with align_corners False."""
        if self.coarse is not None and self.coarse.shape[1:] == tuple(size):
            return self.coarse
        return _resized(self.maps, size)


def _resized(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if maps.shape[1:] == tuple(size):
        return maps
    return resize_maps(torch.from_numpy(np.asarray(maps, np.float32)), size).numpy()


def otsu_threshold(maps: Iterable[np.ndarray], bins: int = 200) -> float:
    """Background score for CAMs, found without masks: the threshold in [0, 1] that splits the largest value of every
    pixel into two groups with the largest variance between them (Otsu, 1979), over all images together; every image
    counts the same.

    Args:
        maps: (K, h, w) of each image, in [0, 1]; images without a class (K = 0) are left out.
        bins: of the histogram.

    Raises ValueError where no image has a class.
    """
    total = np.zeros(bins)
    for one in maps:
        if len(one):
            counts, _ = np.histogram(one.max(axis=0), bins, (0.0, 1.0))
            total += counts / max(1, counts.sum())
    if not total.any():
        raise ValueError("no image has a class, so its CAMs give no background score")
    places = (np.arange(bins) + 0.5) / bins
    below = total.cumsum()[:-1] / total.sum()
    mean = (total * places).cumsum()[:-1] / total.sum()
    whole = (total * places).sum() / total.sum()
    spread = np.divide(
        (whole * below - mean) ** 2, below * (1 - below), out=np.zeros(bins - 1), where=(below > 0) & (below < 1)
    )
    best = np.flatnonzero(spread == spread.max())
    return float((best[0] + best[-1]) / 2 + 1) / bins
