"""A method on generated sample sets of several seeds: ``python -m scripts.study METHOD [--seeds 0 1 2]``.

For each data seed: the whole pipeline, then the same segmentation network trained on the true masks from the same start
(the upper bound). Prints seed, walk and segmentation scores, and the fraction of the upper bound that training from
tags reaches.

``--cams`` trains the CAM network alone and prints a line of JSON for each seed; ``--cams --plain`` does it for the
plain class maps of the same network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from misc import commandline
from misc.files.runfolder import RunFolder
from misc.tables import ResultTable
from scripts import ROOT


@dataclass(frozen=True)
class Row:
    """Scores in percent mIoU, and seconds of the whole pipeline."""

    seed: int
    cam: float
    walk: float
    weak: float
    full: float
    seconds: float

    def cells(self) -> tuple[str, ...]:
        """The result as a row of the table."""
        scores = (f"{v:.2f}" for v in (self.cam, self.walk, self.walk - self.cam, self.weak, self.full))
        return (str(self.seed), *scores, f"{100 * self.weak / self.full:.1f} %", f"{self.seconds:.0f} s")


def drive(*flags: str) -> None:
    """Run the driver with flags. Its failure, which it has explained, ends the study with the same status."""
    status = subprocess.run([sys.executable, "run_sample.py", *flags], cwd=ROOT).returncode
    if status:
        sys.exit(status)


def study(method: str, seed: int, out: Path, flags: tuple[str, ...]) -> Row:
    """Run pipeline and upper bound on the sample set of one seed."""
    weak, full = RunFolder(out / f"{method}-{seed}"), RunFolder(out / f"{method}-{seed}-truth")
    common = [method, "--sample.seed", str(seed), *flags]
    drive(*common, "--run", str(weak.root))
    start = ["--seg.weights", str(weak.weights("cam"))] if weak.record()["config"]["seg.weights"] == "cam" else []
    drive(*common, "--run", str(full.root), "--masks", "truth", "--steps", "train_seg", "infer_seg", *start)
    scores = weak.scores()
    return Row(
        seed,
        scores["CAM"]["miou"],
        next(s["miou"] for name, s in scores.items() if name.startswith("pseudo masks")),
        next(s["miou"] for name, s in scores.items() if name.startswith("predictions")),
        next(s["miou"] for name, s in full.scores().items() if name.startswith("predictions")),
        sum(s["seconds"] for s in weak.record()["steps"].values()),
    )


PLAIN = {
    "transcam": "--cam.network.method convcam",
    "mctformer": "--cam.network.no-attention",
    "aream_mctformer": "--cam.network.pair-weight 0",
    "aream_conformer": "--cam.network.pair-weight 0",
    "toco": " ".join(f"--cam.network.{term}.weight 0" for term in ("ptc", "ctc", "seg", "reg")),
    "more": " ".join(f"--cam.network.{term}.weight 0" for term in ("mct", "ptc", "cle", "une", "seg", "reg")),
}
"""Flags of the plain class maps of a method's own network: trained by classification alone, read without attention."""


def study_cams(method: str, seed: int, out: Path, plain: bool, flags: tuple[str, ...]) -> str:
    """Train the CAM network on the sample set of one seed and score its maps: a line of JSON, with the minutes of both
    steps."""
    run = RunFolder(out / f"{method}-{seed}-cams{'-plain' * plain}")
    added = PLAIN[method].split() if plain else []
    drive(method, "--sample.seed", str(seed), "--run", str(run.root), "--steps", "1-2", *added, *flags)
    score, steps = run.scores()["CAM"], run.record()["steps"]
    told = {
        "method": method, "plain": plain, "seed": seed, "miou": round(score["miou"], 2),
        "threshold": score["threshold"], "minutes": round(sum(s["seconds"] for s in steps.values()) / 60, 2),
        "minutes_training": round(steps["train_cam"]["seconds"] / 60, 2), "flags": " ".join(flags),
    }  # fmt: skip
    return json.dumps(told)


def study_arguments(
    method: tyro.conf.Positional[str] = "seam",
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path = Path("runs/study"),
    cams: bool = False,
    plain: bool = False,
) -> tuple[str, tuple[int, ...], Path, bool, bool]:
    """Study a method on several generated sample sets. Flags that are not listed here go to run_sample.py.

    Args:
        method: Method, as for run_sample.py.
        seeds: Seeds of the generated sets.
        out: Folder for the run folders; a finished part is not run again.
        cams: Only train the CAM network and score its maps on the training images; prints a line of JSON for each
            seed: mIoU at the best background score, and minutes.
        plain: With --cams, the plain class maps of the same network, trained without the method's losses or read
            without its attention.
    """
    return method, seeds, out.resolve(), cams, plain


def main() -> None:
    """Command line."""
    found, flags = commandline.parse_options(study_arguments, prog="python -m scripts.study", return_unknown_args=True)
    method, seeds, out, cams, plain = found
    if plain and (not cams or method not in PLAIN):
        raise commandline.WrongCall(f"--plain needs --cams and one of {', '.join(PLAIN)}.")
    if cams:
        for seed in seeds:
            print(study_cams(method, seed, out, plain, tuple(flags)), flush=True)
        return
    rows = [study(method, seed, out, tuple(flags)) for seed in seeds]
    head = ("data seed", "CAM", "walk", "gain", "weak", "full", "weak/full", "time")
    print("\n" + ResultTable(head, [row.cells() for row in rows], numbers=range(len(head))).markdown())


if __name__ == "__main__":
    commandline.end(commandline.command(main, (ValueError, OSError)))
