"""``python -m voc12.prepare folder``: checks a folder of your own images, and draws a validation list."""

from __future__ import annotations

import shlex
from contextlib import suppress

import numpy as np
from PIL import Image

from misc.commandline import WrongCall
from misc.files.images import channel_bits
from voc12.catalog import Catalog
from voc12.data_sets.folder import FolderCatalog
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
    tell_unread_pictures,
)

_LARGE_MEGAPIXELS = 1.5
"""Images larger than this are reported; VOC's have 0.19 megapixels, COCO's 0.31."""


def prepare_folder(
    root: DirOption, val_share: float = 0.0, decode: bool = True, overwrite: bool = False, workers: int = WORKERS
) -> int:
    """Your own images: checks images/, labels.csv, classes.txt, masks/ and splits/ (docs/your_data.md).

    Args:
        root: Folder with images/ and labels.csv.
        val_share: Fraction of the tagged images that splits/val.txt gets, chosen at random (the same on every call);
            the others go to splits/train.txt, but those of splits/test.txt to neither. 0: no lists are written.
        decode: Read every image and mask; otherwise only look whether the files are there.
        overwrite: Replace lists and classes.txt that are there with other content.
        workers: Processes.
    """
    if not 0 <= val_share < 1:
        raise WrongCall(f"--val-share {val_share} is not possible: it must be a fraction below 1, such as 0.2.")
    check_folder("--root", root)
    findings = Findings(overwrite)
    catalog = FolderCatalog("folder", root)
    if not catalog.classes_are_listed:
        findings.put(root / "classes.txt", join_lines(catalog.classes))
    for one in catalog.classes:
        alike = [other for other in catalog.classes if other != one and other.casefold() == one.casefold()]
        if alike and one < alike[0]:
            findings.tell(f"The classes {one!r} and {alike[0]!r} differ in capitals only: make them one.")
    names = sorted(path.stem for path in (root / "splits").glob("*.txt"))
    drawn = _draw_lists(catalog, val_share) if val_share else {}
    if val_share and "val" not in drawn:
        alone = f"is {'in test.txt, or ' if 'test' in names else ''}the only tagged one of a class"
        findings.tell(f"--val-share: no image can be put into val, as each {alone}: tag more.")
        drawn = {}
    for name, ids in drawn.items():
        findings.put(root / "splits" / f"{name}.txt", join_lines(catalog.table.files[i] for i in ids))
    made_up: tuple[str, ...] = ()
    if drawn and not findings.count:
        names = [name for name in names if name not in drawn]
    elif not {"train", "val"} & set(names):  # made up then
        made_up = ("train", "val")
        names += made_up
        for name in made_up if not val_share else ():
            findings.note(catalog.tell_made_up(name))
    lists = {name: catalog.ids(name) for name in names} | ({} if findings.count else drawn)
    for name in sorted({"train", "val"} - lists.keys()):
        there = f"{root / 'splits'} (there: {', '.join(names)})"
        findings.tell(f"There is no list {name} in {there}: write {name}.txt, or remove the others.")
    for name, ids in lists.items():
        untagged = [i for i in ids if catalog.tag_source == "labels.csv" and i not in catalog.table.tags]
        if untagged:
            print(f"{len(untagged)} images of {name} have no line in labels.csv ({', '.join(untagged[:5])}).")
    check_lists({name: ids for name, ids in lists.items() if name not in made_up}, findings)
    tested = sorted(set(lists.get("train", ())) & set(lists.get("test", ()))) if made_up and not val_share else []
    if tested:
        findings.note(
            f"{len(tested)} images of test.txt are trained on too ({shorten(tested)}), as there is no train.txt: write "
            "splits/train.txt and val.txt without them, or let --val-share 0.2 draw these lists."
        )
    stray = sorted(set(catalog.masks) - set(catalog.images))
    if stray:
        shown = ", ".join(stray[:5])
        findings.tell(f"{len(stray)} masks belong to no image ({shown}): a mask is named after its image.")
    check_files(catalog, {**lists, "labels.csv": list(catalog.table.tags)}, findings, decode, workers)
    check_classes(catalog, lists, findings)
    tell_pictures(catalog, findings)
    for name in catalog.image_folders:
        tell_unread_pictures(root, name, findings)
    print_counts(catalog, lists, {})
    return conclude(findings, ["--data", "folder", "--root", root])


def _draw_lists(catalog: FolderCatalog, val_share: float) -> dict[str, list[str]]:
    """The tagged images that are in no test.txt, shared out by chance between train and val; every class of them keeps
    an image in train."""
    tested = set(catalog.ids("test")) if (catalog.root / "splits" / "test.txt").is_file() else set()
    ids = [image_id for image_id in catalog.table.tags if image_id not in tested]
    left = np.sum([catalog.tags(i) for i in ids], 0) if ids else np.zeros(catalog.num_classes)
    wanted, chosen = max(1, round(val_share * len(ids))), set()
    for number in np.random.default_rng(0).permutation(len(ids)).tolist():
        tags = catalog.tags(ids[number])
        if len(chosen) < wanted and (left - tags)[tags > 0].min(initial=1) >= 1:
            chosen.add(number)
            left -= tags
    return {
        name: [i for n, i in enumerate(ids) if (n in chosen) == inside]
        for name, inside in (("train", False), ("val", True))
        if inside is False or chosen
    }


def tell_pictures(catalog: Catalog, findings: Findings) -> None:
    """Say how many images are much larger than those that the recipes were made for, or have what is not used: more
    than 8 bits, transparency, further pages. Damaged ones are told elsewhere; only the heads of files are read."""
    sizes: dict[str, tuple[int, int]] = {}
    odd: dict[str, list[str]] = {}
    for image_id in catalog.images:
        path = catalog.image_path(image_id)
        if not path.is_file():  # a pipe would be waited for
            continue
        with suppress(Exception), open(path, "rb") as file, Image.open(file) as image:
            sizes[image_id] = image.size
            file.seek(0)
            if channel_bits(image, file.read(32)) > 8:
                odd.setdefault(_DEEP, []).append(image_id)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                odd.setdefault("transparency, which is left out", []).append(image_id)
            if image.mode == "CMYK":
                odd.setdefault("the channels CMYK and are converted without a colour profile", []).append(image_id)
            if getattr(image, "n_frames", 1) > 1:
                odd.setdefault("several pages or frames, of which the first is taken", []).append(image_id)
    for what, ids in odd.items():
        findings.note(f"{len(ids)} images have {what} ({shorten(ids)}).")
    large = {i: size for i, size in sizes.items() if size[0] * size[1] > _LARGE_MEGAPIXELS * 1e6}
    if large:
        widest = max(large, key=lambda i: large[i][0] * large[i][1])
        findings.note(
            f"{len(large)} images have more than {_LARGE_MEGAPIXELS:g} megapixels (the largest, {widest}: "
            f"{large[widest][0]} x {large[widest][1]}). Memory and time grow with the pixels: the preset photos "
            "works on smaller copies (others with --long-side 1024); or make a smaller folder by "
            f"python -m voc12.prepare shrink --root {shlex.quote(str(catalog.root))} --out DIR."
        )


_DEEP = (
    "more than 8 bits a channel: the values are taken for those of the smallest depth of 8, 10, 12, 14 and 16 "
    "bits that holds the largest of an image, and their upper 8 bits are used; save them with 8 bits to scale them "
    "otherwise"
)
