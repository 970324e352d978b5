"""``python -m voc12.prepare from``: a folder of your own images made of what another tool exported."""

from __future__ import annotations

import filecmp
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from misc.commandline import WrongCall
from misc.files import atomic, store
from misc.files.ids import checked_id, strip_image_suffix
from misc.files.images import read_mask, write_mask
from misc.files.store import check_file
from voc12.export import ExportedImage, load_exports, without_folder
from voc12.lists import shorten
from voc12.masks import check_claimed_size
from voc12.prepare.findings import (
    WORKERS,
    DirOption,
    Findings,
    conclude,
    join_lines,
    table_text,
    tell_unread_pictures,
)
from voc12.prepare.folder import prepare_folder
from voc12.tags import DataError, checked_classes


@dataclass(frozen=True)
class _Convert:
    """Links or copies one image and writes its mask; picklable for worker processes."""

    images: dict[str, ExportedImage] = field(repr=False)
    root: Path
    copy: bool
    overwrite: bool

    def files(self, image_id: str) -> tuple[Path, Path]:
        """Image and mask of our folder."""
        return self.root / "images" / self.images[image_id].name, self.root / "masks" / f"{image_id}.png"

    def __call__(self, image_id: str) -> None:
        source = self.images[image_id]
        image, mask = self.files(image_id)
        check_file(source.file)
        if source.mask is not None and source.mask.size is not None:
            check_claimed_size(source.file, source.mask.size)
        if source.mask is not None:
            drawn = source.mask()
            if self.overwrite or not mask.exists():
                write_mask(mask, drawn)
            elif not np.array_equal(read_mask(mask), drawn):
                raise DataError(f"{mask} is there with other content and is kept: --overwrite replaces it.")
        if image.exists():
            if image.samefile(source.file) or filecmp.cmp(image, source.file, shallow=False):
                return
            if not self.overwrite:
                raise DataError(f"{image} is there with other content and is kept: --overwrite replaces it.")
            image.unlink()
        image.parent.mkdir(parents=True, exist_ok=True)
        if not self.copy:
            try:
                os.link(os.path.realpath(source.file), image)  # one file under two names: no space is needed
                return
            except OSError:  # another disk, or none that has links
                pass
        store.write_bytes(image, source.file.read_bytes())


def prepare_from(
    form: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FORMAT", name="format")],
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    root: DirOption, copy: bool = False, overwrite: bool = False, workers: int = WORKERS,
) -> int:
    """Make a folder of your own images of what another tool exported, and check it.

    Images become links to those of SRC (copies where links are not possible); labels.csv, classes.txt, lists, and masks
    where the format has outlines, are written. A second call makes what is missing, and tells what has changed. Where
    there are problems, what the call has made is removed again (what --overwrite replaced stays replaced).

    Args:
        form: What SRC is. {formats}
        source: Folder or file of the export.
        root: Folder to make, for --data folder --root DIR.
        copy: Copy the images, so that SRC can be removed.
        overwrite: Replace labels.csv, classes.txt, lists, masks and images that are there with other content.
        workers: Processes.
    """
    formats = load_exports()
    if form not in formats:
        raise WrongCall(f"There is no format {form!r}. There are: {', '.join(formats)}.")
    if not source.exists():
        raise WrongCall(f"{source} does not exist: give the folder or file of the export.")
    export = formats[form].read(source.absolute())
    findings = Findings(overwrite)
    for note in export.notes:
        findings.note(note)
    tell_unread_pictures(source if source.is_dir() else source.parent, ".", findings)
    images: dict[str, ExportedImage] = {}
    tops = ("JPEGImages", "images", "Images")
    for name, image in without_folder([(image.name, image) for image in export.images], *tops):
        image_id = checked_id(strip_image_suffix(name))
        if image_id in images:
            other = images[image_id].file
            same = f"{other} is named twice: put all its classes into one line or entry."
            told = f"{image.file} and {other} would both be {image_id}: rename one."
            findings.tell(same if image.file == other else told)
        images[image_id] = ExportedImage(image.file, name, image.classes, image.split, image.mask)
    classes = checked_classes(export.classes, lambda n: f"{source}, class {n}")
    for path, text in _texts(images, classes, findings).items():
        findings.put(root / path, text)
    if findings.count:
        return conclude(findings, [])
    work = _Convert(images, root, copy, overwrite)
    atomic.remove_leftovers([root])
    made = _NewFiles(root, [*findings.planned, *(path for image_id in images for path in work.files(image_id))])
    try:
        status = _fill(findings, work, workers)
    except Exception:
        made.remove()
        raise
    if status:
        made.remove()
        print(f"Nothing that this call made in {root} is kept: mend what is told, and start the same command again.")
    return status


class _NewFiles:
    """Files that are to be made, less those that are there, and the folders made for them."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self._files = [path for path in files if not os.path.lexists(path)]
        above = {folder for path in self._files for folder in path.parents if folder.is_relative_to(root)}
        self._folders = [folder for folder in above if not os.path.lexists(folder)]

    def remove(self) -> None:
        """Remove them again, and folders that are empty then."""
        for path in self._files:
            path.unlink(missing_ok=True)
        for folder in sorted(self._folders, key=lambda path: -len(path.parts)):
            with suppress(OSError):
                folder.rmdir()


def _fill(findings: Findings, work: _Convert, workers: int) -> int:
    """Make images, masks and texts and check the folder; returns the exit status."""
    images, root = work.images, work.root
    findings.work("linking images, drawing masks", list(images), work, workers)
    if any(image.mask is not None for image in images.values()):
        bare = [i for i, image in images.items() if image.mask is None and work.files(i)[1].exists()]
        if bare:
            findings.tell(
                f"{len(bare)} images have no outlines in the export, but masks in {root / 'masks'} ({shorten(bare)}): "
                "remove those that are not your own."
            )
    findings.write()
    if findings.count:
        return conclude(findings, [])
    return prepare_folder(root, workers=workers)


def _texts(images: dict[str, ExportedImage], classes: tuple[str, ...], findings: Findings) -> dict[str, str]:
    """Texts of labels.csv, classes.txt and lists. Where there is a list train and none of val, test takes its place."""
    rows = [(image.name, image.classes) for image in images.values() if image.classes is not None]
    texts = {"classes.txt": join_lines(classes), "labels.csv": table_text(rows)}
    count = Counter(image.split for image in images.values())
    lists = {"train": "train", "val": "val" if count["val"] else "test", "test": "test"}
    if count["train"] and count[lists["val"]]:
        if lists["val"] == "test":
            findings.note("there is no list of validation images: test is taken for val too.")
        for name, split in lists.items():
            ids = [i for i, image in images.items() if image.split == split]
            if ids:
                texts[f"splits/{name}.txt"] = join_lines(images[i].name for i in ids)
    elif any(count[split] for split in lists.values()):
        parts = ", ".join(f"{split} ({n})" for split, n in count.items() if split)
        findings.note(f"the images are of {parts} alone: no lists are written, python -m voc12.prepare folder "
                      "--val-share draws them.")  # fmt: skip
    untold = [i for i, image in images.items() if image.classes is None]
    if untold:
        findings.note(f"{len(untold)} images have no tags and no line in labels.csv ({shorten(untold)}).")
    return texts


prepare_from.__doc__ = (prepare_from.__doc__ or "").replace(
    "{formats}", "; ".join(f"{name}: {export.about}" for name, export in load_exports().items()) + "."
)
