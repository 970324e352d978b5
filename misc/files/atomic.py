"""Atomic writing of files that several processes share, locks, and removal of half-written files of killed
processes."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

SUFFIX = ".part"
"""Suffix of files that are being written."""

_LONGEST_NAME = 190
_OLD = 24 * 3600
_LONGEST_WAIT = 300


class DiskFull(OSError):
    """No disk space is left: the step must stop instead of going on to the next image."""


def _host() -> str:
    """A short name of the machine or container in which this process's id is unique."""
    space = "/proc/self/ns/pid"
    inner = os.stat(space).st_ino if os.path.exists(space) else 0
    return hashlib.sha256(f"{platform.node()} {inner}".encode()).hexdigest()[:8]


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing; it gets its name only when the block ends without an error. Raises DiskFull."""
    path = Path(path)
    # the writer's host and process id tell remove_leftovers whether it lives
    start = path.name.encode()[:_LONGEST_NAME].decode(errors="ignore")  # what is put around it must fit too
    beside = path.with_name(f".{start}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{SUFFIX}")
    try:
        with naming_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Where a disk, a quota or the largest size of a file ends what is written in the block: DiskFull with ``path`` and
    the remedy."""
    try:
        yield
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None:  # zip writers raise their own error on top of the disk's
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskFull(
                    cause.errno, f"No disk space left while writing {path}. Free some and start the same command again"
                ) from error
            cause = cause.__context__
        raise


def remove_leftovers(places: Iterable[Path]) -> int:
    """Remove half-written files that no process is writing any more; returns their number.

    These are files that ``writing`` began in a process of this host that has ended, and files of any other host (of a
    cluster) that have not changed for a day. Parallel jobs on one folder don't disturb each other.

    Args:
        places: folders, which are searched with all below, and files, whose own folder is searched.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += [Path(top, name) for top, _, names in os.walk(place) for name in names if name.endswith(SUFFIX)]
        else:
            found += place.parent.glob(f".*{SUFFIX}")
    removed = 0
    for path in found:
        try:
            if _abandoned(path):
                path.unlink()
                removed += 1
        except FileNotFoundError:  # finished or removed in the meantime
            pass
    return removed


def _abandoned(path: Path) -> bool:
    host, _, rest = path.name.removesuffix(SUFFIX).rpartition(".")[2].partition("-")
    pid = rest.partition("-")[0]
    if os.name == "posix" and host == _host() and pid.isdecimal() and not _alive(int(pid)):
        return True
    return time.time() - path.stat().st_mtime > _OLD


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", "rb") as file:  # a killed process that nobody has waited for writes no more
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except ProcessLookupError:
        return False
    except (OSError, IndexError):  # another user's; no such file system
        return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process, on any machine that shares the folder, holds the lock file ``path``, and hold it.

    The system frees the lock of a killed process. Raises OSError after minutes without success.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(path), timeout=_LONGEST_WAIT):
            yield
    except Timeout:
        raise OSError(
            f"{path} has been held by another process for {_LONGEST_WAIT} s. If none works in this folder (its machine "
            "may have gone down), delete the file and start the same command again."
        ) from None
