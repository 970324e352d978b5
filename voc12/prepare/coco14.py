"""``python -m voc12.prepare coco14``: lists, tags and masks from COCO's annotations, a check of every file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from misc.files import atomic
from misc.files.ids import id_of_file
from misc.files.images import write_mask
from voc12.data_sets.coco14 import YEAR_FOLDERS, Coco14Catalog
from voc12.lists import shorten
from voc12.masks import check_claimed_size
from voc12.prepare.coco_annotations import CocoAnnotations, Crowds, read_coco_annotations
from voc12.prepare.findings import (
    WORKERS,
    DirOption,
    Findings,
    check_classes,
    check_files,
    check_folder,
    conclude,
    join_lines,
    print_counts,
    table_text,
)
from voc12.tags import DataError

_EXPECTED = {"train": 82783, "val": 40504, "train_tagged": 82081, "val_tagged": 40137}
"""Images of COCO 2014's lists (evaluation.md section 4)."""


@dataclass(frozen=True)
class _Render:
    """Draws one mask; picklable for worker processes."""

    instances: CocoAnnotations
    numbers: dict[str, int] = field(repr=False)
    folder: Path
    crowds: Crowds
    images: tuple[Path, ...]

    def __call__(self, image_id: str) -> None:
        number = self.numbers[image_id]
        name = PurePosixPath(self.instances.files[number]).name
        for image in (folder / name for folder in self.images):
            if image.is_file():  # missing ones are told later
                check_claimed_size(image, self.instances.sizes[number])
        write_mask(self.folder / f"{image_id}.png", self.instances.mask(number, self.crowds))


def prepare_coco14(
    root: DirOption, annotations: DirOption | None = None, masks: bool = True, crowd_tags: bool = True,
    crowd_masks: Crowds = "background", decode: bool = True, overwrite: bool = False, workers: int = WORKERS,
) -> int:
    """MS-COCO 2014: lists, tags and masks from instances_train2014.json and instances_val2014.json; 80 classes.

    Reading train2014's annotations takes some GB of memory; everything after it works image by image.

    Args:
        root: Folder with train2014 and val2014 (or images/train2014 ...).
        annotations: Folder of the JSON files; left out: annotations below root.
        masks: Draw the masks (needed for scores only). Masks that are there are kept.
        crowd_tags: An image whose only object of a class is a crowd has its tag.
        crowd_masks: What a crowd region is in the masks: background (ReCAM's rule) or ignored (255).
        decode: Read every image and mask; otherwise only look whether the files are there.
        overwrite: Replace lists, classes.txt and labels.csv that are there with other content.
        workers: Processes.
    """
    check_folder("--root", root)
    if annotations is not None:
        check_folder("--annotations", annotations)
    findings = Findings(overwrite)
    annotations = annotations or root / "annotations"
    rows: dict[str, tuple[str, list[str]]] = {}
    lists: dict[str, list[str]] = {}
    classes: tuple[str, ...] = ()
    for split, year in YEAR_FOLDERS.items():
        path = annotations / f"instances_{year}.json"
        if not path.exists() and not (root / year).exists() and not (root / "images" / year).exists():
            print(f"There is neither {path.name} nor a folder {year}: the list {split} is left out.")
            continue
        print(f"reading {path}")
        instances = read_coco_annotations(path)
        if instances.left_out:
            left_out = shorten(instances.left_out)
            findings.note(f"{path} has categories without an object that are no classes: {left_out}.")
        if classes and instances.classes != classes:
            raise DataError(f"{path} has other categories than the other file: take both from one download.")
        classes = instances.classes
        numbers = {id_of_file(file): number for number, file in instances.files.items()}
        twice = [i for i in numbers if i in rows]
        if twice or len(numbers) < len(instances.files):
            raise DataError(f"{path}: image files have one name twice ({', '.join(twice[:5]) or 'within the file'}).")
        names = {i: PurePosixPath(instances.files[n]).name for i, n in numbers.items()}
        rows.update({i: (names[i], instances.names(n, crowd_tags)) for i, n in numbers.items()})
        lists[split] = list(numbers)
        lists[f"{split}_tagged"] = [i for i in numbers if rows[i][1]]
        if masks:
            folder = root / "SegmentationClass" / year
            work = _Render(instances, numbers, folder, crowd_masks, (root / year, root / "images" / year))
            atomic.remove_leftovers([folder])
            there = {path.stem for path in folder.glob("*.png")}
            findings.work(f"masks of {year}", list(numbers), work, workers, there.__contains__)
    if not lists:
        raise DataError(f"There is no COCO in {root}: put train2014, val2014 and annotations/instances_*.json there.")
    findings.put(root / "classes.txt", join_lines(classes))
    findings.put(root / "labels.csv", table_text(rows.values()))
    for name, ids in lists.items():
        findings.put(root / "splits" / f"{name}.txt", join_lines(ids))
    findings.write()
    if findings.count:
        return conclude(findings, [])
    catalog = Coco14Catalog("coco14", root)
    check_files(catalog, lists, findings, decode, workers)
    check_classes(catalog, lists, findings)
    print_counts(catalog, lists, _EXPECTED)
    return conclude(findings, ["--data", "coco14", "--root", root])
