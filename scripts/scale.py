"""Overhead of a large data set: ``python -m scripts.scale [--images 82783] [--at DIR]``.

Makes a COCO-like set of tiny images (80 classes, three tags per image) and a run folder with a finished file for each.
Measures time and memory of everything that a run does once rather than per image, and of the per-image loop itself, in
which nothing is done for an image: in one process, with images read ahead (one by one, or four at once), and in two
worker processes.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from misc import commandline, distributed
from misc.files.images import jpeg_bytes, png_bytes, read_image
from misc.files.runfolder import RunFolder
from misc.loop.each import Rest, Together, each
from step import STEPS
from step.lib.config import Job, default_config
from step.lib.scoring import why_unscored
from voc12.catalog import open_catalog


def make_large_set(root: Path, run: RunFolder, images: int, classes: int = 80) -> None:
    """Write the set and the finished files (without fsync, as they are temporary)."""
    rng = np.random.default_rng(0)
    names = [f"class {n}" for n in range(classes)]
    ids = [f"COCO_train2014_{n:012d}" for n in range(images)]
    jpeg = jpeg_bytes(np.zeros((12, 16, 3), np.uint8))
    png = png_bytes(np.zeros((12, 16, 3), np.uint8))
    masks = root / "SegmentationClass" / "train2014"
    for folder in (root / "train2014", masks, root / "splits", run.root / "cam"):
        folder.mkdir(parents=True)
    for image_id in ids:
        (root / "train2014" / f"{image_id}.jpg").write_bytes(jpeg)
        (masks / f"{image_id}.png").write_bytes(png)
        run.cam(image_id).write_bytes(b"")
    rows = [f"{i}.jpg,{';'.join(names[c] for c in rng.choice(classes, 3, replace=False))}" for i in ids]
    (root / "labels.csv").write_text("\n".join(["file,classes", *rows]) + "\n")
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    (root / "splits" / "train.txt").write_text("\n".join(ids) + "\n")


def memory() -> float:
    """Memory of this process now, MB (Linux)."""
    return distributed.used_memory() / 2**20


def measure(what: str, action: Callable[[], object]) -> None:
    """Call ``work`` and print its time and the growth of memory."""
    before, start = memory(), time.perf_counter()
    action()
    print(f"{what:<58} {time.perf_counter() - start:7.2f} s {memory() - before:+8.1f} MB")


def do_nothing(image_id: str, image: np.ndarray | None = None) -> None:
    """The work of a step that does nothing."""


def do_nothing_together(image_ids: list[str], images: list[np.ndarray]) -> list[Rest]:
    """The same for several images at once."""
    return [partial(do_nothing, image_id) for image_id in image_ids]


def main(images: int = 82783, at: Path | None = None) -> None:
    """Measure a data set of many images.

    Args:
        images: Number of images.
        at: Folder for the set, on the file system to measure; removed at the end. Default: the system's temporary
            folder.
    """
    folder = Path(tempfile.mkdtemp(dir=at))
    try:
        run = RunFolder(folder / "run")
        make_large_set(folder / "set", run, images)
        print(f"{images} images; {memory():.0f} MB before")
        cfg = replace(default_config("seam", "sample"), data="coco14", root=folder / "set", run=run.root)
        jobs: list[Job] = []
        measure("open: labels.csv", lambda: jobs.append(Job(cfg, open_catalog("coco14", folder / "set"), run)))
        job = jobs[0]
        measure("check: list, index of the images, tags", lambda: job.catalog.check("train"))
        measure("index of the masks", lambda: job.catalog.masks)
        measure("fingerprint of the list", lambda: job.catalog.fingerprint("train"))
        measure("are the files of a finished step all there?", lambda: all(p.exists() for p in STEPS[1].files(job)))
        measure("can a list be scored?", lambda: why_unscored(job, "train"))
        loop = partial(each, "loop", job.catalog.ids("train"), do_nothing, done=lambda i: False)
        ahead = partial(loop, prepare=lambda i: read_image(job.catalog.image_path(i)), workers=1)
        measure("per-image loop, one process", loop)
        measure("per-image loop, images read ahead", ahead)
        measure("the same, four at once", lambda: ahead(together=Together(4, np.shape, do_nothing_together)))
        measure("per-image loop, two worker processes", lambda: loop(workers=2))
        measure("the data set for a spawned worker process", lambda: pickle.loads(pickle.dumps(job.catalog)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    commandline.run_script(main, prog="python -m scripts.scale")
