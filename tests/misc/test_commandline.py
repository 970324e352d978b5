"""How command lines end."""

from __future__ import annotations

import subprocess
import sys

import pytest
from running import ROOM, start

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


@pytest.mark.parametrize("program, needed", [
    ("predict.py", "IMAGE... (--weights FILE | --run RUN | --method NAME)"),
    ("evaluation.py", "--list FILE --predict-dir DIR --gt-dir DIR --num-classes N"),
])  # fmt: skip
def test_the_short_help_begins_with_the_usage(program: str, needed: str) -> None:
    told = start([program, "--help"])
    assert told.returncode == 0 and told.stdout.startswith(f"usage: python {program} {needed}"), told.stderr


def test_each_end_has_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        def work() -> None:
            raise error

        return commandline.command(work, (ValueError,), "call again.")

    assert commandline.command(lambda: None, (), "") == 0
    assert raising(ValueError("say so")) == 1 and capsys.readouterr().err == "\nerror: say so\n"
    assert raising(commandline.WrongCall("not so")) == 2 and capsys.readouterr().err == "\nerror: not so\n"
    assert commandline.command(lambda: 3) == 3
    with pytest.raises(commandline.WrongCall, match="no data"), commandline.before_work((OSError,)):
        raise FileNotFoundError("no data")
    assert raising(KeyboardInterrupt()) == 130 and "interrupted: call again." in capsys.readouterr().err
    with pytest.raises(KeyError):  # a defect shows where it is
        raising(KeyError("x"))


def test_a_script_ends_with_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(images: int, root: str = ".", limit: int | None = None) -> int:
        """Count.

        Args:
            images: How many.
            root: Where.
            limit: No more.
        """
        if images > 5:
            raise ValueError("too many")
        print(images, root)
        return images

    def ended(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["count", *words])
        with pytest.raises(SystemExit) as end:
            commandline.run_script(main, prog="count")
        return end.value.code, *capsys.readouterr()

    assert ended("--images", "3", "--root", "x") == (3, "3 x\n", "")
    assert ended("--images", "6") == (1, "", "\nerror: too many\n")
    status, out, err = ended("--images", "many")
    assert status == 2 and not out and err.startswith("\nerror: --images: ") and err.count("\n") == 2
    assert ended() == (2, "", "\nerror: --images is required.\n")
    said = "--limit three is not possible: it must be None or INT."
    assert ended("--images", "3", "--limit", "three") == (2, "", f"\nerror: {said}\n")
    status, out, _ = ended("--help")
    assert status == 0 and "How many." in out
