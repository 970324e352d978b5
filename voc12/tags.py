"""Image-level tags: from VOC annotations, from ``labels.csv``, from masks (evaluation.md 3.4, seam.md 6).

Tags are (C,) float32 vectors of 0 and 1 over the foreground classes.
"""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from misc.store import image_id

IGNORE = 255


class DataError(ValueError):
    """The data set is not what it should be; the message says what, where, and what to do."""


def encode(names: Iterable[str], classes: Sequence[str]) -> np.ndarray:
    """(C,) float32 vector with 1 for each class in ``names``; names that are no class are passed over."""
    present = set(names)
    return np.array([name in present for name in classes], np.float32)


def names_from_xml(text: str) -> list[str]:
    """Names of all objects in a VOC annotation, in its order, repetitions kept.

    Objects flagged difficult count; names of body parts do not (seam.md section 6). Raises DataError for text that is
    no XML, and for a document type or entities: annotations need none, and a few lines of them can fill the memory.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError("holds a document type or entities, which annotations never need: remove them.")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise DataError(f"is no well-formed XML ({error}): replace it.") from None
    return [(thing.findtext("name") or "").strip() for thing in root.iter("object")]


def read_xml(path: Path) -> list[str]:
    """``names_from_xml`` of a UTF-8 file; DataError names the file."""
    try:
        return names_from_xml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason}): save it as UTF-8.") from None
    except DataError as error:
        raise DataError(f"{path} {error}") from None


def read_csv(path: Path, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Tags of a table with the columns ``file,classes``: an image file or id, and class names separated by ``;``.

    An image without any class has a line with an empty second column. Returns {id: (C,) float32}.
    Raises DataError (with the line) for an unknown class, a line that is no such pair, an image that comes twice.
    """
    known = set(classes)
    table: dict[str, np.ndarray] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if not row or (reader.line_num == 1 and row[0].strip().lower() == "file"):
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(row) != 2:
                    raise DataError(f"{where} has {len(row)} columns: write file,class1;class2.")
                key = image_id(row[0])
                names = [name.strip() for name in row[1].split(";") if name.strip()]
                strange = [name for name in names if name not in known]
                if strange:
                    raise DataError(f"{where}: {strange[0]!r} is no class. Correct it, or add it to classes.txt.")
                if key in table:
                    raise DataError(f"{where}: image {key!r} comes twice. Put all its classes on one line.")
                table[key] = encode(names, classes)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason}): save it as UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path} is no comma-separated table ({error}).") from None
    return table


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

    Raises DataError for an empty file, an empty line between two names, a name twice, a line for the background, and
    more than 254 names (masks are 8-bit, 0 and 255 are taken).
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason}): save it as UTF-8.") from None
    if not names:
        raise DataError(f"{path} is empty: write one class name a line.")
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{path}, line {number} is empty: line n names class n.")
        if name.strip("_").lower() == "background":
            raise DataError(f"{path}, line {number}: the background is no class of its own here. Remove the line.")
        if name in names[: number - 1]:
            raise DataError(f"{path}, line {number}: class {name!r} comes twice.")
    if len(names) > 254:
        raise DataError(f"{path} names {len(names)} classes: 8-bit masks hold at most 254.")
    return tuple(names)
