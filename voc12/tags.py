"""Image-level tags: from VOC annotations and from masks; names of classes (evaluation.md 3.4, seam.md 6).

Tags are (C,) float32 vectors of 0 and 1 over the foreground classes.
"""

from __future__ import annotations

import csv
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from misc.files.ids import composed
from misc.files.store import LARGEST_TEXT, check_file
from misc.image.labels import IGNORE

_LARGEST_XML = 16 << 20
_LARGEST_WORDS = 1 << 20
_JOINERS = "\u200c\u200d"
"""Invisible characters that Persian, Indic scripts and emoji are written with."""
_T = TypeVar("_T")


class DataError(ValueError):
    """The data set has a problem; the message says what, where, and what to do."""


def encode_tags(names: Iterable[str], classes: Sequence[str]) -> np.ndarray:
    """(C,) float32 vector with 1 for each class in ``names``; other names are ignored."""
    present = set(names)
    return np.array([name in present for name in classes], np.float32)


def names_from_xml(text: str, difficult: bool = True) -> list[str]:
    """Names of all objects in a VOC annotation, in its order, repetitions kept.

    Objects flagged difficult count unless ``difficult`` is False; names of body parts do not (seam.md section 6).
    Raises DataError for text that ``parse_xml`` refuses.
    """
    return [
        composed((thing.findtext("name") or "").strip())
        for thing in parse_xml(text).iter("object")
        if difficult or (thing.findtext("difficult") or "0").strip() in ("", "0")
    ]


def parse_xml(text: str) -> ET.Element:
    """The root element of XML.

    Raises DataError for text that is no XML, and for a document type or entities: annotations need none, and a few
    lines of them can fill the memory.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError("holds a document type or entities, which annotations never need: remove them.")
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError, RecursionError) as error:
        raise DataError(f"is no well-formed XML ({error}): replace it.") from None


def read_xml(path: Path, difficult: bool = True) -> list[str]:
    """``names_from_xml`` of a file, in the encoding that it declares; DataError names the file."""
    return read_xml_file(path, lambda text: names_from_xml(text, difficult))


def read_xml_file(path: Path, use: Callable[[str], _T], largest: int = _LARGEST_XML) -> _T:
    """``use`` of the text of an XML file of at most ``largest`` bytes, in the encoding that it declares, without its
    declaration; DataError names the file."""
    try:
        check_file(path, largest)
        data = path.read_bytes()
        text = data.decode(_xml_encoding(data))
        return use(re.sub(r"^\s*<\?xml.*?\?>", "", text, count=1, flags=re.DOTALL))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(f"{path} is not in the encoding that it declares ({error}): save it as UTF-8.") from None
    except ValueError as error:
        told = str(error)
        raise DataError(told if told.startswith(str(path)) else f"{path} {told}") from None


def _xml_encoding(data: bytes) -> str:
    """Name of the encoding of an XML file, by its byte order mark or its first line."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    declared = re.match(rb"(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.-]+)[\"']", data)
    name = declared[1].decode("ascii") if declared else "utf-8"
    return "utf-8-sig" if name.lower().replace("-", "") == "utf8" else name


def encoding_hint(path: Path) -> str:
    """What to do about a text file that is not in UTF-8."""
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or start.count(b"\0") > len(start) // 4:
        return "it looks like UTF-16 (Excel's 'Unicode text'): save it as UTF-8 (CSV UTF-8)"
    return "it looks like a code page of Windows or of old systems: save it as UTF-8 (in Excel: CSV UTF-8)"


def read_texts(path: Path, classes: Sequence[str]) -> dict[str, str]:
    """What classes are called in words, for networks that read: lines ``class,words`` of a UTF-8 file; words may hold
    commas. Classes may be left out. DataError for a damaged file and for a name that is no class."""
    try:
        check_file(path, _LARGEST_WORDS)
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.reader(text.splitlines()))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: write lines 'class,words for it'.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} can't be read ({error.reason}): {encoding_hint(path)}.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} can't be read ({error}): save it as UTF-8 text, a line 'class,words' each.") from None
    if "\0" in text:
        raise DataError(f"{path} holds a NUL character: {encoding_hint(path)}.")
    texts: dict[str, str] = {}
    known = {composed(name): name for name in classes}
    for number, row in enumerate(rows, 1):
        if not any(cell.strip() for cell in row):
            continue
        name, words = composed(row[0].strip()), ",".join(row[1:]).strip()
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
    names = [composed(line.strip()) for line in _read_lines(path)]
    if not names:
        raise DataError(f"{path} is empty: write one class name a line.")
    return checked_classes(names, lambda number: f"{path}, line {number}")


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names of labelme's ``class_names.txt`` or ``labels.txt``, without ``__ignore__`` and ``_background_``.

    Raises DataError as ``read_classes``.
    """
    names = [composed(line.strip()) for line in _read_lines(path) if line.strip()]
    kept = [name for name in names if name.strip("_").lower() not in ("background", "ignore")]
    return checked_classes(kept, lambda number: f"{path}, class {number}")


def _read_lines(path: Path) -> list[str]:
    try:
        check_file(path, LARGEST_TEXT)
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason}): {encoding_hint(path)}.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from None


def checked_classes(names: Sequence[str], where: Callable[[int], str]) -> tuple[str, ...]:
    """The names themselves; ``where(n)`` says where name n (from 1) stands.

    Raises DataError for no name at all, an empty name, a name twice, a name of the background, with a ``;`` or an
    invisible character, and more than 254 names (masks are 8-bit, 0 and 255 are taken).
    """
    if not names:
        raise DataError(f"{where(1)}: there is no class at all. Name at least one.")
    if len(names) > 254:
        raise DataError(f"{where(255)}: {len(names)} classes are too many, 8-bit masks hold at most 254.")
    for number, name in enumerate(names, 1):
        if not isinstance(name, str):
            raise DataError(f"{where(number)}: {name!r} is no text.")
        if not name:
            raise DataError(f"{where(number)} is empty: the n-th name is that of class n.")
        if name.strip("_").lower() == "background":
            raise DataError(f"{where(number)}: the background is no class of its own here. Remove it.")
        if ";" in name:
            raise DataError(f"{where(number)}: {name!r} has a semicolon, which separates classes. Rename it.")
        if any(unicodedata.category(mark) in ("Cc", "Cf") and mark not in _JOINERS for mark in name):
            raise DataError(
                f"{where(number)}: {ascii(name)} has a character that is not seen, which makes it another class than "
                "the same name without it. Remove it."
            )
        if name in names[: number - 1]:
            raise DataError(f"{where(number)}: class {name!r} comes twice.")
    return tuple(names)
