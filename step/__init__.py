"""The steps of the pipeline, in order; each file has one ``run(job, device)``: files in, files out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Aim = Literal["masks", "plain_masks", "single_stage", "boxes"]
"""What a run makes: masks by a segmentation network (plain_masks: with pseudo masks of a refiner that is not trained),
masks by the CAM network itself, or boxes (Job.aim)."""
MASKS: tuple[Aim, ...] = ("masks", "plain_masks")
"""Runs that train a segmentation network."""


@dataclass(frozen=True)
class Step:
    """A step: its name (that of its file), what it does, the folders or files that it makes in the run folder, and all
    files that a job has when the step is done. ``needs``: names of the steps whose files it reads. Per-image steps can
    be done in parts. ``aims``: the runs that the step belongs to; other runs do it only if it is named."""

    name: str
    does: str
    makes: tuple[str, ...]
    files: Callable[[Any], Iterable[Path]]
    needs: tuple[str, ...] = ()
    per_image: bool = False
    aims: tuple[Aim, ...] = MASKS
    trains: str = ""
    """What is trained, as its section of the command line: cam, aff, seg; empty for other steps."""

    def tell(self, job: Any) -> str:
        """What the step does in a job: nothing is trained by a recipe of no updates, or with a released checkpoint."""
        recipe = getattr(job.cfg, self.trains) if self.trains else None
        phases = [phase for _, phase in recipe.needed_phases()] if self.trains == "cam" else [recipe]
        if recipe is None or any(getattr(phase, "is_trained", True) for phase in phases):
            return self.does
        if recipe.released:
            return "take the released checkpoint as it is: nothing is trained"
        if recipe.network.reads_class_texts:
            return "encode the classes' texts: nothing is trained"
        return "take the start weights as they are: nothing is trained"

    def run(self) -> Callable[[Any, Any], None]:
        """The step's function (imported when it is needed)."""
        return importlib.import_module(f"step.{self.name}").run


ALL: tuple[Aim, ...] = get_args(Aim)

STEPS: tuple[Step, ...] = (
    Step("train_cam", "train the CAM network from tags", ("weights/cam.pt",),
         lambda job: [job.run.weights(name) for name in job.cam_networks()], aims=ALL, trains="cam"),
    Step("make_cam", "infer the CAMs of the training images", ("cam", "cam_last"),
         lambda job: [*map(job.run.cam, job.cam_ids()), *job.further_files(job.run.cam, job.further_cam_ids())],
         needs=("train_cam",), per_image=True, aims=(*MASKS, "single_stage")),
    Step("make_aff_label", "make affinity labels from the CAMs", ("aff_label",),
         lambda job: map(job.run.aff_label, job.train_ids()), needs=("make_cam",), per_image=True, aims=("masks",)),
    Step("train_aff", "train the affinity network", ("weights/aff.pt",), lambda job: [job.run.weights("aff")],
         needs=("make_aff_label",), aims=("masks",), trains="aff"),
    Step("random_walk", "refine the CAMs, by a random walk or without one: pseudo masks",
         ("label", "label_overlay", "label_full", "instance"),
         lambda job: job.mask_files(job.run.label, job.cam_ids()), needs=("make_cam", "train_aff"), per_image=True),
    Step("train_seg", "train the segmentation network on the pseudo masks", ("weights/seg.pt",),
         lambda job: [job.run.weights("seg")], needs=("random_walk",), trains="seg"),
    Step("infer_seg", "predict the validation images", ("seg", "seg_before_crf", "seg_overlay", "seg_full"),
         lambda job: job.mask_files(job.run.seg, job.predicted_ids()), needs=("train_seg",), per_image=True,
         aims=(*MASKS, "single_stage")),
    Step("localise", "draw boxes round the objects of the validation images", ("box", "box_last", "box_loc_top1"),
         lambda job: [*map(job.run.box, job.catalog.ids(job.cfg.val_list)),
                      *job.further_files(job.run.box, job.catalog.ids(job.cfg.val_list))],
         needs=("train_cam",), per_image=True, aims=("boxes",)),
    Step("report", "write a page with scores and pictures", ("report.html", "pictures.png"),
         lambda job: [job.run.report], aims=ALL),
)  # fmt: skip


def select(wanted: Sequence[str], aim: Aim = "masks") -> list[Step]:
    """The steps given by numbers, names and ranges such as ``["2-4", "report"]``, in pipeline order. Empty: all steps
    of a run with this aim.

    Raises ValueError for an unknown step, listing the steps.
    """
    names = [s.name for s in STEPS]

    def number(text: str) -> int:
        if text in names:
            return names.index(text)
        if text.isdecimal() and 1 <= int(text) <= len(STEPS):
            return int(text) - 1
        listed = ", ".join(f"{i} {n}" for i, n in enumerate(names, 1))
        raise ValueError(f"--steps {text}: there is no such step. The steps are: {listed}.")

    chosen: set[int] = set()
    for part in wanted:
        first, dash, last = part.partition("-")
        if dash and number(first) > number(last):
            raise ValueError(f"--steps {part}: the range runs backwards.")
        chosen.update(range(number(first), number(last if dash else first) + 1))
    return [STEPS[i] for i in sorted(chosen)] if wanted else [s for s in STEPS if aim in s.aims]
