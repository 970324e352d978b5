"""Pixel-adaptive refinement in place of an affinity network: class maps that follow the image's colours. Nothing is
trained. PAR as AReAM and WeCLIP have it (aream.md section 5, weclip.md section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch

from misc.checked import Range
from misc.image.cam import Cam
from misc.image.picture import Picture
from misc.propagate.par import PAR, PixelAdaptive
from net.contract import PlainRefiner, RefineSettings
from net.registry import refiner
from net.shared.background import BackgroundOptions


@refiner("par")
class ParRefiner(PlainRefiner):
    """Scores of background and classes after PAR."""

    def refine(self, picture: Picture, cam: Cam, options: ParOptions) -> np.ndarray:
        """The scores sum to a little more than those before it: the kernel's weights do (misc/propagate/par.py)."""
        scores = torch.from_numpy(options.stack(cam.maps)).to(picture.values.device)[None]  # (1, K + 1, H, W)
        return PixelAdaptive(picture.values[None], PAR)(scores, options.iterations)[0].cpu().numpy()


@dataclass(frozen=True)
class ParOptions(BackgroundOptions):
    """Background score and iterations."""

    iterations: Annotated[int, Range(least=0)] = 20
    """Times that every pixel is replaced by the mean of its likes around it. 0: none."""


@dataclass(frozen=True)
class ParRecipe(RefineSettings):
    """Refinement by averaging over pixels nearby that are alike in colour."""

    walk: ParOptions = field(default_factory=ParOptions)
    """Background score and iterations."""


ParRefiner.recipes = {
    "published": ParRecipe(),
    "sample": ParRecipe(ParOptions("constant", iterations=10)),
    "photos": ParRecipe(ParOptions("otsu")),
}
