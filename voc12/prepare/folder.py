"""``python -m voc12.prepare folder``: checks a folder of one's own images, and draws a validation list."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from PIL import Image

from voc12.catalog import Catalog
from voc12.data_sets.folder import FolderCatalog
from voc12.prepare.findings import WORKERS, DirOption, Findings, check_files, conclude, join_lines, print_counts
from voc12.tags import DataError

_LARGE_MEGAPIXELS = 1.5
"""Larger images of one's own are told of; VOC's have 0.19, COCO's 0.31."""


def prepare_folder(
    root: DirOption, val_share: float = 0.0, decode: bool = True, overwrite: bool = False, workers: int = WORKERS
) -> int:
    """Your own images: checks images/, labels.csv, classes.txt, masks/ and splits/ (docs/your_data.md).

    Args:
        root: DirOption with images/ and labels.csv.
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
        findings.put(root / "classes.txt", join_lines(catalog.classes))
    if val_share:
        ids = list(catalog.table.tags)
        chosen = set(np.random.default_rng(0).permutation(len(ids))[: max(1, round(val_share * len(ids)))].tolist())
        for name, inside in (("train", False), ("val", True)):
            lines = [catalog.table.files[i] for n, i in enumerate(ids) if (n in chosen) == inside]
            findings.put(root / "splits" / f"{name}.txt", join_lines(lines))
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
    check_files(catalog, {**lists, "labels.csv": list(catalog.table.tags)}, findings, decode, workers)
    _tell_large(catalog)
    print_counts(catalog, lists, {})
    return conclude(findings, f"--data folder --root {root}")


def _tell_large(catalog: Catalog) -> None:
    """Say how many images are much larger than those that the recipes were made for; damaged ones are told elsewhere.
    Sizes are read from the files' heads."""
    sizes: dict[str, tuple[int, int]] = {}
    for image_id in catalog.images:
        with suppress(Exception), Image.open(catalog.image_path(image_id)) as image:
            sizes[image_id] = image.size
    large = {i: size for i, size in sizes.items() if size[0] * size[1] > _LARGE_MEGAPIXELS * 1e6}
    if large:
        widest = max(large, key=lambda i: large[i][0] * large[i][1])
        print(
            f"NOTE: {len(large)} images have more than {_LARGE_MEGAPIXELS:g} megapixels (the largest, {widest}: "
            f"{large[widest][0]} x {large[widest][1]}). Memory and time grow with the pixels: make a smaller "
            f"copy first by python -m voc12.prepare shrink --root {catalog.root} --out DIR."
        )
