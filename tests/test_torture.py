"""The small version of ``scripts/torture.py``: a dozen kills and fifty hostile files; and that its judge can fail."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from running import start

from scripts.hostile.cases import HostileFile
from scripts.hostile.children import Ending
from scripts.hostile.formats import MARKER, mutate, other_pixels, png
from scripts.hostile.fuzz import judge
from scripts.hostile.kills import Scenario

FINE = Ending(status=0, seconds=0.1, peak=100)
REFUSED = Ending(status=1, seconds=0.1, peak=100)


@pytest.mark.slow
def test_a_dozen_kills_and_fifty_hostile_files(tmp_path: Path) -> None:
    flags = "--quick --kills 10 --fuzz 50 --cli 1 --seed 3 --jobs 1 --work".split()
    done = start(["scripts/torture.py", *flags, str(tmp_path)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = done.stdout.splitlines()[-1]
    assert told.startswith("TORTURE PASS seed 3 ") and "inputs 50," in told
    assert int(re.search(r" kills (\d+),", told)[1]) >= 12
    assert len((tmp_path / "fuzz.jsonl").read_text().splitlines()) == 50


def _case(must: str = "refuse", victim: str = "a.npz") -> HostileFile:
    return HostileFile("maps npz", "x", "evaluation.py", [], lambda cwd: None, must, victim)


@pytest.mark.parametrize(
    ("verdict", "ending", "text", "outside"),
    [
        ("silent", FINE, "", False),
        ("clean", REFUSED, "error: a.npz holds no maps", False),
        ("unnamed", REFUSED, "error: a file holds no maps", False),
        ("raw", REFUSED, "a.npz: KeyError: 3", False),
        ("traceback", REFUSED, "Traceback (most recent call last):\n a.npz", False),
        ("hang", Ending(-9, 20.0, 100, "hang"), "", False),
        ("memory", Ending(1, 1.0, 5000), "error: a.npz", False),
        ("crash", Ending(-11, 1.0, 100), "", False),
        ("wrote outside", REFUSED, "error: a.npz", True),
    ],
)
def test_verdicts(verdict: str, ending: Ending, text: str, outside: bool, tmp_path: Path) -> None:
    assert judge(_case(), ending, text, tmp_path, outside)[0] == verdict


def test_code_that_was_run_is_noticed(tmp_path: Path) -> None:
    (tmp_path / MARKER).touch()
    assert judge(_case(), REFUSED, "error: a.npz", tmp_path, False)[0] == "code executed"


def test_a_damaged_png_that_was_taken_is_noticed(tmp_path: Path) -> None:
    good = png(2, 2, b"\0\1\2\0\3\4")
    (tmp_path / "a.png").write_bytes(good)
    assert not other_pixels(tmp_path / "a.png", good)
    other = bytearray(png(2, 2, b"\0\1\2\0\3\5"))
    other[-15] ^= 1  # a byte of the pixels' checksum
    (tmp_path / "a.png").write_bytes(bytes(other))
    assert "taken" in other_pixels(tmp_path / "a.png", good)


def test_files_of_a_killed_run_are_compared(tmp_path: Path) -> None:
    scenario = Scenario("x", "prepare", [], lambda cwd: None, ["out"])
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "b", "run.json"):
        (out / name).write_text(name)
    scenario.reference = scenario.files(tmp_path)
    assert not scenario.differences(tmp_path) and set(scenario.reference) == {"out/a", "out/b"}
    (out / "a").write_text("other")
    (out / "b").unlink()
    (out / ".c.part").touch()
    (out / "d").touch()
    assert scenario.differences(tmp_path) == {
        "different": ["out/a"], "missing": ["out/b"], "leftover": ["out/.c.part"], "extra": ["out/d"],
    }  # fmt: skip


def test_damage_repeats_with_its_seed() -> None:
    data = bytes(range(256)) * 4
    assert [mutate(data, random.Random(5)) for _ in range(2)] == [mutate(data, random.Random(5))] * 2
    assert len({mutate(data, random.Random(seed)) for seed in range(40)}) > 30
