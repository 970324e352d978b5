"""``labels.csv``: the tags of all images in one table, in either of two forms (docs/your_data.md).

    file,classes               file,dog,person
    a.jpg,dog;person           a.jpg,1,1
    b.jpg,                     b.jpg,0,0
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from misc.files.ids import composed, image_suffixes
from misc.files.store import LARGEST_TEXT, check_file
from voc12.tags import DataError, checked_classes, encode_tags, encoding_hint

FILE_HEADS = (
    "file", "image", "filename", "image_id", "id", "file_name", "image_name", "image_path", "image_file", "file_path",
    "filepath", "path", "name", "img", "img_name", "img_path",
)  # fmt: skip
"""What the first column may be called, whatever its capitals; blanks and hyphens count as underscores."""
CLASSES_HEADS = ("classes", "class", "labels", "label", "tags", "tag", "categories", "category")
"""What a column of class names may be called."""
_HEAD_LIKE = re.compile(r"(image|img|file|photo|picture)[ _-]?(id|name|path|file|url)s?|encoded_?pixels|annotation_id")
NUMBER = re.compile(r"[-+]?\d+([.,]\d*)?")
_LIST = re.compile(r"\[.*\]|\(.*[,'\"].*\)|\{.*[,:'\"].*\}", re.DOTALL)
_YES = ("1", "1.0", "x", "y", "yes", "true")
_NO = ("", "0", "0.0", "n", "no", "false")
_SHOWN = 10
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Table:
    """Content of a table of tags.

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

    Form 1 has the columns ``file,classes`` (the header may be left out), classes separated by ``;`` or ``|``, or as a
    list in brackets; commas separate where all parts are classes. An image without any class has a line with an empty
    second column. Form 2 has a header and one column a class with 1 or 0 (x, yes, true; nothing, no, false).

    Args:
        path: of the table, UTF-8.
        classes: the names that may occur; None: whatever occurs is a class, but numbers, lists and names made of other
            names.
        key: id of an image from its file as written; its ValueError is reported for the line.

    Raises:
        DataError: with the faults of the first ten lines that have one: unknown class, wrong number of columns, a cell
            that is neither yes nor no, an image that comes twice, an id that leaves the folder; or for a first line
            that
            looks like a header and is none that is known.
    """
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} is empty: write one line an image, file,class1;class2.")
    heads = [composed(cell.strip()) for cell in rows[0][1]]
    titled = _plain(heads[0]) in FILE_HEADS and not _is_image(heads[0])
    if not titled:
        _refuse_head(path, heads, rows)
    if titled and len(rows) == 1:
        raise DataError(f"{path} has a header and no line for an image: write one line an image.")
    columns: tuple[str, ...] = ()
    if titled and not (len(heads) == 2 and _plain(heads[1]) in CLASSES_HEADS):
        columns = checked_classes(heads[1:], lambda n: f"{path}, column {n + 1}")
        strange = [name for name in columns if classes is not None and name not in classes]
        if strange:
            raise DataError(f"{path}: the column {_unknown(strange[0], classes or ())}")

    allowed = None if classes is None else frozenset(classes)
    names: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    faults: list[str] = []
    for number, row in rows[titled:]:
        try:
            image_id = _key(row[0], key)
            alike = classes or () if len(faults) < _SHOWN else ()  # looking for a name that is alike takes time
            present = _marked(row, columns) if columns else _named(row, allowed, alike)
            if image_id in names:
                raise DataError(f": image {image_id!r} comes twice. Put all its classes on one line.")
            names[image_id], files[image_id] = present, row[0].strip()
        except DataError as error:
            faults.append(f"line {number}{error}")
    if faults:
        more = [f"... {len(faults) - _SHOWN} more lines"] if len(faults) > _SHOWN else []
        raise DataError(f"{path}, " + "\n  ".join([*faults[:_SHOWN], *more]))
    if classes is None and not columns:
        names = separate_names(path, names)
        occurring = sorted({name for present in names.values() for name in present})
        classes = checked_classes(occurring, lambda n: f"{path}, class {n}")
    elif classes is None:
        classes = columns
    return Table(tuple(classes), {i: encode_tags(present, classes) for i, present in names.items()}, files)


def _plain(head: str) -> str:
    return re.sub(r"[ -]+", "_", head.lower())


def _is_image(cell: str) -> bool:
    return PurePosixPath(cell.lower()).suffix in image_suffixes()


def _refuse_head(path: Path, heads: Sequence[str], rows: Sequence[tuple[int, Sequence[str]]]) -> None:
    """DataError where the first line looks like a header but its first column has no name that is known."""
    if _is_image(heads[0]):
        return
    firsts = [row[0].strip() for _, row in rows[1:1001]]
    named = any(_plain(head) in FILE_HEADS or _HEAD_LIKE.fullmatch(head.lower()) for head in heads)
    titled = len(heads) > 1 and _plain(heads[1]) in CLASSES_HEADS and heads[0] not in firsts
    if named or titled or (len(firsts) > 1 and all(map(_is_image, firsts))):
        raise DataError(
            f"{path}, line {rows[0][0]}: {','.join(heads)[:200]!r} looks like a header, and its first column "
            f"has no name that is known. Call the column of images one of {', '.join(FILE_HEADS)}, put it first, and "
            f"call a column of class names one of {', '.join(CLASSES_HEADS)} (or give each class a column of 1 and 0)."
        )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of the line, cells) of every line that is not blank."""
    try:
        check_file(path, LARGEST_TEXT)
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = next((mark for mark in ",\t;" if mark in first), ",")
            reader = csv.reader(file, delimiter=delimiter)
            begin = 1
            for row in reader:
                if reader.line_num > begin:
                    raise DataError(f"{path}, line {begin}: a cell has several lines. Is a quotation mark not closed?")
                begin = reader.line_num + 1
                if "\0" in "".join(row):
                    raise DataError(f"{path}, line {reader.line_num} holds a NUL character: {encoding_hint(path)}.")
                if any(cell.strip() for cell in row):
                    yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason}): {encoding_hint(path)}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{error}.") from None
    except csv.Error as error:
        raise DataError(f"{path} is no comma-separated table ({error}).") from None


def _key(written: str, key: Callable[[str], str]) -> str:
    if not written.strip():
        raise DataError(" names no image.")
    try:
        return key(written)
    except ValueError as error:
        raise DataError(f": {error}") from None


def _named(row: Sequence[str], allowed: frozenset[str] | None, classes: Sequence[str]) -> list[str]:
    """Classes of a line of form 1, of ``allowed`` ones where they are given."""
    if len(row) != 2:
        raise DataError(f" has {len(row)} columns: write file,class1;class2.")
    cells = names_in_cell(composed(row[1]))
    return cells if allowed is None else listed_names(cells, allowed, classes)


def listed_names(cells: Iterable[str], allowed: frozenset[str], classes: Sequence[str]) -> list[str]:
    """Classes of a line, of ``allowed`` ones; a name of several is taken apart where all parts are classes. DataError
    for others, with the one of ``classes`` that is alike."""
    present: list[str] = []
    for cell in cells:
        parts = [cell] if cell in allowed else next((p for p in _splits(cell) if allowed.issuperset(p)), None)
        if parts is None:
            raise DataError(f": {_unknown(cell, classes)}")
        present += parts
    return present


def names_in_cell(cell: str) -> list[str]:
    """Names that a cell lists: separated by ``;`` or ``|``, or a Python or JSON list."""
    cell = cell.strip()
    if _LIST.fullmatch(cell) and cell[1:-1].count("[") == 0 and ":" not in cell:
        quoted = re.findall(r"'([^']*)'|\"([^\"]*)\"", cell[1:-1])
        items = [one or other for one, other in quoted] if quoted else cell[1:-1].split(",")
    else:
        items = re.split(r"[;|]", cell)
    return [item.strip() for item in items if item.strip()]


def _splits(name: str) -> list[list[str]]:
    """The ways in which a name can be made of several."""
    ways = [[part.strip() for part in name.split(mark) if part.strip()] for mark in (",", "/")] + [name.split()]
    return [parts for parts in ways if len(parts) > 1]


def separate_names(path: Path, names: Mapping[K, Sequence[str]]) -> dict[K, list[str]]:
    """Tags of a table without a list of classes: names joined by commas are taken apart where all parts are classes of
    their own.

    Raises DataError for a name that is made of others in another way, that is a number, or that looks like a list.
    """
    occurring = {name for present in names.values() for name in present}
    simple = {name for name in occurring if "," not in name}
    joined = {n: [p.strip() for p in n.split(",") if p.strip()] for n in occurring - simple}
    joined = {name: parts for name, parts in joined.items() if parts and simple.issuperset(parts)}
    occurring -= joined.keys()
    listed = "or, if it is a name of its own, list all class names in classes.txt, one a line"
    numbers = sorted(name for name in occurring if NUMBER.fullmatch(name))
    if numbers:
        raise DataError(
            f"{path}: the class {numbers[0]!r} is a number. If 1 and 0 say whether an image has a class, name "
            f"the class in the header (file,tumor); otherwise write class names, {listed}."
        )
    for name in sorted(occurring):
        if _LIST.fullmatch(name):
            raise DataError(f"{path}: the class {name!r} looks like a list: separate classes by ';', {listed}.")
        for parts in _splits(name):
            if name != " ".join(parts) and any(part in occurring for part in parts) or occurring.issuperset(parts):
                raise DataError(
                    f"{path}: the class {name!r} is made of "
                    f"{', '.join(repr(p) for p in parts if p in occurring)}, which "
                    f"are classes too: separate classes by ';', {listed}."
                )
    several = {f" {name} ": name for name in occurring if " " in name}
    if len(several) <= 254:  # more are too many classes anyway
        for padded, name in sorted(several.items()):
            longer = min((other for spaced, other in several.items() if padded in spaced and other != name), default="")
            if longer:
                raise DataError(
                    f"{path}: the class {longer!r} holds the class {name!r}: separate classes by ';', {listed}."
                )
    return {i: [part for name in present for part in joined.get(name, [name])] for i, present in names.items()}


def _marked(row: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Classes of a line of form 2."""
    if len(row) != len(columns) + 1:
        raise DataError(f" has {len(row)} columns, the header has {len(columns) + 1}.")
    present = []
    for name, cell in zip(columns, row[1:], strict=True):
        word = cell.strip().lower()
        if word not in _YES and word not in _NO:
            hint = f" (A column of class names is called {CLASSES_HEADS[0]}.)" if len(columns) == 1 else ""
            raise DataError(f", column {name!r}: {cell!r} is neither 1 nor 0.{hint}")
        if word in _YES:
            present.append(name)
    return present


def _unknown(name: str, classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, classes, 1)
    hint = f" (is it {near[0]!r}?)" if near else ""
    return f"{name!r} is no class{hint}. Correct it, or add it to classes.txt."
