"""``python -m voc12.prepare voc12``: masks from SBD, the list train_aug, tags, a check of every file."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from misc.files import atomic
from misc.files.images import write_mask
from voc12 import tags as tags_of
from voc12.catalog import Catalog
from voc12.data_sets.voc12 import VocCatalog, find_voc_root
from voc12.lists import shorten
from voc12.prepare.findings import (
    WORKERS,
    DirOption,
    Findings,
    check_classes,
    check_files,
    check_folder,
    check_lists,
    conclude,
    join_lines,
    print_counts,
    table_text,
)
from voc12.prepare.sbd import find_sbd_maps, read_sbd_mask
from voc12.tags import DataError

_EXPECTED = {"train": 1464, "train_aug": 10582, "val": 1449, "test": 1456}
"""Images of VOC 2012's lists (evaluation.md 3.1)."""


@dataclass(frozen=True)
class _Convert:
    """Writes one SBD map as a mask; picklable for worker processes."""

    source: Path
    catalog: Catalog

    def __call__(self, image_id: str) -> None:
        mask = read_sbd_mask(self.source / f"{image_id}.mat", self.catalog.num_classes)
        with Image.open(self.catalog.image_path(image_id)) as image:
            size = image.size[::-1]
        if mask.shape != size:
            raise DataError(f"{image_id}.mat is {mask.shape} pixels high and wide, the image {size}: not its map.")
        write_mask(aug_mask_path(self.catalog, image_id), mask)


def aug_mask_path(catalog: Catalog, image_id: str) -> Path:
    """File of the mask that SBD gives an image."""
    return catalog.root / "SegmentationClassAug" / f"{image_id}.png"


def prepare_voc12(
    root: DirOption, sbd: DirOption | None = None, sbd_lists: DirOption | None = None,
    tags: Literal["xml", "masks"] = "xml", difficult: bool = True, decode: bool = True,
    overwrite: bool = False, workers: int = WORKERS,
) -> int:
    """VOC 2012's devkit: SBD's masks, the list train_aug, tags in labels.csv, a check of every file.

    train_aug is every image with a mask that is not in val. Its masks are the official ones and SegmentationClassAug,
    as the field passes it round or as made here from SBD. Learning from tags needs the list alone: --sbd-lists.

    Args:
        root: VOC2012, or a folder that holds it.
        sbd: The unpacked Semantic Boundaries Dataset (benchmark_RELEASE), where there is no SegmentationClassAug.
        sbd_lists: Folder of SBD's own train.txt and val.txt (benchmark_RELEASE/dataset), which make the list train_aug
            without SBD's masks.
        tags: Where labels.csv takes the tags from. The published systems use the XML files.
        difficult: Count objects flagged difficult in the XML files, as the published systems do.
        decode: Read every image and mask; otherwise only look whether the files are there.
        overwrite: Replace lists and labels.csv that are there with other content.
        workers: Processes.
    """
    check_folder("--root", root)
    if sbd is not None:
        check_folder("--sbd", sbd)
    if sbd_lists is not None:
        check_folder("--sbd-lists", sbd_lists)
    findings = Findings(overwrite)
    catalog = VocCatalog("voc12", find_voc_root(root))
    if sbd is not None:
        source = find_sbd_maps(sbd)
        official = {i for i, path in catalog.masks.items() if path.startswith("SegmentationClass/")}
        ids = sorted(path.stem for path in source.glob("*.mat") if path.stem not in official)
        print(f"SBD: {len(ids)} maps in {source} for images without an official mask")
        work = _Convert(source, catalog)
        atomic.remove_leftovers([catalog.root / "SegmentationClassAug"])
        findings.work("SBD masks", ids, work, workers, lambda i: aug_mask_path(catalog, i).exists())
        catalog = VocCatalog("voc12", catalog.root)
    lists: dict[str, list[str]] = {}
    for name in ("train", "val", "test"):
        if catalog.has_list(name):
            lists[name] = catalog.ids(name)
        elif name != "test":
            folder = catalog.root / "ImageSets" / "Segmentation"
            cvat = " CVAT writes default.txt: share its images out." if (folder / "default.txt").is_file() else ""
            findings.tell(f"There is no list {name} in {folder}.{cvat}")
    if not catalog.classes_from:
        findings.note(f"{catalog.root} has no classes.txt: the classes are VOC's 20.")
    elif catalog.classes_from != "classes.txt":
        findings.note(f"{catalog.root} has no classes.txt: the classes are those of {catalog.classes_from}.")
        findings.put(catalog.root / "classes.txt", join_lines(catalog.classes))
    if doubled := catalog.doubled_images():
        findings.tell(
            f"{len(doubled)} images share their names with others of another ending ({shorten(doubled)}), and masks "
            "and tags are found by the name: remove or rename one of each."
        )
    _train_aug(catalog, lists, findings, sbd_lists)
    check_lists(lists, findings)
    tagged = sorted({i for name, ids in lists.items() if name != "test" for i in ids})
    rows: list[tuple[str, list[str]]] = []
    strange: Counter[str] = Counter()
    for image_id in tagged:
        try:
            names = _voc_names(catalog, image_id, tags, difficult)
        except (ValueError, OSError) as error:
            findings.tell(f"{image_id}: {error}")
            continue
        strange.update(set(names) - set(catalog.classes))
        file = catalog.images.get(image_id, f"JPEGImages/{image_id}.jpg").removeprefix("JPEGImages/")
        rows.append((file, [name for name in catalog.classes if name in names]))
        catalog.keep_tags(image_id, tags_of.encode_tags(names, catalog.classes))
    _tell_strange(strange, catalog, findings)
    if len(rows) == len(tagged):
        findings.put(catalog.root / "labels.csv", table_text(rows))
    check_files(catalog, lists, findings, decode, workers)
    check_classes(catalog, lists, findings)
    print_counts(catalog, lists, _EXPECTED)
    return conclude(findings, ["--data", "voc12", "--root", catalog.root])


def _tell_strange(strange: Counter[str], catalog: Catalog, findings: Findings) -> None:
    """Tell objects whose names are no class: a problem where only the capitals differ."""
    folded = {name.casefold(): name for name in catalog.classes}
    miswritten = {name: folded[name.casefold()] for name in strange if name.casefold() in folded}
    if miswritten:
        shown = shorten([f"{name!r} ({strange[name]}; is it {right!r}?)" for name, right in miswritten.items()])
        findings.tell(f"objects whose names are no class, but for their capitals: {shown}. Mend them or classes.txt.")
    others = []
    for name, count in strange.most_common():
        near = [] if name in miswritten else difflib.get_close_matches(name, catalog.classes, 1)
        if name not in miswritten:
            others.append(f"{name!r} ({count}{f'; is it {near[0]!r}?' if near else ''})")
    if others:
        findings.note(f"objects whose names are no class are passed over (images): {shorten(others)}.")


def _train_aug(catalog: Catalog, lists: dict[str, list[str]], findings: Findings, sbd_lists: Path | None) -> None:
    """Add train_aug to the lists, and write it where it is not there."""
    if catalog.has_list("train_aug"):
        lists["train_aug"] = catalog.ids("train_aug")
        return
    more: Iterable[str]
    if any(path.startswith("SegmentationClassAug/") for path in catalog.masks.values()):
        more = catalog.masks
    elif sbd_lists is not None:
        more = _sbd_ids(sbd_lists)
    else:
        print(
            "There are no masks besides the official ones, hence no train_aug: give --sbd DIR to make it, or "
            "--sbd-lists DIR for the list without the masks."
        )
        return
    ids = sorted({*more, *lists.get("train", ())} - set(lists.get("val", ())))
    findings.put(catalog.root / "ImageSets" / "Segmentation" / "train_aug.txt", join_lines(ids))
    lists["train_aug"] = ids


def _sbd_ids(folder: Path) -> list[str]:
    """The ids of SBD's two lists; DataError where one is missing."""
    for place in (folder, folder / "dataset", folder / "benchmark_RELEASE" / "dataset"):
        files = [place / name for name in ("train.txt", "val.txt")]
        if all(file.is_file() for file in files):
            return [word for file in files for word in file.read_text().split()]
    raise DataError(f"No lists of SBD in {folder}: looked for train.txt and val.txt there and in dataset.")


def _voc_names(catalog: VocCatalog, image_id: str, source: str, difficult: bool) -> set[str]:
    if source == "xml":
        return set(tags_of.read_xml(catalog.annotation_path(image_id), difficult))
    return {catalog.classes[c] for c in np.flatnonzero(catalog.tags_from_mask(image_id))}
