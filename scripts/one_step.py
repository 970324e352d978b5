"""One training step of every published recipe at full size: ``python -m scripts.one_step --root DIR``.

Shows that the published networks, sizes and losses run on this machine, and prints the time of a step; the trained
weights are useless. Start weights are random and the batch is reduced. If a loss starts later in the training, the
script runs as many steps as it takes to reach it. DIR is a folder in VOC 2012's layout, such as a generated one
(data/sample-...). Without names it runs the CAM networks; segmentation networks (``--methods deeplabv2``) need masks in
DIR.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from misc.files.runfolder import RunFolder
from misc.tables import ResultTable
from net import registry

ROOT = Path(__file__).resolve().parents[1]

SPECIAL = {
    "puzzlecam:published:resnet50": "--cam.network.backbone resnet",
    "aream_mctformer": "--cam.fit.steps 2 --cam.selection last",  # the pair loss starts after a sixth of the training
    "aream_conformer": "--cam.fit.steps 2",
    "semformer": "--cam.caae.weights none --cam.caae.fit.steps 1 --cam.caae.fit.batch-size {batch}",
    # the loss between the branches starts in the second epoch. Batch normalisation is frozen, so random weights of 50
    # blocks give enormous values: the second step is finite only if the first one changed nothing
    "crt": "--cam.fit.steps 2 --cam.fit.lr 1e-30",
    "crt:published_cub": "--cam.fit.steps 2 --cam.fit.lr 1e-30 --cam.network.agreement-from 0.5",
    "clipes": "--cam.fit.steps 0",  # nothing is trained
    "weclip": "--cam.fit.steps 3",  # the decoder takes part in the maps from the second step on
    "getam": "--cam.fit.steps 3 --saliency {saliency}",  # the third step is in the second half of the training
    "getam:published:without_saliency": "--cam.fit.steps 3 --cam.network.label.no-saliency",
    "getam:published:vitb": "--cam.fit.steps 3 --saliency {saliency} --cam.network.dpt.backbone vitb",
    "getam:published:deitb_distilled": (
        "--cam.fit.steps 3 --saliency {saliency} --cam.network.dpt.backbone deitb_distilled"
    ),
    "toco": "--cam.fit.steps 2",  # the decoder's terms begin after a tenth of the training, on COCO all have after 0.15
    "toco:published_deit": "--cam.fit.steps 2",
    "toco:published_coco": "--cam.fit.steps 2",
    "toco:published_coco_deit": "--cam.fit.steps 2",
    "more": "--cam.fit.steps 3",  # the third step is after the switch of the labels
    "more:published_coco": "--cam.fit.steps 3",
}
"""Extra flags of METHOD, METHOD:PRESET or METHOD:PRESET:VARIANT."""

registry.load_methods()
RECIPES = tuple(
    method if preset == "published" else f"{method}:{preset}"
    for method, cls in sorted(registry.SEEDS.items())
    for preset in cls.recipes
    if preset.startswith("published")
)
"""The published recipes of all methods, METHOD or METHOD:PRESET."""
METHODS = (*RECIPES, *(name for name in SPECIAL if name not in RECIPES))
SEGMENTERS = tuple(sorted(registry.SEGMENTERS))
"""Segmentation networks; they are trained on the true masks, as there are no pseudo masks."""


def step_flags(name: str, root: Path, out: Path, batch: int) -> list[str]:
    """The arguments of run_sample.py for a name of ``METHODS`` or ``SEGMENTERS``; its extra flags come last and
    override."""
    method, preset, *_ = [*name.split(":"), "published"]
    part, own = "cam", SPECIAL.get(name, "")
    if name in SEGMENTERS:
        method, part, own = "seam", "seg", f"--segmenter {name} --masks truth"
    common = (
        f"{method} --preset {preset} --data voc12 --steps train_{part} --{part}.weights none --{part}.fit.steps 1 "
        f"--{part}.fit.batch-size {batch} --machine.device cpu --machine.workers 0"
    )
    special = [word.format(batch=batch, saliency=root / "Saliency") for word in own.split()]
    return [*common.split(), "--root", str(root), "--out", str(out / name.replace(":", "_")), *special]


def main(root: Path, methods: Sequence[str] = METHODS, out: Path = Path("runs/one_step"), batch: int = 2) -> int:
    """Run the steps one after the other, each in its own process; a step that has run is not run again.

    Args:
        root: Data set in VOC 2012's layout; its folder Saliency holds the saliency maps for getam.
        methods: Names to run.
        out: Folder for the run folders.
        batch: Images per step.

    Returns:
        1 if one of them failed, else 0.
    """
    rows, failed = [], 0
    for name in methods:
        if name not in (*METHODS, *SEGMENTERS):
            raise SystemExit(f"error: there is no {name}. There are: {', '.join((*METHODS, *SEGMENTERS))}.")
        command = ["run_sample.py", *step_flags(name, root.resolve(), out.resolve(), batch)]
        print(f"\n== python {shlex.join(command)}", flush=True)
        if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            failed = 1
            rows.append((name, "failed", "-"))
            continue
        (step,) = RunFolder(out.resolve() / name.replace(":", "_")).record()["steps"].values()
        peak = step.get("peak_memory_mb", float("nan")) / 1024
        rows.append((name, f"{step['seconds']:.1f} s", f"{peak:.1f} GiB"))
    print("\n" + ResultTable((f"batch {batch}", "training", "peak memory"), rows, numbers={1, 2}).markdown())
    return failed


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m scripts.one_step"))
