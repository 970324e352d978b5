"""HuggingFace's image folders: ``metadata.csv`` or ``metadata.jsonl`` beside the images, also in ``train/`` ..."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from misc.files.store import read_text
from voc12.export import (
    Export,
    ExportedImage,
    NamedPicture,
    PictureFinder,
    classes_of_cells,
    export_format,
    named_by_path,
    need,
    split_of,
)
from voc12.table import CLASSES_HEADS, names_in_cell
from voc12.tags import DataError, read_classes


@export_format("huggingface", "image folders with metadata.csv or metadata.jsonl (file_name and label, or 0/1 columns)")
def read_metadata(source: Path) -> Export:
    """Labels that are numbers (also 1.0, and true and false for 1 and 0) are the lines of SRC/classes.txt, from 0."""
    files = sorted([*source.rglob("metadata.csv"), *source.rglob("metadata.jsonl")])
    need(files, f"{source} holds no metadata.csv and no metadata.jsonl.")
    listed = source / "classes.txt"
    numbered = read_classes(listed) if listed.exists() else None
    find = PictureFinder(source)
    images: list[ExportedImage] = []
    columns: tuple[str, ...] = ()
    named: list[NamedPicture] = []
    names: list[tuple[str, ...]] = []
    for path in files:
        rows = _rows(path)
        columns, present = _labels(path, rows, numbered)
        names += present
        named += [NamedPicture(row["file_name"], (path.parent,)) for row in rows]
    pictures = find(named, files[0] if len(files) == 1 else source)
    find.check()
    if columns:
        classes = columns
    else:
        classes, names = classes_of_cells(files[0], listed, names)
    for file, tags in zip(pictures, names, strict=True):
        assert file is not None  # checked
        name = named_by_path(source, file)
        images.append(ExportedImage(file, name, tags, split_of(name)[0]))
    return Export(classes, images, tuple(find.notes()))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a table; DataError where one names no image."""
    try:
        text = read_text(path)
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}): save it again.") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"].strip():
            raise DataError(f"{path}, line {number}: it has no file_name. Every line needs one.")
    need(rows, f"{path} has no line: it needs one an image.")
    return rows


def _labels(
    path: Path, rows: list[dict[str, Any]], numbered: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(classes where each is a column of 0 and 1, names of the classes of every row)."""
    heads = [head for head in rows[0] if head not in (None, "file_name")]
    column = next((head for head in heads if head.lower() in CLASSES_HEADS), None)
    marks = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
    if column is not None:
        cells = [row.get(column) for row in rows]
        if all(str(cell).strip().lower() in marks for cell in cells):
            cells = [int(marks[str(cell).strip().lower()]) for cell in cells]
        return (), [_names(path, number, cell, numbered) for number, cell in enumerate(cells, 1)]
    columns = tuple(head for head in heads if all(str(row.get(head)).strip().lower() in marks for row in rows))
    if not columns:
        raise DataError(
            f"{path} has no column of labels: call it one of {', '.join(CLASSES_HEADS)}, or give every class a column "
            f"of 0 and 1 (there: {', '.join(map(str, heads)) or 'file_name alone'})."
        )
    return columns, [tuple(c for c in columns if marks[str(row[c]).strip().lower()]) for row in rows]


def _names(path: Path, number: int, value: Any, numbered: tuple[str, ...] | None) -> tuple[str, ...]:
    """Classes of a cell: names, or numbers from 0 on of the list of classes."""
    if isinstance(value, list):
        items = [str(item) for item in value]
    else:
        items = names_in_cell(str(value)) if value is not None else []
    found: list[str] = []
    for item in (re.sub(r"^(\d+)\.0*$", r"\1", item.strip()) for item in items):  # pandas makes 1.0 of 1
        if not item.isdecimal():
            found.append(item)
        elif numbered is None:
            raise DataError(
                f"{path}, line {number}: the label {item} is a number. Write {path.parent / 'classes.txt'} (at the "
                "top of the folder), one class name a line, the first for 0."
            )
        elif int(item) >= len(numbered):
            raise DataError(f"{path}, line {number}: the label {item} is none of the {len(numbered)} classes.")
        else:
            found.append(numbered[int(item)])
    return tuple(dict.fromkeys(found))
