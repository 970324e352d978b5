"""A tiny data set and tiny settings with which all steps run in seconds, for tests of the driver."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import run_sample
from voc12.generated.sets import generate

ROOM = Path(__file__).resolve().parents[1]

TINY = """
--machine.workers 0 --machine.device cpu
--cam.weights none --cam.network.resnet38.width 0.0625 --cam.network.dropout 0
--cam.fit.steps 4 --cam.fit.batch-size 4 --cam.fit.optimiser sgd --cam.fit.lr 0.01
--cam.augment.long-side 48 64 --cam.augment.crop 48 --cam.infer.scales 1.0
--aff.weights none --aff.network.resnet38.width 0.0625
--aff.fit.steps 2 --aff.fit.batch-size 4 --aff.augment.crop 48 --aff.walk.beta 8 --aff.walk.logt 2
--aff.label.crf.iterations 1
--seg.weights none --seg.network.resnet38.width 0.0625 --seg.network.dropout 0
--seg.fit.steps 3 --seg.fit.batch-size 4
--seg.augment.crop 48 --seg.infer.scales 1.0 --seg.infer.crf.iterations 1
""".split()
"""Settings of ``psa``; later flags of the same name win."""


def make_set(root: Path, images: int = 8, val: int = 3) -> Path:
    """A generated data set of two classes with images of at most 90 pixels."""
    generate(root, images=images, val=val, classes=2, long_side=(64, 90))
    return root


def arguments(data: Path, out: Path, *flags: str) -> list[str]:
    """The command line of a tiny run."""
    return ["psa", "--root", str(data), "--out", str(out), *TINY, *flags]


def run(data: Path, out: Path, *flags: str) -> int:
    """Exit status of a tiny run in this process."""
    return run_sample.main(arguments(data, out, *flags))


def start(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command line (without ``python``) in a process of its own, on one thread."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOM, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOM), **environment},
    )


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """Files of a folder that match, each with a digest of its bytes."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def gone(process: int) -> bool:
    """Whether a process has ended (or only waits for somebody to take note of it)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it is true, at most a minute."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited in vain")
