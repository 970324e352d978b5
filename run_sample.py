"""The driver: one method, one data set, the numbered steps in order (see --help)."""

# ruff: noqa: E402
from __future__ import annotations

import os

# OpenMP reads this when PyTorch is loaded: threads that wait for each other sleep. Spinning, as they do otherwise,
# makes a training many times slower as soon as anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
import tyro

from misc import distributed
from misc.config import flatten
from misc.files.runfolder import OtherConfiguration, RunFolder
from misc.loop.each import EachFailed, WorkerDied
from misc.loop.fit import NonFiniteLoss, divide, resume_point
from net import registry, verify
from step import STEPS, Step, report, select
from step.lib.config import Config, Job, default_config, open_job
from voc12 import loader
from voc12.generated import sets

PROBLEMS = (ValueError, OSError, EachFailed, WorkerDied, loader.WorkerDied, NonFiniteLoss, OtherConfiguration)
"""Errors that tell the user what to do; anything else is a defect and shows its traceback."""


def parse(argv: Sequence[str]) -> Config:
    """The configuration that a command line asks for. METHOD, if given, comes first; --preset, --refiner and
    --segmenter decide which defaults the other flags have."""
    registry.load_methods()
    method = argv[0] if argv and not argv[0].startswith("-") else "seam"
    preset = _value(argv, "--preset") or "sample"
    base = default_config(method, preset, _value(argv, "--refiner"), _value(argv, "--segmenter"))
    if _value(argv, "--voc12-root") and not _value(argv, "--data"):
        base = dataclasses.replace(base, data="voc12")
    cfg = tyro.cli(Config, default=base, args=list(argv), description=_description(base), prog="run_sample.py")
    if cfg.method != method:
        raise ValueError(f"METHOD comes first: python run_sample.py {cfg.method} ...")
    return cfg


def _value(argv: Sequence[str], flag: str) -> str | None:
    for i, word in reversed(list(enumerate(argv))):  # the last one counts, as for tyro
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag and (equals or i + 1 < len(argv)):
            return value if equals else argv[i + 1]
    return None


def _description(base: Config) -> str:
    steps = "\n".join(
        f"  {i} {s.name}: {s.does}" + (" (data sets of boxes)" if s.aims == ("boxes",) else "")
        for i, s in enumerate(STEPS, 1)
    )
    return (
        "Semantic masks from image-level tags: trains a CAM network, refines its maps, trains a segmentation network, "
        f"step by step.\n\nSteps:\n{steps}\n\nAny method runs with any refiner and any segmenter:\n"
        f"  METHOD: {', '.join(sorted(registry.SEEDS))}\n"
        f"  --refiner: {', '.join(sorted(registry.REFINERS))}\n"
        f"  --segmenter: {', '.join(sorted(registry.SEGMENTERS))}, {registry.OWN} (the CAM network itself, of methods "
        "that can)\n\n"
        f"The defaults below are those of {base.method}, preset {base.preset}, refiner {base.refiner}, segmenter "
        f"{base.segmenter}.\n\nExamples:\n"
        "  python run_sample.py\n"
        "  python run_sample.py seam --preset published --data voc12 --root VOCdevkit/VOC2012 --cam.weights FILE ...\n"
        "  python run_sample.py seam --steps 5-7 --aff.walk.beta 10 --out runs/beta10\n"
        "  torchrun --nproc-per-node 2 run_sample.py seam ..."
    )


def check(job: Job, steps: Sequence[Step]) -> None:
    """Everything that can be known to fail before any work starts. Raises ValueError or FileNotFoundError."""
    cfg = job.cfg
    if cfg.shard_part()[1] > 1 and cfg.redo:
        raise ValueError("--redo with --shard would remove the files of the other parts too: call it once without.")
    names = {s.name for s in steps}
    phases = [("cam." if n == "cam" else f"cam.{n}.", p) for n, p in cfg.cam.phases()] if "train_cam" in names else []
    phases += [("aff.", cfg.aff)] if "train_aff" in names else []
    if "train_seg" in names:
        if job.single_stage:
            raise ValueError(
                "train_seg: with --segmenter own the CAM network predicts the masks, there is nothing else to train. "
                f"Name a segmenter: {', '.join(sorted(registry.SEGMENTERS))}."
            )
        phases += [("seg.", cfg.seg)]
    if job.single_stage and cfg.masks == "truth":
        raise ValueError("--masks truth: with --segmenter own nothing is trained on masks. Name a segmenter.")
    for prefix, phase in phases:
        divide(phase.fit, distributed.world())
        phase.start.check(f"--{prefix}weights", None if "train_cam" in names else job.run.weights("cam"))
    saliency = job.saliency_folder() if any(phase.network.wants_saliency for _, phase in phases) else None
    lists: dict[str, dict[str, Any]] = {
        job.train_list: {"need_masks": cfg.masks == "truth" and "train_seg" in names, "saliency": saliency}
    }
    scored = cfg.score_list != Config.score_list or job.catalog.has_list(cfg.score_list)
    if scored and {"make_cam", "random_walk"} & names:
        lists.setdefault(cfg.score_list, {})
    if "infer_seg" in names:
        lists.setdefault(cfg.val_list, {"need_tags": False})
    if "localise" in names:
        lists[cfg.val_list] = {"need_boxes": True}
    for split, needs in lists.items():
        for warning in job.catalog.check(split, **needs):
            distributed.say(f"Note ({split}): {warning}")


def verify_networks(job: Job, steps: Sequence[Step]) -> None:
    """A tiny batch through every network that the steps train: a slip in a method's file is told before work starts.

    Raises ValueError with the file and what is wrong.
    """
    names, classes, cfg = {s.name for s in steps}, job.catalog.num_classes, job.cfg
    if "train_cam" in names:
        verify.verify_seed(cfg.cam.phases(), classes)
    if "train_aff" in names:
        verify.verify_refiner(job.refine_method(), cfg.aff, classes)
    if "train_seg" in names:
        verify.verify_segmenter(cfg.seg, classes)


def remove(job: Job, steps: Sequence[Step]) -> None:
    """Remove what the named steps and all later ones made: later files rest on earlier ones."""
    first = min(STEPS.index(s) for s in steps)
    for step in STEPS[first:]:
        job.run.forget(step.name)
        for path in (job.run.root / made for made in step.makes):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
                resume_point(path).unlink(missing_ok=True)
    if first == 0:
        shutil.rmtree(job.run.root / "weights", ignore_errors=True)


def finished(job: Job, step: Step) -> bool:
    """Whether a step is recorded as done and all its files are there. To be called by all processes."""
    done = job.run.finished(step.name) and all(path.exists() for path in step.files(job))
    return all(distributed.joined([done]))  # one answer for all, and none goes on before all have looked


def without_steps(argv: Sequence[str]) -> list[str]:
    """A command line without its --steps and --redo."""
    kept: list[str] = []
    skipping = False
    for word in argv:
        if word.startswith("-"):
            skipping = word == "--steps"
        if not skipping and word != "--redo" and not word.startswith("--steps="):
            kept.append(word)
    return kept


def run(cfg: Config, device: torch.device, command: Sequence[str] = ("python", "run_sample.py")) -> None:
    """Run the steps of a configuration; ``command`` is what a hint at the next step repeats."""
    select(cfg.steps)  # what is no step is refused before anything is generated
    if cfg.data in sets.LAYOUTS and cfg.root is None and distributed.is_main():
        s, layout = cfg.sample, sets.LAYOUTS[cfg.data]
        sets.generate(cfg.data_root(), images=s.images, val=s.val, classes=s.classes, seed=s.seed, layout=layout)
    distributed.barrier()
    job = open_job(cfg)
    pipeline, steps = select((), job.aim), select(cfg.steps, job.aim)
    source = None if cfg.cams is None else RunFolder(cfg.cams)
    adopted = ("train_cam", "make_cam") if source else ()
    todo = [s for s in steps if s.name not in adopted and (cfg.redo or not finished(job, s))]
    check(job, todo)
    verify_networks(job, todo)
    names = [name for name in {job.train_list, cfg.score_list, cfg.val_list} if job.catalog.has_list(name)]
    lists = {name: job.catalog.fingerprint(name) for name in sorted(names)}
    if source:
        source.check_cams(cfg.recorded(), lists)
    job.run.begin(cfg.recorded(), flatten(cfg.machine), lists, cfg.force)
    if cfg.redo:
        distributed.barrier()
        if distributed.is_main():
            remove(job, steps)
        distributed.barrier()
    if source:
        if distributed.is_main():
            job.run.adopt_cams(source, [name for name, _ in cfg.cam.phases()])
        distributed.barrier()
    parts, partly, ran = cfg.shard_part()[1], False, False
    for step in steps:
        title = f"[{STEPS.index(step) + 1}/{len(STEPS)}] {step.name}"
        if finished(job, step) and not (step.name == "report" and (ran or not report.current(job))):
            distributed.say(f"{title}: done already (--redo does it again).")
            if step.name == "report":
                report.show(job)
            continue
        if partly and not step.per_image:
            distributed.say(f"\n{title}: needs all {parts} parts. When they are there, call without --shard.")
            return
        distributed.say(f"\n{title}: {step.does}")
        with job.run.step(step.name, done=parts == 1 or not step.per_image, makes=step.makes):
            step.run()(job, device)
        partly |= parts > 1 and step.per_image
        ran = True
        made = [job.run.root / m for m in step.makes]
        distributed.say(f"    files: {', '.join(str(path) for path in made if path.exists())}")
        if following := next((s for s in pipeline if STEPS.index(s) > STEPS.index(step)), None):
            distributed.say(f"    next: {shlex.join(command)} --steps {following.name}")


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""

    def work() -> None:
        cfg = parse(argv)
        run(cfg, distributed.start(cfg.machine.device), ["python", "run_sample.py", *without_steps(argv)])
        distributed.stop()

    return distributed.command(work, PROBLEMS, "start the same command again (without --redo) to go on.")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    distributed.end(main(sys.argv[1:]))
