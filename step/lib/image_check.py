"""A look at the images of a run before its first training: a loader meets a damaged one only when it is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from misc import distributed
from misc.files import store
from misc.files.images import check_image
from misc.files.runfolder import RunFolder
from misc.files.schema import Each, Number
from voc12.lists import shorten

if TYPE_CHECKING:
    from step.lib.config import Job

Known = dict[str, list[int]]
"""Images that were found whole, by id: size of the file in bytes, and time of its last change in ns."""


def check_images(job: Job, ids: Iterable[str]) -> Known:
    """Check that the images ``ids`` can be opened and are not cut short (misc.files.images.check_image); those that
    ``keep_checked`` has told of an earlier start and that did not change since are passed over. All processes must call
    it.

    Returns:
        What ``keep_checked`` is to keep.

    Raises:
        ValueError: with the first images that can't be read, why, and what to do.
    """
    known, faults = _look(job, list(ids)) if distributed.is_main() else ({}, [])
    faults = distributed.joined(faults)
    if faults:
        told = shorten(faults, "\n  ")
        raise ValueError(f"{len(faults)} images of this run's lists can't be read:\n  {told}")
    return known


def _look(job: Job, ids: list[str]) -> tuple[Known, list[str]]:
    """The images that are whole, and what is wrong with each other one."""
    before = _checked(job.run)

    def look(image_id: str) -> tuple[list[int], str]:
        path = job.catalog.image_path(image_id)
        try:
            state = path.stat()
            now = [state.st_size, state.st_mtime_ns]
            if before.get(image_id) != now:
                check_image(path)
            return now, ""
        except (OSError, ValueError) as error:
            return [], str(error)

    with ThreadPoolExecutor() as pool:  # thousands of small reads: waiting for the disk is what takes time
        found = dict(zip(ids, pool.map(look, ids), strict=True))
    known = {image_id: now for image_id, (now, fault) in found.items() if not fault}
    return {**before, **known}, [fault for _, fault in found.values() if fault]


def _checked(run: RunFolder) -> Known:
    """What an earlier start found whole; nothing where the file is missing or damaged: images are looked at again."""
    try:
        return store.read_json(run.checked_images, Each([Number(whole=True)]))  # times before 1970 are negative
    except (ValueError, OSError):
        return {}


def keep_checked(run: RunFolder, known: Known) -> None:
    """Note in the run folder what was found whole, for the next start."""
    if distributed.is_main() and known != _checked(run):
        store.write_json(run.checked_images, known)
