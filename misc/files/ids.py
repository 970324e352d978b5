"""Image ids of files and of lines in lists; an id cannot leave its folder."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

from misc.files.store import LARGEST_TEXT, check_file, reading

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
"""Suffixes of image files, in order of preference if an id has several files."""
_LONGEST = 4096
"""Characters of a path that systems open."""
_DRIVE = re.compile(r"[A-Za-z]:")
_SUFFIX = r"\.(?:" + "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES) + ")"
_PAIR = re.compile(
    rf"(?P<file>.+?{_SUFFIX})\s+(?:\S*/.*|.*{_SUFFIX}|[-+.\d\s]+)|(?P<id>\S+)(?:\s+(?:\S*/.*|\S+{_SUFFIX}|-1)|\s\s+[01])",
    re.IGNORECASE,
)
"""A line of more than an image: its first file and another path or numbers; or its id and a path or a mark as VOC's
lists of one class have it (``2008_000008  1``, ``2008_000015 -1``)."""


@cache
def image_suffixes() -> frozenset[str]:
    """Endings (with the dot, lower case) of the image formats that this Pillow reads."""
    Image.init()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


@cache
def unread_suffixes() -> frozenset[str]:
    """Endings of pictures of cameras, phones and drawing tools that this Pillow does not read."""
    known = "heic heif avif jxl cr2 cr3 nef arw orf rw2 raf dng svg psd ai"
    return frozenset(f".{suffix}" for suffix in known.split()) - image_suffixes()


def composed(text: str) -> str:
    """Text in Unicode's composed form (NFC), in which names are compared: file systems and editors use either form."""
    return unicodedata.normalize("NFC", text)


def strip_image_suffix(path: str) -> str:
    """A relative path in composed Unicode, ``/`` between its parts, without an image format's ending."""
    path = composed(path).replace("\\", "/")
    base, suffix = os.path.splitext(path)
    return base if suffix.lower() in image_suffixes() else path


def id_of_file(file: str) -> str:
    """Id of an image file: its name without folders and without an image extension (``a.b`` stays ``a.b``)."""
    name = PurePosixPath(composed(file.strip()).replace("\\", "/")).name
    return name.rsplit(".", 1)[0] if name.lower().endswith(IMAGE_SUFFIXES) else name


def checked_id(image_id: str) -> str:
    """The id itself; ValueError where it would leave its folder (``../``, absolute, drive, backslash) or is empty."""
    if image_id.startswith("/"):
        raise ValueError(f"Image id {image_id!r} is not allowed: it is an absolute path. Write paths below the folder.")
    if not image_id or ".." in image_id.split("/") or "\\" in image_id:
        raise ValueError(f"Image id {image_id!r} is not allowed: ids are file names inside the data folder.")
    if _DRIVE.match(image_id) or (os.name == "nt" and ":" in image_id):
        raise ValueError(
            f"Image id {image_id!r} is not allowed: its ':' reads as a drive. Write paths relative to the data folder, "
            "or rename the file."
        )
    if image_id == "." or any(mark in image_id for mark in "\0\n\r"):  # a list has one name a line
        raise ValueError(f"Image id {image_id!r} is not allowed: rename the file.")
    if not image_id.isascii() and image_id != image_id.encode(errors="replace").decode():
        raise ValueError(f"Image id {image_id!r} is not allowed: its letters are not in UTF-8. Rename the file.")
    return image_id


def result_path(folder: Path, image_id: str, suffix: str) -> Path:
    """FOLDER/ID.SUFFIX, where results of an image are written; ValueError for an id that leaves the folder, also by a
    link in it to a folder elsewhere. The folder itself may be a link."""
    path = folder / f"{checked_id(image_id)}{suffix}"
    if "/" in image_id:
        top, place = os.path.realpath(folder), os.path.realpath(path.parent)
        if place != top and not place.startswith(f"{top.rstrip(os.sep)}{os.sep}"):
            raise ValueError(f"Image id {image_id!r} is not allowed: {path.parent} leads to {place}. Remove that link.")
    return path


def walk_files(root: Path, folder: str = ".") -> Iterator[str]:
    """Paths below ``root`` (``/`` between parts) of the files in a folder of it and its sub-folders; hidden ones are
    left out, a link to a folder above it is not followed."""
    seen: set[str] = set()
    for place, folders, files in os.walk(root / folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        below = os.path.relpath(place, root).replace(os.sep, "/")
        yield from ((f"{below}/{file}" if below != "." else file) for file in files if not file.startswith("."))


def file_of_id(folder: Path, image_id: str, suffix: str) -> Path:
    """ID.SUFFIX in a folder, in the Unicode form in which it is there (composed, where it is not there at all)."""
    path = folder / f"{image_id}{suffix}"
    decomposed = folder / f"{unicodedata.normalize('NFD', image_id)}{suffix}"
    return decomposed if decomposed != path and not os.path.exists(path) and os.path.exists(decomposed) else path


class IdReader:
    """Makes an image id of a line of a list file (or of a cell of a table), given the ids that there are.

    The whole line is the id, spaces and sub-folders included, where there is such an image; an ending of an image
    format and folders above the images (``images/a.jpg``, ``/JPEGImages/a.jpg``, an absolute path) are taken off. A
    line of a pair, image and mask, is read by its first file only where the whole line is no image.
    """

    def __init__(
        self,
        known: Container[str] = (),
        is_folder: Callable[[str], bool] | None = None,
        roots: Sequence[Path] | None = None,
    ) -> None:
        """
        Args:
            known: the ids that there are, composed; empty: nothing is known of them.
            is_folder: whether some ids lie in this folder, which then is part of an id and not taken off; None: looked
                up in ``known``, which has to be a collection.
            roots: folders below which an absolute path must lie; None: its last parts are looked for as of any path.
        """
        self.known = known
        self._is_folder = is_folder or _folders_of(known).__contains__
        self._anywhere = roots is None
        forms = [form for root in roots or () for form in (os.path.abspath(root), os.path.realpath(root))]
        self._roots = [composed(str(form)) for form in forms]

    def __call__(self, line: str) -> str:
        """The id; ValueError for one that leaves the folder, and for an absolute path that leads to none of them."""
        if len(line) > _LONGEST:
            raise ValueError(f"Image id {line[:60]!r}... is not allowed: it has {len(line)} characters.")
        whole = self._below_root(composed(line.strip()).replace("\\", "/"))
        pair = _PAIR.fullmatch(whole)
        written = pair["file"] or pair["id"] if pair else whole
        found = self._exact(whole) if pair else None
        if found is None:
            self._check_absolute(written)
            found = self._find(written)
        if found is not None:
            return found
        # nothing there: the id to tell of
        parts = written.lstrip("/").split("/")
        if written.startswith("/") and ".." not in parts:
            return checked_id(strip_image_suffix(parts[-1]))
        return checked_id(strip_image_suffix(written.removeprefix("./")))

    def _check_absolute(self, written: str) -> None:
        parts = written.lstrip("/").split("/")
        if (written.startswith("/") or _DRIVE.match(written)) and ".." not in parts and not self._anywhere:
            if not (written.startswith("/") and len(parts) == 2):  # /JPEGImages/ID.jpg, evaluation.md 3.1
                raise ValueError(
                    f"Image id {written!r} is not allowed: it is an absolute path, and no image of this "
                    "data set. Write paths relative to the data folder."
                )

    def _below_root(self, path: str) -> str:
        return next((path[len(r) + 1 :] for r in self._roots if path.startswith(f"{r}/")), path)

    def _exact(self, path: str) -> str | None:
        return next((i for i in (strip_image_suffix(path), path) if i in self.known), None)

    def _find(self, written: str) -> str | None:
        parts = [part for part in written.split("/") if part not in ("", ".")]
        if ".." in parts:
            return None
        for start in range(len(parts)):
            rest = "/".join(parts[start:])
            found = self._exact(rest)
            if found is not None:
                return found
            if self._is_folder("/".join(parts[: start + 1])):
                return None
        return None


def _folders_of(known: Container[str]) -> set[str]:
    folders: set[str] = set()
    for image_id in known if isinstance(known, Collection) else ():
        while "/" in image_id:
            image_id = image_id.rpartition("/")[0]
            if image_id in folders:
                break
            folders.add(image_id)
    return folders


def read_ids(path: Path, key: Callable[[str], str] | None = None) -> list[str]:
    """Image ids of a list file, ``key`` (by default an ``IdReader`` that knows no image) of each line that is not
    blank.

    Raises FileNotFoundError, ValueError (an empty list, an id twice, no text, what ``key`` refuses).
    """
    key = key or IdReader()
    with reading(path, "List file", "", "save it as UTF-8 text, one image id a line"):
        check_file(path, LARGEST_TEXT)
        text = Path(path).read_text(encoding="utf-8-sig")
    ids: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            ids.append(key(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not ids:
        raise ValueError(f"{path} is empty: put one image id a line.")
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        more = " ..." if len(twice) > 5 else ""
        raise ValueError(f"{path} names images twice: {', '.join(twice[:5])}{more}. Remove the copies.")
    return ids
