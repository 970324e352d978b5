"""Planning of a call of run_sample.py: which steps are done, apply and come next, and checks before work starts."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from misc import distributed
from misc.config import flatten
from misc.files.runfolder import OtherConfiguration, RunFolder
from misc.loop.each import EachFailed, WorkerDied
from misc.loop.fit import NonFiniteLoss, OutOfMemory, divide
from misc.loop.kept import resume_point
from net import registry, verify
from net.contract import Phase
from step import STEPS, Step, report, select, train_cam
from step.lib.config import Config, Job, open_job
from step.lib.image_check import check_images, keep_checked
from step.lib.inference import rests_on_all_cams
from step.lib.networks import try_weights
from step.lib.sizes import make_copies
from voc12 import loader
from voc12.generated import sets

PROBLEMS = (
    ValueError, OSError, EachFailed, WorkerDied, loader.WorkerDied, NonFiniteLoss, OutOfMemory, OtherConfiguration
)
"""Errors that tell the user what to do, printed without a traceback. Any other exception is a bug."""


@dataclass
class Plan:
    """The steps of one call; the run folder is open and ready."""

    job: Job
    listed: list[Step]
    """Steps to report: the named ones, or all nine."""
    steps: list[Step]
    """Steps to run: the named ones, or all that apply."""
    made: list[Step] = field(default_factory=list)
    """Steps that this call has finished so far."""

    @property
    def parts(self) -> int:
        """Number of parts that the images are split into (--shard)."""
        return self.job.cfg.shard_part()[1]

    def reason_to_skip(self, step: Step) -> str | None:
        """Why a step is skipped; None if it is to run. All processes must call it."""
        if step not in self.steps:
            return not_applying(step, self.job)
        if not finished(self.job, step):
            return None
        outdated = step.name == "report" and (self.made or not report.current(self.job))
        return None if outdated else "done already (--redo does it again)."

    def waits(self, step: Step) -> bool:
        """Whether a step must wait for the parts of the images in other jobs."""
        whole = not step.per_image or (step.name == "random_walk" and rests_on_all_cams(self.job.cfg.aff.walk))
        return self.parts > 1 and whole and any(made.per_image for made in self.made)

    def recording(self, step: Step, device: torch.device) -> AbstractContextManager[None]:
        """Record in run.json that a step is done, with its time and memory, the device and the precision there."""
        self.made.append(step)
        cfg = self.job.cfg
        recipe = {"aff": cfg.aff, "walk": cfg.aff, "seg": cfg.seg}.get(step.name.rpartition("_")[2], cfg.cam)
        machine = self.job.machine(recipe, device)
        layout = ", channels last" if machine.uses_channels_last(device) else ""
        made_on = {"device": distributed.device_name(device), "precision": machine.precision(device) + layout}
        done = self.parts == 1 or not step.per_image
        return self.job.run.step(step.name, done=done, makes=step.makes, made_on=made_on)

    def tell_interrupted(self) -> str:
        """What is kept of an interrupted call, and how to go on. One process may call it alone."""
        if not self.made:
            return "no step was begun: start the same command again."
        step, run = self.made[-1], self.job.run
        going_on = "start the same command again (without --redo)"
        if run.finished(step.name):
            return f"{going_on} to continue with the next step."
        if step.per_image:
            return f"{going_on} to continue {step.name}; images that are finished are kept."
        left = [name for name in _phases(self.job, {step.name}) if not run.weights(name).exists()]
        if not left or resume_point(run.weights(left[0])).exists():
            return f"{going_on} to continue {step.name}" + (" from its last resume point." if left else ".")
        kept = "what was finished before is kept"
        return f"the training {left[0]} has no resume point yet and begins anew, {kept}: {going_on}."

    def files(self, step: Step) -> list[str]:
        """The existing files and folders that a step has made."""
        made = (self.job.run.root / name for name in step.makes)
        return [str(path) for path in made if path.exists()]

    @staticmethod
    def say(text: str) -> None:
        """Print from the main process only."""
        distributed.say(text)

    def show_scores(self) -> None:
        """Print the scores of a run whose report was made earlier."""
        if self.job.run.report.exists():
            report.show(self.job)

    def following(self) -> Step | None:
        """The first unfinished step after the named ones; None at the pipeline's end. All processes must call it."""
        later = STEPS[STEPS.index(self.steps[-1]) + 1 :]
        own = select((), self.job.aim)
        return next((s for s in later if s in own and not finished(self.job, s)), None)


def open_plan(cfg: Config) -> Plan:
    """Generate the sample set, check everything that can fail, and open the run folder.

    Raises ValueError, OSError or OtherConfiguration, before any work is done or anything is removed.
    """
    select(cfg.steps)  # unknown steps are refused before anything is generated
    if cfg.data in sets.LAYOUTS and cfg.root is None and distributed.is_main():
        s, layout = cfg.sample, sets.LAYOUTS[cfg.data]
        sets.generate(cfg.data_root(), images=s.images, val=s.val, classes=s.classes, seed=s.seed, layout=layout)
    distributed.barrier()
    job = open_job(cfg)
    used = [i for name in _lists(job) for i in job.catalog.ids(name)]
    make_copies(job, dict.fromkeys(used))
    listed = select(cfg.steps, job.aim)
    steps = [step for step in listed if not _is_for_trained_refiners(step) or job.refine_method().is_trained]
    if not steps:
        raise ValueError(f"{listed[0].name}: {not_applying(listed[0], job)}")
    if isinstance(cfg.aff, Phase) and cfg.aff.released and not cfg.steps:
        steps = [s for s in steps if s.name != "make_aff_label"]
    source = None if cfg.cams is None else RunFolder(cfg.cams)
    adopted = ("train_cam", "make_cam") if source else ()
    todo = [s for s in steps if s.name not in adopted and (cfg.redo or not finished(job, s))]
    read = check_inputs(job, todo)
    check_needs(job, todo, adopted)
    whole = check_images(job, read)
    verify_networks(job, todo)
    check_start(job, todo)
    lists: dict[str, Any] = {name: job.catalog.fingerprint(name) for name in _lists(job)}
    if cfg.cam.network.reads_class_texts and job.texts():
        lists["texts"] = job.texts()  # a changed texts.csv is another run
    if source:
        source.check_cams(cfg.recorded(), lists)
        _check_listed(job, source)
    changed = job.run.begin(
        cfg.recorded(), flatten(cfg.machine), lists, cfg.force, job.catalog.root, _free_settings(job),
        shared=cfg.shard_part()[1] > 1,
    )
    keep_checked(job.run, whole)
    if changed:
        _remove_unfinished(job)
    if cfg.redo:
        distributed.barrier()
        if distributed.is_main():
            remove(job, steps)
        distributed.barrier()
    if source:
        if distributed.is_main():
            job.run.adopt_cams(source, job.cam_networks())
        distributed.barrier()
    return Plan(job, listed if cfg.steps else list(STEPS), steps)


def _lists(job: Job) -> list[str]:
    """The lists that a run uses and its data set has."""
    names = {job.train_list, job.cfg.score_list, job.cfg.val_list}
    return sorted(name for name in names if job.catalog.has_list(name))


_LATER = {
    "random_walk": ("make_aff_label", "train_aff", "random_walk"),
    "infer_seg": ("train_seg", "infer_seg"),
}
"""Last step that a group of settings is for -> all of its steps."""


def _free_settings(job: Job) -> list[str]:
    """Beginnings of names of settings with which nothing was made yet in the run folder: all of them where no step has
    left a file, as after a start that found no weights; else those of the segmentation network where its steps have
    left no file, then those of the refiner."""
    if job.cfg.shard_part()[1] == 1 and not any(_has_left_files(job, step) for step in STEPS):
        return [""]
    free: list[str] = []
    groups = (("infer_seg", ("seg.", "segmenter", "masks", "val_list")), ("random_walk", ("aff.", "refiner")))
    for last, settings in groups:
        if any(_has_left_files(job, step) for step in STEPS if step.name in _LATER[last]):
            break
        free += settings
    return [] if job.single_stage else free


def _has_left_files(job: Job, step: Step) -> bool:
    """Whether a step is recorded, or has left anything, also half a training."""
    made = [job.run.root / name for name in step.makes]
    return step.name in job.run.record().get("steps", {}) or any(
        path.exists() or resume_point(path).exists() for path in made
    )


def _remove_unfinished(job: Job) -> None:
    """Remove images' files that unfinished steps have left in a run folder whose configuration is overwritten
    (--force): they were made with the other one, and would be taken for this one's. (A resume point knows its settings:
    a training that would go on with others is refused.)"""
    distributed.barrier()
    if distributed.is_main():
        left = [s for s in STEPS if s.per_image and not job.run.finished(s.name) and _has_left_files(job, s)]
        for step in left:
            _remove_files(job, step)
        if left:
            distributed.say(f"Removed what {', '.join(s.name for s in left)} had begun with the other settings.")
    distributed.barrier()


def _check_listed(job: Job, source: RunFolder) -> None:
    """Raises FileNotFoundError if a run has no CAMs of some images of this one's list."""
    missing = [i for i in job.cam_ids() if not source.cam(i).exists()]
    if missing:
        raise FileNotFoundError(
            f"--cams {source.root}: it has no CAMs of {len(missing)} images of this run's list, such as {missing[0]}. "
            "Give a run over a list that contains this one's."
        )


def _is_for_trained_refiners(step: Step) -> bool:
    """Whether a step makes labels for the refiner's training, or is that training."""
    return step.aims == ("masks",)


def not_applying(step: Step, job: Job) -> str | None:
    """Why a step does not apply to this run; None if it does, or if it is optional."""
    if _is_for_trained_refiners(step) and not job.refine_method().is_trained:
        return f"does not apply: the refiner {job.cfg.refiner} is not trained."
    if job.aim in step.aims:
        if step.name == "make_aff_label" and isinstance(job.cfg.aff, Phase) and job.cfg.aff.released:
            return "does not apply: the affinity network is a released one, so no labels are needed."
        return None
    if job.aim == "boxes":
        return f"does not apply: {job.cfg.data} has boxes to find, not masks."
    if step.aims == ("boxes",):
        return f"does not apply: {job.cfg.data} has no boxes to find."
    return f"does not apply: {job.cfg.method} predicts the masks itself (--segmenter own)."


def check_inputs(job: Job, steps: Sequence[Step]) -> list[str]:
    """Check settings, and that the files exist that are read, before work starts.

    Returns the ids of all images that the steps read, where one of them is a training: it would meet a damaged one
    late. (Steps of single images tell it and go on.) Raises ValueError or FileNotFoundError.
    """
    cfg = job.cfg
    if cfg.shard_part()[1] > 1 and cfg.redo:
        raise ValueError("--redo with --shard would also remove the other parts: run --redo once without --shard.")
    names = {s.name for s in steps}
    phases = _phases(job, names)
    _check_published_list(job, names, phases)
    if "train_seg" in names and job.single_stage:
        raise ValueError(
            "train_seg: with --segmenter own the CAM network predicts the masks, so nothing else is trained. "
            f"Name a segmenter: {', '.join(sorted(registry.SEGMENTERS))}."
        )
    if job.single_stage and cfg.masks == "truth":
        raise ValueError("--masks truth: with --segmenter own nothing is trained on masks. Name a segmenter.")
    for name, phase in phases.items():
        if phase.released:
            for file in phase.released_files:
                if not Path(file).is_file():
                    raise FileNotFoundError(f"--{_section(name)}.released {file}: there is no such file.")
            continue
        if phase.fit.steps != 0:
            divide(phase.fit, distributed.world())
        cam = (job.run if cfg.cams is None else RunFolder(cfg.cams)).weights("cam")
        phase.start.check(f"--{_section(name)}.weights", None if "train_cam" in names else cam)
    if "train_cam" in names:
        train_cam.check_selection(job)
    wants_saliency = any(phase.network.wants_saliency and not phase.released for phase in phases.values())
    saliency = job.saliency_folder() if wants_saliency else None
    lists: dict[str, dict[str, Any]] = {
        job.train_list: {"need_masks": cfg.masks == "truth" and "train_seg" in names, "saliency": saliency}
    }
    scored = cfg.score_list != Config.score_list or job.catalog.has_list(cfg.score_list)
    if scored and {"make_cam", "random_walk"} & names:
        lists.setdefault(cfg.score_list, {})
    if "random_walk" in names and job.refine_method().wants_segments:
        for split in {job.train_list, *([cfg.score_list] if scored else [])}:
            lists.setdefault(split, {})["segments"] = job.segments_folder()
    if "infer_seg" in names:
        lists.setdefault(cfg.val_list, {"need_tags": False})
    if "localise" in names:
        lists[cfg.val_list] = {"need_boxes": True}
    for split, needs in lists.items():
        for warning in job.catalog.check(split, **needs):
            distributed.say(f"Note ({split}): {warning}")
    trains = any(phase.is_trained for phase in phases.values())
    return list(dict.fromkeys(i for split in lists for i in job.catalog.ids(split))) if trains else []


def _check_published_list(job: Job, names: set[str], phases: Mapping[str, Phase]) -> None:
    """Raises ValueError if a published recipe would go through VOC's small list train unasked. Networks that are used
    as released, and predictions, need no training list."""
    cfg = job.cfg
    trains = any(phase.is_trained for phase in phases.values())
    if not (trains or names & {"make_cam", "make_aff_label", "random_walk"}):
        return
    asked = cfg.train_list is not None or cfg.data != "voc12" or not cfg.preset.startswith("published")
    if asked or job.catalog.has_list("train_aug"):
        return
    raise ValueError(
        f"The recipe {cfg.preset} on voc12 is for the list train_aug (VOC's train and SBD: 10,582 images), and there "
        f"is none in {job.catalog.root}. Make it: python -m voc12.prepare voc12 --root {job.catalog.root} --sbd DIR "
        "(or --sbd-lists DIR, which makes the list without SBD's masks). To use fewer images say so: --train-list "
        "train (1,464 images in VOC; expect scores below the published ones)."
    )


def _phases(job: Job, names: Collection[str]) -> dict[str, Phase]:
    """What the steps of these names train or adopt, by the names of the weights files."""
    phases = dict(job.cfg.cam.needed_phases()) if "train_cam" in names else {}
    for part, phase in (("aff", job.cfg.aff), ("seg", job.cfg.seg)):
        if f"train_{part}" in names and isinstance(phase, Phase):
            phases[part] = phase
    return phases


def _section(name: str) -> str:
    """Beginning of a phase's options, by the name of its weights file."""
    return name if name in ("cam", "aff", "seg") else f"cam.{name}"


def check_start(job: Job, steps: Sequence[Step]) -> None:
    """Load what the trainings of these steps start from or adopt (step.lib.networks.try_weights), so that weights that
    are damaged, do not fit or can't be fetched are told now and not when their step begins.

    Raises ValueError with the option and the cause.
    """
    for name, phase in _phases(job, {s.name for s in steps}).items():
        if job.cfg.redo or not job.run.weights(name).exists():
            option = "released" if phase.released else "weights"
            try:
                try_weights(job, name, phase)
            except (ValueError, OSError) as error:
                raise ValueError(f"--{_section(name)}.{option}: {error}") from error


def needed(step: Step, job: Job) -> list[Step]:
    """The steps whose files a step reads in this run."""
    names = step.needs
    if step.name == "infer_seg" and job.single_stage:
        names = ("train_cam",)
    if step.name == "localise" and job.aim != "boxes":
        names = ()  # the step says why it can't run
    released = {"train_aff": job.cfg.aff, "train_seg": job.cfg.seg}.get(step.name)
    if (step.name == "train_seg" and job.cfg.masks == "truth") or getattr(released, "released", ""):
        names = ()
    found = [s for s in STEPS if s.name in names]
    return [s for s in found if not _is_for_trained_refiners(s) or job.refine_method().is_trained]


def check_needs(job: Job, steps: Sequence[Step], adopted: Sequence[str] = ()) -> None:
    """Raises FileNotFoundError if a step needs files of another one that is not to run, and there are none; those of
    the steps ``adopted`` come from another run.

    Single missing files are reported by the step, with their images.
    """

    def missing(step: Step) -> list[Step]:
        others = [s for s in needed(step, job) if s not in steps and s.name not in adopted]
        return [s for s in others if not any(path.exists() for path in s.files(job))]

    for step in steps:
        if not missing(step):
            continue
        first = missing(step)[0]
        while earlier := missing(first):
            first = earlier[0]
        lacking = " and ".join(s.name for s in missing(step))
        raise FileNotFoundError(
            f"{step.name} needs the files of {lacking}, and there are none in {job.run.root}. Run the missing steps "
            f"too: --steps {first.name}-{steps[-1].name}, or all unfinished ones: leave --steps out."
        )


def verify_networks(job: Job, steps: Sequence[Step]) -> None:
    """Run a tiny batch through every network that the steps train, to find mistakes in a method's file before work
    starts.

    Raises ValueError with the file and the mistake.
    """
    names, classes, cfg = {s.name for s in steps}, job.catalog.num_classes, job.cfg
    if "train_cam" in names and not cfg.cam.released:
        verify.verify_seed(cfg.cam.phases(), classes)
    trained = job.refine_method().is_trained
    if ("train_aff" in names and not cfg.aff.released) if trained else "random_walk" in names:
        verify.verify_refiner(job.refine_method(), cfg.aff, classes)
    if "train_seg" in names and not cfg.seg.released:
        verify.verify_segmenter(cfg.seg, classes)


def remove(job: Job, steps: Sequence[Step]) -> None:
    """Remove the files of the named steps and all later ones, which depend on them."""
    first = min(STEPS.index(s) for s in steps)
    for step in STEPS[first:]:
        job.run.forget(step.name)
        _remove_files(job, step)
    if first == 0:
        shutil.rmtree(job.run.root / "weights", ignore_errors=True)


def _remove_files(job: Job, step: Step) -> None:
    for path in (job.run.root / made for made in step.makes):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
            resume_point(path).unlink(missing_ok=True)


def finished(job: Job, step: Step) -> bool:
    """Whether a step is recorded as done and all its files exist. All processes must call it."""
    done = job.run.finished(step.name) and all(path.exists() for path in step.files(job))
    return all(distributed.joined([done]))  # the main process decides for all
