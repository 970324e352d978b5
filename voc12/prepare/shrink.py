"""``python -m voc12.prepare shrink``: a copy of your own images with sides no longer than a limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from misc.commandline import WrongCall
from misc.files import atomic, store
from misc.files.images import jpeg_bytes, read_image, read_mask, write_mask
from misc.image.pixels import resize_image, resize_mask, scaled_size
from voc12.catalog import Catalog
from voc12.data_sets.folder import FolderCatalog
from voc12.prepare.findings import WORKERS, DirOption, Findings, check_folder, conclude

_LARGEST_MEGAPIXELS = 400
"""Larger images are refused here too: reading one takes 3 bytes a pixel, twice."""


@dataclass(frozen=True)
class _Shrink:
    """Copies one image and its mask, no side longer than ``long_side``; picklable for worker processes."""

    catalog: Catalog
    out: Path
    long_side: int

    def image(self, image_id: str) -> Path:
        return self.out / "images" / f"{image_id}.jpg"

    def __call__(self, image_id: str) -> None:
        path = self.catalog.mask_path(image_id)
        image = read_image(self.catalog.image_path(image_id), _LARGEST_MEGAPIXELS)
        size = scaled_size(image.shape[:2], min(1.0, self.long_side / max(image.shape[:2])))
        if path is not None:
            write_mask(self.out / "masks" / f"{image_id}.png", resize_mask(read_mask(path, _LARGEST_MEGAPIXELS), size))
        store.write_bytes(self.image(image_id), jpeg_bytes(resize_image(image, size), 95))  # written last


def shrink_folder(
    root: DirOption, out: DirOption, long_side: int = 1024, overwrite: bool = False, workers: int = WORKERS
) -> int:
    """A copy of your own images in which no side is longer than a limit: photographs need much memory at full size.

    Args:
        root: Folder with images/ and labels.csv.
        out: Folder of the copy, laid out like root; images turned upright, as JPEG of quality 95.
        long_side: Greatest length of a side, pixels; smaller images keep their size.
        overwrite: Replace lists, classes.txt and labels.csv that are there with other content.
        workers: Processes.
    """
    if long_side < 16:
        raise WrongCall(f"--long-side {long_side} is not possible: it must be 16 or more.")
    check_folder("--root", root)
    findings = Findings(overwrite)
    catalog = FolderCatalog("folder", root)
    work = _Shrink(catalog, out, long_side)
    atomic.remove_leftovers([out])
    findings.work("shrinking", sorted(catalog.images), work, workers, lambda i: work.image(i).exists())
    for path in [root / "labels.csv", root / "classes.txt", *sorted((root / "splits").glob("*.txt"))]:
        if path.is_file():
            findings.put(out / path.relative_to(root), path.read_text(encoding="utf-8-sig"))
    return conclude(findings, ["--data", "folder", "--root", out])
