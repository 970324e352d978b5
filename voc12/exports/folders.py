"""Class folders: ``CLASS/a.jpg``, also below ``train/``, ``valid/`` or ``test/``, as for image classification."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

from misc.files.store import check_file
from voc12.export import SPLITS, Export, ExportedImage, all_classes, export_format, find_pictures, need, split_of
from voc12.lists import shorten
from voc12.table import NUMBER
from voc12.tags import DataError

_NO_CLASSES = {"images", "Images", "image", "JPEGImages", "imgs", "photos", "Photos", "pictures", "data", "dataset"}
"""Names of a folder round all class folders."""


def _digest(path: Path) -> str:
    try:
        check_file(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (ValueError, OSError) as error:
        raise DataError(f"Image {path} cannot be read ({error}): replace or remove it.") from None


def _list_of(folder: str) -> str | None:
    """List of a folder such as seg_train or test_set; "" for images to predict, None for a folder that is no list."""
    words = re.split(r"[^a-z]+", folder.lower())
    told = [SPLITS[word] for word in words if word in SPLITS]
    return told[0] if told else "" if {"pred", "predict", "prediction"} & set(words) else None


@export_format("folders", "class folders, CLASS/a.jpg, also below train/, valid/ or test/")
def read_class_folders(source: Path) -> Export:
    """An image in the folders of several classes (the same file) has them all. A folder in which all class folders
    lie (images, PetImages), and folders seg_train, seg_test that hold folders only, are no classes."""
    parts = [(path, *split_of(path)) for path in find_pictures(source)]
    notes: list[str] = []
    while True:
        tops = sorted({rest.split("/")[0] for _, _, rest in parts if "/" in rest})
        bare = {rest.split("/")[0] for _, _, rest in parts if rest.count("/") == 1}  # files lie in the folder itself
        lists = [_list_of(top) for top in tops]
        if len(tops) > 1 and all(told is not None for told in lists) and not any(map(_list_of, bare)):
            parts = [(path, split or _list_of(rest.split("/")[0]) or "", rest.partition("/")[2] or rest)
                     for path, split, rest in parts]  # fmt: skip
            notes.append(f"the folders {', '.join(tops)} are lists, no classes: the folders in them are the classes.")
        elif len(tops) == 1 and (not bare or tops[0] in _NO_CLASSES):
            (top,) = tops
            notes.append(f"all images lie in folders {top}/, which is no class: the folders in it are the classes.")
            inner = [(path, split, rest.removeprefix(f"{top}/")) for path, split, rest in parts]
            parts = [(path, split, rest) if split else (path, *split_of(rest)) for path, split, rest in inner]
        else:
            break
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
            content = _digest(source / entry[0]) if len(entries) > 1 else ""
            same[content].append(entry)
        for copies in same.values():
            path, split, _ = copies[0]
            merged += len(copies) > 1
            names = tuple(sorted({name for _, _, name in copies}))
            images.append(ExportedImage(source / path, path, names, split))
    within = [path for path, _, rest in parts if rest.count("/") > 1]
    if within:
        notes.append(f"{len(within)} images lie in folders inside a folder of a class and have the class of the outer "
                     f"one ({shorten(within)}). Where the inner folders are the classes, give the folder that holds "
                     "those.")  # fmt: skip
    numbers = sorted({name for _, _, name in placed if NUMBER.fullmatch(name)})
    if numbers:
        notes.append(f"the folders {shorten(numbers)} are classes whose names are numbers: rename the folders to give "
                     "them names.")  # fmt: skip
    if merged:
        notes.append(f"{merged} images lie in the folders of several classes and have them all.")
    beside = [path for path, _, rest in parts if "/" not in rest]
    if beside:
        notes.append(f"{len(beside)} images lie in no folder of a class and are left out ({shorten(beside)}).")
    images.sort(key=lambda image: image.name)
    return Export(all_classes((name for _, _, name in placed), source), images, tuple(dict.fromkeys(notes)))
