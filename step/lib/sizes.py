"""Large images: networks work on smaller copies in the run folder, masks are also written at the size of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from misc import distributed
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
    """Make the copies of these images that are missing or older than their files, in worker processes. All processes
    must call it."""
    wanted = [i for i in ids if i in job.large]
    if distributed.joined([i for i in wanted if not _is_current(job, i)]):  # the same answer in all processes
        each(
            "smaller copies", wanted, _Copy(job), done=lambda i: _is_current(job, i), workers=job.cfg.machine.workers
        )


def _is_current(job: Job, image_id: str) -> bool:
    """Whether an image's copy is there and no older than the files of image and mask."""
    copy = job.catalog.image_path(image_id)
    files = [path for path in job.large[image_id] if path is not None and path.exists()]
    return copy.exists() and all(copy.stat().st_mtime >= path.stat().st_mtime for path in files)


@dataclass(frozen=True)
class _Enlarge:
    """Writes the mask of one large image at the size of its file; picklable for worker processes."""

    job: Job
    mask: Callable[[str], Path]

    def __call__(self, image_id: str) -> None:
        mask = self.mask(image_id)
        size = read_image(self.job.large[image_id][0], _MEGAPIXELS).shape[:2]
        write_mask(self.job.run.full(mask), resize_mask(read_mask(mask), size))


def write_full_masks(job: Job, mask: Callable[[str], Path], ids: Sequence[str]) -> None:
    """Masks of large images at the size of their files too: label_full/ID.png, seg_full/ID.png (nearest neighbour), of
    the images of this job's part."""
    part, parts = job.cfg.shard_part()
    large = [i for i in ids[part::parts] if i in job.large]
    if large:
        each(
            "masks at full size", large, _Enlarge(job, mask), done=lambda i: job.run.full(mask(i)).exists(),
            workers=job.cfg.machine.workers,
        )
