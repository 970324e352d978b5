"""``labels.csv``: the tags of many images in one table, in the two forms that people write (docs/your_data.md).

    file,classes               file,dog,person
    a.jpg,dog;person           a.jpg,1,1
    b.jpg,                     b.jpg,0,0
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voc12.tags import DataError, checked_classes, encode_tags

FILE_HEADS = ("file", "image", "filename", "image_id", "id")
CLASSES_HEADS = ("classes", "class", "labels", "label", "tags")
_YES = ("1", "1.0", "x", "y", "yes", "true")
_NO = ("", "0", "0.0", "n", "no", "false")
_SHOWN = 10


@dataclass(frozen=True)
class Table:
    """What a table of tags says.

    Attributes:
        classes: names of the classes; the given ones, or where none were given the columns, or all names in order.
        tags: {id: (C,) float32 of 0 and 1}, in the order of the lines.
        files: {id: the image file as it is written in the table}.
    """

    classes: tuple[str, ...]
    tags: dict[str, np.ndarray]
    files: dict[str, str]


def read_table(path: Path, classes: Sequence[str] | None, key: Callable[[str], str]) -> Table:
    """Read a table of either form; commas, semicolons or tabs between the columns, with or without a byte order mark.

    Form 1 has the columns ``file,classes`` (the header may be left out), classes separated by ``;``. An image without
    any class has a line with an empty second column. Form 2 has a header and one column a class with 1 or 0 (x, yes,
    true; nothing, no, false).

    Args:
        path: of the table, UTF-8.
        classes: the names that may occur; None: whatever occurs is a class.
        key: id of an image, from its file as written; its ValueError is the line's fault.

    Raises:
        DataError: with the faults of the first ten lines that have one: unknown class, wrong number of columns, a cell
            that is neither yes nor no, an image that comes twice, an id that leaves the folder.
    """
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} is empty: write one line an image, file,class1;class2.")
    heads = [cell.strip() for cell in rows[0][1]]
    titled = heads[0].lower() in FILE_HEADS
    columns: tuple[str, ...] = ()
    if titled and not (len(heads) == 2 and heads[1].lower() in CLASSES_HEADS):
        columns = checked_classes(heads[1:], lambda n: f"{path}, column {n + 1}")
        strange = [name for name in columns if classes is not None and name not in classes]
        if strange:
            raise DataError(f"{path}: the column {_unknown(strange[0], classes or ())}")

    names: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    faults: list[str] = []
    for number, row in rows[titled:]:
        try:
            image_id = _key(row[0], key)
            present = _marked(row, columns) if columns else _named(row)
            unknown = [name for name in present if classes is not None and name not in classes]
            if unknown:
                raise DataError(f": {_unknown(unknown[0], classes or ())}")
            if image_id in names:
                raise DataError(f": image {image_id!r} comes twice. Put all its classes on one line.")
            names[image_id], files[image_id] = present, row[0].strip()
        except DataError as error:
            faults.append(f"line {number}{error}")
    if faults:
        more = [f"... {len(faults) - _SHOWN} more lines"] if len(faults) > _SHOWN else []
        raise DataError(f"{path}, " + "\n  ".join([*faults[:_SHOWN], *more]))
    if classes is None:
        occurring = sorted({name for present in names.values() for name in present})
        classes = columns or checked_classes(occurring, lambda n: f"{path}, class {n}")
    return Table(tuple(classes), {i: encode_tags(present, classes) for i, present in names.items()}, files)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of the line, cells) of every line that is not blank."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = next((mark for mark in ",\t;" if mark in first), ",")
            reader = csv.reader(file, delimiter=delimiter)
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason}): save it as UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path} is no comma-separated table ({error}).") from None


def _key(written: str, key: Callable[[str], str]) -> str:
    if not written.strip():
        raise DataError(" names no image.")
    try:
        return key(written)
    except ValueError as error:
        raise DataError(f": {error}") from None


def _named(row: Sequence[str]) -> list[str]:
    """Classes of a line of form 1."""
    if len(row) != 2:
        raise DataError(f" has {len(row)} columns: write file,class1;class2.")
    return [name.strip() for name in row[1].split(";") if name.strip()]


def _marked(row: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Classes of a line of form 2."""
    if len(row) != len(columns) + 1:
        raise DataError(f" has {len(row)} columns, the header has {len(columns) + 1}.")
    present = []
    for name, cell in zip(columns, row[1:], strict=True):
        word = cell.strip().lower()
        if word not in _YES and word not in _NO:
            raise DataError(f", column {name!r}: {cell!r} is neither 1 nor 0.")
        if word in _YES:
            present.append(name)
    return present


def _unknown(name: str, classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, classes, 1)
    hint = f" (is it {near[0]!r}?)" if near else ""
    return f"{name!r} is no class{hint}. Correct it, or add it to classes.txt."
