"""Images given on a command line as files, folders and globs, and the ids of their results."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from misc.files.ids import IMAGE_SUFFIXES, unread_suffixes, walk_files


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
        for path, name in _named(word, None if leave_out is None else real_path(leave_out)):
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


def unread_pictures(words: Sequence[str]) -> list[str]:
    """Pictures in the folders among these words whose format is not read, and which ``find_images`` passes over."""
    return sorted(
        os.path.join(word, path)
        for word in words if os.path.isdir(word)
        for path in walk_files(Path(word)) if os.path.splitext(path)[1].lower() in unread_suffixes()
    )  # fmt: skip


def real_path(path: Path) -> Path:
    """Where a path leads, links followed; links in circles are left as they are."""
    return Path(os.path.realpath(path))


def safe_name(name: str) -> str:
    """A relative path without what may not stand in an id (``ids.checked_id``): drives, backslashes, ``..``,
    letters that are not in UTF-8."""
    parts = name.encode(errors="replace").decode().replace("\\", "_").replace(":", "_").split("/")
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)


def _named(word: str, leave_out: Path | None) -> Iterator[tuple[Path, str]]:
    """(path, name below its folder) of what one word means."""
    path = Path(word)
    if path.is_dir():
        yield from _below(path, leave_out)
    elif path.exists() or not glob.has_magic(word):
        yield path, path.name
    else:
        for match in map(Path, sorted(glob.glob(word, recursive=True))):
            if match.is_dir():
                continue
            if match.suffix.lower() in IMAGE_SUFFIXES and not _inside(real_path(match), leave_out):
                yield match, match.name


def _below(folder: Path, leave_out: Path | None) -> Iterator[tuple[Path, str]]:
    for top, inner, names in os.walk(folder):
        inner[:] = sorted(n for n in inner if not n.startswith(".") and not _inside(real_path(Path(top, n)), leave_out))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                path = Path(top, name)
                yield path, path.relative_to(folder).as_posix()


def _inside(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.is_relative_to(folder)
