"""Tags in file names: ``patch-3[1 0 1].png`` has the first and the third class, as in LUAD-HistoSeg and BCSS-WSSS."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from voc12.export import Export, ExportedImage, export_format, find_pictures, need, split_of
from voc12.tags import DataError, read_classes

_MARKS = re.compile(r"\[\s*([01](?:[\s,;_]*[01])*)\s*\]")


@export_format("names", "tags in file names: a[1 0 1].png; SRC/classes.txt names the classes")
def read_marked_names(source: Path) -> Export:
    """Classes are called "class 1", ... where there is no classes.txt; images without marks are not tagged."""
    marked: dict[str, list[int]] = {}
    pictures = find_pictures(source)
    for path in pictures:
        found = _MARKS.findall(PurePosixPath(path).stem)
        if found:
            marked[path] = [int(mark) for mark in re.findall("[01]", found[-1])]
    need(marked, f"{source} holds no image with its tags in its name, such as a[1 0 1].png.")
    first = next(iter(marked))
    for path, marks in marked.items():
        if len(marks) != len(marked[first]):
            raise DataError(f"{source / path} has {len(marks)} marks, {first} has {len(marked[first])}: rename it.")
    listed = source / "classes.txt"
    classes = read_classes(listed) if listed.exists() else tuple(f"class {n + 1}" for n in range(len(marked[first])))
    if len(classes) != len(marked[first]):
        raise DataError(f"{listed} names {len(classes)} classes, file names have {len(marked[first])} marks: mend it.")
    notes = [] if listed.exists() else [f"classes have no names: write {listed}, one a line, in the marks' order."]
    if len(marked) < len(pictures):
        notes.append(f"{len(pictures) - len(marked)} images have no marks in their names and so no tags.")
    images = []
    for path in pictures:
        marks = marked.get(path)
        names = None if marks is None else tuple(c for c, mark in zip(classes, marks, strict=True) if mark)
        images.append(ExportedImage(source / path, path, names, split_of(path)[0]))
    return Export(classes, images, tuple(notes))
