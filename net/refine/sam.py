"""Class-agnostic segments, such as SAM's, choose their classes by vote. Nothing is trained. The rule is this project's
own, after the published idea of voting.

The maps' label L (arg-max over the background's score and the maps, if asked for after a CRF) names a class, the
segments name borders. Of every segment S the class c of the most pixels that are not background is looked at. S takes c

    where more than half of S is c (segment_share 0.5),   or
    where S holds most of c's pixels (class_share 0.85), and c is at least a tenth of S (least 0.1).

The second says that a class map sees only the strongest part of an object; its tenth keeps a segment that is the whole
image from taking the class of a small object in it. "Most" is 85 % and not half: by this condition S, up to ten times
as large as what the map shows, becomes c as a whole, so nearly all of the map has to speak for S. At half, a segment of
the surroundings that cuts through the map would take the class too. Neither value was tried with real segments of SAM.

Segments that took a class are laid over L, the largest first, so that of nested ones the smallest counts. All other
pixels keep L.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np

from misc.checked import Range
from misc.crf.dense import CRFSettings, DenseCRF
from misc.image.cam import Cam
from misc.image.picture import Picture
from misc.image.segments import Segments
from net.contract import PlainRefiner, RefineSettings
from net.registry import refiner
from net.shared.background import BackgroundOptions

_Share = Annotated[float, Range(least=0, most=1)]


@refiner("sam")
class SamRefiner(PlainRefiner):
    """Votes of segments over the label of background and class maps."""

    wants_segments = True

    def refine(self, picture: Picture, cam: Cam, options: SamOptions) -> np.ndarray:
        """1 for the class that a segment took, 0 for the others; elsewhere the scores that the label came from."""
        if picture.segments is None:
            raise ValueError("The refiner sam needs the segments of the image (--segments DIR).")
        scores = options.stack(cam.maps)
        if options.crf.iterations:
            scores = DenseCRF(picture.rgb, options.crf, picture.values.device)(scores)
        voted = vote(scores.argmax(0), picture.segments, len(scores), options)
        taken = voted > 0
        return np.where(taken, voted == np.arange(len(scores))[:, None, None], scores).astype(np.float32)


def vote(label: np.ndarray, segments: Segments, labels: int, options: SamOptions) -> np.ndarray:
    """The classes that segments take.

    Args:
        label: (H, W) of 0 (background) to ``labels`` - 1.
        segments: of the same size.
        labels: number of labels, background included.
        options: the shares of the rule.

    Returns:
        (H, W) int64: the label that a segment took there, 0 where none did.
    """
    totals = np.bincount(label.ravel(), minlength=labels)
    took: list[tuple[int, int, int]] = []
    for number in range(len(segments)):
        inside = np.bincount(label[segments.mask(number)], minlength=labels)
        area = int(inside.sum())
        if labels < 2 or not inside[1:].any():
            continue
        best = 1 + int(inside[1:].argmax())
        most_of_class = inside[best] > options.class_share * totals[best] and inside[best] >= options.least * area
        if inside[best] > options.segment_share * area or most_of_class:
            took.append((-area, number, best))
    voted = np.zeros(label.shape, np.int64)
    for _, number, best in sorted(took):
        voted[segments.mask(number)] = best
    return voted


@dataclass(frozen=True)
class SamOptions(BackgroundOptions):
    """Background score, CRF, and how much of a segment or of a class a vote takes."""

    crf: CRFSettings = field(default_factory=lambda: CRFSettings(iterations=0))
    """CRF over background and present classes before the vote. 0 iterations: none."""
    segment_share: _Share = 0.5
    """A segment takes the class that covers more than this fraction of it."""
    class_share: _Share = 0.85
    """A segment also takes a class if it holds more than this fraction of the class's pixels in the image, and they
    cover at least ``least`` of the segment. 0.5: more than half of them; 1: this condition is off."""
    least: _Share = 0.1
    """Smallest fraction of a segment that a class must cover to take it by ``class_share``."""


@dataclass(frozen=True)
class SamRecipe(RefineSettings):
    """Votes of segments."""

    walk: SamOptions = field(default_factory=SamOptions)
    """Background score, CRF, shares."""


SamRefiner.recipes = {"published": SamRecipe(), "sample": SamRecipe(SamOptions("constant"))}
