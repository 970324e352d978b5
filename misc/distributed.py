"""Ranks, devices, threads: the only file that knows about processes (docs/design.md section 7).

Plain ``python`` is the case of one process, ``torchrun`` that of several; gloo on the CPU, nccl on GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import cv2
import torch
import torch.distributed as dist
from torch import Tensor

from misc.precision import allow_tf32

_T = TypeVar("_T")

# at the end of a step processes wait for each other, possibly for hours: their images take different times
_LONGEST_WAIT = timedelta(days=7)
_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def start(device: str) -> torch.device:
    """Join the process group if torchrun started us, and choose this process's device.

    Args:
        device: 'auto' (a GPU if there is one), 'cpu', 'cuda' or 'mps' (Apple's GPUs, untested).

    Raises ValueError if a GPU is requested and there is none, or fewer GPUs than processes.
    """
    chosen = _choose_device(device)
    allow_tf32(False)  # misc.precision.autocast allows it where the precision is fast
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif chosen.type == "cpu":
        keep_freed_memory()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # gloo too: processes that wait for each other by NCCL keep their GPU and a core busy
        on_gpu = {"backend": "cpu:gloo,cuda:nccl", "device_id": chosen}
        settings = on_gpu if chosen.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(timeout=_LONGEST_WAIT, **settings)  # type: ignore[arg-type]
    return chosen


def keep_freed_memory() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones; returns whether it can (glibc).

    By default it gives large blocks back at once, and the system clears every page of the next ones: a quarter to a
    third of the time of a training step on large images on a CPU. The process then stays as large as it has been.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # from glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    wanted = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20))
    return all([mallopt(ctypes.c_int(which), ctypes.c_int(value)) == 1 for which, value in wanted])


def give_memory_back() -> None:
    """Give the pages that nothing uses back to the system, where the C library can (glibc): images of many sizes leave
    the kept memory in pieces that fit no other."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def used_memory(largest: bool = False) -> int:
    """Bytes of memory that this process has now, or the most so far; 0 where the system doesn't tell (Linux does)."""
    told = kilobytes("self/status")
    return max(told.get("VmRSS", 0), told.get("VmHWM", 0) if largest else 0) * 1024


def free_memory() -> int:
    """Bytes of memory that new processes can have: of the machine, or of the control groups (container, batch job) that
    this process is in, divided over the processes that torchrun started on this machine. 0 where the system doesn't
    tell (Linux does)."""
    free: float = kilobytes("meminfo").get("MemAvailable", 0) * 1024
    try:
        groups = [line.split(":", 2) for line in (_PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    for number, controllers, path in groups:
        if number == "0":
            free = min(free, _left_in(_GROUPS, path, "memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):  # version 1 of control groups
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            free = min(free, _left_in(_GROUPS / "memory", path, *files))
    return int(free) // _local_processes()


def _left_in(root: Path, path: str, limit: str, used: str, cached: str) -> float:
    """Bytes left in the tightest of a control group and those around it; inf where none has a limit."""
    group, left = root / path.lstrip("/"), math.inf
    for inside in (group, *group.parents[: len(group.parts) - len(root.parts)]):
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, or "max"
            most, now = (int((inside / name).read_text()) for name in (limit, used))
            kept = dict(line.split() for line in (inside / "memory.stat").read_text().splitlines())
            left = min(left, max(0, most - now + int(kept[cached])))  # files' pages are given up when needed
    return left


def kilobytes(file: str) -> dict[str, int]:
    """The sizes in a file of /proc, by name."""
    try:
        text = (_PROC / file).read_text()
    except OSError:
        return {}
    return {name: int(size) for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}


def _choose_device(device: str) -> torch.device:
    """This process's device; arguments and errors as for ``start``."""
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("--machine.device mps: PyTorch sees no GPU of Apple's here. Leave the flag out.")
        return torch.device("mps")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--machine.device cuda: PyTorch sees no GPU here. Leave the flag out to run on the CPU.")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.index >= torch.cuda.device_count():
        raise ValueError(
            f"There are {torch.cuda.device_count()} GPUs but more processes: lower --nproc-per-node, or give "
            "--machine.device cpu."
        )
    return chosen


def device_name(device: torch.device) -> str:
    """A device as run.json records it: the GPU's name, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def usable_cores() -> int:
    """Processor cores for this process: those that it may use, divided over the processes that torchrun started on
    this machine; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // _local_processes())


def _local_processes() -> int:
    """Number of processes that torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def stop() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Rank of this process, 0-based."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the main process (rank 0), which writes shared files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU, where waiting costs nothing


def total(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def joined(items: list[_T]) -> list[_T]:
    """The concatenated lists of all processes, on every process. Waits for all."""
    if not dist.is_initialized():
        return items
    lists: list[list[_T]] = [[] for _ in range(world())]
    dist.all_gather_object(lists, items)
    return [item for listed in lists for item in listed]


def say(*parts: object) -> None:
    """Print from the main process only."""
    if is_main():
        print(*parts, flush=True)


def quiet_threads() -> None:
    """Use one thread in this process. For worker processes, which share the cores among themselves."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def parse_shard(shard: str) -> tuple[int, int]:
    """(i, n) from "i/n": the i-th of n parts of the images, i from 0. Raises ValueError if it has another form."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"--shard {shard} is not i/n with 0 <= i < n.")
    return int(match[1]), int(match[2])
