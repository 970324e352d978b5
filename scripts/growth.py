"""How time and memory of every per-image step grow with the number of images: ``python -m scripts.growth``.

Runs a method's sample recipe, at one scale and with hardly any training, on growing parts of a generated set of small
pictures: in one process of one thread, in one that forks several of one thread each (``--workers``), and in several by
torchrun. Prints milliseconds an image and, on Linux, the largest memory of all processes of a step together: neither
should depend on the number of images. A page that several processes share is divided among them (PSS), also among those
of other programs: leave no other PyTorch program running beside it. For methods whose sample recipe trains a refiner
and a segmentation network, on images at scales; flags behind ``--`` go to run_sample.py.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from misc import commandline, distributed
from misc.checked import Checked, Range
from misc.files.runfolder import RunFolder
from misc.tables import ResultTable
from scripts import ROOT, options_with_flags
from scripts.hostile.children import children_of
from step import STEPS
from voc12.generated.sets import generate

LITTLE_WORK = "--cam.fit.steps 2 --aff.fit.steps 2 --seg.fit.steps 2 --cam.infer.scales 1 --seg.infer.scales 1".split()
"""Hardly any training, and maps at one scale: growth is what is looked for."""
DRAWN = "pictures"
EVERY = 0.25  # seconds between two looks at the memory


@dataclass(frozen=True)
class GrowthOptions(Checked):
    """What is run."""

    method: Annotated[str, tyro.conf.Positional] = "irn_cam"
    """CAM method."""
    images: Annotated[tuple[int, ...], Range(least=2, filled=True)] = (100, 1000)
    """Numbers of training images; as many again are predicted."""
    workers: Annotated[tuple[int, ...], Range(least=1, filled=True)] = (1, 2)
    """--machine.workers: on a CPU the processes that compute images."""
    processes: Annotated[tuple[int, ...], Range(least=1, filled=True)] = (1,)
    """Processes of torchrun."""
    long_side: Annotated[tuple[int, int], Range(least=64)] = (64, 80)
    """Least and greatest long side of a picture, pixels."""
    flags: tyro.conf.Suppress[tuple[str, ...]] = ()
    """More flags for run_sample.py: given behind --."""


@dataclass(frozen=True)
class GrowthRun:
    """One run of all steps: how many images, worker processes and processes of torchrun."""

    images: int
    workers: int
    processes: int

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{self.images}-images-{self.workers}-workers-{self.processes}-processes"

    def command(self, method: str, root: Path) -> list[str]:
        """The driver's command line but for --steps and --out."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        return [
            sys.executable, *(launcher if self.processes > 1 else []), str(ROOT / "run_sample.py"), method,
            "--preset", "sample", "--data", "voc12", "--root", str(root), "--train-list", f"train_{self.images}",
            "--score-list", f"train_{self.images}", "--val-list", f"val_{self.images}",
            "--machine.workers", str(self.workers), *LITTLE_WORK,
        ]  # fmt: skip


def write_pictures(root: Path, images: Sequence[int], long_side: tuple[int, int]) -> None:
    """Write the largest set, and lists of its first images for every number."""
    generate(root, images=max(images), val=max(images), long_side=long_side)
    lists = root / "ImageSets" / "Segmentation"
    for name in ("train", "val"):
        ids = (lists / f"{name}.txt").read_text().splitlines()
        for number in images:
            (lists / f"{name}_{number}.txt").write_text("\n".join(ids[:number]) + "\n")


def process_tree(pid: int) -> Iterator[int]:
    """A process and all below it (Linux)."""
    yield pid
    for child in children_of(pid):
        yield from process_tree(child)


def memory_of_tree(pid: int) -> int:
    """Kilobytes of a process and all below it (PSS). 0 where the system doesn't tell."""
    return sum(distributed.kilobytes(f"{one}/smaps_rollup").get("Pss", 0) for one in process_tree(pid))


def run_watched(command: Sequence[str], folder: Path) -> int:
    """Run a command; returns the largest memory of its processes together, in kilobytes. Raises RuntimeError where it
    fails, and has said why."""
    most = before = 0
    with subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while True:
            try:
                status = process.wait(EVERY)
                break
            except subprocess.TimeoutExpired:
                # the smaller one of two looks: while a process forks, pages are counted twice
                now = memory_of_tree(process.pid)
                most, before = max(most, min(before, now)), now
    if status:
        raise RuntimeError(f"a step ended with status {status}; its message is above.")
    return most


def grow(run: GrowthRun, options: GrowthOptions, folder: Path) -> list[list[str]]:
    """Rows of the per-image steps of one run."""
    out = folder / run.name
    command = [*run.command(options.method, folder / DRAWN), *options.flags, "--out", str(out)]
    rows = []
    for step in STEPS:
        if "masks" not in step.aims or step.name == "report":
            continue
        most = run_watched([*command, "--steps", step.name], folder)
        if step.per_image:
            seconds = RunFolder(out).record()["steps"][step.name]["seconds"]
            counts = (run.images, run.workers, run.processes)
            shown = f"{most / 1024:.0f}" if most else ""
            rows.append([step.name, *map(str, counts), f"{1e3 * seconds / run.images:.1f}", shown])
            print(f"{run.name} {step.name}: {rows[-1][-2]} ms an image, {shown} MB", flush=True)
    return rows


def main() -> None:
    """Run all sizes and print the table."""
    options = options_with_flags(GrowthOptions, prog="python -m scripts.growth", description=__doc__)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, trial = Path(temporary), Path(temporary) / "trial"
        # wrong names and flags are found before a large set is drawn
        write_pictures(trial / DRAWN, (2,), options.long_side)
        first = GrowthRun(2, 1, 1).command(options.method, trial / DRAWN)
        run_watched([*first, *options.flags, "--steps", "train_cam", "--out", str(trial / "run")], trial)
        write_pictures(folder / DRAWN, options.images, options.long_side)
        runs = itertools.product(*map(dict.fromkeys, (options.images, options.workers, options.processes)))
        for run in runs:
            rows += grow(GrowthRun(*run), options, folder)
    rows.sort(key=lambda row: [step.name for step in STEPS].index(row[0]))
    head = ("step", "images", "workers", "processes", "ms an image", "MB")
    print(ResultTable(head, rows, range(1, 6)).markdown())


if __name__ == "__main__":
    commandline.end(commandline.command(main, (ValueError, OSError, RuntimeError)))
