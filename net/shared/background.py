"""The background's score beside class maps: a power of (1 - largest map), or a constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from misc.checked import Checked, Range, When

BackgroundRule = Literal["power", "constant", "otsu"]
"""power: (1 - largest map)^alpha. constant: a threshold. otsu: the threshold that splits the CAMs best without any
mask, which the pipeline fills in (``misc.image.cam.otsu_threshold`` of the run's CAMs)."""


@dataclass(frozen=True)
class BackgroundOptions(Checked):
    """The background's score. Refiners that are not trained subclass it."""

    background: BackgroundRule = "power"
    """Background score. power: (1 - largest CAM)^alpha. constant: the threshold. otsu: one for all images that splits
    the values of the run's CAMs into two groups as well as can be (Otsu), found without any mask."""
    alpha: Annotated[float, Range(above=0), When("background", "power")] = 1.0
    """power: exponent of the background score."""
    threshold: Annotated[float | None, Range(least=0, most=1), When("background", "constant")] = 0.3
    """constant: the background score. None: the one that make_cam found best for the CAMs."""

    def stack(self, maps: np.ndarray) -> np.ndarray:
        """``stack_background`` by this rule; a threshold must have been set."""
        assert self.threshold is not None
        return stack_background(maps, self.background, self.alpha, self.threshold)


def stack_background(maps: np.ndarray, rule: BackgroundRule, alpha: float, threshold: float) -> np.ndarray:
    """Score stack of an image: background first, then its class maps.

    Args:
        maps: (K, H, W) in [0, 1], K >= 1.
        rule, alpha, threshold: power gives (1 - largest map)^alpha, constant gives the threshold everywhere.

    Returns:
        (K + 1, H, W) float32.
    """
    largest = maps.max(axis=0)
    background = (1 - largest) ** alpha if rule == "power" else np.full_like(largest, threshold)
    return np.concatenate([background[None], maps]).astype(np.float32)
