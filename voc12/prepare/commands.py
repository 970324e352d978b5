"""Makes a download ready and checks it, once: lists, tags, masks, and every missing or damaged file by name.

    python -m voc12.prepare voc12 --root VOCdevkit/VOC2012 --sbd benchmark_RELEASE
    python -m voc12.prepare coco14 --root coco
    python -m voc12.prepare folder --root my_photos --val-share 0.2
    python -m voc12.prepare shrink --root my_photos --out my_photos_1024

Run again, it goes on where it stopped and changes nothing that is there. The exit status is 1 where anything is wrong.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image

from misc import distributed
from misc.files import store
from misc.image.pixels import resize_image, resize_mask, scaled_size
from misc.loop.each import EachFailed, WorkerDied, each
from voc12 import coco14 as coco
from voc12 import tags as tags_of
from voc12.catalog import Catalog, VocCatalog, find_root
from voc12.folder import FolderCatalog
from voc12.prepare.instances import Crowds, Instances, read_instances
from voc12.prepare.sbd import find_classes, read_segmentation
from voc12.tags import DataError

EXPECTED = {"train": 1464, "train_aug": 10582, "val": 1449, "test": 1456}
"""Images of VOC 2012's lists (evaluation.md 3.1)."""
COCO_EXPECTED = {"train": 82783, "val": 40504, "train_tagged": 82081, "val_tagged": 40137}
"""Images of COCO 2014's lists (evaluation.md section 4)."""

Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
LARGE_MEGAPIXELS = 1.5
"""Larger images of one's own are told of; VOC's have 0.19, COCO's 0.31."""
WORKERS = min(8, os.cpu_count() or 1)


@dataclass
class Findings:
    """What was found wrong; told as it is found, counted for the exit status."""

    overwrite: bool = False
    count: int = 0

    def tell(self, text: str) -> None:
        """One problem."""
        self.count += 1
        print(f"PROBLEM: {text}")

    def work(self, name: str, ids: Sequence[str], action: Callable[[str], None], workers: int,
             done: Callable[[str], bool] = lambda _: False) -> None:
        """Do ``action`` for every id and tell every failure."""
        try:
            each(name, ids, action, done=done, workers=workers)
        except EachFailed as failed:
            for failure in failed.failures:
                self.tell(f"{failure.image_id}: {failure.cause}")

    def put(self, path: Path, text: str) -> None:
        """Write a text file unless it is there; a different one is only replaced with ``overwrite``."""
        if path.exists() and path.read_bytes() == text.encode():
            print(f"as it was: {path}")
        elif path.exists() and not self.overwrite:
            self.tell(f"{path} is there with other content and is kept: --overwrite replaces it.")
        else:
            store.write_bytes(path, text.encode())
            print(f"written: {path}")


@dataclass(frozen=True)
class _Look:
    """Reads all files of an image; picklable for worker processes."""

    catalog: Catalog

    def __call__(self, image_id: str) -> None:
        image = store.read_image(self.catalog.image_path(image_id))
        path = self.catalog.mask_path(image_id)
        if path is None:
            return
        mask = store.read_mask(path)
        if mask.shape != image.shape[:2]:
            raise DataError(f"{path} is {mask.shape} pixels high and wide, the image {image.shape[:2]}. Replace it.")
        try:
            tags_of.tags_from_mask(mask, self.catalog.num_classes)
        except DataError as error:
            raise DataError(f"Mask {path} {error} Correct the class list, or replace the mask.") from None


def _table_text(rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """labels.csv of (file, class names)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "classes"])
    writer.writerows([file, ";".join(names)] for file, names in rows)
    return text.getvalue()


def _lines(items: Iterable[str]) -> str:
    return "".join(f"{item}\n" for item in items)


def _counts(catalog: Catalog, lists: dict[str, list[str]], expected: dict[str, int]) -> None:
    """Print how many images, masks and tags every list has, and how many images every class has."""
    print("\nlist            images  expected     masks  tags an image")
    rows: dict[str, np.ndarray] = {}
    for name, ids in lists.items():
        masks = sum(i in catalog.masks for i in ids)
        known = []
        for image_id in ids:
            try:
                known.append(catalog.tags(image_id))
            except (ValueError, OSError):
                continue
        rows[name] = np.sum(known, 0) if known else np.zeros(catalog.num_classes)
        mean = f"{rows[name].sum() / len(known):.3f}" if known else "-"
        odd = "  <- not as published" if expected.get(name, len(ids)) != len(ids) else ""
        print(f"{name:<14} {len(ids):>7} {expected.get(name, '-'):>9} {masks:>9} {mean:>14}{odd}")
    print("\nimages of each class: " + ", ".join(lists))
    for c, name in enumerate(catalog.classes):
        print(f"{c + 1:>4} {name:<20}" + "".join(f"{int(row[c]):>8}" for row in rows.values()))


# ------------------------------------------------------------------------------------------------ VOC 2012


@dataclass(frozen=True)
class _Convert:
    """Writes one SBD map as a mask; picklable for worker processes."""

    source: Path
    catalog: Catalog

    def __call__(self, image_id: str) -> None:
        mask = read_segmentation(self.source / f"{image_id}.mat", self.catalog.num_classes)
        with Image.open(self.catalog.image_path(image_id)) as image:
            size = image.size[::-1]
        if mask.shape != size:
            raise DataError(f"{image_id}.mat is {mask.shape} pixels high and wide, the image {size}: not its map.")
        store.write_mask(aug_mask(self.catalog, image_id), mask)


def aug_mask(catalog: Catalog, image_id: str) -> Path:
    """File of the mask that SBD gives an image."""
    return catalog.root / "SegmentationClassAug" / f"{image_id}.png"


def voc12(
    root: Folder, sbd: Folder | None = None, tags: Literal["xml", "masks"] = "xml", difficult: bool = True,
    decode: bool = True, overwrite: bool = False, workers: int = WORKERS,
) -> int:
    """VOC 2012's devkit: SBD's masks, the list train_aug, tags in labels.csv, a check of every file.

    train_aug is every image with a mask that is not in val. Its masks are the official ones and SegmentationClassAug,
    as the field passes it round or as made here from SBD.

    Args:
        root: VOC2012, or a folder that holds it.
        sbd: The unpacked Semantic Boundaries Dataset (benchmark_RELEASE), where there is no SegmentationClassAug.
        tags: Where labels.csv takes the tags from. The published systems use the XML files.
        difficult: Count objects flagged difficult in the XML files, as the published systems do.
        decode: Read every image and mask; otherwise only look whether the files are there.
        overwrite: Replace lists and labels.csv that are there with other content.
        workers: Processes.
    """
    findings = Findings(overwrite)
    catalog = VocCatalog("voc12", find_root(root))
    if sbd is not None:
        source = find_classes(sbd)
        official = {i for i, path in catalog.masks.items() if path.startswith("SegmentationClass/")}
        ids = sorted(path.stem for path in source.glob("*.mat") if path.stem not in official)
        print(f"SBD: {len(ids)} maps in {source} for images without an official mask")
        findings.work("SBD masks", ids, _Convert(source, catalog), workers, lambda i: aug_mask(catalog, i).exists())
        catalog = VocCatalog("voc12", catalog.root)
    lists: dict[str, list[str]] = {}
    for name in ("train", "val", "test"):
        if catalog.has_list(name):
            lists[name] = catalog.ids(name)
        elif name != "test":
            findings.tell(f"There is no list {name} in {catalog.root / 'ImageSets' / 'Segmentation'}.")
    _train_aug(catalog, lists, findings)
    tagged = sorted({i for name, ids in lists.items() if name != "test" for i in ids})
    rows: list[tuple[str, list[str]]] = []
    for image_id in tagged:
        try:
            rows.append((f"{image_id}.jpg", _voc_tags(catalog, image_id, tags, difficult)))
        except (ValueError, OSError) as error:
            findings.tell(f"{image_id}: {error}")
    if len(rows) == len(tagged):
        findings.put(catalog.root / "labels.csv", _table_text(rows))
    else:
        print("labels.csv is not written before all tags are there.")
    _check_files(catalog, lists, findings, decode, workers)
    _counts(VocCatalog("voc12", catalog.root), lists, EXPECTED)
    return _end(findings, f"--data voc12 --root {catalog.root}")


def _train_aug(catalog: Catalog, lists: dict[str, list[str]], findings: Findings) -> None:
    """Add train_aug to the lists, and write it where it is not there."""
    if catalog.has_list("train_aug"):
        lists["train_aug"] = catalog.ids("train_aug")
    elif any(path.startswith("SegmentationClassAug/") for path in catalog.masks.values()):
        ids = sorted({*catalog.masks, *lists.get("train", ())} - set(lists.get("val", ())))
        findings.put(catalog.root / "ImageSets" / "Segmentation" / "train_aug.txt", _lines(ids))
        lists["train_aug"] = ids
    else:
        print("There are no masks besides the official ones, hence no train_aug: give --sbd DIR to make it.")
    for name in ("train", "train_aug"):
        both = sorted(set(lists.get(name, ())) & set(lists.get("val", ())))
        if both:
            findings.tell(f"{len(both)} images of {name} are in val too ({', '.join(both[:5])}): mend the lists.")


def _voc_tags(catalog: Catalog, image_id: str, source: str, difficult: bool) -> list[str]:
    if source == "xml":
        present = set(tags_of.read_xml(catalog.root / "Annotations" / f"{image_id}.xml", difficult))
        return [name for name in catalog.classes if name in present]
    return [catalog.classes[c] for c in np.flatnonzero(catalog.tags_from_mask(image_id))]


def _check_files(
    catalog: Catalog, lists: dict[str, list[str]], findings: Findings, decode: bool, workers: int
) -> None:
    """Tell every listed image that has no file, and with ``decode`` every damaged image and mask."""
    listed = sorted({i for ids in lists.values() for i in ids})
    folded = {image_id.casefold(): image_id for image_id in catalog.images}
    for image_id in listed:
        if image_id not in catalog.images:
            alike = folded.get(image_id.casefold())
            hint = f" (there is {alike}: capitals count)" if alike else ""
            findings.tell(f"{image_id} is on a list and has no image file{hint}.")
    if decode:
        there = [i for i in listed if i in catalog.images]
        findings.work("reading images and masks", there, _Look(catalog), workers)


def _end(findings: Findings, flags: str) -> int:
    if findings.count:
        print(f"\n{findings.count} problems, listed above as PROBLEM.")
        return 1
    print(f"\nAll is well. Now: python run_sample.py METHOD {flags} ...")
    return 0


# ------------------------------------------------------------------------------------------------ COCO 2014


@dataclass(frozen=True)
class _Render:
    """Draws one mask; picklable for worker processes."""

    instances: Instances
    numbers: dict[str, int] = field(repr=False)
    folder: Path
    crowds: Crowds

    def __call__(self, image_id: str) -> None:
        store.write_mask(self.folder / f"{image_id}.png", self.instances.mask(self.numbers[image_id], self.crowds))


def coco14(
    root: Folder, annotations: Folder | None = None, masks: bool = True, crowd_tags: bool = True,
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
    findings = Findings(overwrite)
    annotations = annotations or root / "annotations"
    rows: dict[str, tuple[str, list[str]]] = {}
    lists: dict[str, list[str]] = {}
    classes: tuple[str, ...] = ()
    for split, year in coco.SPLITS.items():
        path = annotations / f"instances_{year}.json"
        if not path.exists() and not (root / year).exists() and not (root / "images" / year).exists():
            print(f"There is neither {path.name} nor a folder {year}: the list {split} is left out.")
            continue
        print(f"reading {path}")
        instances = read_instances(path)
        if classes and instances.classes != classes:
            raise DataError(f"{path} has other categories than the other file: take both from one download.")
        classes = instances.classes
        numbers = {store.image_id(file): number for number, file in instances.files.items()}
        twice = [i for i in numbers if i in rows]
        if twice or len(numbers) < len(instances.files):
            raise DataError(f"{path}: image files have one name twice ({', '.join(twice[:5]) or 'within the file'}).")
        rows.update({i: (instances.files[n], instances.names(n, crowd_tags)) for i, n in numbers.items()})
        lists[split] = list(numbers)
        lists[f"{split}_tagged"] = [i for i in numbers if rows[i][1]]
        if masks:
            folder = root / "SegmentationClass" / year
            work = _Render(instances, numbers, folder, crowd_masks)
            there = {path.stem for path in folder.glob("*.png")}
            findings.work(f"masks of {year}", list(numbers), work, workers, there.__contains__)
    if not lists:
        raise DataError(f"There is no COCO in {root}: put train2014, val2014 and annotations/instances_*.json there.")
    findings.put(root / "classes.txt", _lines(classes))
    findings.put(root / "labels.csv", _table_text(rows.values()))
    for name, ids in lists.items():
        findings.put(root / "splits" / f"{name}.txt", _lines(ids))
    catalog = coco.Coco14Catalog("coco14", root)
    _check_files(catalog, lists, findings, decode, workers)
    _counts(catalog, lists, COCO_EXPECTED)
    return _end(findings, f"--data coco14 --root {root}")


# ------------------------------------------------------------------------------------------------ own images


def folder(
    root: Folder, val_share: float = 0.0, decode: bool = True, overwrite: bool = False, workers: int = WORKERS
) -> int:
    """Your own images: checks images/, labels.csv, classes.txt, masks/ and splits/ (docs/your_data.md).

    Args:
        root: Folder with images/ and labels.csv.
        val_share: Share of the tagged images that splits/val.txt gets, chosen by chance (the same on every call); the
            others go to splits/train.txt. 0: no lists are written.
        decode: Read every image and mask; otherwise only look whether the files are there.
        overwrite: Replace lists and classes.txt that are there with other content.
        workers: Processes.
    """
    if not 0 <= val_share < 1:
        raise DataError(f"--val-share {val_share} is not possible: it must be a share below 1, such as 0.2.")
    findings = Findings(overwrite)
    catalog = FolderCatalog("folder", root)
    if not catalog.classes_are_listed:
        findings.put(root / "classes.txt", _lines(catalog.classes))
    if val_share:
        ids = list(catalog.table.tags)
        chosen = set(np.random.default_rng(0).permutation(len(ids))[: max(1, round(val_share * len(ids)))].tolist())
        for name, inside in (("train", False), ("val", True)):
            lines = [catalog.table.files[i] for n, i in enumerate(ids) if (n in chosen) == inside]
            findings.put(root / "splits" / f"{name}.txt", _lines(lines))
    catalog = FolderCatalog("folder", root)
    for one in catalog.classes:
        alike = [other for other in catalog.classes if other != one and other.casefold() == one.casefold()]
        if alike and one < alike[0]:
            findings.tell(f"The classes {one!r} and {alike[0]!r} differ in capitals only: make them one.")
    names = sorted(path.stem for path in (root / "splits").glob("*.txt"))
    if not {"train", "val"} & set(names):  # made up then
        names += ["train", "val"]
    lists = {name: catalog.ids(name) for name in names}
    for name in names:
        untagged = [i for i in lists[name] if catalog.tag_source == "labels.csv" and i not in catalog.table.tags]
        if untagged:
            print(f"{len(untagged)} images of {name} have no line in labels.csv ({', '.join(untagged[:5])}).")
    stray = sorted(set(catalog.masks) - set(catalog.images))
    if stray:
        shown = ", ".join(stray[:5])
        findings.tell(f"{len(stray)} masks belong to no image ({shown}): a mask is named after its image.")
    _check_files(catalog, {**lists, "labels.csv": list(catalog.table.tags)}, findings, decode, workers)
    _tell_large(catalog)
    _counts(catalog, lists, {})
    return _end(findings, f"--data folder --root {root}")


def _tell_large(catalog: Catalog) -> None:
    """Say how many images are much larger than those that the recipes were made for; damaged ones are told elsewhere.
    Sizes are read from the files' heads."""
    sizes: dict[str, tuple[int, int]] = {}
    for image_id in catalog.images:
        with suppress(Exception), Image.open(catalog.image_path(image_id)) as image:
            sizes[image_id] = image.size
    large = {i: size for i, size in sizes.items() if size[0] * size[1] > LARGE_MEGAPIXELS * 1e6}
    if large:
        widest = max(large, key=lambda i: large[i][0] * large[i][1])
        print(
            f"NOTE: {len(large)} images have more than {LARGE_MEGAPIXELS:g} megapixels (the largest, {widest}: "
            f"{large[widest][0]} x {large[widest][1]}). Memory and time grow with the pixels: make a smaller "
            f"copy first by python -m voc12.prepare shrink --root {catalog.root} --out DIR."
        )


@dataclass(frozen=True)
class _Shrink:
    """Copies one image and its mask, no side longer than ``long_side``; picklable for worker processes."""

    catalog: Catalog
    out: Path
    long_side: int

    def image(self, image_id: str) -> Path:
        return self.out / "images" / f"{image_id}.jpg"

    def __call__(self, image_id: str) -> None:
        image, path = store.read_image(self.catalog.image_path(image_id)), self.catalog.mask_path(image_id)
        size = scaled_size(image.shape[:2], min(1.0, self.long_side / max(image.shape[:2])))
        if path is not None:
            store.write_mask(self.out / "masks" / f"{image_id}.png", resize_mask(store.read_mask(path), size))
        store.write_bytes(self.image(image_id), store.jpeg_bytes(resize_image(image, size), 95))  # written last


def shrink(root: Folder, out: Folder, long_side: int = 1024, overwrite: bool = False, workers: int = WORKERS) -> int:
    """A copy of your own images in which no side is longer than a limit: photographs need much memory at full size.

    Args:
        root: Folder with images/ and labels.csv.
        out: Folder of the copy, laid out like root; images turned upright, as JPEG of quality 95.
        long_side: Greatest length of a side, pixels; smaller images keep their size.
        overwrite: Replace lists, classes.txt and labels.csv that are there with other content.
        workers: Processes.
    """
    if long_side < 16:
        raise DataError(f"--long-side {long_side} is not possible: it must be 16 or more.")
    findings = Findings(overwrite)
    catalog = FolderCatalog("folder", root)
    work = _Shrink(catalog, out, long_side)
    findings.work("shrinking", sorted(catalog.images), work, workers, lambda i: work.image(i).exists())
    for path in [root / "labels.csv", root / "classes.txt", *sorted((root / "splits").glob("*.txt"))]:
        if path.is_file():
            findings.put(out / path.relative_to(root), path.read_text(encoding="utf-8-sig"))
    return _end(findings, f"--data folder --root {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    commands = {"voc12": voc12, "coco14": coco14, "folder": folder, "shrink": shrink}
    ended: list[int] = []

    def work() -> None:
        ended.append(
            tyro.extras.subcommand_cli_from_dict(
                commands, args=argv, prog="python -m voc12.prepare", description=__doc__
            )
        )

    status = distributed.command(work, (ValueError, OSError, WorkerDied), "start the same command again to go on.")
    return status or ended[0]
