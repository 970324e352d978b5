"""Image ids: of files, of the lines of a list; an id cannot leave its folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from misc.files.store import reading

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
"""Image files, the preferred one first where an id has several."""


def id_of_file(file: str) -> str:
    """Id of an image file: its name without folders and without an image extension (``a.b`` stays ``a.b``)."""
    name = PurePosixPath(file.strip().replace("\\", "/")).name
    return name.rsplit(".", 1)[0] if name.lower().endswith(IMAGE_SUFFIXES) else name


def checked_id(image_id: str) -> str:
    """The id itself; ValueError where it would leave its folder (``../``, absolute, drive, backslash) or is empty."""
    parts = PurePosixPath(image_id).parts
    if not image_id or image_id.startswith("/") or ".." in parts or "\\" in image_id or ":" in image_id:
        raise ValueError(f"Image id {image_id!r} is not allowed: ids are file names inside the data folder.")
    if "\0" in image_id or image_id in (".",):
        raise ValueError(f"Image id {image_id!r} is not allowed.")
    return image_id


def id_of_line(line: str) -> str:
    """Id of a line of a list file: its first word, the file name without extension (evaluation.md 3.1).

    Bare ids and lines such as ``/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png`` are understood.
    Raises ValueError for an id that leaves the folder.
    """
    word = line.split()[0]
    # a path is cut to its file name, but one that climbs is refused rather than quietly tamed
    checked_id(word.lstrip("/"))
    return checked_id(id_of_file(word))


def read_ids(path: Path, key: Callable[[str], str] = id_of_line) -> list[str]:
    """Image ids of a list file, ``key`` of each line that is not blank.

    Raises FileNotFoundError, ValueError (an empty list, an id twice, no text, what ``key`` refuses).
    """
    with reading(path, "List file", "", "save it as UTF-8 text, one image id a line"):
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
