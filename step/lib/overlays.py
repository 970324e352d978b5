"""Masks drawn over their images (--overlays): label_overlay/ID.jpg, seg_overlay/ID.jpg."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from misc.files.images import jpeg_bytes, read_image, read_mask
from misc.files.store import write_bytes
from misc.image.draw import overlay
from misc.loop.each import each
from step.lib.config import Job


@dataclass(frozen=True)
class _Draw:
    """Makes the overlay of one image; picklable for worker processes."""

    job: Job
    mask: Callable[[str], Path]

    def __call__(self, image_id: str) -> None:
        image = read_image(self.job.catalog.image_path(image_id))
        picture = overlay(image, read_mask(self.mask(image_id)), self.job.catalog.classes)
        write_bytes(self.job.run.overlay(self.mask(image_id)), jpeg_bytes(picture))


def draw(job: Job, mask: Callable[[str], Path], ids: Sequence[str]) -> None:
    """Write the overlay of every mask ``mask(id)`` in worker processes, if the run's settings ask for overlays."""
    if job.cfg.overlays:
        each(
            "overlays", ids, _Draw(job, mask), done=lambda i: job.run.overlay(mask(i)).exists(),
            workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
        )
