"""The driver's command line: its two helps, and wrong words and values."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import start

import run_sample

pytestmark = pytest.mark.usefixtures("no_default_folders")


def test_help_is_one_screen_and_help_all_shows_what_has_an_effect(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sample.main(["--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 45 and max(map(len, short.splitlines())) <= 100
    for part in ("1 train_cam", "9 report", "METHOD", "seam", "psa", "deeplabv1", "own", "cub200", "--help-all"):
        assert part in short, part
    assert run_sample.main(["seam", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < 130
    for part in ("--cam.fit.lr 0.0015", "Base learning rate", "[above 0]", "--aff.walk.logt", "--cam.fit.power",
                 "--cam.augment.long-side 112 160", "{sgd,adamw}"):  # fmt: skip
        assert part in text, part
    for part in ("--cam.fit.warmup-epochs", "--cam.boxes", "--cam.augment.hsv", "--aff.network.vgg16", "--saliency"):
        assert part not in text, part
    assert run_sample.main(["seam", "--cam.fit.schedule", "cosine", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "--cam.fit.warmup-epochs 5" in text and "--cam.fit.power" not in text


WRONG = {
    "method": (["nosuch"], "There is no method 'nosuch'. There are: "),
    "method late": (["--preset", "sample", "psa"], "METHOD comes first"),
    "preset": (["seam", "--preset", "big"], "seam has no preset 'big'. There are: published, sample"),
    "refiner": (["seam", "--refiner=x"], "There is no refiner 'x'. There are: "),
    "step": (["seam", "--steps", "2-nosuch"], "--steps nosuch: there is no such step. The steps are: 1 train_cam"),
    "no step": (["seam", "--steps"], "--steps needs numbers, names or ranges"),
    "shard": (["seam", "--shard", "2/2"], "--shard 2/2 is not i/n"),
    "data": (["seam", "--data", "coco"], "--data coco: there is no such data set. There are: "),
    "root": (["seam", "--data", "coco14"], "--data coco14 needs --root"),
    "weights": (["seam", "--cam.weights", "nowhere.pth"], "--cam.weights nowhere.pth: there is no such file"),
    "batch": (["seam", "--aff.fit.micro-batch", "3"], "not a multiple of micro_batch = 3"),
    "score list": (["seam", "--score-list", "trian"], "There is no list 'trian'"),
    "required": (["seam", "--preset", "published", "--data", "sample"], "give --cam.weights FILE"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("argv, told", WRONG.values(), ids=WRONG)
def test_wrong_words_are_one_line_errors(
    argv: list[str], told: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = [] if {"coco", "coco14"} & set(argv) else ["--root", str(data)]
    assert run_sample.main([*argv, *root, "--run", "new"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith("\nerror: ") and error.count("\n") == 2
    assert not Path("new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("argv, told", [
    (["--cam.fit.lr", "fast"], "--cam.fit.lr: could not convert string to float: 'fast'"),
    (["--cam.fit.lr", "-1"], "--cam.fit.lr -1.0 is not possible: it must be above 0."),
    (["--cam.network.plain-share", "2"], "--cam.network.plain-share 2.0 is not possible: it must be in [0, 1]."),
    (["--cam.fit.schedule", "nope"], "--cam.fit.schedule nope is not possible: it must be one of poly, warmup_poly, "),
    (["--cam.augment.long-side", "7"], "--cam.augment.long-side needs 2 values."),
    (["more"], "Unrecognized options: more"),
])  # fmt: skip
def test_an_impossible_value_is_a_one_line_error(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sample.main(["seam", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"\nerror: {told}") and error.count("\n") == 2


def test_help_shows_the_presets_of_the_chosen_method(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, told in ((["--help"], "of seam: "), (["mctformer", "--help"], "\nmctformer: MCTformer")):
        assert run_sample.main(argv) == 0
        short = capsys.readouterr().out
        assert told in short and ("published_plus" in short) == ("mctformer" in argv)


@pytest.mark.slow
def test_errors_of_a_process_are_short_and_give_its_status(tmp_path: Path) -> None:
    ended = start(["run_sample.py", "seam", "--root", str(tmp_path / "nowhere")])
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"No data set in VOC's layout in {tmp_path}/nowhere (which does not exist)" in ended.stderr
