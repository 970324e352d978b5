"""Label Studio's choices: its CSV, and its JSON in full or as JSON-MIN."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from misc.files.ids import image_suffixes
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
    read_annotations,
)
from voc12.lists import shorten
from voc12.table import names_in_cell
from voc12.tags import DataError

_OWN = {
    "id", "annotation_id", "annotator", "created_at", "updated_at", "lead_time", "inner_id", "project", "agreement",
    "completed_by", "annotation_agreement", "total_annotations", "cancelled_annotations", "predictions", "data",
}  # fmt: skip
"""Columns that Label Studio adds by itself."""
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")
"""What Label Studio puts before the names of files that were uploaded."""


@export_format("labelstudio", "Label Studio's choices: its CSV, JSON or JSON-MIN, a file of SRC or SRC itself")
def read_label_studio(source: Path) -> Export:
    """An image with several annotations has the choices of them all; one whose annotations are empty has no class. A
    classes.txt beside the file names the classes where their names are numbers or made of other names."""
    tables = [source] if source.is_file() else sorted([*source.glob("*.csv"), *source.glob("*.json")])
    need(tables, f"{source} holds no CSV and no JSON of Label Studio.")
    if len(tables) > 1:
        raise DataError(f"{source} holds {', '.join(p.name for p in tables)}: give the one that Label Studio wrote.")
    path = tables[0]
    folder = path.parent
    find = PictureFinder(folder)
    chosen: dict[Path, list[str]] = {}
    other: Counter[str] = Counter()
    entries = list(_table(path) if path.suffix == ".csv" else _tasks(path, other))
    files = find([_named(written) for written, _ in entries], path)
    find.check()
    classes, tags = classes_of_cells(path, folder / "classes.txt", [names for _, names in entries])
    for file, names in zip(files, tags, strict=True):
        assert file is not None  # checked
        chosen.setdefault(file, []).extend(names)
    images = [ExportedImage(f, named_by_path(folder, f), tuple(dict.fromkeys(n))) for f, n in chosen.items()]
    need(images, f"{path} names no image.")
    notes = find.notes()
    if other:
        shown = shorten([f"{kind} ({count})" for kind, count in other.most_common()])
        notes.append(f"annotations that are no choices are passed over: {shown}.")
    return Export(classes, images, tuple(notes))


def _named(written: str) -> NamedPicture:
    """An image by its path, and by its name before it was uploaded."""
    name = _file_name(written)
    return NamedPicture(name, other=_UPLOADED.sub("", PurePosixPath(name).name))


def _file_name(written: str) -> str:
    """``/data/upload/1/abc-a.jpg``, ``/data/local-files/?d=x/a.jpg`` and addresses -> the path of the file."""
    try:
        parts = urlsplit(written)
    except ValueError:  # it looks like an address and is none: a path, of which there is hardly a file
        return written
    local = parse_qs(parts.query).get("d")
    return local[0] if local else unquote(parts.path) if parts.scheme or written.startswith("/data/") else written


def _table(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(image as written, names) of every line of the CSV."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path))))
    except (ValueError, OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}): export it again.") from None
    need(rows, f"{path} has no line: export tasks that are annotated.")
    heads = [head for head in rows[0] if head]
    image = next((h for h in heads if all(_is_image(row[h]) for row in rows)), None)
    rest = [h for h in heads if h != image and h.lower() not in _OWN]
    columns = [h for h in rest if "choice" in h.lower()] or rest
    if image is None or len(columns) != 1:
        raise DataError(
            f"{path} has the columns {', '.join(heads)}: {'none' if image is None else image} names images, and "
            f"{', '.join(columns) or 'none'} may be the choices. Take the other columns out."
        )
    for number, row in enumerate(rows, 2):
        yield row[image], _choices(row[columns[0]], f"{path}, line {number}")


def _is_image(cell: str | None) -> bool:
    return PurePosixPath(_file_name(cell or "").lower()).suffix in image_suffixes()


def _choices(cell: Any, where: str) -> list[str]:
    """Names in a cell: one, several, or ``{"choices": [...]}`` as an object or as its text."""
    if isinstance(cell, str) and cell.lstrip().startswith("{"):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise DataError(f"{where}: {cell[:60]!r} is no choice. Export it again.") from None
    if isinstance(cell, dict):
        cell = cell.get("choices")
    if isinstance(cell, list) and all(isinstance(name, str) for name in cell):
        return cell
    if cell is None or isinstance(cell, str):
        return names_in_cell(cell or "")
    raise DataError(f"{where}: {str(cell)[:60]!r} is no choice. Export it again.")


def _tasks(path: Path, passed_over: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """(image as written, names) of every task of the JSON, which has a list of annotations or is JSON-MIN; kinds of
    annotations that are no choices are counted in ``passed_over``."""
    tasks = list(read_annotations(path, [dict]))
    columns = _choice_keys(tasks)
    if len(columns) > 1 or (tasks and not columns and not any("annotations" in task for task in tasks)):
        told = f"{', '.join(columns)} may be the choices. Take the others out." if columns else "no task has choices."
        raise DataError(f"{path}: {told}")
    for number, task in enumerate(tasks):
        where = f"{path}, task {number + 1}"
        fields = task.get("data") if isinstance(task.get("data"), dict) else task
        written = [v for v in fields.values() if isinstance(v, str) and _is_image(v)]
        if len(written) != 1:
            raise DataError(f"{where} names {len(written)} images, one is needed: {written[:3]}.")
        if "annotations" not in task:
            yield written[0], _choices(task[columns[0]], where) if columns and columns[0] in task else []
            continue
        names: list[str] = []
        for annotation in _list(task["annotations"], where):
            if not annotation.get("was_cancelled"):
                for result in _list(annotation.get("result"), where):
                    if result.get("type") == "choices":
                        names += _choices(result.get("value"), where)
                    else:
                        passed_over[str(result.get("type"))[:60]] += 1
        yield written[0], names


def _choice_keys(tasks: Sequence[dict[str, Any]]) -> list[str]:
    """Keys that may be the choices, of all tasks of JSON-MIN: one that a task lacks is none of that task alone."""
    minimal = [task for task in tasks if "annotations" not in task]
    images = {k for task in minimal for k, v in task.items() if isinstance(v, str) and _is_image(v)}
    rest = [k for k in dict.fromkeys(k for task in minimal for k in task) if k.lower() not in _OWN and k not in images]
    return [k for k in rest if "choice" in k.lower()] or rest


def _list(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{where}: {str(value)[:60]!r} is no list of annotations. Export it again as JSON.")
    return value
