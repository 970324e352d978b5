"""Methods on photographs: ``python -m scripts.photos --root VOC --weights FILE [--device cuda] [--jobs 6]``.

Every row is a CAM method x a refiner x a segmentation network x a seed, by the preset photos, on a data set in VOC
2012's layout; "truth" in place of a refiner is the same segmentation network on the true masks. Every other image of
val is there to tune on, the others are reported. Lines of JSON and a Markdown table are written to the folder --out as
soon as a row is finished; a finished one is not run again, a part of one neither. The rows are tried in the
order of what they tell: plain rows, the best one with other seeds, variants of a setting (their masks only), others.
Flags behind ``--`` go to run_sample.py, in every row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from misc import commandline
from misc.files.images import read_mask
from misc.files.runfolder import RunFolder
from misc.score.evaluate import evaluate_masks
from misc.tables import ResultTable
from scripts import ROOT, options_with_flags
from voc12.catalog import Catalog, open_catalog

PHOTO_METHODS = ("irn_cam", "puzzlecam", "seam", "psa")
PHOTO_REFINERS = ("edge", "crf", "none", "par", "psa", "irn")
TRAINED = ("edge", "psa", "irn")
TRUTH = "truth"

VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "crf of scores": ("crf", ("--aff.walk.unary", "scores")),
    "crf at 0.30": ("crf", ("--aff.walk.background", "constant", "--aff.walk.threshold", "0.30")),
    "crf at 0.35": ("crf", ("--aff.walk.background", "constant", "--aff.walk.threshold", "0.35")),
    "crf at 0.40": ("crf", ("--aff.walk.background", "constant", "--aff.walk.threshold", "0.40")),
    "crf at 0.45": ("crf", ("--aff.walk.background", "constant", "--aff.walk.threshold", "0.45")),
    "crf srgb 10": ("crf", ("--aff.walk.crf.bilateral-srgb", "10")),
    "crf sxy 80 srgb 8": ("crf", ("--aff.walk.crf.bilateral-sxy", "80", "--aff.walk.crf.bilateral-srgb", "8")),
    "edge at 0.30": ("edge", ("--aff.walk.background", "constant", "--aff.walk.threshold", "0.30")),
    "edge at 0.40": ("edge", ("--aff.walk.background", "constant", "--aff.walk.threshold", "0.40")),
    "edge at 0.50": ("edge", ("--aff.walk.background", "constant", "--aff.walk.threshold", "0.50")),
    "edge logt 6": ("edge", ("--aff.walk.logt", "6")),
    "edge logt 10": ("edge", ("--aff.walk.logt", "10")),
    "edge without crf": ("edge", ("--aff.walk.crf.iterations", "0")),
    "psa at 0.30": ("psa", ("--aff.walk.background", "constant", "--aff.walk.threshold", "0.30")),
    "psa logt 3": ("psa", ("--aff.walk.logt", "3")),
    "psa crf": ("psa", ("--aff.walk.crf.iterations", "5", "--aff.walk.crf-unary", "labels")),
}
"""Name -> refiner, and flags of its walk; a trained refiner is that of the plain row."""
SEED_VARIANTS: dict[str, tuple[str, ...]] = {
    "stride 8": ("--cam.network.timm.stride", "8"),
    "16 epochs": ("--cam.fit.epochs", "16"),
    "nothing frozen": ("--cam.network.timm.frozen", "none"),
    "trained at stride 16": ("--cam.network.timm.training-stride", "0"),
    "scales to 2": ("--cam.infer.scales", "0.5", "1.0", "1.5", "2.0"),
    "rate 5e-4": ("--cam.fit.lr", "5e-4"),
    "crop 448": ("--cam.augment.crop", "448", "--cam.augment.long-side", "448", "704"),
}
"""Other settings of the CAM network, with the refiner crf."""


@dataclass(frozen=True)
class PhotoRow:
    """What is run. A variant has masks only, a row without one also a segmentation network."""

    method: str
    refiner: str
    seed: int = 0
    variant: str = ""

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return "-".join((self.method, self.refiner, str(self.seed), *self.variant.split()))


def plain_rows() -> list[PhotoRow]:
    """The rows of the first seed that matter most."""
    first = PHOTO_METHODS[0]
    return [
        PhotoRow(first, "edge"), PhotoRow(first, TRUTH), *(PhotoRow(m, "edge") for m in PHOTO_METHODS[1:]),
        *(PhotoRow(first, refiner) for refiner in PHOTO_REFINERS[1:]),
    ]  # fmt: skip


class PhotoStudy:
    """Runs rows, at most ``jobs`` at a time, and writes the table."""

    def __init__(self, options: PhotosOptions) -> None:
        self.options = options
        self.out = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.catalog: Catalog = open_catalog("voc12", options.root)
        val = self.catalog.ids(options.val_list)
        self.halves = {"tune": val[::2], "report": val[1::2]}
        threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
        self.env = {"OMP_NUM_THREADS": threads, **os.environ}
        self.begin = time.monotonic()
        self.lock = threading.Lock()
        self.seeds: dict[tuple[str, int, str], Future[None]] = {}
        self.queued: dict[str, Future[None]] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        if (self.out / "rows.jsonl").exists():
            lines = (self.out / "rows.jsonl").read_text(encoding="utf-8").splitlines()
            self.rows = {row["name"]: row for row in map(json.loads, lines)}

    # --- running

    def late(self) -> bool:
        """Whether no further row is begun."""
        return (time.monotonic() - self.begin) / 60 > self.options.minutes

    def drive(self, method: str, run: Path, *flags: str) -> float:
        """Run the driver; its output goes to a file. Seconds; RuntimeError where it fails."""
        options, begin = self.options, time.monotonic()
        command = [
            sys.executable, "run_sample.py", method, "--preset", "photos", "--data", "voc12", "--root",
            str(options.root.resolve()), "--out", str(run), "--val-list", options.val_list,
            "--machine.device", options.device, "--machine.workers", str(options.workers),
            "--cam.weights", str(options.weights.resolve()), *options.flags, *flags,
        ]  # fmt: skip
        if options.train_list:
            command += ["--train-list", options.train_list, "--score-list", options.train_list]
        log = self.out / "log" / f"{run.name}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            ended = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False, env=self.env)
        if ended.returncode:
            raise RuntimeError(f"{run.name}: {log} ends with {log.read_text(encoding='utf-8')[-300:]!r}")
        return time.monotonic() - begin

    def seed_run(self, method: str, seed: int, variant: str = "") -> Path:
        """The run folder of a CAM network."""
        return self.out / "-".join((method, "cam", str(seed), *variant.split()))

    def make_seed(self, method: str, seed: int, variant: str = "") -> None:
        """Train a CAM network and make its CAMs."""
        run = self.seed_run(method, seed, variant)
        if not RunFolder(run).finished("make_cam"):
            self.drive(method, run, "--seed", str(seed), "--steps", "1-2", *SEED_VARIANTS.get(variant, ()))

    def run_row(self, row: PhotoRow, needs: list[Future[None]]) -> None:
        """Run a row once what it needs is there, and add it to the table."""
        for one in needs:
            one.result()
        if self.late():
            return
        variant = row.variant if row.variant in SEED_VARIANTS else ""
        cams, run = self.seed_run(row.method, row.seed, variant), self.out / row.name
        flags = ["--seed", str(row.seed), "--cams", str(cams), *SEED_VARIANTS.get(row.variant, ())]
        if self.options.segmenter:
            flags += ["--segmenter", self.options.segmenter]
        if row.refiner == TRUTH:
            flags += ["--refiner", "none", "--masks", "truth", "--steps", "6-7"]
        elif row.variant:
            walk = VARIANTS.get(row.variant, ("", ()))[1]
            trained = self.out / PhotoRow(row.method, row.refiner, row.seed).name / "weights" / "aff.pt"
            again = ["--aff.released", str(trained), "--steps", "train_aff"] if row.refiner in TRAINED else ["--steps"]
            flags += ["--refiner", row.refiner, *walk, *again, "random_walk"]
        else:
            steps = ["3-7"] if row.refiner in TRAINED else ["random_walk", "train_seg", "infer_seg"]
            flags += ["--refiner", row.refiner, "--steps", *steps]
        self.drive(row.method, run, *flags)
        self.add(row, cams, run)

    def submit(self, pool: ThreadPoolExecutor, rows: list[PhotoRow]) -> list[Future[None]]:
        """Queue rows in this order, each after its CAM network, which is queued first."""
        wanted = [row for row in rows if row.name not in {*self.rows, *self.queued} and self.options.wants(row)]
        for row in wanted:
            key = (row.method, row.seed, row.variant if row.variant in SEED_VARIANTS else "")
            if key not in self.seeds:
                self.seeds[key] = pool.submit(self.make_seed, *key)
        queued: list[Future[None]] = []
        for row in wanted:
            needs = [self.seeds[(row.method, row.seed, row.variant if row.variant in SEED_VARIANTS else "")]]
            base = self.queued.get(PhotoRow(row.method, row.refiner, row.seed).name)
            if row.variant in VARIANTS and row.refiner in TRAINED and base:
                needs.append(base)
            queued.append(pool.submit(self.run_row, row, needs))
            self.queued[row.name] = queued[-1]
        return queued

    def run(self) -> None:
        """All rows, in the order of what they tell."""
        with ThreadPoolExecutor(self.options.jobs) as pool:
            first = PHOTO_METHODS[0]
            self.finish(self.submit(pool, plain_rows()))
            best = self.best()
            again = [PhotoRow(best[0], refiner, seed) for refiner in (best[1], TRUTH) for seed in (1, 2)]
            truth = [] if best[0] == first else [PhotoRow(best[0], TRUTH)]
            variants = [
                PhotoRow(best[0] if refiner == "crf" else first, refiner, 0, name)
                for name, (refiner, _) in VARIANTS.items()
            ]
            others = [PhotoRow(best[0], "crf", 0, name) for name in SEED_VARIANTS]
            rest = [PhotoRow(method, refiner) for refiner in PHOTO_REFINERS for method in PHOTO_METHODS]
            groups = (again + truth, others[:3], variants, others[3:], rest)
            self.finish([one for group in groups for one in self.submit(pool, group)])

    def finish(self, futures: list[Future[None]]) -> None:
        """Wait for rows; one that fails is told and does not stop the others."""
        for one in futures:
            try:
                one.result()
            except Exception as error:  # any row may fail in any way
                print(f"failed: {error}", flush=True)

    def best(self) -> tuple[str, str]:
        """Method and refiner with the best predictions of the images to tune on, among finished rows of seed 0."""
        found = [r for r in self.rows.values() if not r["variant"] and r["refiner"] != TRUTH and not r["seed"]]
        top = max(found, key=lambda r: r["val_tune"], default=None)
        return (top["method"], top["refiner"]) if top else (PHOTO_METHODS[0], PHOTO_REFINERS[0])

    # --- results

    def add(self, row: PhotoRow, cams: Path, run: Path) -> None:
        """Score a finished row and write all rows."""
        made, seed = RunFolder(run), RunFolder(cams)
        steps = {**seed.record()["steps"], **made.record()["steps"]}
        cam = seed.scores()["CAM"]
        found: dict[str, Any] = {
            "name": row.name, "method": row.method, "refiner": row.refiner, "seed": row.seed, "variant": row.variant,
            "cam": cam["miou"], "cam_threshold": cam["threshold"],
            "seconds": {name: step["seconds"] for name, step in steps.items() if "seconds" in step},
            "finished_after": round(time.monotonic() - self.begin),
        }  # fmt: skip
        walks = [s for name, s in made.scores().items() if name.startswith("pseudo masks")]
        if walks:
            chosen = walks[0].get("walk", {}).get("threshold")
            near = min(cam["curve"], key=lambda point: abs(point["threshold"] - (chosen or 0)))
            found |= {"masks": walks[0]["miou"], "threshold": chosen, "cam_at_threshold": near["miou"]}
            found["mask_classes"] = {one["name"]: one["iou"] for one in walks[0]["classes"]}
        if not row.variant:
            for half, ids in self.halves.items():
                for name, path in ((f"val_{half}", made.seg), (f"val_{half}_before_crf", made.seg_before_crf)):
                    if path(ids[0]).exists():
                        found |= self.score(name, ids, path)
        with self.lock:
            self.rows[row.name] = found
            lines = [json.dumps(one) for one in self.rows.values()]
            (self.out / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (self.out / "table").with_suffix(".md").write_text(self.table(), encoding="utf-8")
        shown = ", ".join(f"{k} {found[k]:.2f}" for k in ("cam", "masks", "val_tune", "val_report") if k in found)
        print(f"{found['finished_after']:5d} s  {row.name}: {shown}", flush=True)

    def score(self, name: str, ids: list[str], path: Callable[[str], Path]) -> dict[str, Any]:
        """mIoU and IoU of the classes of predicted masks, in percent."""
        count = self.catalog.num_classes + 1
        scores = evaluate_masks(
            ids, lambda i: read_mask(path(i)), self._true_mask, count, boundary=False, progress=False
        ).to_dict(("background", *self.catalog.classes), name)
        return {name: scores["miou"], f"{name}_classes": {one["name"]: one["iou"] for one in scores["classes"]}}

    def _true_mask(self, image_id: str) -> np.ndarray:
        path = self.catalog.mask_path(image_id)
        assert path is not None
        return read_mask(path)

    def table(self) -> str:
        """All rows as Markdown, and mean and deviation of those with several seeds."""
        full = {(r["method"], r["seed"]): r["val_report"] for r in self.rows.values() if r["refiner"] == TRUTH}

        def cells(row: dict[str, Any]) -> tuple[str, ...]:
            upper = full.get((row["method"], row["seed"])) or full.get((PHOTO_METHODS[0], row["seed"]))
            ratio = row["val_report"] / upper if "val_report" in row and upper else None
            numbers = (row["cam"], row.get("cam_at_threshold"), row.get("masks"), row.get("val_tune"),
                       row.get("val_report"))  # fmt: skip
            return (
                row["method"], row["refiner"], row["variant"], str(row["seed"]),
                *("" if x is None else f"{x:.1f}" for x in numbers), "" if ratio is None else f"{ratio:.3f}",
                f"{row['cam_threshold']:.2f}", "" if row.get("threshold") is None else f"{row['threshold']:.2f}",
                f"{sum(row['seconds'].values()):.0f}",
            )  # fmt: skip

        heads = ("seed", "refiner", "variant", "no.", "CAM, best", "CAM, chosen", "masks", "val to tune on",
                 "val reported", "weak/full", "best thr.", "chosen thr.", "s")  # fmt: skip
        text = ResultTable(heads, [cells(row) for row in self.rows.values()], range(3, len(heads))).markdown() + "\n"
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.rows.values():
            if not row["variant"]:
                groups.setdefault((row["method"], row["refiner"]), []).append(row)
        several = []
        for (method, refiner), rows in groups.items():
            if len(rows) > 1:
                numbers = [[r[k] for r in rows if k in r] for k in ("cam", "masks", "val_tune", "val_report")]
                told = [f"{np.mean(x):.1f} ± {np.std(x, ddof=1):.1f}" if len(x) > 1 else "" for x in numbers]
                several.append((method, refiner, str(len(rows)), *told))
        if several:
            heads = ("seed", "refiner", "runs", "CAM, best", "masks", "val to tune on", "val reported")
            text += "\n" + ResultTable(heads, several, range(2, len(heads))).markdown() + "\n"
        return text


@dataclass(frozen=True)
class PhotosOptions:
    """Options of the study."""

    root: Path
    """The photographs, in VOC 2012's layout, with masks of train and val."""
    weights: Path
    """ImageNet weights of the preset's backbone."""
    out: Path = Path("runs/photos")
    """Folder for run folders and tables."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As --machine.device."""
    jobs: int = 1
    """Rows at a time."""
    workers: int = 2
    """Worker processes of each."""
    minutes: float = float("inf")
    """No row is begun after this time."""
    rows: tuple[str, ...] = ()
    """Only rows whose names these are, such as irn_cam-crf-0 (CAM method, refiner, seed), or patterns with * and ?."""
    segmenter: str = ""
    """Another segmentation network than the preset's."""
    train_list: str = ""
    """Another list of training images, for a trial."""
    val_list: str = "val"
    """List of validation images."""
    flags: tyro.conf.Suppress[tuple[str, ...]] = ()
    """More flags for run_sample.py, in every row: given behind --."""

    def wants(self, row: PhotoRow) -> bool:
        """Whether a row is to be run."""
        return not self.rows or any(fnmatchcase(row.name, pattern) for pattern in self.rows)


def main() -> None:
    """Command line: options, and after -- further ones of run_sample.py."""
    PhotoStudy(options_with_flags(PhotosOptions, prog="python -m scripts.photos", description=__doc__)).run()


if __name__ == "__main__":
    commandline.end(commandline.command(main, (ValueError, OSError)))
