"""Images given on a command line as files, folders and globs, and the ids of their results."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from misc.files.ids import IMAGE_SUFFIXES, image_suffixes, unread_suffixes

_NO_PICTURES = {".bufr", ".grib", ".h5", ".hdf", ".mpeg", ".mpg"}
"""Endings of data and films, which Pillow names among its formats."""
_SURROGATE = re.compile("[\ud800-\udfff]")
"""What stands for a byte of a file name that is not in UTF-8."""


def find_images(words: Sequence[str], leave_out: Path | None = None) -> dict[str, Path]:
    """The images given, by ids under which results can be written.

    A folder stands for all images below it that have a known suffix; its ids keep the sub-folders. Other images have
    their file name without suffix for an id; images that would share one get their suffix into it (``a.jpg``). An image
    that is named several times counts once. A file that isn't there is listed all the same: reading it reports it.

    Args:
        words: files, folders, globs (``*``, ``?``, ``[]``, ``**``).
        leave_out: a folder below which no image is looked for (where results go).

    Returns:
        {id: path}, files of a folder or glob sorted by name.

    Raises:
        ValueError: there is none, or two would have one id even so (from several folders).
    """
    found: dict[Path, str] = {}  # the file itself -> its name below its folder
    paths: dict[Path, Path] = {}
    for word in words:
        for path, name in _files(word, leave_out):
            if _is_searched(word) and path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            paths.setdefault(real_path(path), path)
            found.setdefault(real_path(path), name)
    if not found:
        raise ValueError(
            f"There is no image in {', '.join(words)}: give files, folders or globs of {', '.join(IMAGE_SUFFIXES)}."
        )
    short = {file: safe_name(os.path.splitext(name)[0]) for file, name in found.items()}
    count = Counter(short.values())
    ids = {file: safe_name(found[file]) if count[name] > 1 else name for file, name in short.items()}
    images: dict[str, Path] = {}
    for file, image_id in ids.items():
        if image_id in images:
            raise ValueError(
                f"{images[image_id]} and {paths[file]} would both be written as {image_id}: give the folder that holds "
                "both (its sub-folders are kept apart), or call once for each."
            )
        images[image_id] = paths[file]
    return images


def unread_pictures(words: Sequence[str], leave_out: Path | None = None) -> list[str]:
    """Paths of the pictures of other formats that ``find_images`` passes over in these folders and globs, each once."""
    unread = (image_suffixes() | unread_suffixes()) - {*IMAGE_SUFFIXES, *_NO_PICTURES}
    taken = {real_path(Path(word)) for word in words if not _is_searched(word)}
    found: dict[Path, str] = {}
    for word in words:
        for path, _ in _files(word, leave_out):
            if path.suffix.lower() in unread and real_path(path) not in taken:
                found.setdefault(real_path(path), str(path))
    return sorted(found.values())


def real_path(path: Path) -> Path:
    """Where a path leads, links followed; links in circles are left as they are."""
    return Path(os.path.realpath(path))


def safe_name(name: str) -> str:
    """A relative path without what may not stand in an id (``ids.checked_id``): drives, backslashes, ``..``,
    letters that are not in UTF-8."""
    parts = _SURROGATE.sub("_", name).replace("\\", "_").replace(":", "_").split("/")
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)


def _is_searched(word: str) -> bool:
    """Whether a word is a folder or a glob; the others are files, whatever their ending."""
    return os.path.isdir(word) or (glob.has_magic(word) and not os.path.exists(word))


def _files(word: str, leave_out: Path | None) -> Iterator[tuple[Path, str]]:
    """(path, name below its folder) of what one word means, files of any ending."""
    path, out = Path(word), None if leave_out is None else real_path(leave_out)
    if not _is_searched(word):
        yield path, path.name
    elif path.is_dir():
        yield from _below(path, out)
    else:
        for match in map(Path, sorted(glob.glob(word, recursive=True))):
            if not match.is_dir() and not _inside(real_path(match), out):
                yield match, match.name


def _below(folder: Path, leave_out: Path | None) -> Iterator[tuple[Path, str]]:
    for top, inner, names in os.walk(folder):
        inner[:] = sorted(n for n in inner if not n.startswith(".") and not _inside(real_path(Path(top, n)), leave_out))
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(top, name)
                yield path, path.relative_to(folder).as_posix()


def _inside(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.is_relative_to(folder)
