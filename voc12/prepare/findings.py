"""What the preparations share: problems told and counted, texts of lists, and the check of every file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from misc.files import store
from misc.files.images import read_image, read_mask
from misc.loop.each import EachFailed, each
from misc.tables import ResultTable
from voc12 import tags as tags_of
from voc12.catalog import Catalog
from voc12.tags import DataError

DirOption = Annotated[Path, tyro.conf.arg(metavar="DIR")]
"""A folder on the command line."""
WORKERS = min(8, os.cpu_count() or 1)
"""Processes unless told otherwise."""


@dataclass
class Findings:
    """What was found wrong; told as it is found, counted for the exit status."""

    overwrite: bool = False
    count: int = 0

    def tell(self, text: str) -> None:
        """One problem."""
        self.count += 1
        print(f"PROBLEM: {text}")

    def work(self, name: str, ids: Sequence[str], action: Callable[[str], None], workers: int,
             done: Callable[[str], bool] = lambda _: False) -> None:
        """Do ``action`` for every id and tell every failure."""
        try:
            each(name, ids, action, done=done, workers=workers)
        except EachFailed as failed:
            for failure in failed.failures:
                self.tell(f"{failure.image_id}: {failure.cause}")

    def put(self, path: Path, text: str) -> None:
        """Write a text file unless it is there; a different one is only replaced with ``overwrite``."""
        if path.exists() and path.read_bytes() == text.encode():
            print(f"as it was: {path}")
        elif path.exists() and not self.overwrite:
            self.tell(f"{path} is there with other content and is kept: --overwrite replaces it.")
        else:
            store.write_bytes(path, text.encode())
            print(f"written: {path}")


def table_text(rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """labels.csv of (file, class names)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "classes"])
    writer.writerows([file, ";".join(names)] for file, names in rows)
    return text.getvalue()


def join_lines(items: Iterable[str]) -> str:
    return "".join(f"{item}\n" for item in items)


def print_counts(catalog: Catalog, lists: dict[str, list[str]], expected: dict[str, int]) -> None:
    """Print how many images, masks and tags every list has, and how many images every class has."""
    counts: list[tuple[str, ...]] = []
    rows: dict[str, np.ndarray] = {}
    for name, ids in lists.items():
        masks = sum(i in catalog.masks for i in ids)
        known = []
        for image_id in ids:
            try:
                known.append(catalog.tags(image_id))
            except (ValueError, OSError):
                continue
        rows[name] = np.sum(known, 0) if known else np.zeros(catalog.num_classes)
        mean = f"{rows[name].sum() / len(known):.3f}" if known else "-"
        odd = "<- not as published" if expected.get(name, len(ids)) != len(ids) else ""
        counts.append((name, str(len(ids)), str(expected.get(name, "-")), str(masks), mean, odd))
    head = ("list", "images", "expected", "masks", "tags per image", "")
    print("\n" + ResultTable(head, counts, numbers={1, 2, 3, 4}).text())
    print("\nimages of each class:")
    of_class = [(str(c + 1), name, *(str(int(n[c])) for n in rows.values())) for c, name in enumerate(catalog.classes)]
    print(ResultTable(("", "class", *lists), of_class, numbers={0, *range(2, len(lists) + 2)}).text())


@dataclass(frozen=True)
class _Look:
    """Reads all files of an image; picklable for worker processes."""

    catalog: Catalog

    def __call__(self, image_id: str) -> None:
        image = read_image(self.catalog.image_path(image_id))
        path = self.catalog.mask_path(image_id)
        if path is None:
            return
        mask = read_mask(path)
        if mask.shape != image.shape[:2]:
            raise DataError(f"{path} is {mask.shape} pixels high and wide, the image {image.shape[:2]}. Replace it.")
        try:
            tags_of.tags_from_mask(mask, self.catalog.num_classes)
        except DataError as error:
            raise DataError(f"Mask {path} {error} Correct the class list, or replace the mask.") from None


def check_files(
    catalog: Catalog, lists: dict[str, list[str]], findings: Findings, decode: bool, workers: int
) -> None:
    """Tell every listed image that has no file, and with ``decode`` every damaged image and mask."""
    listed = sorted({i for ids in lists.values() for i in ids})
    folded = {image_id.casefold(): image_id for image_id in catalog.images}
    for image_id in listed:
        if image_id not in catalog.images:
            alike = folded.get(image_id.casefold())
            hint = f" (there is {alike}: capitals count)" if alike else ""
            findings.tell(f"{image_id} is on a list and has no image file{hint}.")
    if decode:
        there = [i for i in listed if i in catalog.images]
        findings.work("reading images and masks", there, _Look(catalog), workers)


def conclude(findings: Findings, flags: str) -> int:
    if findings.count:
        print(f"\n{findings.count} problems, listed above as PROBLEM.")
        return 1
    print(f"\nAll is well. Now: python run_sample.py METHOD {flags} ...")
    return 0
