"""The steps of the pipeline, in order; each file has one ``run(job, device)``: files in, files out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """A step: its name (that of its file), what it does, and the folders or files of the run folder that it makes."""

    name: str
    does: str
    makes: tuple[str, ...]

    def run(self) -> Callable[[Any, Any], None]:
        """The step's function (imported when it is needed)."""
        return importlib.import_module(f"step.{self.name}").run


STEPS: tuple[Step, ...] = (
    Step("train_cam", "train the CAM network from tags", ("weights/cam.pt",)),
    Step("make_cam", "infer the CAMs of the training images", ("cam",)),
    Step("make_aff_label", "make affinity labels from the CAMs", ("aff_label",)),
    Step("train_aff", "train the affinity network", ("weights/aff.pt",)),
    Step("random_walk", "spread the CAMs by a random walk: pseudo masks", ("label",)),
    Step("train_seg", "train the segmentation network on the pseudo masks", ("weights/seg.pt",)),
    Step("infer_seg", "predict the validation images", ("seg",)),
    Step("report", "write the page that shows it all", ("report.html",)),
)


def select(wanted: Sequence[str]) -> list[Step]:
    """The steps that numbers, names and ranges name, in pipeline order: ``["2-4", "report"]``. Nothing: all.

    Raises ValueError for what is no step, listing the steps.
    """
    names = [s.name for s in STEPS]

    def number(text: str) -> int:
        if text in names:
            return names.index(text)
        if text.isdigit() and 1 <= int(text) <= len(STEPS):
            return int(text) - 1
        listed = ", ".join(f"{i} {n}" for i, n in enumerate(names, 1))
        raise ValueError(f"--steps {text}: there is no such step. The steps are: {listed}.")

    chosen: set[int] = set()
    for part in wanted:
        first, dash, last = part.partition("-")
        if dash and number(first) > number(last):
            raise ValueError(f"--steps {part}: the range runs backwards.")
        chosen.update(range(number(first), number(last if dash else first) + 1))
    return [STEPS[i] for i in sorted(chosen)] if wanted else list(STEPS)
