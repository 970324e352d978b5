"""Kills: commands are killed at random moments and started again; they must end with an undisturbed run's files."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.hostile.children import Kill, Rig, alive_in_group, file_digests, fresh, kill_group, log_of, tail, wait
from scripts.hostile.material import (
    PLAIN_RUN,
    SAMPLE,
    SAMPLE_FLAGS,
    TINY_FLAGS,
    make_coco,
    make_devkit,
    make_folder,
    names_of_classes,
)  # fmt: skip

LIMIT = 300
"""Seconds that a command may take."""

_OF_ITS_OWN_TIME = re.compile(r"(^|/)(log/|checked_images\.json$|run\.json$|report\.html$|\.lock$)")
"""Files that hold times."""
_LEFTOVER = re.compile(r"(\.part|\.resume\.pt|\.best\.pt|\.tmp)$")


@dataclass
class Scenario:
    """A command, what it needs, the folders of its results, and what they hold when nothing disturbs it."""

    name: str
    script: str
    argv: Sequence[str]
    lay: Callable[[Path], None]
    """Lays what the command needs into an empty folder."""
    results: Sequence[str]
    reference: dict[str, str] = field(default_factory=dict)
    operations: int = 0
    seconds: float = 0.0

    def files(self, cwd: Path) -> dict[str, str]:
        """{file: digest} of the results, but for files that hold times."""
        found = {f"{r}/{n}": d for r in self.results for n, d in file_digests(cwd / r).items()}
        return {name: digest for name, digest in found.items() if not _OF_ITS_OWN_TIME.search(name)}

    def differences(self, cwd: Path) -> dict[str, list[str]]:
        """Files that are missing, different, left over or additional: {} where all is as in the undisturbed run."""
        here, there = self.files(cwd), self.reference
        extra = [n for n in here if n not in there]
        found = {
            "missing": [n for n in there if n not in here],
            "different": [n for n in here if n in there and here[n] != there[n]],
            "leftover": [n for n in extra if _LEFTOVER.search(n)],
            "extra": [n for n in extra if not _LEFTOVER.search(n)],
        }
        return {kind: names for kind, names in found.items() if names}

    def begin(self, cwd: Path) -> Path:
        """Lay all that is needed into an empty folder; returns the log of its commands."""
        self.lay(fresh(cwd))
        return log_of(cwd)

    def undisturbed(self, rig: Rig, cwd: Path, real: bool = False) -> str:
        """Run without a kill; returns the error, or ""."""
        log = self.begin(cwd)
        ending = rig.call(self.script, self.argv, cwd, log, LIMIT, real=real, kill=None if real else Kill(cwd))
        if not real:
            self.operations = int(log.with_suffix(".count").read_text() or 0)
            self.seconds = ending.seconds
        return f"undisturbed {self.name}: status {ending.status} {tail(log, 2000)}" if ending.status else ""


def base_scenario() -> Scenario:
    """The run whose data and networks the other scenarios use."""
    return Scenario("base", "run_sample.py", PLAIN_RUN, lambda cwd: None, ["run", "data"])


def make_scenarios(base: Path) -> dict[str, Scenario]:
    """All commands that are killed. ``base``: folder of the finished base scenario."""
    sample = base / SAMPLE

    def link(*names: str) -> Callable[[Path], None]:
        def lay(cwd: Path) -> None:
            for name in names:
                (cwd / name).symlink_to(base / name)

        return lay

    def photos(cwd: Path) -> None:
        shutil.copytree(sample / "JPEGImages", cwd / "photos")
        link("run")(cwd)

    def score(cwd: Path) -> None:
        (cwd / "d").symlink_to(sample)
        link("run")(cwd)
        (cwd / "out").mkdir()

    def folder(cwd: Path) -> None:
        make_folder(cwd / "photos", sample, masks=True)

    def devkit(cwd: Path) -> None:
        make_devkit(cwd, sample)

    def coco(cwd: Path) -> None:
        make_coco(cwd / "coco", sample)

    def nothing(cwd: Path) -> None:
        pass

    run = ["seam", *SAMPLE_FLAGS, *TINY_FLAGS, "--out", "run", "--machine.workers"]
    lists = "--list d/ImageSets/Segmentation/train.txt --gt-dir d/SegmentationClass --num-classes 3 --json out/x.json"
    cpu = "--machine.workers 1 --machine.device cpu"
    tag = names_of_classes(sample)[0]
    table: list[tuple[str, str, str | list[str], Callable[[Path], None], str]] = [
        ("run", "run_sample.py", [*run, "0"], link("data"), "run"),
        ("run-workers", "run_sample.py", [*run, "2"], link("data"), "run"),
        ("run-data", "run_sample.py", [*run, "0", "--steps", "1", "2"], nothing, "run data"),
        ("prepare-voc12", "prepare", "voc12 --root voc --sbd sbd --workers 0", devkit, "voc"),
        ("prepare-voc12-workers", "prepare", "voc12 --root voc --sbd sbd --workers 2", devkit, "voc"),
        ("prepare-folder", "prepare", "folder --root photos --val-share 0.3 --workers 0", folder, "photos"),
        ("prepare-shrink", "prepare", "shrink --root photos --out small --long-side 64 --workers 0", folder, "small"),
        ("prepare-coco14", "prepare", "coco14 --root coco --workers 0", coco, "coco"),
        ("predict", "predict.py", f"photos --weights run/weights/seg.pt --out masks --probabilities {cpu}", photos,
         "masks"),
        ("predict-tags", "predict.py", f"photos --run run --tags {tag} --out maps {cpu}", photos, "maps"),
        ("evaluation", "evaluation.py", f"{lists} --predict-dir run/label", score, "out"),
        ("evaluation-workers", "evaluation.py",
         f"{lists} --predict-dir run/cam --type npz --curve --workers 2", score, "out"),
    ]  # fmt: skip
    return {
        name: Scenario(name, script, argv.split() if isinstance(argv, str) else argv, lay, results.split())
        for name, script, argv, lay, results in table
    }


LONG = [
    ("run", "real clock"), ("run", "operation"), ("run-workers", "clock"), ("run-workers", "operation"),
    ("run", "clock int"), ("run-data", "operation"), ("run-workers", "real clock int"), ("run", "operation"),
    ("run-workers", "clock term"), ("run-data", "clock"), ("run-workers", "parent clock"), ("run", "operation"),
]  # fmt: skip
"""Scenarios of the pipeline and how they are killed. operation: before a change of a file; clock: at a moment; real: a
process of its own; parent: the main process alone; int, term: by that signal."""
SHORT = [
    ("prepare-voc12", "operation"), ("prepare-folder", "operation"), ("predict", "operation"),
    ("evaluation", "operation"), ("prepare-shrink", "operation"), ("prepare-coco14", "operation"),
    ("predict-tags", "operation"), ("evaluation-workers", "clock"), ("prepare-voc12-workers", "clock"),
    ("predict", "clock int"), ("evaluation-workers", "clock int"), ("prepare-voc12-workers", "clock int"),
]  # fmt: skip
"""Those of the other programs."""
QUICK = [job for job in SHORT if job[1] == "operation"]


def planned(count: int, quick: bool) -> list[tuple[str, str]]:
    """Scenario and manner of every kill run: ``count`` of the pipeline and as many of the other programs; quick: those
    of the other programs alone."""
    if quick:
        return [QUICK[n % len(QUICK)] for n in range(count)]
    jobs: list[tuple[str, str]] = []
    for number in range(count):
        jobs.append(LONG[number % len(LONG)])
        if number % 2 == 0:
            jobs += [SHORT[(number // 2) % len(SHORT)]] * 2
    return jobs


def tortured(rig: Rig, scenario: Scenario, manner: str, rng: random.Random, cwd: Path) -> dict[str, Any]:
    """One run that is killed one to four times and then let end: what was noticed."""
    log = scenario.begin(cwd)
    real = "real" in manner
    moments: list[str] = []
    notes: list[str] = []
    refused = ""
    for _ in range(rng.randint(1, 4)):
        if "operation" in manner:
            delay = rng.choice([0, 0, rng.uniform(0, 0.004), rng.uniform(0, 0.05)])
            kill = Kill(cwd, rng.randint(1, max(2, scenario.operations)), delay)
            pid = rig.spawn(scenario.script, scenario.argv, cwd, log, kill=kill)
            ending = wait(pid, LIMIT)
            kill_group(pid)
            if ending.status == -signal.SIGKILL and not ending.ended:
                moments.append(f"change {kill.at}")
                continue
            status, ended = ending.status, ending.ended
        else:
            pid, begin = rig.spawn(scenario.script, scenario.argv, cwd, log, real=real), time.time()
            time.sleep((3.0 if real else 0.0) + rng.uniform(0, max(0.3, scenario.seconds)))
            done, code = os.waitpid(pid, os.WNOHANG)
            if not done:
                moments.append(f"{time.time() - begin:.2f} s")
                notes += _interrupt(pid, manner)
                continue
            status, ended = os.waitstatus_to_exitcode(code), ""
        if status or ended:
            refused = f"status {status} {ended}: {tail(log)}"
        break  # it was quicker than the kill, or failed
    if not refused:
        ending = rig.call(scenario.script, scenario.argv, cwd, log, LIMIT, real=real)
        if ending.status or ending.ended:
            refused = f"status {ending.status} {ending.ended}: {tail(log)}"
    text = log.read_text(errors="replace")
    errors = text.split("Traceback (most recent call last)")[1:]
    # Python itself was starting: nothing of the project had begun
    errors = [error for error in errors if '"<frozen site>"' not in error]
    notes += [f"traceback in the output: {error[:900]}" for error in errors[:1]]
    told = {"scenario": scenario.name, "manner": manner, "kills": len(moments), "moments": moments}
    found = {"refused": refused, "notes": notes, **scenario.differences(cwd)}
    return told | {kind: value for kind, value in found.items() if value}


def _interrupt(pid: int, manner: str) -> list[str]:
    """Send the signal of a manner to a child, wait for its end, and say what is wrong with that."""
    number = {"term": signal.SIGTERM, "int": signal.SIGINT}.get(manner.split()[-1], signal.SIGKILL)
    alone = "parent" in manner  # the main process: its workers must end by themselves
    if alone:
        os.kill(pid, number)
    else:
        kill_group(pid, number)
    notes: list[str] = []
    ending = wait(pid, 60)
    if ending.ended:
        notes.append(f"did not end within 60 s of {number.name}")
    if alone or number != signal.SIGKILL:
        until = time.time() + 15
        while alive_in_group(pid) and time.time() < until:
            time.sleep(0.1)
        if left := alive_in_group(pid):
            notes.append(f"{len(left)} processes of the group are alive after 15 s")
            kill_group(pid)
    if number == signal.SIGINT and ending.status not in (130, 0, -signal.SIGINT):
        notes.append(f"status {ending.status} after SIGINT")
    return notes


FINDINGS = ("harness", "refused", "notes", "missing", "different", "extra", "leftover")
"""Keys of a kill run's result that say that something is wrong."""


def compare_undisturbed(rig: Rig, every: dict[str, Scenario]) -> list[str]:
    """Run every scenario twice, and one as a process of its own: all must give the same files. Sets the references."""
    problems: list[str] = []
    place = rig.work / "undisturbed"
    for name, scenario in every.items():
        problems += filter(None, [scenario.undisturbed(rig, place / f"{name}-1")])
        scenario.reference = scenario.files(place / f"{name}-1")
        problems += filter(None, [scenario.undisturbed(rig, place / f"{name}-2")])
        odd = scenario.differences(place / f"{name}-2")
        print(f"undisturbed {name}: {len(scenario.reference)} files, {scenario.seconds} s, differ: {odd}", flush=True)
        problems += [f"two undisturbed runs of {name} differ: {odd}"] if odd else []
    run = every["run"]
    problems += filter(None, [run.undisturbed(rig, place / "run-real", real=True)])
    if odd := run.differences(place / "run-real"):
        problems.append(f"the forked run and a process of its own differ: {odd}")
    other = every["run-workers"].reference
    if odd_files := [n for n, d in other.items() if run.reference.get(n) != d]:
        problems.append(f"--machine.workers 2 gives other files: {odd_files[:5]}")
    return problems


def run_base(rig: Rig) -> Path:
    """Run the base scenario; returns its folder. Raises SystemExit where it fails."""
    place = rig.work / "base"
    base = base_scenario()
    if not (place / "finished").exists():
        if error := base.undisturbed(rig, place):
            raise SystemExit(error)
        (place / "finished").touch()
    return place


def kill_runs(
    rig: Rig, every: dict[str, Scenario], jobs: Sequence[tuple[str, str]], seed: int
) -> dict[str, int]:
    """Do the kill runs of ``planned`` and return counts; what is wrong is printed."""

    def one(index: int, job: tuple[str, str]) -> dict[str, Any]:
        cwd = rig.work / "kills" / f"{index:03}"
        result = tortured(rig, every[job[0]], job[1], random.Random(f"{seed} {index}"), cwd)
        if not any(key in result for key in FINDINGS):
            shutil.rmtree(cwd, ignore_errors=True)
            with contextlib.suppress(OSError):
                cwd.with_name(f"{cwd.name}.log").unlink()
        return result

    results = rig.each("kills", jobs, one)
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        found = {key: str(result[key])[:600] for key in FINDINGS if key in result}
        if found:
            what = f"{result.get('scenario')} ({result.get('manner')}, {result.get('moments')})"
            print(f"KILL RUN {result['index']} {what}: {found}", flush=True)
        rows[result.get("scenario", "?")].update(runs=1, kills=result.get("kills", 0), findings=bool(found))
    for name, row in sorted(rows.items()):
        print(f"  {name:<24} {row['runs']:>3} runs {row['kills']:>4} kills {row['findings']:>3} with a finding")
    counts = {"kill_runs": len(results), "kills": sum(row["kills"] for row in rows.values())}
    counts["wrong_files"] = sum(any(k in r for k in ("missing", "different", "extra")) for r in results)
    for key in ("refused", "leftover", "notes", "harness"):
        counts[key] = sum(key in r for r in results)
    counts["failed"] = sum(any(key in r for key in FINDINGS) for r in results)
    return counts
