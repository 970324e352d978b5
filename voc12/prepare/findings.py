"""Shared code of the preparations: reporting and counting of problems, texts of lists, and the check of every file."""

from __future__ import annotations

import csv
import io
import itertools
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from misc.commandline import WrongCall
from misc.files import atomic, store
from misc.files.ids import checked_id, unread_suffixes, walk_files
from misc.files.images import read_image, read_mask
from misc.files.labelmap import NO_CLASS
from misc.loop.each import EachFailed, each
from misc.tables import ResultTable
from voc12 import tags as tags_of
from voc12.catalog import Catalog
from voc12.lists import shorten
from voc12.masks import compare_masks, tell_foreign_masks
from voc12.tags import DataError

DirOption = Annotated[Path, tyro.conf.arg(metavar="DIR")]
"""A folder on the command line."""
_ORIENTATION = 0x0112
"""EXIF's tag of how a photo is turned; above 4: by a quarter."""
WORKERS = min(8, os.cpu_count() or 1)
"""Default number of processes."""


def check_folder(flag: str, folder: Path) -> None:
    """WrongCall where the folder that an option names is none."""
    if not folder.is_dir():
        raise WrongCall(f"{flag} {folder}: there is no such folder.")


@dataclass
class Findings:
    """What was found wrong, told as it is found and counted for the exit status, and the files to write where nothing
    is: a list of a damaged folder would outlive the damage."""

    overwrite: bool = False
    count: int = 0
    planned: dict[Path, str] = field(default_factory=dict)

    def tell(self, text: str) -> None:
        """Print and count one problem."""
        self.count += 1
        print(f"PROBLEM: {text}")

    def note(self, text: str) -> None:
        """Something that may be meant so."""
        print(f"NOTE: {text}")

    def work(self, name: str, ids: Sequence[str], action: Callable[[str], None], workers: int,
             done: Callable[[str], bool] = lambda _: False) -> None:
        """Call ``action`` for every id and report every failure."""
        try:
            each(name, ids, action, done=done, workers=workers)
        except EachFailed as failed:
            for failure in failed.failures:
                self.tell(f"{failure.image_id}: {failure.cause}")

    def put(self, path: Path, text: str) -> None:
        """Plan a text file, which ``write`` writes; one that is there with other content is a problem, unless with
        ``overwrite``."""
        if path.exists() and path.read_bytes() == text.encode():
            print(f"as it was: {path}")
        elif path.exists() and not self.overwrite:
            self.tell(f"{path} is there with other content and is kept: --overwrite replaces it.")
        else:
            self.planned[path] = text

    def write(self) -> None:
        """Write what is planned, if there is no problem."""
        if self.count and self.planned:
            names = ", ".join(str(path) for path in self.planned)
            print(f"not written while there are problems: {names}")
            self.planned.clear()
            return
        for path, text in self.planned.items():
            atomic.remove_leftovers([path])
            store.write_bytes(path, text.encode())
            print(f"written: {path}")
        self.planned.clear()


def table_text(rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """labels.csv of (file, class names)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "classes"])
    writer.writerows([file, ";".join(names)] for file, names in rows)
    return text.getvalue()


def join_lines(items: Iterable[str]) -> str:
    """The text of a list file: one item per line, each line ended."""
    return "".join(f"{item}\n" for item in items)


def print_counts(catalog: Catalog, lists: dict[str, list[str]], expected: dict[str, int]) -> None:
    """Print how many images, masks and tags every list has, and how many images every class has."""
    counts: list[tuple[str, ...]] = []
    rows: dict[str, np.ndarray] = {}
    for name, ids in lists.items():
        masks = sum(i in catalog.masks for i in ids)
        rows[name], known = _count_tags(catalog, ids)
        mean = f"{rows[name].sum() / known:.3f}" if known else "-"
        odd = "<- not as published" if expected.get(name, len(ids)) != len(ids) else ""
        counts.append((name, str(len(ids)), str(expected.get(name, "-")), str(masks), mean, odd))
    head = ("list", "images", "expected", "masks", "tags per image", "")
    print("\n" + ResultTable(head, counts, numbers={1, 2, 3, 4}).text())
    print("\nimages of each class:")
    of_class = [(str(c + 1), name, *(str(int(n[c])) for n in rows.values())) for c, name in enumerate(catalog.classes)]
    print(ResultTable(("", "class", *lists), of_class, numbers={0, *range(2, len(lists) + 2)}).text())


def _count_tags(catalog: Catalog, ids: Iterable[str]) -> tuple[np.ndarray, int]:
    """(C,) images with each class, and the number of images whose tags are known."""
    total, known = np.zeros(catalog.num_classes), 0
    for image_id in ids:
        try:
            total += catalog.tags(image_id)
            known += 1
        except (ValueError, OSError):
            continue
    return total, known


def _is_empty(catalog: Catalog, image_id: str) -> bool:
    """Whether an image is known to have no class."""
    try:
        return not catalog.tags(image_id).any()
    except (ValueError, OSError):
        return False


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
            with Image.open(self.catalog.image_path(image_id)) as opened:
                turned = opened.size[::-1] == mask.shape and opened.getexif().get(_ORIENTATION, 1) > 4
            if turned:
                raise DataError(
                    f"{path} lies as the photo is stored, which its EXIF orientation turns: turn the mask as "
                    "the photo is shown, or save the photo upright without the orientation."
                )
            raise DataError(f"{path} is {mask.shape} pixels high and wide, the image {image.shape[:2]}. Replace it.")
        try:
            tags_of.tags_from_mask(mask, self.catalog.num_classes)
        except DataError as error:
            raise DataError(f"Mask {path} {error} Correct the class list, or replace the mask.") from None


def check_files(
    catalog: Catalog, lists: dict[str, list[str]], findings: Findings, decode: bool, workers: int
) -> None:
    """Tell every listed image that has no file, every name that results cannot have, and with ``decode`` every damaged
    image and mask, and masks that the tags contradict."""
    listed = sorted({i for ids in lists.values() for i in ids})
    folded = {image_id.casefold(): image_id for image_id in catalog.images}
    for image_id in listed:
        if image_id not in catalog.images:
            alike = folded.get(image_id.casefold())
            hint = f" (there is {alike}: capitals count)" if alike else ""
            findings.tell(f"{image_id} is on a list and has no image file{hint}.")
    for image_id in sorted({*catalog.images, *listed}):
        try:
            checked_id(image_id)
        except ValueError as error:
            findings.tell(f"{catalog.images.get(image_id, image_id)}: {error}")
    foreign = catalog.foreign_masks()
    if foreign:
        findings.tell(tell_foreign_masks(foreign))
    if decode:
        there = [i for i in listed if i in catalog.images]
        findings.work("reading images and masks", there, _Look(catalog), workers)
        problems, notes = compare_masks(catalog, [i for i in there if i in catalog.masks], max(1, workers))
        for text in problems:
            findings.tell(text)
        for text in notes:
            findings.note(text)


def tell_unread_pictures(root: Path, folder: str, findings: Findings) -> None:
    """Tell pictures below a folder whose format is not read."""
    unread = sorted(p for p in walk_files(root, folder) if PurePosixPath(p).suffix.lower() in unread_suffixes())
    if unread:
        findings.note(
            f"{len(unread)} pictures have formats that are not read and are left out ({shorten(unread)}): save them as "
            "JPEG or PNG."
        )


def check_lists(lists: dict[str, list[str]], findings: Findings) -> None:
    """Tell images that are trained on and tested on, by lists that somebody wrote."""
    for name, other in itertools.product(("train", "train_aug"), ("val", "test")):
        both = sorted(set(lists.get(name, ())) & set(lists.get(other, ())))
        if both:
            findings.tell(f"{len(both)} images of {name} are in {other} too ({', '.join(both[:5])}): mend the lists.")


def check_classes(catalog: Catalog, lists: dict[str, list[str]], findings: Findings) -> None:
    """Tell classes that no image has, or no training image, and names that sound like none or like each other."""
    counted = {name: _count_tags(catalog, ids) for name, ids in lists.items()}
    counts = {name: count for name, (count, _) in counted.items()}
    known_ids = [number for _, number in counted.values()]
    known = np.sum(list(counts.values()), 0) if counts else np.zeros(catalog.num_classes)
    if any(known_ids) and not known.any():
        findings.tell(
            "no image of any list has any class, so nothing can be trained: write the classes of each image into "
            "labels.csv (or draw them in the masks, where tags come from these; or check the export)."
        )
    empty = sorted({i for name, ids in lists.items() if name != "test" for i in ids if _is_empty(catalog, i)})
    if empty and known.any():
        findings.note(f"{len(empty)} images have no class ({shorten(empty)}): they are taken as background only.")
    nowhere = [name for name, count in zip(catalog.classes, known, strict=True) if not count]
    if nowhere and len(nowhere) < catalog.num_classes:
        findings.note(
            f"no image of any list has the class {shorten(nowhere)}: take it out of the list of classes, unless "
            "the masks count it (each class is one mask value)."
        )
    trained = "train_aug" if "train_aug" in lists else "train"
    if 0 < len(lists.get(trained, ())) < _FEW_IMAGES:
        findings.note(
            f"{trained} has {len(lists[trained])} images: that is too few to train on (as a rule, {_FEW_IMAGES} or "
            f"more, and {_FEW_OF_CLASS} or more of each class)."
        )
    elif trained in counts:
        few = [f"{c} ({n:g})" for c, n in zip(catalog.classes, counts[trained], strict=True) if 0 < n < _FEW_OF_CLASS]
        if few:
            findings.note(
                f"fewer than {_FEW_OF_CLASS} images of {trained} have the class {shorten(few)}: it is hardly learnt."
            )
    for name in ("train", "train_aug"):
        lacking = [c for c, n in enumerate(counts.get(name, ())) if not n and known[c]]
        if lacking:
            shown = shorten(catalog.classes[c] for c in lacking)
            findings.note(f"no image of {name} has the class {shown}: it is not learnt.")
    for name in catalog.classes:
        if name.strip("_ ").lower().replace(" ", "") in _NO_CLASS:
            findings.note(
                f"the class {name!r} sounds like no class at all: an image without any object has a line "
                "without a class, and pixels without a label are 255 in the masks."
            )
    letters: dict[str, list[str]] = {}
    for name in catalog.classes:
        letters.setdefault("".join(sorted(name.casefold())), []).append(name)
    for names in letters.values():
        if len(names) > 1 and len(names[0]) > 2 and catalog.classes_are_guessed:
            findings.tell(
                f"The classes {' and '.join(map(repr, names))} have the same letters: mend the one that is "
                "misspelt, or, if all are right, list all class names in classes.txt, one a line."
            )


_FEW_IMAGES, _FEW_OF_CLASS = 50, 10
"""Training images in all, and of a class, below which a note says that they are too few: a rule of thumb."""
_NO_CLASS = (*NO_CLASS, "none", "noclass", "nothing", "empty", "noobject", "nolabel", "nan", "null")
"""Names, without blanks and underscores at their ends, that people give to what is no class."""


def conclude(findings: Findings, flags: Sequence[str]) -> int:
    """Write what is planned and say how it ended; ``flags`` of the run that follows. Returns the exit status."""
    findings.write()
    if findings.count:
        print(f"\n{findings.count} problems, listed above as PROBLEM.")
        return 1
    print(f"\nAll is well. Now: python run_sample.py METHOD {shlex.join(map(str, flags))} ...")
    return 0
