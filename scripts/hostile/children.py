"""Commands of the product in child processes: started (forked or really executed), watched, killed.

Only processes that were started here are ever killed, each with its own process group.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY_LIMIT = 4 << 30
"""Resident bytes at which a child is killed and counted as a failure."""

PROGRAMS = {
    "run_sample.py": "run_sample.py",
    "predict.py": "predict.py",
    "evaluation.py": "evaluation.py",
    "prepare": "voc12/prepare/__main__.py",
}
"""Command lines that are tried -> the file of each."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"}


@dataclass(frozen=True)
class Ending:
    """How a child ended: its exit status (negative: the signal), and whether it was ended for time or memory."""

    status: int
    seconds: float
    peak: int
    """Peak resident memory in MB."""
    ended: str = ""
    """"hang" or "memory" where the child was killed for it."""


@dataclass(frozen=True)
class Kill:
    """A process kills its own group before (or ``delay`` seconds after) the ``at``-th change of files below ``place``.

    ``at`` 0: never; the changes are counted into LOG.count.
    """

    place: Path
    at: int = 0
    delay: float = 0.0


@dataclass
class Rig:
    """The checkout that is tortured, its interpreter, a folder to work in, and the number of children at a time."""

    project: Path
    python: Path
    work: Path
    jobs: int = 1
    _mains: dict[str, Callable[[list[str]], int]] = field(default_factory=dict)

    def load(self) -> None:
        """Import the product once: forked children have everything loaded. They compute on one thread."""
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if str(self.project) not in sys.path:
            sys.path.insert(0, str(self.project))
        import cv2
        import torch
        import torch.utils.tensorboard  # noqa: F401

        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        for name, path in PROGRAMS.items():
            self._mains[name] = importlib.import_module(path.removesuffix(".py").replace("/", ".")).main
        importlib.import_module("net.registry").load_methods()
        for step in importlib.import_module("step").STEPS:
            step.run()

    def spawn(
        self, script: str, argv: Sequence[str], cwd: Path, log: Path, *, real: bool = False, kill: Kill | None = None,
        setup: Callable[[], None] | None = None,
    ) -> int:  # fmt: skip
        """Start a command in a session of its own and return its process id.

        Args:
            script: one of PROGRAMS.
            argv: its arguments.
            cwd: folder to start it in.
            log: file to which its output is appended.
            real: execute the interpreter, as a user does; else the loaded program runs in a fork.
            kill: where a fork kills itself.
            setup: called in the child before anything else.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            _detach(cwd, log)
            if setup is not None:
                setup()
            if real:
                os.environ["PYTHONPATH"] = str(self.project)
                where = ["-m", "voc12.prepare"] if script == "prepare" else [str(self.project / PROGRAMS[script])]
                os.execv(self.python, [str(self.python), *where, *argv])
            sys.modules["torch"].set_num_threads(1)  # of a fork; threads that ask for it at once break PyTorch
            sys.argv = [script, *argv]
            sys.modules["__main__"].__file__ = str(self.project / PROGRAMS[script])  # what spawned workers import
            if kill is not None:
                _watch(kill, log.with_suffix(".count"))
            status = int(self._mains[script](list(argv)) or 0)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException as error:
            traceback.print_exc()
            status = 130 if isinstance(error, KeyboardInterrupt) else 1
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def call(self, script: str, argv: Sequence[str], cwd: Path, log: Path, limit: float = 300, **how: Any) -> Ending:
        """``spawn``, and wait for the end."""
        return wait(self.spawn(script, argv, cwd, log, **how), limit)

    def each(self, name: str, items: Sequence[Any], work: Callable[[int, Any], dict[str, Any]]) -> list[dict[str, Any]]:
        """work(index, item) for all items, in forked processes; returns the results, which are dicts.

        They are appended to WORK/NAME.jsonl as they come, and those that are there already are not made again: a
        call that was stopped goes on with the same folder.
        """
        path = self.work / f"{name}.jsonl"
        results = _read_results(path)
        todo = [(i, item) for i, item in enumerate(items) if i not in results]
        children = []
        for slot in range(self.jobs):
            pid = os.fork()
            if pid:
                children.append(pid)
                continue
            try:
                for index, item in todo[slot :: self.jobs]:
                    try:
                        result = work(index, item)
                    except Exception:
                        result = {"harness": traceback.format_exc()}
                    with open(path, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"index": index, **result}, default=str) + "\n")
            finally:
                os._exit(0)
        for pid in children:
            os.waitpid(pid, 0)
        results = _read_results(path)
        lost = {i: {"index": i, "harness": "the process of this item ended"} for i in range(len(items))}
        return list((lost | results).values())


def _read_results(path: Path) -> dict[int, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["index"]: result for result in map(json.loads, lines)}


def _detach(cwd: Path, log: Path) -> None:
    """Make this fork a session of its own whose output goes to ``log``."""
    os.setsid()
    os.chdir(cwd)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(kill: Kill, counted: Path) -> None:
    """Count what changes files below ``kill.place``, and kill this process's group when it is time."""
    count = 0
    place = f"{kill.place}{os.sep}"
    descriptor = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def die() -> None:
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            if not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
                return
        elif event not in _CHANGES:
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(os.fspath(path)).startswith(place):
            return
        count += 1
        os.pwrite(descriptor, str(count).encode(), 0)
        if count == kill.at:
            if kill.delay <= 0:
                die()
            timer = threading.Timer(kill.delay, die)
            timer.daemon = True
            timer.start()

    sys.addaudithook(audit)


def wait(pid: int, limit: float) -> Ending:
    """Wait for a child; kill its group where it lives longer than ``limit`` seconds or takes more than 4 GB."""
    begin, ended, peak = time.time(), "", 0
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        peak = max(peak, _memory(pid))
        ended = "memory" if peak > MEMORY_LIMIT else "hang" if time.time() - begin > limit else ""
        if ended:
            kill_group(pid)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.02)
    megabytes = max(peak, usage.ru_maxrss << 10) >> 20
    return Ending(os.waitstatus_to_exitcode(status), round(time.time() - begin, 1), megabytes, ended)


def _memory(pid: int) -> int:
    """Resident bytes of a process."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) << 10
    return 0


def kill_group(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to the group of a child."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def alive_in_group(pid: int) -> list[int]:
    """Processes of a child's group that live."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == pid and fields[0] != "Z":
                    found.append(int(entry))
    return found


def children_of(pid: int) -> list[int]:
    """Processes that a process has started and that live."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # the process has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # the thread has ended
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def fresh(folder: Path) -> Path:
    """An empty folder in place of whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def log_of(folder: Path) -> Path:
    """An absent file beside a folder, for the output of a command that works in it."""
    path = folder.with_name(f"{folder.name}.log")
    path.unlink(missing_ok=True)
    return path


def tail(log: Path, count: int = 500) -> str:
    """The end of a child's output."""
    return log.read_text(errors="replace")[-count:].strip() if log.exists() else ""


def has_traceback(log: Path) -> bool:
    """Whether a child's output shows a Python traceback."""
    return "Traceback (most recent call last)" in log.read_text(errors="replace")


def file_digests(folder: Path) -> dict[str, str]:
    """{path below the folder: digest} of all files."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
