"""How time and memory of every per-image step grow with the number of images: ``python -m scripts.growth``.

Runs a method's sample recipe, with hardly any training, on generated sets of growing size, in one process and (by
torchrun) in two. Prints milliseconds an image and the peak memory of the main process for each step: both should not
depend on the number of images.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from misc.checked import Checked, Count, Range
from misc.files.runfolder import RunFolder
from misc.tables import ResultTable
from scripts import ROOT
from step import STEPS

SHORT_TRAININGS = "--cam.fit.steps 2 --aff.fit.steps 2 --seg.fit.steps 2".split()


@dataclass(frozen=True)
class GrowthOptions(Checked):
    """What is run."""

    method: Annotated[str, tyro.conf.Positional] = "irn_cam"
    """CAM method."""
    images: Annotated[tuple[int, ...], Range(least=2)] = (100, 1000)
    """Numbers of training images; as many again are predicted."""
    processes: Annotated[tuple[int, ...], Range(least=1)] = (1, 2)
    """Numbers of processes."""
    workers: Count = 1
    """--machine.workers of each process."""


def grow(options: GrowthOptions, images: int, processes: int, folder: Path) -> list[list[str]]:
    """Rows of the per-image steps of one run. Raises CalledProcessError if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "run_sample.py"), options.method]
    flags = ["--sample.images", str(images), "--sample.val", str(images), "--machine.workers", str(options.workers)]
    out = folder / f"run-{images}-{processes}"
    subprocess.run([*command, *flags, *SHORT_TRAININGS, "--out", str(out)], cwd=folder, check=True)
    steps = RunFolder(out).record()["steps"]
    return [
        [step.name, str(images), str(processes), f"{1e3 * steps[step.name]['seconds'] / images:.1f}",
         f"{steps[step.name].get('peak_memory_mb', float('nan')):.0f}"]
        for step in STEPS if step.per_image and step.name in steps
    ]  # fmt: skip


def main(options: GrowthOptions) -> None:
    """Run all sizes and print the table."""
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for images in options.images:
            for processes in options.processes:
                rows += grow(options, images, processes, Path(folder))
    rows.sort(key=lambda row: [step.name for step in STEPS].index(row[0]))
    print(ResultTable(("step", "images", "processes", "ms an image", "MB"), rows, range(1, 5)).markdown())


if __name__ == "__main__":
    main(tyro.cli(GrowthOptions, prog="python -m scripts.growth"))
