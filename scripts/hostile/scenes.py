"""Scenes around the kills: two processes on one folder, a full disk, a read-only folder, a killed worker, and a kill
before each change of files in turn. Each function returns what is wrong, a line each."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.hostile.children import Ending, Kill, Rig, children_of, has_traceback, kill_group, log_of, tail, wait
from scripts.hostile.kills import LIMIT, Scenario


def kill_at_every_change(rig: Rig, every: dict[str, Scenario]) -> list[str]:
    """Kill the short commands once before each of their changes of files, and the making of the data at its first."""
    jobs = [
        (scenario, at)
        for scenario in every.values()
        if scenario.operations and not scenario.name.startswith(("run", "predict"))
        and not scenario.name.endswith("workers")
        for at in range(1, min(scenario.operations, 40) + 1)
    ]  # fmt: skip
    jobs += [(every["run-data"], at) for at in range(1, 9)]

    def one(index: int, job: tuple[Scenario, int]) -> dict[str, Any]:
        scenario, at = job
        cwd = rig.work / "every" / f"{index:03}"
        log = scenario.begin(cwd)
        first = rig.call(scenario.script, scenario.argv, cwd, log, kill=Kill(cwd, at))
        second = rig.call(scenario.script, scenario.argv, cwd, log)
        seen = scenario.differences(cwd)
        if not seen and not second.status:
            shutil.rmtree(cwd, ignore_errors=True)
        refused = tail(log, 300) if second.status else ""
        return {"scenario": scenario.name, "at": at, "killed": first.status == -9, "seen": seen, "refused": refused}

    results = rig.each("every", jobs, one)
    problems = [
        f"killed before change {r.get('at')} of {r.get('scenario')}: {r.get('harness') or (r['seen'], r['refused'])}"
        for r in results
        if "harness" in r or r["seen"] or r["refused"]
    ]
    print(f"killed once before each change of files: {sum(r.get('killed', False) for r in results)} kills", flush=True)
    return problems


def kill_one_worker(rig: Rig, every: dict[str, Scenario]) -> list[str]:
    """Kill one worker process, as a system that is short of memory does: a named error, and the command goes on."""
    problems = []
    for name in ("run-workers", "prepare-voc12-workers", "evaluation-workers"):
        scenario, told = every[name], Counter[str]()
        for attempt, delay in enumerate((0.0, 0.02, 0.2, 1.0)):
            cwd = rig.work / "scenes" / f"worker-{name}-{attempt}"
            log = scenario.begin(cwd)
            pid = rig.spawn(scenario.script, scenario.argv, cwd, log)
            victim = _first_worker(pid)
            if not victim:
                told["no worker was seen"] += 1
                continue
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            ending = wait(pid, 120)
            traced = has_traceback(log)
            again = rig.call(scenario.script, scenario.argv, cwd, log)
            seen = {k: v for k, v in scenario.differences(cwd).items() if k != "leftover"}
            what = " ".join([f"status {ending.status}", ending.ended, "(traceback)" if traced else ""]).strip()
            told[f"{what}, then {again.status}"] += 1
            if traced or ending.ended or again.status or seen:
                problems.append(f"one worker of {name} killed after {delay} s: {what}, then {again.status} {seen}")
        print(f"one worker killed, {name}: {dict(told)}", flush=True)
    return problems


def _first_worker(pid: int) -> int:
    """The first worker process that a running child starts; 0 where it ends without any."""
    begin = time.time()
    seen_at: dict[int, float] = {}
    while time.time() - begin < 60 and os.waitpid(pid, os.WNOHANG) == (0, 0):
        for child in children_of(pid):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{child}/cmdline").read_bytes()
                if b"git" in line or b"resource_tracker" in line:
                    continue
                if time.time() - seen_at.setdefault(child, time.time()) > 0.03:  # younger: it may become git yet
                    return child
        time.sleep(0.005)
    return 0


def two_at_once(rig: Rig, every: dict[str, Scenario], rng: random.Random) -> list[str]:
    """Start one command twice in one folder; one of them may be refused because the other works there, and a third call
    must find or make everything."""
    problems = []
    plan = [("run", 0.0, False), ("run", 0.7, False), ("run-workers", 0.0, True), ("run-data", 0.0, False)]
    for number, (name, offset, kill) in enumerate([*plan, ("run-workers", 1.5, False)]):
        scenario = every[name]
        cwd = rig.work / "scenes" / f"two-{number}"
        log = scenario.begin(cwd)
        logs = [log, log_of(cwd.with_name(f"{cwd.name}-second"))]
        first = rig.spawn(scenario.script, scenario.argv, cwd, logs[0])
        time.sleep(offset)
        second = rig.spawn(scenario.script, scenario.argv, cwd, logs[1])
        if kill:
            time.sleep(rng.uniform(0.5, 3))
            kill_group(first)
        endings = [wait(first, LIMIT), wait(second, LIMIT)]
        told = [f"status {e.status} {tail(log, 300) if e.status else ''}" for e, log in zip(endings, logs, strict=True)]
        again = rig.call(scenario.script, scenario.argv, cwd, logs[0])
        after, traced = scenario.differences(cwd), any(map(has_traceback, logs))
        print(f"two at once ({name}, {offset} s apart): {told}; a third: {again.status} {after}", flush=True)
        failed = [e for e, text in zip(endings, told, strict=True) if e.status and "another process" not in text]
        if after or again.status or traced or (failed and not kill):
            problems.append(f"two at once ({name}, {offset} s apart): {told} {after} {'traceback' if traced else ''}")
    return problems


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[bool]:
    """A file system of a given size; yields False where none can be mounted (it takes root's rights)."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "torture", str(place)]
    mounted = bool(shutil.which("mount")) and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        for _ in range(20 if mounted else 0):
            if subprocess.run(["umount", str(place)], capture_output=True).returncode == 0:
                break
            time.sleep(0.5)


def read_only_folder(rig: Rig, scenario: Scenario, base: Path) -> list[str]:
    """A run folder that cannot be written to: a named error; a finished run is fine."""
    problems = []
    for kind in ("empty", "finished", "half"):
        cwd = rig.work / "scenes" / f"read-only-{kind}"
        log = scenario.begin(cwd)
        with small_disk(cwd / "run", "30m") as mounted:
            if not mounted:
                print("read-only folder: no file system can be mounted here, left out.", flush=True)
                break
            if kind != "empty":
                shutil.copytree(base / "run", cwd / "run", dirs_exist_ok=True)
            if kind == "half":
                shutil.rmtree(cwd / "run" / "seg")
            subprocess.run(["mount", "-o", "remount,ro", str(cwd / "run")], check=True)
            ending = rig.call(scenario.script, scenario.argv, cwd, log)
            print(f"read-only run folder ({kind}): status {ending.status}, {tail(log, 250)!r}", flush=True)
            if has_traceback(log) or (kind != "finished" and ending.status not in (1, 2)):
                problems.append(f"read-only run folder ({kind}): status {ending.status}, {tail(log, 700)}")
    return problems


def full_disk(rig: Rig, scenario: Scenario) -> list[str]:
    """Disks that are full at once or later (KB left after step 1): a named error, and the command goes on."""
    problems = []
    for size, left in [("64k", None), ("2m", None), ("6m", None), *(("40m", free) for free in (6, 60, 400, 2500))]:
        cwd = rig.work / "scenes" / f"disk-{size}-{left}"
        log = scenario.begin(cwd)
        with small_disk(cwd / "run", size) as mounted:
            if not mounted:
                print("full disk: no file system can be mounted here, left out.", flush=True)
                break
            if left is not None:
                rig.call(scenario.script, [*scenario.argv, "--steps", "1"], cwd, log)
                room = os.statvfs(cwd / "run")
                (cwd / "run/filler").write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - (left << 10))))
                log.unlink()
            ending, text, traced = _call(rig, scenario, cwd, log)
            if left is None:
                subprocess.run(["mount", "-o", "remount,size=40m", str(cwd / "run")], check=True)
            else:
                (cwd / "run/filler").unlink()
            what = f"disk of {size}" if left is None else f"{left} KB left after step 1"
            problems += _goes_on(rig, scenario, cwd, log, what, (ending, text, traced))
    return problems


def small_files(rig: Rig, scenario: Scenario) -> list[str]:
    """A limit on the size of files (ulimit -f): as a full disk."""
    problems = []
    for limit in (10_000, 300_000):
        cwd = rig.work / "scenes" / f"files-{limit}"
        log = scenario.begin(cwd)

        def small(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        told = _call(rig, scenario, cwd, log, setup=small)
        problems += _goes_on(rig, scenario, cwd, log, f"files of at most {limit} bytes", told)
    return problems


def _call(rig: Rig, scenario: Scenario, cwd: Path, log: Path, **how: Any) -> tuple[Ending, str, bool]:
    ending = rig.call(scenario.script, scenario.argv, cwd, log, **how)
    return ending, tail(log, 400), has_traceback(log)


def _goes_on(
    rig: Rig, scenario: Scenario, cwd: Path, log: Path, what: str, told: tuple[Ending, str, bool]
) -> list[str]:
    """Call again with space: everything must be as undisturbed. ``told``: how the call without space ended."""
    ending, text, traced = told
    again = rig.call(scenario.script, scenario.argv, cwd, log)
    seen = scenario.differences(cwd)
    print(f"{what}: status {ending.status}, {text[-230:]!r}; with space: status {again.status}, {seen}", flush=True)
    if traced or again.status or seen or ending.status not in (0, 1, 2):
        trace = "(traceback)" if traced else ""
        return [f"{what}: status {ending.status} {trace}, then {again.status} {seen}: {text}"]
    return []
