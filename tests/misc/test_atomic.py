"""Files that several processes share: leftovers of dead writers, and changes by one process at a time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from running import start

from misc.files import atomic
from misc.files.runfolder import RunFolder


def begun(folder: Path, name: str, *, killed: bool) -> Path:
    """A file that a process of this machine has begun to write: one that was killed, or this one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = f"import os, misc.files.atomic as a; w = a.writing({str(folder / name)!r}); w.__enter__(); os._exit(9)"
    if killed:
        assert start(["-c", command]).returncode == 9
        (path,) = folder.glob(f".{name}.*")
    else:
        path = folder / f".{name}.{atomic._host()}-{os.getpid()}-0{atomic.SUFFIX}"
        path.write_bytes(b"half")
    return path


def test_what_a_dead_process_left_goes_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    dead = [begun(tmp_path / "cam" / "deep", "a.b.npz", killed=True), begun(tmp_path, "cam.resume.pt", killed=True)]
    live = begun(tmp_path / "cam", "c.npz", killed=False)
    whole = tmp_path / "cam" / "d.npz"
    whole.write_bytes(b"whole")
    assert atomic.remove_leftovers([tmp_path / "cam", tmp_path / "cam.pt", tmp_path / "none"]) == 2
    assert not any(path.exists() for path in dead) and live.exists() and whole.exists()


def test_another_machines_file_stays_until_nothing_was_written_to_it_for_a_day(tmp_path: Path) -> None:
    path = tmp_path / f".a.npz.0badcafe-1-2{atomic.SUFFIX}"
    path.write_bytes(b"half")
    assert atomic.remove_leftovers([tmp_path]) == 0 and path.exists()
    os.utime(path, (time.time() - 90_000,) * 2)
    assert atomic.remove_leftovers([tmp_path]) == 1 and not path.exists()


JOBS = """
import subprocess, sys
job = '''
import sys
from pathlib import Path
from misc.files.runfolder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.begin({"lr": 1}, {}, {}, force=False, shared=True)
for i in range(8):
    with run.step(f"step {sys.argv[2]}.{i}"):
        run.add_score(f"score {sys.argv[2]}.{i}", {"miou": 50.0})
    with run.step("shared", done=False):
        pass
'''
jobs = [subprocess.Popen([sys.executable, "-c", job, sys.argv[1], str(n)]) for n in range(3)]
sys.exit(any(j.wait() for j in jobs))
"""


@pytest.mark.slow
def test_jobs_at_the_same_time_lose_no_record(tmp_path: Path) -> None:
    ended = start(["-c", JOBS, str(tmp_path / "run")])
    assert ended.returncode == 0, ended.stderr
    run = RunFolder(tmp_path / "run")
    names = {f"{job}.{i}" for job in range(3) for i in range(8)}
    assert set(run.record()["steps"]) == {f"step {name}" for name in names} | {"shared"}
    assert set(run.scores()) == {f"score {name}" for name in names}
    assert len(run.record()["command"]) == 3 and run.scores()["score 1.3"]["step"] == "step 1.3"


HOLD = """
import pathlib, sys
from misc.files import atomic
atomic._LONGEST_WAIT = 0.1
with atomic.locked(pathlib.Path(sys.argv[1])):
    pass
"""


def test_a_lock_that_is_never_freed_is_named_with_a_remedy(tmp_path: Path) -> None:
    with atomic.locked(tmp_path / ".lock"):
        other = start(["-c", HOLD, str(tmp_path / ".lock")])
    assert other.returncode == 1 and "has been held by another process" in other.stderr
    assert "delete the file and start the same command again" in other.stderr
    assert start(["-c", HOLD, str(tmp_path / ".lock")]).returncode == 0
