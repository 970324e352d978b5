"""The per-image loop: runs a step's function for all image ids (docs/design.md section 2, rule 3).

Sharding over processes and jobs, worker processes, look-ahead reading, resume by finished files, progress with ETA,
and a per-image report of what failed live here and nowhere else.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from misc import distributed
from misc.files import atomic
from misc.loop.pool import WorkerKilled, in_workers
from misc.loop.progress import Progress


@dataclass(frozen=True)
class Failure:
    """An image that failed, and the cause."""

    image_id: str
    cause: str


_GIVE_BACK_EVERY = 32
"""Number of images, or of groups that are computed at once, after which memory that nothing uses is given back."""
_FIRST = 3
"""Images of which one process alone tells how much memory others will need."""
_LEAST_NEEDED = 256 << 20
"""Bytes of memory that a process is reckoned with at least: the first images may be small, or have no tag."""

Rest = Callable[[], None]
"""What is left of an image's work: writing its files."""
Ready = tuple[str, Future[Any]]
"""An image's id and what ``prepare`` gives, or will give, for it."""


@dataclass(frozen=True)
class Together:
    """How several images are computed at once."""

    most: int
    """Largest number of images; 1: one by one. Halved for the rest of the step where a GPU's memory is too small."""
    kind: Callable[[Any], Hashable]
    """Of what ``prepare`` gave: images of the same kind go together, those of kind None alone."""
    work: Callable[[list[str], list[Any]], list[Rest]]
    """Like ``work``, of several images; returns what is left of each."""


class EachFailed(RuntimeError):
    """Some images of a step failed, listed in ``failures``; the others are finished."""

    def __init__(self, name: str, failures: list[Failure], total: int):
        self.failures = failures
        lines = [f"  {f.image_id}: {f.cause}" for f in failures[:10]]
        if len(failures) > 10:
            lines.append(f"  ... and {len(failures) - 10} more")
        super().__init__(
            f"{name}: {len(failures)} of {total} images failed, the others are finished and kept:\n"
            + "\n".join(lines)
            + "\nFix them or take them off the list, then start the same command again: finished images are skipped."
        )


class WorkerDied(RuntimeError):
    """A worker process was killed or crashed; finished images are kept."""


def shard(ids: Sequence[str], part: tuple[int, int] = (0, 1)) -> list[str]:
    """The ids that this process handles: every n-th, divided over jobs (``part`` = (i, n)), then over ranks."""
    return list(ids[part[0] :: part[1]])[distributed.rank() :: distributed.world()]


def each(
    name: str,
    ids: Sequence[str],
    work: Callable[..., Rest | None],
    *,
    done: Callable[[str], bool],
    prepare: Callable[[str], Any] | None = None,
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
    together: Together | None = None,
    in_processes: bool = False,
) -> None:
    """Call ``work`` for every id that is not done.

    Args:
        name: label of the progress bar.
        ids: all image ids of the step.
        work: called as work(id), or work(id, prepared) in this process if ``prepare`` is given. It writes its own
            files, atomically; with ``prepare`` it may return a function that does so, which a thread then calls while
            the next image is computed.
        done: whether the files of an id exist already.
        prepare: reads and computes the input of ``work`` in ``workers`` threads, ahead of it; must be thread-safe.
        workers: processes for ``work`` (which must then be picklable), or look-ahead threads for ``prepare``.
            0: everything in this process.
        part: (i, n): only every n-th id, from the i-th on (``--shard``).
        in_processes: with ``prepare``: read, compute and write each image in one of ``workers`` forked processes of one
            thread each, where there are as many as two, images enough and memory for them. A CPU computes one image a
            core faster than one image on all cores. ``work`` must then leave nothing in this process but its files.
        together: with ``prepare``: images that follow each other closely may be computed at once. Where that fails,
            each is worked at alone; out of GPU memory, fewer are computed at once from then on.

    Raises:
        EachFailed: after all other images are finished, in all processes of a torchrun alike.
        atomic.DiskFull, WorkerDied: at once.
    """
    mine = shard(ids, part)
    left = [i for i in mine if not done(i)]
    if len(left) < len(mine):
        distributed.say(f"{name}: {len(mine) - len(left)} of {len(mine)} images are done already.")
    failures: list[Failure] = []
    with Progress(total=len(left), desc=name, unit="image", disable=not distributed.is_main()) as bar:
        if prepare is not None:
            groups, here = _Groups(name, together) if together and together.most > 1 else None, left
            # by all images, not those left: where there is memory enough, an interrupted step goes on in the same way,
            # to the last bit
            if in_processes and not groups and 1 < workers < len(mine) - _FIRST and _can_fork():
                here = _measured_processes(name, left, _Whole(work, prepare), workers, failures, bar)
            _look_ahead(here, work, prepare, max(1, workers), failures, bar, groups)
        elif workers > 0 and len(left) > 1:
            _processes(left, work, workers, failures, bar)
        else:
            for image_id in left:
                _guarded(image_id, lambda i=image_id: work(i), failures)
                bar.update()
    reports = distributed.joined([(failures, len(left))])
    failures = [failure for listed, _ in reports for failure in listed]
    if failures:
        raise EachFailed(name, failures, sum(count for _, count in reports))


def _guarded(image_id: str, action: Callable[[], Any], failures: list[Failure]) -> Any:
    """Call ``action`` and return its result; an error is a failure of this image, then None. Out of GPU memory, it is
    called once more: the images before may have left the memory in pieces."""
    for attempt in (1, 2):
        try:
            return action()
        except atomic.DiskFull:
            raise
        except Exception as error:  # one bad image must not cost the others
            if _is_broken_gpu(error):
                raise
            if not is_out_of_memory(error):
                failures.append(Failure(image_id, f"{type(error).__name__}: {error}"))
                return None
            cause = f"out of GPU memory ({error})"
        if attempt == 1:
            torch.cuda.empty_cache()  # here, where the error no longer holds the tensors of its frames
    failures.append(Failure(image_id, cause))
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory was too small, for a tensor or for what its libraries need."""
    told = ("error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


def _is_broken_gpu(error: Exception) -> bool:
    """Whether the GPU itself failed: then nothing more can be computed on it in this process."""
    started = isinstance(error, RuntimeError) and str(error).startswith(("CUDA error", "HIP error"))
    return started and not is_out_of_memory(error)


class _Groups:
    """Images of one kind that are computed at once: fewer of them after the memory was too small."""

    def __init__(self, name: str, together: Together):
        self.name, self.together, self.most = name, together, together.most

    def take(self, waiting: deque[Ready], window: int) -> list[Ready]:
        """Take the first waiting image and those of its kind among the first ``window`` from the queue; it alone if
        there are none. All of the window are waited for, so that it does not depend on the readers' speed which images
        go together."""
        seen = list(islice(waiting, window))
        kinds = [None if ready.exception() else self.together.kind(ready.result()) for _, ready in seen]
        chosen = [0] if kinds[0] is None else [at for at, kind in enumerate(kinds) if kind == kinds[0]][: self.most]
        for place in reversed(chosen):
            del waiting[place]
        return [seen[place] for place in chosen]

    def compute(self, group: list[Ready]) -> tuple[list[tuple[str, Rest]], list[Ready]]:
        """What is left of the images that were computed at once, and the others, which are to be computed one by one:
        those that fail together for another reason than memory, so that each has its own cause. Raises what stops the
        step: a full disk, a broken GPU."""
        left: list[tuple[str, Rest]] = []
        alone: list[Ready] = []
        while group:
            part = group[: self.most]
            ids = [image_id for image_id, _ in part]
            too_large = False
            if len(part) == 1:
                alone += part
            else:
                try:
                    rests = self.together.work(ids, [ready.result() for _, ready in part])
                    left += list(zip(ids, rests, strict=True))
                except atomic.DiskFull:
                    raise
                except Exception as error:
                    if _is_broken_gpu(error):
                        raise
                    too_large = is_out_of_memory(error)
                    alone += [] if too_large else part
            if too_large:  # here, where the error no longer holds the tensors of its frames
                self._lower(len(part))
            else:
                group = group[len(part) :]
        return left, alone

    def _lower(self, tried: int) -> None:
        """Half as many images as were tried from here on."""
        torch.cuda.empty_cache()
        self.most = (tried + 1) // 2
        distributed.say(
            f"{self.name}: the GPU's memory is too small for {tried} images at once; from here on "
            f"{'one' if self.most == 1 else self.most} at a time (as with --machine.images {self.most})."
        )


def _look_ahead(
    ids: list[str], work: Callable[..., Rest | None], prepare: Callable[[str], Any], threads: int,
    failures: list[Failure], bar: Progress, groups: _Groups | None = None,
) -> None:  # fmt: skip
    # a group is chosen from all but the last ``spare``, which are read while it is computed
    spare = groups.most if groups else 0
    ahead = max(2 * threads, 5 * spare)
    waiting: deque[Ready] = deque()
    written: deque[tuple[str, Future[None]]] = deque()
    rest = iter(ids)
    since = 0

    def finish(left: int) -> None:
        """Wait until at most this many images are still being written."""
        while len(written) > left:
            image_id, result = written.popleft()
            _guarded(image_id, result.result, failures)
            bar.update()

    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        try:
            while True:
                while len(waiting) < ahead and (image_id := next(rest, None)) is not None:
                    waiting.append((image_id, readers.submit(prepare, image_id)))
                if not waiting:
                    finish(0)
                    return
                if groups:
                    computed, alone = groups.compute(groups.take(waiting, ahead - spare))
                    written.extend((image_id, writers.submit(write)) for image_id, write in computed)
                else:
                    alone = [waiting.popleft()]
                for image_id, ready in alone:
                    one = _guarded(image_id, lambda i=image_id, r=ready: work(i, r.result()), failures)
                    if one is None:
                        bar.update()
                    else:
                        written.append((image_id, writers.submit(one)))
                finish(2 * threads)
                since += 1
                if since % _GIVE_BACK_EVERY == 0:
                    distributed.give_memory_back()
        finally:
            for _, ready in waiting:
                ready.cancel()


def _can_fork() -> bool:
    """Whether worker processes can be forked, which is fast and hands down everything, and can compute then: not where
    this process has opened a GPU, and not by Apple's libraries."""
    return sys.platform == "linux" and not torch.cuda.is_initialized()


class _Whole:
    """All that is to be done for an image, in a worker process."""

    def __init__(self, work: Callable[..., Rest | None], prepare: Callable[[str], Any]):
        self.work, self.prepare = work, prepare
        self.before = 0  # the memory of this process when it was given its first image

    def __call__(self, image_id: str) -> int:
        """Returns the most memory that the images of this process have needed, in bytes."""
        self.before = self.before or distributed.used_memory()
        write = self.work(image_id, self.prepare(image_id))
        if write is not None:
            write()
        distributed.give_memory_back()  # freed pieces of all sizes would add up, and be other processes' memory
        return distributed.used_memory(largest=True) - self.before


def _measured_processes(
    name: str, ids: list[str], work: _Whole, workers: int, failures: list[Failure], bar: Progress
) -> list[str]:
    """Work at images in as many processes as memory permits, and return those that are left where that is but one."""
    distributed.give_memory_back()  # else freed memory, such as a training's, would serve the first images unseen
    needed = max([_LEAST_NEEDED, *filter(None, _processes(ids[:_FIRST], work, 1, failures, bar))])
    # Twice that: the next images may be larger, and pages are shared with this process until they are written.
    room = distributed.free_memory() // (2 * needed)
    if room < 2:
        needs = f"{needed / 1e9:.1g} GB"
        distributed.say(f"{name}: one process computes all images, as there is no memory for two of some {needs}.")
        return ids[_FIRST:]
    _processes(ids[_FIRST:], work, min(workers, room), failures, bar)
    return []


def _processes(
    ids: list[str], work: Callable[[str], Any], workers: int, failures: list[Failure], bar: Progress
) -> list[Any]:
    """Work at images in worker processes; returns what ``work`` did, None where it failed."""
    # a forked child cannot use a GPU context that its parent has opened
    method = "spawn" if torch.cuda.is_initialized() or "fork" not in multiprocessing.get_all_start_methods() else "fork"
    found = []
    try:
        with closing(in_workers(work, ids, workers, method)) as outcomes:
            for image_id, outcome in zip(ids, outcomes, strict=True):
                found.append(_guarded(image_id, outcome.result, failures))
                bar.update()
    except WorkerKilled as killed:
        raise WorkerDied(
            f"A worker process died (often: out of memory) at one of the images {', '.join(killed.items)}. Finished "
            "images are kept: start the same command again, with fewer --machine.workers if it happens again."
        ) from None
    return found
