"""Image-level tags: from VOC annotations and from masks; names of classes (evaluation.md 3.4, seam.md 6).

Tags are (C,) float32 vectors of 0 and 1 over the foreground classes.
"""

from __future__ import annotations

import csv
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from misc.image.labels import IGNORE


class DataError(ValueError):
    """The data set is not what it should be; the message says what, where, and what to do."""


def encode_tags(names: Iterable[str], classes: Sequence[str]) -> np.ndarray:
    """(C,) float32 vector with 1 for each class in ``names``; names that are no class are passed over."""
    present = set(names)
    return np.array([name in present for name in classes], np.float32)


def names_from_xml(text: str, difficult: bool = True) -> list[str]:
    """Names of all objects in a VOC annotation, in its order, repetitions kept.

    Objects flagged difficult count unless ``difficult`` is False; names of body parts do not (seam.md section 6).
    Raises DataError for text that is no XML, and for a document type or entities: annotations need none, and a few
    lines of them can fill the memory.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError("holds a document type or entities, which annotations never need: remove them.")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise DataError(f"is no well-formed XML ({error}): replace it.") from None
    return [
        (thing.findtext("name") or "").strip()
        for thing in root.iter("object")
        if difficult or (thing.findtext("difficult") or "0").strip() in ("", "0")
    ]


def read_xml(path: Path, difficult: bool = True) -> list[str]:
    """``names_from_xml`` of a UTF-8 file; DataError names the file."""
    try:
        return names_from_xml(path.read_text(encoding="utf-8-sig"), difficult)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason}): save it as UTF-8.") from None
    except DataError as error:
        raise DataError(f"{path} {error}") from None


def read_texts(path: Path, classes: Sequence[str]) -> dict[str, str]:
    """What classes are called in words, for networks that read: lines ``class,words`` of a UTF-8 file; words may hold
    commas. Classes may be left out. DataError for a damaged file and for a name that is no class."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: write lines 'class,words for it'.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} can't be read ({error}): save it as UTF-8 text, a line 'class,words' each.") from None
    texts: dict[str, str] = {}
    known = {unicodedata.normalize("NFC", name): name for name in classes}
    for number, row in enumerate(rows, 1):
        if not any(cell.strip() for cell in row):
            continue
        name, words = unicodedata.normalize("NFC", row[0].strip()), ",".join(row[1:]).strip()
        if name not in known or not words or known[name] in texts:
            problem = "has no words" if name in known and not words else "is there twice" if name in known else \
                f"is no class; there are: {', '.join(classes[:20])}"
            raise DataError(f"{path}, line {number}: {name!r} {problem}.")
        texts[known[name]] = words
    return texts


def tags_from_mask(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Classes that occur in a mask: (H, W) uint8, 0 background, c + 1 class c, 255 ignored -> (C,) float32.

    Raises DataError for a value that is no class.
    """
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    strange = present[(present > num_classes) & (present != IGNORE)]
    if len(strange):
        raise DataError(f"holds the value {strange[0]}, but there are {num_classes} classes.")
    tags = np.zeros(num_classes, np.float32)
    tags[present[(present > 0) & (present != IGNORE)] - 1] = 1
    return tags


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names of a ``classes.txt``: line n names class n, the background is not among them.

    Raises DataError for an empty file, and for what ``checked_classes`` refuses.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason}): save it as UTF-8.") from None
    if not names:
        raise DataError(f"{path} is empty: write one class name a line.")
    return checked_classes(names, lambda number: f"{path}, line {number}")


def checked_classes(names: Sequence[str], where: Callable[[int], str]) -> tuple[str, ...]:
    """The names themselves; ``where(n)`` says where name n (from 1) stands.

    Raises DataError for no name at all, an empty name, a name twice, a name of the background or with a ``;``, and
    more than 254 names (masks are 8-bit, 0 and 255 are taken).
    """
    if not names:
        raise DataError(f"{where(1)}: there is no class at all. Name at least one.")
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{where(number)} is empty: the n-th name is that of class n.")
        if name.strip("_").lower() == "background":
            raise DataError(f"{where(number)}: the background is no class of its own here. Remove it.")
        if ";" in name:
            raise DataError(f"{where(number)}: {name!r} has a semicolon, which separates classes. Rename it.")
        if name in names[: number - 1]:
            raise DataError(f"{where(number)}: class {name!r} comes twice.")
    if len(names) > 254:
        raise DataError(f"{where(255)}: {len(names)} classes are too many, 8-bit masks hold at most 254.")
    return tuple(names)
