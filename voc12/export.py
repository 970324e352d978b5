"""What annotation tools and other data sets' layouts export: the contract of a format, and the registry.

A format is one file in voc12/exports with one function, registered by ``@export_format("name", "what it is")``: it
reads a folder (or file) and returns an ``Export``. ``python -m voc12.prepare from`` makes a folder of one's own images
(``--data folder``) of it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from misc.files.ids import composed, image_suffixes, walk_files
from misc.files.images import read_mask
from misc.files.schema import Schema
from misc.files.store import read_json
from voc12.lists import shorten
from voc12.table import listed_names, separate_names
from voc12.tags import DataError, checked_classes, read_classes, tags_from_mask

SPLITS = {"train": "train", "training": "train", "valid": "val", "validation": "val", "val": "val", "test": "test"}
"""Folders (in lower case) that exports share their images out to -> names of our lists."""
_IMAGE_FOLDERS = ("images", "Images", "JPEGImages")
"""Folders of all images, which annotations may leave out of the paths."""


class MaskMaker(Protocol):
    """Makes the mask of an image: (H, W) uint8, 0 background, n the n-th class, 255 ignored; picklable.

    ``size`` is the height and width that the export claims; None where the mask is a file, whose reader checks it.
    """

    @property
    def size(self) -> tuple[int, int] | None: ...

    def __call__(self) -> np.ndarray: ...


@dataclass(frozen=True)
class MaskFile:
    """A mask that is there as a file."""

    path: Path
    size: None = None

    def __call__(self) -> np.ndarray:
        return read_mask(self.path)


@dataclass(frozen=True)
class ExportedImage:
    """An image of an export.

    Attributes:
        file: the image file.
        name: its path below our folder images/, with its ending; two images never share one.
        classes: names of its classes; None: nobody said, so it is not trained on.
        split: the list it belongs to; "": none is told.
        mask: makes its mask; None: it has none.
    """

    file: Path
    name: str
    classes: tuple[str, ...] | None
    split: str = ""
    mask: MaskMaker | None = None


@dataclass(frozen=True)
class Export:
    """All of an export: names of the classes in the order of the mask values, images, and what is to be told."""

    classes: tuple[str, ...]
    images: list[ExportedImage]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportFormat:
    """A format: what it is, in a line of the help, and its reader, which raises DataError with file and remedy."""

    about: str
    read: Callable[[Path], Export]


EXPORTS: dict[str, ExportFormat] = {}
"""Formats by their names on the command line; filled by ``load_exports``."""


def export_format(name: str, about: str) -> Callable[[Callable[[Path], Export]], Callable[[Path], Export]]:
    """Register the reader of a format under its name on the command line."""

    def add(read: Callable[[Path], Export]) -> Callable[[Path], Export]:
        if name in EXPORTS:
            raise ValueError(f"Two formats of exports are called {name!r}.")
        EXPORTS[name] = ExportFormat(about, read)
        return read

    return add


def load_exports() -> dict[str, ExportFormat]:
    """Import every file of voc12/exports, which fills EXPORTS; returns it."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "exports")]):
        importlib.import_module(f"voc12.exports.{module.name}")
    return EXPORTS


# ---------------------------------------------------------------------------------------------- what formats share


def find_pictures(source: Path) -> list[str]:
    """Paths of all images below a folder, ``/`` between parts, sorted."""
    return sorted(p for p in walk_files(source) if PurePosixPath(p).suffix.lower() in image_suffixes())


def split_of(path: str) -> tuple[str, str]:
    """(list, rest) of a path below an export: ``valid/cat/a.jpg`` -> ("val", "cat/a.jpg"); ("", path) where the first
    folder is none that images are shared out to."""
    first, slash, rest = path.partition("/")
    split = SPLITS.get(first.lower()) if slash else None
    return (split, rest) if split else ("", path)


def masked_images(
    source: Path, classes: tuple[str, ...], pictures: Iterable[str], folders: Sequence[str]
) -> list[ExportedImage]:
    """Images of a folder of VOC's layout: their tags are the classes of their masks.

    Args:
        source: the folder.
        classes: names of the mask values from 1 on.
        pictures: paths below ``source``, in JPEGImages.
        folders: where masks may be, below ``source``; DataError for an image without one, and for a damaged one.
    """
    images: list[ExportedImage] = []
    for path in pictures:
        name = PurePosixPath(path.removeprefix("JPEGImages/")).with_suffix(".png")
        masks = [source / folder / name for folder in folders if (source / folder / name).is_file()]
        need(masks, f"{source / path} has no mask in {' or '.join(folders)}, so its classes are not known.")
        try:
            tags = tags_from_mask(read_mask(masks[0]), len(classes))
        except ValueError as error:
            raise DataError(f"{masks[0]}: {error}") from None
        names = tuple(name for name, tag in zip(classes, tags, strict=True) if tag)
        images.append(ExportedImage(source / path, path, names, mask=MaskFile(masks[0])))
    return images


@dataclass(frozen=True)
class NamedPicture:
    """An image as annotations name it.

    Attributes:
        written: its name or path.
        folders: where a relative path may start, in order of preference; the export's own folder is tried last.
        other: another name that the tool may have given it; "": none.
    """

    written: str
    folders: tuple[Path, ...] = ()
    other: str = ""


class PictureFinder:
    """Finds the images that annotations name.

    The named path, sub-folders included, is the image where there is such a file: below a folder that the annotations
    start from, below the export, or below a folder images in one of these. Otherwise the file whose path ends with most
    parts of the named one is taken, if it is the only one that does, no other named image is that file, and it does not
    lie in the folder of another list (train, val, test); ``notes`` tells that. All others are missing.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._below = {composed(path): path for path in find_pictures(source)}
        self._by_name: dict[str, list[str]] = {}
        for path in self._below:
            self._by_name.setdefault(path.rpartition("/")[2], []).append(path)
        self._where = source
        self._missing: list[str] = []
        self._unnamed: list[str] = []
        self._elsewhere: list[str] = []

    def __call__(self, pictures: Sequence[NamedPicture], where: Path) -> list[Path | None]:
        """The file of each image; None (and DataError by ``check``) where there is none. ``where``: the annotations."""
        self._where = where
        found = [self._named(picture) for picture in pictures]
        claims: dict[str, set[NamedPicture]] = {}
        for picture, path in zip(pictures, found, strict=True):
            if path is not None:
                claims.setdefault(path, set()).add(picture)
        like: dict[NamedPicture, list[str]] = {}
        for picture in dict.fromkeys(p for p, path in zip(pictures, found, strict=True) if path is None):
            like[picture] = self._alike(picture)
            if len(like[picture]) == 1:
                claims.setdefault(like[picture][0], set()).add(picture)
        taken: dict[NamedPicture, str] = {}
        for picture, paths in like.items():
            written = picture.written if len(picture.written) <= 200 else f"{picture.written[:200]}..."
            if len(paths) > 1:
                self._missing.append(f"{written}, which may be any of {', '.join(paths[:3])}")
            elif paths and len(claims[paths[0]]) > 1:
                self._missing.append(f"{written}, and {paths[0]} is named otherwise too")
            elif paths:
                taken[picture] = paths[0]
                self._elsewhere.append(f"{written}: {paths[0]}")
            else:
                self._missing.append(written)
        files = [path or taken.get(picture) for picture, path in zip(pictures, found, strict=True)]
        self._unnamed = sorted(self._below.keys() - set(files))
        return [None if path is None else self.source / self._below.get(path, path) for path in files]

    def _named(self, picture: NamedPicture) -> str | None:
        """Path below the export of the file at the named path."""
        path = composed(picture.written).replace("\\", "/").strip()
        for start in (*picture.folders, self.source):
            for folder in (start, *(start / name for name in _IMAGE_FOLDERS)):
                below = os.path.relpath(os.path.normpath(folder / path), self.source).replace(os.sep, "/")
                if not below.startswith("../") and (composed(below) in self._below or os.path.isfile(folder / path)):
                    return composed(below) if composed(below) in self._below else below
        return None

    def _alike(self, picture: NamedPicture) -> list[str]:
        """Paths below the export that end with most parts of the named path."""
        start_folder = os.path.relpath(picture.folders[0], self.source) if picture.folders else ""
        beside = _lists_of(start_folder.replace(os.sep, "/").split("/"))
        for written in filter(None, (picture.written, picture.other)):
            parts = [p for p in composed(written).replace("\\", "/").strip().split("/") if p not in ("", ".", "..")]
            lists = _lists_of(parts[:-1]) or beside
            named = self._by_name.get(parts[-1], []) if parts else []
            for start in range(len(parts)):
                end = "/".join(parts[start:])
                found = [path for path in named if f"/{path}".endswith(f"/{end}")]
                if found:
                    own = {path: _lists_of(path.split("/")[:-1]) for path in found}
                    return [path for path in found if not (own[path] and lists) or own[path] & lists]
        return []

    def notes(self) -> list[str]:
        """What to tell of images that were not where they are named, and of those that are not named."""
        notes: list[str] = []
        if self._elsewhere:
            many = f"{len(self._elsewhere)} images are not at the path that the annotations name, and the only file"
            notes.append(f"{many} that has the end of that path is taken ({shorten(self._elsewhere)}).")
        if self._unnamed:
            many = f"{len(self._unnamed)} images of {self.source} are not named by the annotations and are left out"
            notes.append(f"{many} ({shorten(self._unnamed)}).")
        return notes

    def check(self) -> None:
        """DataError for images that were looked for and are not there."""
        if self._missing:
            shown = "; ".join(self._missing[:5]) + ("; ..." if len(self._missing) > 5 else "")
            raise DataError(
                f"{self._where}: {len(self._missing)} images are named and not there ({shown}): put them into "
                f"{self.source}, at the path that is named."
            )


def _lists_of(folders: Iterable[str]) -> set[str]:
    """Lists that the names of folders stand for."""
    return {SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}


def named_by_path(source: Path, file: Path) -> str:
    """Name below our images/ of a file: its path below the export, or its name where it lies outside."""
    return file.relative_to(source).as_posix() if file.is_relative_to(source) else file.name


def without_folder(images: Iterable[tuple[str, Any]], *folders: str) -> Iterator[tuple[str, Any]]:
    """(name, thing) with a first folder taken off that all names share and that is one of ``folders``."""
    images = list(images)
    for folder in folders:
        if images and all(name.startswith(f"{folder}/") for name, _ in images):
            images = [(name[len(folder) + 1 :], thing) for name, thing in images]
    return iter(images)


def all_classes(names: Iterable[str], where: Path) -> tuple[str, ...]:
    """Names that occur, in order and each once; DataError where they can be no classes."""
    return checked_classes(sorted({composed(name) for name in names}), lambda n: f"{where}, class {n}")


def classes_of_cells(
    table: Path, listed: Path, names: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(classes, names of the classes of every line) of a table that another tool wrote, checked as those of labels.csv:
    several names in a cell are taken apart, and DataError is raised for a class that is none.

    Args:
        table: the table, for the error.
        listed: file that names all classes, one a line; it may be missing.
        names: what every line has.
    """
    lines = [[composed(name.strip()) for name in line if name.strip()] for line in names]
    if listed.exists():
        classes = read_classes(listed)
        allowed = frozenset(classes)
        try:
            found = [listed_names(line, allowed, classes) for line in lines]
        except DataError as error:
            raise DataError(f"{table}{error} ({listed})") from None
    else:
        found = list(separate_names(table, dict(enumerate(lines))).values())
        classes = all_classes((name for line in found for name in line), table)
    return classes, [tuple(dict.fromkeys(line)) for line in found]


def read_annotations(path: Path, form: Schema) -> Any:
    """JSON of annotations; DataError for a damaged file and for one of another form."""
    try:
        return read_json(path, form)
    except (ValueError, OSError) as error:
        raise DataError(str(error).replace("delete it and run again", "export it again")) from None


def need(found: Sequence[Any], text: str) -> None:
    """DataError with ``text`` where nothing was found."""
    if not found:
        raise DataError(text)
