"""A dense CRF in place of an affinity network: the posterior of background and class maps. Nothing is trained.

The settings are those that CLIP-ES makes its pseudo masks with. Its segmentation network leaves out the pixels that the
CRF is not sure of: ``ignore_below`` is 0.95 there (clipes.md section 6).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from misc.crf.dense import CRFSettings, DenseCRF
from misc.image.cam import Cam
from misc.image.picture import Picture
from net.contract import PlainRefiner, RefineSettings
from net.registry import refiner
from net.shared.background import BackgroundOptions


@refiner("crf")
class CrfRefiner(PlainRefiner):
    """Posterior of the CRF."""

    def refine(self, picture: Picture, cam: Cam, options: CrfOptions) -> np.ndarray:
        """The scores sum to one."""
        scores = options.stack(cam.maps)
        crf = DenseCRF(picture.rgb, options.crf, picture.values.device)
        return crf(scores) if options.unary == "scores" else crf.from_labels(scores.argmax(axis=0), len(scores))


@dataclass(frozen=True)
class CrfOptions(BackgroundOptions):
    """Background score and CRF."""

    unary: Literal["scores", "labels"] = "scores"
    """Input of the CRF. labels: the arg-max, with confidence 0.7."""
    crf: CRFSettings = field(default_factory=lambda: _CRF)
    """The CRF over background and present classes."""


@dataclass(frozen=True)
class CrfRecipe(RefineSettings):
    """A dense CRF."""

    walk: CrfOptions = field(default_factory=CrfOptions)
    """Background score and CRF."""


_CRF = CRFSettings(
    iterations=10, gauss_sxy=1, gauss_weight=3, bilateral_sxy=67, bilateral_srgb=3, bilateral_weight=4
)

CrfRefiner.recipes = {
    "published": CrfRecipe(),
    # a background that pictures of small objects need, and colours that lie farther apart
    "sample": CrfRecipe(CrfOptions("constant", crf=CRFSettings(iterations=5, bilateral_sxy=32))),
    "photos": CrfRecipe(
        CrfOptions("otsu", unary="labels", crf=CRFSettings(iterations=5, bilateral_sxy=50, bilateral_srgb=5))
    ),
}
