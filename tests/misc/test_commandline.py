"""How command lines end."""

from __future__ import annotations

import subprocess
import sys

import pytest
from running import ROOM

from misc import commandline


def test_nobody_reading_ends_it_quietly() -> None:
    """As in ``run_sample.py --help | head``."""
    command = [sys.executable, "-c", "import run_sample as r; r.commandline.end(r.main(['--help']))"]
    with subprocess.Popen(command, cwd=ROOM, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None and started.stderr is not None
        started.stdout.close()
        assert started.stderr.read() == b""
    assert started.returncode == 141


def test_another_broken_pipe_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    assert commandline.command(work, (OSError,), "") == 1
    assert "error: [Errno 32] Broken pipe" in capsys.readouterr().err


def test_each_end_has_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        def work() -> None:
            raise error

        return commandline.command(work, (ValueError,), "call again.")

    assert commandline.command(lambda: None, (), "") == 0
    assert raising(ValueError("say so")) == 1 and capsys.readouterr().err == "\nerror: say so\n"
    assert raising(KeyboardInterrupt()) == 130 and "interrupted: call again." in capsys.readouterr().err
    with pytest.raises(KeyError):  # a defect shows where it is
        raising(KeyError("x"))
