"""The driver: runs one method on one data set, in nine steps. Each step is a file in step/:

  1 train_cam        train the CAM network from tags
  2 make_cam         infer the CAMs of the training images
  3 make_aff_label   make affinity labels from the CAMs
  4 train_aff        train the affinity network
  5 random_walk      spread the CAMs by a random walk: pseudo masks
  6 train_seg        train the segmentation network on the pseudo masks
  7 infer_seg        predict the validation images
  8 localise         draw boxes round the objects of the validation images (data sets of boxes; they need no 2 to 7)
  9 report           write a page with scores and pictures

A step reads the files of the steps before it in the run folder and writes its own (misc/files/runfolder.py).
``python run_sample.py --help`` lists methods and options.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

from misc import commandline

commandline.begin(__name__)

# OpenMP reads this when PyTorch is loaded: waiting threads sleep. By default they spin, which makes a training many
# times slower as soon as anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from step import STEPS
from step.lib import choices

if TYPE_CHECKING:
    import torch

    from step.plan import Plan


def run_plan(plan: Plan, device: torch.device, command: Sequence[str] = ("python", "run_sample.py")) -> None:
    """Run the steps of a plan; ``command`` is repeated in the hint at the next step."""
    for step in plan.listed:
        title = f"[{STEPS.index(step) + 1}/{len(STEPS)}] {step.name}"
        if reason := plan.reason_to_skip(step):
            plan.say(f"{title}: {reason}")
            continue
        if plan.waits(step):
            plan.say(f"\n{title}: needs all {plan.parts} parts. When they are finished, run it without --shard.")
            return
        plan.say(f"\n{title}: {step.tell(plan.job)}")
        with plan.recording(step, device):
            step.run()(plan.job, device)
        plan.say(f"    files: {', '.join(plan.files(step))}")
    if following := plan.following():
        plan.say(f"\nnext: {shlex.join(command)} --steps {following.name}")
    elif not plan.made:
        plan.show_scores()


def without_steps(argv: Sequence[str]) -> list[str]:
    """The command line without --steps and --redo."""
    kept: list[str] = []
    skipping = False
    for word in argv:
        if word.startswith("-"):
            skipping = word == "--steps"
        if not skipping and word != "--redo" and not word.startswith("--steps="):
            kept.append(word)
    return kept


def main(argv: Sequence[str]) -> int:
    """Command line. Returns the exit status: 2 if the call is refused before any work, 1 if the work failed."""
    # the first call after a change of the sources imports PyTorch here; libraries lose a KeyboardInterrupt then
    if commandline.wants_help(argv):
        return commandline.command(lambda: print(choices.help_text(argv)), interrupted=None)
    if wrong := commandline.command(lambda: choices.check_words(argv), interrupted=None):
        return wrong

    # these import PyTorch, which takes seconds
    from misc import distributed
    from step.lib import parsing
    from step.plan import PROBLEMS, open_plan

    opened: list[Plan] = []

    def interrupted() -> str:
        return opened[0].tell_interrupted() if opened else "no step was begun: start the same command again."

    def work() -> None:
        with commandline.before_work(PROBLEMS):
            if "--help-all" in argv:
                print(parsing.help_all(argv))
                return
            cfg = parsing.parse(argv)
            device = distributed.start(cfg.machine.device)
            for line in parsing.tell_preset(cfg):
                distributed.say(line)
            opened.append(open_plan(cfg))
        run_plan(opened[0], device, ["python", "run_sample.py", *without_steps(argv)])
        distributed.stop()

    return commandline.command(work, PROBLEMS, interrupted)


if __name__ == "__main__":
    commandline.end(main(sys.argv[1:]))
