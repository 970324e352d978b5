"""COCO's JSON of instances, one a folder as Roboflow writes it (``train/_annotations.coco.json``), or a single file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from voc12.export import (
    SPLITS,
    Export,
    ExportedImage,
    NamedPicture,
    PictureFinder,
    export_format,
    named_by_path,
    need,
)
from voc12.prepare.coco_annotations import CocoAnnotations, read_coco_annotations
from voc12.tags import DataError


@dataclass(frozen=True)
class _Mask:
    annotations: CocoAnnotations = field(repr=False)
    number: int

    @property
    def size(self) -> tuple[int, int]:
        return self.annotations.sizes[self.number]

    def __call__(self) -> np.ndarray:
        return self.annotations.mask(self.number, "ignore")


@export_format("coco", "COCO JSON: Roboflow's train/_annotations.coco.json ..., CVAT's and others' instances*.json")
def read_coco_export(source: Path) -> Export:
    """Masks are drawn for images all of whose objects have an outline; a crowd is ignored in them."""
    files = _annotation_files(source)
    need(files, f"{source} holds no COCO annotations: looked for _annotations.coco.json and instances*.json.")
    folder = source if source.is_dir() else source.parent
    find = PictureFinder(folder)
    classes: tuple[str, ...] = ()
    images: list[ExportedImage] = []
    notes: list[str] = []
    boxed = 0
    parts: list[tuple[Path, CocoAnnotations]] = []
    for path in files:
        found = read_coco_annotations(path)
        if classes and found.classes != classes:
            raise DataError(f"{path} has other categories than {files[0]}: export all parts together.")
        classes = found.classes
        if found.left_out:
            notes.append(f"{path} has categories without an object that are no classes: {', '.join(found.left_out)}.")
        parts.append((path, found))
    named = [NamedPicture(n, _starts(folder, path)) for path, found in parts for n in found.files.values()]
    pictures = iter(find(named, files[0] if len(files) == 1 else folder))
    find.check()
    for path, found in parts:
        split = next((SPLITS[word] for word in (path.parent.name.lower(), _kind(path)) if word in SPLITS), "")
        for number in found.files:
            file = next(pictures)
            assert file is not None  # checked
            objects = found.objects.get(number, [])
            outlined = [thing for thing in objects if thing["segmentation"]]
            boxed += len(outlined) < len(objects)
            mask = _Mask(found, number) if outlined and len(outlined) == len(objects) else None
            images.append(ExportedImage(file, named_by_path(folder, file), tuple(found.names(number)), split, mask))
    notes += find.notes()
    if boxed:
        notes.append(f"{boxed} images have objects with a box and no outline: they get tags and no mask.")
    return Export(classes, images, tuple(notes))


def _annotation_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    found = [p for pattern in ("_annotations.coco.json", "instances*.json") for p in source.rglob(pattern)]
    return sorted(found) or sorted(p for p in source.rglob("*.json") if p.parent.name == "annotations")


def _starts(folder: Path, path: Path) -> tuple[Path, ...]:
    """Folders that names in a file may start from: its own, and train2017 of instances_train2017.json."""
    kind = path.stem.rpartition("_")[2]
    return path.parent, *(top / kind for top in (folder, folder / "images", path.parent.parent))


def _kind(path: Path) -> str:
    """"train" of instances_train.json and instances_train2017.json."""
    return path.stem.lower().rpartition("_")[2].rstrip("0123456789")
