"""Class folders: ``CLASS/a.jpg``, also below ``train/``, ``valid/`` or ``test/``, as for image classification."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path, PurePosixPath

from voc12.export import Export, ExportedImage, all_classes, export_format, find_pictures, need, split_of


@export_format("folders", "class folders, CLASS/a.jpg, also below train/, valid/ or test/")
def read_class_folders(source: Path) -> Export:
    """An image in the folders of several classes (the same file) has them all."""
    placed: list[tuple[str, str, str]] = []  # path, list, class
    for path in find_pictures(source):
        split, rest = split_of(path)
        if "/" in rest:
            placed.append((path, split, rest.split("/")[0]))
    need(placed, f"{source} holds no image in a folder of its class: put them into {source}/CLASS/.")
    alike: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)
    for entry in placed:
        alike[PurePosixPath(entry[0]).name, entry[1]].append(entry)
    images: list[ExportedImage] = []
    merged = 0
    for entries in alike.values():
        same: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
        for entry in entries:
            content = hashlib.sha256((source / entry[0]).read_bytes()).hexdigest() if len(entries) > 1 else ""
            same[content].append(entry)
        for copies in same.values():
            path, split, _ = copies[0]
            merged += len(copies) > 1
            names = tuple(sorted({name for _, _, name in copies}))
            images.append(ExportedImage(source / path, path, names, split))
    notes = (f"{merged} images lie in the folders of several classes and have them all.",) if merged else ()
    images.sort(key=lambda image: image.name)
    return Export(all_classes((name for _, _, name in placed), source), images, notes)
