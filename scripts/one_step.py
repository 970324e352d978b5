"""One training step of every published recipe at full size: ``python -m scripts.one_step --all --json FILE``.

Shows that the published networks, sizes and losses run on this machine, and tells the seconds and the peak memory of
each; the trained weights are useless. Start weights are random and the batch is reduced. If a loss starts later in the
training, the script runs as many steps as it takes to reach it. Every recipe runs in a process of its own. The same
command started again leaves out what FILE says has run, so that it may be interrupted.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from misc import commandline
from misc.files import store
from misc.files.runfolder import RunFolder
from misc.files.schema import Each
from misc.tables import ResultTable
from net import registry
from scripts import ROOT
from voc12.generated.sets import generate

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
    "clipes:published_coco": "--cam.fit.steps 0",
    "weclip": "--cam.fit.steps 3",  # the decoder takes part in the maps from the second step on
    "weclip:published_coco": "--cam.fit.steps 3",
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
SEGMENTER_NAMES = tuple(sorted(registry.SEGMENTERS))
"""Segmentation networks; they are trained on the true masks, as there are no pseudo masks."""


@dataclass(frozen=True)
class OneStepOptions:
    """What to run, and where."""

    root: Path | None = None
    """Data set in VOC 2012's layout; its folder Saliency holds the saliency maps for getam, and segmentation networks
    need its masks. Default: a small generated set in the folder OUT."""
    all: bool = False
    """Run every published recipe of the CAM networks, and every segmentation network."""
    methods: tuple[str, ...] = ()
    """Run these: METHOD, METHOD:PRESET, METHOD:PRESET:VARIANT or a segmentation network."""
    out: Path = Path("runs/one_step")
    """Folder for the run folders."""
    json: Path | None = None
    """File for the results, by name: seconds, peak memory, and whether it ran. Default: OUT/results.json."""
    batch: int = 2
    """Images per step."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the networks run."""
    limit: float | None = None
    """Seconds after which a recipe is ended, and counts as failed. Default: none."""

    def names(self) -> tuple[str, ...]:
        """What to run. Raises ValueError for unknown names, and where nothing is named."""
        known = (*METHODS, *SEGMENTER_NAMES)
        unknown = [name for name in self.methods if name not in known]
        if unknown or not (self.methods or self.all):
            told = f"there is no {unknown[0]}" if unknown else "give --all or --methods"
            raise ValueError(f"{told}. There are: {', '.join(known)}.")
        return known if self.all else self.methods


def step_flags(name: str, root: Path, out: Path, batch: int, device: str = "cpu") -> list[str]:
    """The arguments of run_sample.py for a name of ``METHODS`` or ``SEGMENTER_NAMES``; its extra flags come last and
    override."""
    method, preset, *_ = [*name.split(":"), "published"]
    part, own = "cam", SPECIAL.get(name, "")
    if name in SEGMENTER_NAMES:
        method, part, own = "seam", "seg", f"--segmenter {name} --masks truth"
    common = (
        f"{method} --preset {preset} --data voc12 --train-list train --steps train_{part} --{part}.weights none "
        f"--{part}.fit.steps 1 --{part}.fit.batch-size {batch} --machine.device {device} --machine.workers 0"
    )
    special = [word.format(batch=batch, saliency=root / "Saliency") for word in own.split()]
    return [*common.split(), "--root", str(root), "--out", str(run_folder(name, out, batch, device)), *special]


def run_folder(name: str, out: Path, batch: int, device: str) -> Path:
    """Run folder of a recipe's step."""
    return out / f"{name.replace(':', '_')}-{device}-{batch}"


def run_step(name: str, options: OneStepOptions, root: Path) -> dict[str, Any]:
    """Run a recipe's step; its result for the JSON file."""
    out = options.out.resolve()
    command = ["run_sample.py", *step_flags(name, root, out, options.batch, options.device)]
    print(f"\n== python {shlex.join(command)}", flush=True)
    made_by = {"batch": options.batch, "device": options.device}
    try:
        status = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=options.limit).returncode
    except subprocess.TimeoutExpired:
        return {**made_by, "ran": False, "why": f"ended after {options.limit:g} s"}
    if status:
        return {**made_by, "ran": False, "why": f"exit status {status}"}
    (step,) = RunFolder(run_folder(name, out, options.batch, options.device)).record()["steps"].values()
    return {**made_by, "ran": True, **{k: v for k, v in step.items() if k != "done"}}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    rows = []
    for name, result in results.items():
        peaks = [result.get(key) for key in ("peak_memory_mb", "peak_gpu_memory_mb")]
        cells = [f"{peak / 1024:.1f} GiB" if peak else "-" for peak in peaks]
        rows.append((name, f"{result['seconds']:.1f} s" if result["ran"] else result["why"], *cells))
    head = ("recipe", "training", "peak memory", "peak GPU memory")
    return ResultTable(head, rows, numbers={1, 2, 3}).markdown()


def main(options: OneStepOptions) -> int:
    """Run what is named and has not run yet, one after the other. Returns 1 if one of them failed, else 0."""
    with commandline.before_work((ValueError,)):
        names = options.names()
    root = (options.root or options.out / "set").resolve()
    if options.root is None:
        generate(root, images=16, val=4, classes=5)
    path = options.json or options.out / "results.json"
    results = store.read_json(path, Each(dict)) if path.exists() else {}
    for name in names:
        there = results.get(name, {})
        if there.get("ran") and (there["batch"], there["device"]) == (options.batch, options.device):
            print(f"{name}: has run already.")
            continue
        results[name] = run_step(name, options, root)
        store.write_json(path, results)
    print("\n" + table({name: results[name] for name in names}))
    return int(not all(results[name]["ran"] for name in names))


if __name__ == "__main__":
    told = {"prog": "python -m scripts.one_step", "description": __doc__}
    work = lambda: main(commandline.parse_options(OneStepOptions, **told))  # noqa: E731
    commandline.end(commandline.command(work, (ValueError, OSError)))
