"""Class folders: ``CLASS/a.jpg``, also below ``train/``, ``valid/`` or ``test/``, as for image classification."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path, PurePosixPath

from voc12.export import Export, ExportedImage, all_classes, export_format, find_pictures, need, split_of
from voc12.lists import shorten

_NO_CLASSES = {"images", "Images", "image", "JPEGImages", "imgs", "photos", "Photos", "pictures", "data", "dataset"}
"""Names of a folder round all class folders."""


@export_format("folders", "class folders, CLASS/a.jpg, also below train/, valid/ or test/")
def read_class_folders(source: Path) -> Export:
    """An image in the folders of several classes (the same file) has them all. A folder such as images, in which all
    class folders lie, is no class."""
    parts = [(path, *split_of(path)) for path in find_pictures(source)]
    notes: list[str] = []
    tops = {rest.split("/")[0] for _, _, rest in parts}
    if len(tops) == 1 and tops <= _NO_CLASSES:
        (top,) = tops
        notes.append(f"all images lie in folders {top}/, which is no class: the folders in it are the classes.")
        inner = [(path, split, rest.partition("/")[2]) for path, split, rest in parts]
        parts = [(path, split, rest) if split else (path, *split_of(rest)) for path, split, rest in inner]
    placed = [(path, split, rest.split("/")[0]) for path, split, rest in parts if "/" in rest]  # path, list, class
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
    if merged:
        notes.append(f"{merged} images lie in the folders of several classes and have them all.")
    beside = [path for path, _, rest in parts if "/" not in rest]
    if beside:
        notes.append(f"{len(beside)} images lie in no folder of a class and are left out ({shorten(beside)}).")
    images.sort(key=lambda image: image.name)
    return Export(all_classes((name for _, _, name in placed), source), images, tuple(notes))
