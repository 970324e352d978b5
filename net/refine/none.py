"""No refinement: a pseudo mask is the arg-max over the background's score and the class maps. Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from misc.image.cam import Cam
from misc.image.picture import Picture
from net.contract import PlainRefiner, RefineSettings
from net.registry import refiner
from net.shared.background import BackgroundOptions


@refiner("none")
class NoRefiner(PlainRefiner):
    """Background score and class maps, side by side."""

    def refine(self, picture: Picture, cam: Cam, options: BackgroundOptions) -> np.ndarray:
        """Scores (K + 1, H, W) of the background and the K maps as they are; the picture has no effect."""
        return options.stack(cam.maps)


@dataclass(frozen=True)
class NoneRecipe(RefineSettings):
    """Class maps as they are, beside the background's score."""

    walk: BackgroundOptions = field(default_factory=BackgroundOptions)
    """The background's score."""


NoRefiner.recipes = {
    "published": NoneRecipe(),
    "sample": NoneRecipe(),
    "photos": NoneRecipe(BackgroundOptions("otsu")),
}
