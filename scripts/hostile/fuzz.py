"""Hostile inputs: each is read by a command of its own, whose answer is judged."""

from __future__ import annotations

import gc
import random
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from scripts.hostile import annotations, checkpoints, exports, images, maps, networks, records, texts
from scripts.hostile.cases import Bench, HostileFile
from scripts.hostile.children import MEMORY_LIMIT, Ending, Kill, Rig, fresh, log_of
from scripts.hostile.damage import damaged_cases
from scripts.hostile.formats import MARKER

_RAW = re.compile(
    r"\b(TypeError|KeyError|IndexError|AttributeError|AssertionError|RuntimeError|UnboundLocalError|ZeroDivisionError|"
    r"RecursionError|OverflowError|MemoryError|StopIteration|struct\.error): "
)
"""Names of exceptions that stand in no message written for a user."""
GOOD = ("clean", "worked")
"""Verdicts that are no failures: refused by name, or taken where that is right."""


def make_resume_point(rig: Rig, base: Path) -> None:
    """Make BASE/resume.pt: a resume point as a killed training leaves it."""
    if (base / "resume.pt").exists():
        return
    half = fresh(rig.work / "half")
    (half / "data").symlink_to(base / "data")
    for at in range(6, 40, 3):
        rig.call("run_sample.py", [*Bench.run, "--steps", "1"], half, log_of(half), kill=Kill(half, at))
        if (point := half / "run/weights/cam.resume.pt").exists():
            shutil.copy(point, base / "resume.pt")
            return
        shutil.rmtree(half / "run", ignore_errors=True)


def structured_cases(bench: Bench) -> list[HostileFile]:
    """All cases that are made on purpose."""
    makers = [
        images.image_cases, images.name_cases, images.mask_cases, texts.all_text_cases, annotations.coco_cases,
        annotations.sbd_cases, exports.export_cases, maps.all_map_cases, networks.all_network_cases,
        records.record_cases, records.predict_record_cases, checkpoints.checkpoint_cases,
    ]  # fmt: skip
    return [case for make in makers for case in make(bench)]


def choose_cases(bench: Bench, count: int, quick: bool) -> list[HostileFile]:
    """``count`` cases, a fifth or more of them damaged bytes; quick: none that are heavy."""
    structured = [case for case in structured_cases(bench) if not (quick and case.heavy)]
    damaged = list(damaged_cases(bench, max(count // 5, count - len(structured))))
    bench.rng.shuffle(structured)
    return structured[: max(0, count - len(damaged))] + damaged


def judge(case: HostileFile, ending: Ending, text: str, cwd: Path, outside: bool) -> tuple[str, str]:
    """The verdict on a case, and why.

    Args:
        case: the hostile input.
        ending: how the command ended.
        text: its output.
        cwd: its folder.
        outside: whether files outside its folder changed.
    """
    if (cwd / MARKER).exists():
        return "code executed", "the marker file is there"
    if outside:
        return "wrote outside", "files outside its folder changed"
    if ending.ended:
        return ending.ended, f"after {ending.seconds} s, {ending.peak} MB"
    if ending.peak << 20 > MEMORY_LIMIT:
        return "memory", f"{ending.peak} MB"
    if ending.status < 0:
        return "crash", f"signal {-ending.status}"
    if "Traceback (most recent call last)" in text:
        return "traceback", text[text.index("Traceback (most recent") :][-500:]
    if ending.status == 0:
        if case.must == "refuse":
            return "silent", "taken, and should be refused"
        if callable(case.must) and (told := case.must(cwd)):
            return "silent", told
        return "worked", ""
    if case.must == "accept":
        return "wrongly refused", text[-300:]
    if found := _RAW.search(text):
        return "raw", found[0]
    if case.victim and case.victim not in text:
        return "unnamed", "the message does not name the file"
    return "clean", ""


def try_case(rig: Rig, case: HostileFile, top: Path, real: bool) -> dict[str, Any]:
    """Run the command of a case in a folder below ``top`` and judge it."""
    room = fresh(top / "x" / "y")
    cwd = room / "cwd"
    cwd.mkdir()
    for folder in (top, top / "x", room):
        (folder / "canary").write_text("as it was")
    log = log_of(top)
    case.build(cwd)

    def around() -> dict[Path, str]:
        files = [path for path in top.rglob("*") if cwd not in path.parents]
        return {path: path.read_text(errors="replace") if path.is_file() else "" for path in files}

    before = around()
    ending = rig.call(case.script, case.argv, cwd, log, case.limit + (20 if real else 0), real=real)
    text = log.read_text(errors="replace") if log.exists() else ""
    verdict, why = judge(case, ending, text, cwd, around() != before)
    if verdict in GOOD:
        shutil.rmtree(top, ignore_errors=True)
        log.unlink(missing_ok=True)
    return {
        "kind": case.kind, "name": case.name, "script": case.script, "argv": case.argv, "real": real,
        "verdict": verdict, "why": why, "last": text.strip()[-400:], "status": ending.status,
        "seconds": ending.seconds, "peak": ending.peak,
    }  # fmt: skip


def fuzz(
    rig: Rig, base: Path, count: int, seed: int, real: int = 0, only: str = "", quick: bool = False
) -> dict[str, int]:
    """Try hostile inputs, print what is wrong, and return counts.

    Args:
        rig: the product and the folder to work in.
        base: folder of a finished tiny run.
        count: number of inputs.
        seed: of the choice and of the damage.
        real: how many go through a process of their own, as a user starts it.
        only: try only cases whose "KIND: NAME" holds this.
        quick: leave heavy cases out.
    """
    rng = random.Random(seed)
    if not quick:
        make_resume_point(rig, base)
    cases = [c for c in choose_cases(Bench(base, rng), count, quick) if only in f"{c.kind}: {c.name}"]
    print(f"{len(cases)} hostile inputs", flush=True)
    chosen = set(rng.sample(range(len(cases)), min(real, len(cases))))
    gc.freeze()

    def one(index: int, case: HostileFile) -> dict[str, Any]:
        return try_case(rig, case, rig.work / "cases" / f"{index:04}", index in chosen)

    results = rig.each("fuzz", cases, one)
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for r in sorted(results, key=lambda r: (r.get("verdict", ""), r.get("kind", ""))):
        verdict = r.get("verdict", "harness")
        table[r.get("kind", "?")][verdict] += 1
        if verdict not in GOOD:
            why, last = (" ".join(str(text).split()) for text in (r.get("why") or r.get("harness"), r.get("last")))
            what = f"{verdict.upper()} {r['index']:04} {r.get('kind')}: {r.get('name')} [{r.get('script')}]"
            how = f"status {r.get('status')} {r.get('seconds')} s {r.get('peak')} MB"
            print(f"{what} {how}: {why[-330:]} || {last[-200:]}", flush=True)
    for kind, counts in sorted(table.items()):
        print(f"  {kind:<14} {sum(counts.values()):>4}  " + ", ".join(f"{k} {v}" for k, v in counts.most_common()))
    verdicts = sum(table.values(), Counter[str]())
    failed = sum(n for verdict, n in verdicts.items() if verdict not in GOOD)
    return {"inputs": len(results), **{k.replace(" ", "_"): n for k, n in verdicts.most_common()}, "failed": failed}
