"""A run that is killed in the middle ends, started again, with the bytes of an undisturbed one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from running import arguments, digests, make_set, start

MADE = ("weights/*.pt", "cam/*.npz", "aff_label/*", "label/*.png")

KILLER = """
import os, signal, sys
import run_sample

part_of_name, count, seen, replace = sys.argv[1], int(sys.argv[2]), [], os.replace

def deadly(source, target):
    if part_of_name in str(target):
        seen.append(target)
    if len(seen) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = deadly
sys.exit(run_sample.main(sys.argv[3:]))
"""
"""A run that kills itself when it is about to put the n-th file of some name in its place."""


@pytest.mark.slow
def test_a_run_killed_in_training_and_in_make_cam_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data")
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    flags = "--steps 1-5 --cam.fit.steps 9 --cam.network.dropout 0.5 --machine.checkpoint-every 2".split()
    flags += ["--machine.workers", "1"]
    undisturbed = start(["run_sample.py", *arguments(data, tmp_path / "whole", *flags)])
    assert undisturbed.returncode == 0, undisturbed.stderr

    cut = tmp_path / "cut"
    command = arguments(data, cut, *flags)
    killed = start([str(script), "cam.resume.pt", "3", *command])
    assert killed.returncode == -signal.SIGKILL
    assert digests(cut, "weights/*").keys() == {"weights/cam.resume.pt", *halves(cut / "weights")}
    assert len(halves(cut / "weights")) == 1

    killed = start([str(script), "cam/2025", "4", *command])
    assert killed.returncode == -signal.SIGKILL and "going on from update 4" in killed.stdout
    assert len(list((cut / "cam").glob("[!.]*"))) == 3 and len(halves(cut / "cam")) == 1
    assert halves(cut / "weights") == []  # the second start found the first one's process dead

    ended = start(["run_sample.py", *command])
    assert ended.returncode == 0, ended.stderr
    assert "train_cam: done already" in ended.stdout and "make_cam: 3 of 8 images are done already" in ended.stdout
    assert not list(cut.rglob("*.part"))
    assert digests(cut, *MADE) == digests(tmp_path / "whole", *MADE)
    scores = [(folder / "scores.json").read_text() for folder in (cut, tmp_path / "whole")]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["toco", "more"])
def test_views_draws_and_momentum_copies_go_on_as_they_would_have(method: str, tmp_path: Path) -> None:
    """Through the real loader and its worker process: several pictures of a sample, draws in ``prepare``, a momentum
    copy, labels that the network makes itself."""
    data = make_set(tmp_path / "data")
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    flags = """--steps train_cam --machine.device cpu --machine.workers 1 --machine.checkpoint-every 1
    --cam.fit.steps 5 --cam.fit.batch-size 4""".split()
    terms = ("ptc", "ctc", "seg", "reg") if method == "toco" else ("mct", "ptc", "cle", "une", "seg", "reg")
    flags += [word for term in terms for word in (f"--cam.network.{term}.start", "0")]
    command = [method, "--root", str(data), *flags]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(["run_sample.py", *command, "--out", str(whole)]).returncode == 0
    killed = start([str(script), "cam.resume.pt", "4", *command, "--out", str(cut)])
    assert killed.returncode == -signal.SIGKILL
    ended = start(["run_sample.py", *command, "--out", str(cut)])
    assert ended.returncode == 0 and "going on from update 3" in ended.stdout, ended.stderr
    assert digests(cut, "weights/*") == digests(whole, "weights/*")


def halves(folder: Path) -> list[str]:
    """Files that a killed process left half written."""
    return [f"{folder.name}/{path.name}" for path in folder.glob("*.part")]
