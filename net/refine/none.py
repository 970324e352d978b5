"""No refinement: a pseudo mask is the arg-max over the background's score and the class maps. Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from misc.image.cam import Cam
from misc.image.picture import Picture
from net.contract import PlainRefiner, RefineSettings
from net.registry import refiner
from net.shared.background import BackgroundOptions


@dataclass(frozen=True)
class NoneRecipe(RefineSettings):
    """No refinement."""

    walk: BackgroundOptions = field(default_factory=BackgroundOptions)
    """The background's score."""


@refiner("none")
class NoRefiner(PlainRefiner):
    """Background score and class maps, side by side."""

    recipes = {"published": NoneRecipe(), "sample": NoneRecipe()}

    def refine(self, picture: Picture, cam: Cam, options: BackgroundOptions) -> np.ndarray:
        """The picture is not looked at."""
        return options.stack(cam.maps)
