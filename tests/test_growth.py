"""scripts/growth.py: all steps are measured, and what can't be run is told before pictures are drawn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import start

from scripts import growth, options_with_flags


@pytest.mark.slow
def test_every_per_image_step_is_measured_once() -> None:
    ended = start(["-m", "scripts.growth", "psa", "--images", "2", "2", "--workers", "1"])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows[2:]] == ["make_cam", "make_aff_label", "random_walk", "infer_seg"]
    assert all(row[1:4] == ["2", "1", "1"] and float(row[4]) > 0 for row in rows[2:])
    if sys.platform == "linux":
        assert all(float(row[5]) > 100 for row in rows[2:])


@pytest.mark.slow
def test_a_wrong_flag_behind_the_dashes_is_told_in_the_driver_s_words() -> None:
    ended = start(["-m", "scripts.growth", "psa", "--images", "2", "--", "--no-such-flag", "1"])
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "--no-such-flag" in ended.stderr and "its message is above" in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_process_and_its_children_and_of_one_that_has_ended() -> None:
    took = "import time; kept = b\"1\" * 50_000_000; print(flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {took!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        inner = [pid for pid in growth.process_tree(process.pid) if pid != process.pid]
        assert len(inner) == 1 and growth.memory_of_tree(process.pid) > 50_000
        for pid in (*inner, process.pid):
            os.kill(pid, 9)
    assert list(growth.process_tree(process.pid)) == [process.pid] and growth.memory_of_tree(process.pid) == 0


def test_flags_behind_the_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*argv: str) -> growth.GrowthOptions:
        monkeypatch.setattr(sys, "argv", ["growth", *argv])
        return options_with_flags(growth.GrowthOptions)

    assert parsed("--images", "5", "--", "--seed", "3").flags == ("--seed", "3")
    assert parsed("--images", "5", "--").flags == parsed().flags == ()
    with pytest.raises(ValueError, match="--images .* must be at least one value"):
        parsed("--images", "1")


def test_lists_hold_the_first_pictures(tmp_path: Path) -> None:
    growth.write_pictures(tmp_path / "set", (3, 2), (64, 70))
    lists = {p.stem: p.read_text().split() for p in (tmp_path / "set" / "ImageSets" / "Segmentation").glob("*_*.txt")}
    assert {name: len(ids) for name, ids in lists.items()} == {"train_2": 2, "train_3": 3, "val_2": 2, "val_3": 3}
    assert lists["train_3"][:2] == lists["train_2"]
