"""Curves of the trainings, from the TensorBoard files of the run folder."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from misc.loop.terms import IMAGES_PER_SECOND, LEARNING_RATE, RATING

_POINTS = 150
"""Points of a curve on the page: longer ones are averaged over blocks of updates."""


@dataclass(frozen=True)
class TrainingCurve:
    """One logged value of a training over its updates."""

    training: str
    """Name of the training, such as cam."""
    term: str
    """Loss term, or one of ``misc.loop.terms``; a rating with the name of what epochs are selected by."""
    updates: list[float]
    values: list[float]

    @property
    def is_rating(self) -> bool:
        """Whether epochs are selected by it."""
        return self.term.startswith(RATING)

    @property
    def is_loss(self) -> bool:
        """Whether it is a loss term."""
        return not self.is_rating and self.term not in (LEARNING_RATE, IMAGES_PER_SECOND)


def read_curves(log: Path) -> list[TrainingCurve]:
    """All curves below a TensorBoard folder, by training and term in the order of their names; none without a log."""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for folder in sorted(path for path in log.glob("*") if path.is_dir()):
        for tag, points in _read_scalars(folder).items():
            training, _, term = tag.partition("/")
            found[training, term].update(points)
    return [_shortened(*name, points) for name, points in found.items()]


def _read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> update -> value of the event files in a folder."""
    # imported here: it takes a second, and a page without a log needs none of it
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})  # 0: all of them
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def _shortened(training: str, term: str, points: dict[int, float]) -> TrainingCurve:
    updates = np.array(sorted(points), float)
    values = np.array([points[int(u)] for u in updates], float)
    size = -(-len(updates) // _POINTS)  # equal blocks, so that a curve is equally smooth everywhere
    blocks = [slice(begin, begin + size) for begin in range(0, len(updates), size)]
    return TrainingCurve(
        training, term, [float(updates[b].mean()) for b in blocks], [float(values[b].mean()) for b in blocks]
    )
