"""Large images: networks work on smaller copies in the run folder, masks are also written at the size of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from misc.files import store
from misc.files.ids import checked_id
from misc.files.images import jpeg_bytes, read_image, read_mask, write_mask
from misc.files.runfolder import RunFolder
from misc.image.pixels import resize_image, resize_mask, scaled_size
from misc.loop.each import each
from voc12.catalog import Catalog

if TYPE_CHECKING:
    from step.lib.config import Job

_MEGAPIXELS = 400
"""Larger files are refused."""


def find_large(catalog: Catalog, ids: Iterable[str], long_side: int) -> dict[str, Path]:
    """Images of which a side is longer than ``long_side``, and their files. Files that can't be opened are left to the
    steps, which say so."""
    found = {}
    for image_id in ids:
        path = catalog.image_path(image_id)
        try:
            with Image.open(path) as image:
                if max(image.size) > long_side:
                    found[image_id] = path
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    return found


def use_copies(catalog: Catalog, run: RunFolder, long_side: int) -> dict[str, tuple[Path, Path | None]]:
    """Let the catalog name smaller copies in the run folder in place of large images and their masks.

    Returns the files of these images and of their masks, which ``make_copies`` reads.
    """
    large = {i: (path, catalog.mask_path(i)) for i, path in find_large(catalog, catalog.images, long_side).items()}
    folder = (run.root / f"smaller-{long_side}").resolve()
    copies = {i: str(folder / "images" / f"{checked_id(i)}.jpg") for i in large}
    masks = {i: str(folder / "masks" / f"{checked_id(i)}.png") for i, (_, mask) in large.items() if mask}
    # absolute paths stay as they are where they are joined to the data set's root
    catalog.images, catalog.masks = {**catalog.images, **copies}, {**catalog.masks, **masks}
    return large


@dataclass(frozen=True)
class _Copy:
    """Makes the copies of one image and of its mask; picklable for worker processes."""

    job: Job

    def __call__(self, image_id: str) -> None:
        path, mask = self.job.large[image_id]
        image = read_image(path, _MEGAPIXELS)
        size = scaled_size(image.shape[:2], self.job.cfg.long_side / max(image.shape[:2]))
        copy = self.job.catalog.mask_path(image_id)
        if mask is not None and copy is not None:
            write_mask(copy, resize_mask(read_mask(mask), size))
        store.write_bytes(self.job.catalog.image_path(image_id), jpeg_bytes(resize_image(image, size), 95))  # last


def make_copies(job: Job, ids: Iterable[str]) -> None:
    """Make the copies of these images that are missing, in worker processes."""
    wanted = [i for i in ids if i in job.large]
    if any(not job.catalog.image_path(i).exists() for i in wanted):
        each(
            "smaller copies", wanted, _Copy(job), done=lambda i: job.catalog.image_path(i).exists(),
            workers=job.cfg.machine.workers,
        )


def write_full_masks(job: Job, mask: Callable[[str], Path], ids: Iterable[str]) -> None:
    """Masks of large images at the size of their files too: label_full/ID.png, seg_full/ID.png (nearest neighbour)."""
    for image_id in ids:
        target = job.run.full(mask(image_id))
        if image_id in job.large and not target.exists():
            height, width = read_image(job.large[image_id][0], _MEGAPIXELS).shape[:2]
            write_mask(target, resize_mask(read_mask(mask(image_id)), (height, width)))
