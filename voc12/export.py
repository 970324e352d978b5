"""What annotation tools and other data sets' layouts export: the contract of a format, and the registry.

A format is one file in voc12/exports with one function, registered by ``@export_format("name", "what it is")``: it
reads a folder (or file) and returns an ``Export``. ``python -m voc12.prepare from`` makes a folder of one's own images
(``--data folder``) of it.
"""

from __future__ import annotations

import importlib
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
from voc12.tags import DataError, checked_classes, tags_from_mask

SPLITS = {"train": "train", "training": "train", "valid": "val", "validation": "val", "val": "val", "test": "test"}
"""Folders (in lower case) that exports share their images out to -> names of our lists."""


class MaskMaker(Protocol):
    """Makes the mask of an image: (H, W) uint8, 0 background, n the n-th class, 255 ignored; picklable."""

    def __call__(self) -> np.ndarray: ...


@dataclass(frozen=True)
class MaskFile:
    """A mask that is there as a file."""

    path: Path

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


class PictureFinder:
    """Finds the images that annotations name: beside them, or by the name alone anywhere below the export."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._by_name: dict[str, list[str]] = {}
        for path in find_pictures(source):
            self._by_name.setdefault(composed(PurePosixPath(path).name), []).append(path)
        self._missing: list[str] = []

    def __call__(self, written: str, beside: Path | None = None, where: str = "") -> Path | None:
        """The file; None (and remembered for ``check``) where there is none.

        Args:
            written: name or path as the annotations have it.
            beside: folder to look in first; the export's own folder by default.
            where: who names it, for the error. DataError where several files have the name.
        """
        parts = [part for part in composed(written).replace("\\", "/").split("/") if part not in ("", ".", "..")]
        for top in (beside or self.source, self.source):
            for start in range(len(parts)):
                path = top.joinpath(*parts[start:])
                if path.is_file():
                    return path
        named = self._by_name.get(parts[-1] if parts else "", [])
        if len(named) > 1:
            raise DataError(f"{where or self.source}: {written!r} may be any of {', '.join(named[:3])}: rename them.")
        if not named:
            self._missing.append(written)
            return None
        return self.source / named[0]

    def has(self, written: str) -> bool:
        """Whether a file has this name, anywhere below the export."""
        return composed(PurePosixPath(written.replace("\\", "/")).name) in self._by_name

    def check(self) -> None:
        """DataError for images that were looked for and are not there."""
        if self._missing:
            shown = ", ".join(self._missing[:5]) + (" ..." if len(self._missing) > 5 else "")
            raise DataError(
                f"{len(self._missing)} images are named and not there ({shown}): put them into {self.source}, in any "
                "folder of it."
            )


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
