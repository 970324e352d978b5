"""Torture: kills tiny runs at random moments and compares what they end with, and feeds hostile files to every reader.

    python scripts/torture.py --kills 200 --fuzz 1000 --seed 1 [--project DIR --python PY --work DIR]

Kills: commands are killed one to four times and started again; they must end with the files of an undisturbed run.
After them: two processes on one folder, full disks, read-only folders (root's rights are needed to mount small ones),
killed workers. Hostile files: made on purpose, or good ones with damaged bytes; each must be taken where that is right
or refused by name, within 20 s and 4 GB; nothing hidden in it may be run, and nothing written outside the folder.

Results are written to WORK/kills.jsonl and WORK/fuzz.jsonl as they come, failing cases are kept below WORK; a second
call with the same arguments and --work makes those that are missing. The last line is a summary; the exit status is 1
where anything failed.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # read when NumPy and PyTorch are loaded; children compute side by side

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    import as_file  # noqa: F401

from scripts import ROOT
from scripts.hostile import fuzz, kills, scenes
from scripts.hostile.children import Rig


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--project", type=Path, default=ROOT, help="checkout to torture; default: this one")
    add("--python", type=Path, default=Path(sys.executable), help="its interpreter; default: this one")
    add("--kills", type=int, default=30, help="kill runs of the pipeline, with as many of the other programs; 0: none")
    add("--fuzz", type=int, default=750, help="hostile inputs, a fifth or more of them damaged bytes; 0: none")
    add("--seed", type=int, default=0, help="seed of the moments, of the choice of inputs and of the damage")
    add("--jobs", type=int, default=2, help="commands at a time")
    add("--cli", type=int, default=60, help="hostile inputs that go through an interpreter of their own")
    add("--only", default="", help="hostile inputs: only those whose 'KIND: NAME' holds this")
    add("--quick", action="store_true", help="kill short commands alone, no further scenes, no large files")
    add("--work", type=Path, help="folder to work in; default: a new temporary one")
    return parser


def torture_by_kills(rig: Rig, base: Path, count: int, seed: int, quick: bool) -> dict[str, int]:
    """The kill runs and the scenes around them: counts; what is wrong is printed."""
    jobs = kills.planned(count, quick)
    every = kills.make_scenarios(base)
    if quick:
        every = {name: scenario for name, scenario in every.items() if name in {name for name, _ in jobs}}
    problems = [] if quick else kills.compare_undisturbed(rig, every)
    for scenario in every.values() if quick else ():
        problems += filter(None, [scenario.undisturbed(rig, rig.work / "undisturbed" / scenario.name)])
        scenario.reference = scenario.files(rig.work / "undisturbed" / scenario.name)
    counts = kills.kill_runs(rig, every, jobs, seed)
    if not quick:
        problems += scenes.two_at_once(rig, every, random.Random(seed))
        problems += scenes.read_only_folder(rig, every["run"], base)
        problems += scenes.full_disk(rig, every["run"])
        problems += scenes.small_files(rig, every["run"])
        problems += scenes.kill_at_every_change(rig, every)
        problems += scenes.kill_one_worker(rig, every)
    for problem in problems:
        print(f"PROBLEM: {problem}", flush=True)
    return {**counts, "problems": len(problems), "failed": counts["failed"] + len(problems)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parser().parse_args(argv)
    begin = time.time()
    work = (args.work or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = Path(os.path.abspath(args.python))  # a link of a virtual environment stays what it is
    rig = Rig(args.project.resolve(), python, work, args.jobs)
    rig.load()
    base = kills.run_base(rig)
    parts: dict[str, dict[str, int]] = {}
    if args.kills:
        parts["kills"] = torture_by_kills(rig, base, args.kills, args.seed, args.quick)
    if args.fuzz:
        parts["fuzz"] = fuzz.fuzz(rig, base, args.fuzz, args.seed, args.cli, args.only, args.quick)
    failed = sum(part["failed"] for part in parts.values())
    text = "; ".join(f"{name}: " + ", ".join(f"{k} {n}" for k, n in part.items()) for name, part in parts.items())
    verdict = "FAIL" if failed else "PASS"
    print(f"TORTURE {verdict} seed {args.seed} {text} ({time.time() - begin:.0f} s, work in {work})")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
