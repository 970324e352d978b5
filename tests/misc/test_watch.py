"""What a training shows while it runs: TensorBoard, the progress bar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import start
from test_fit import RECIPE, TOTAL, Toy, curve, read_log, train

from misc.loop.progress import Progress
from misc.loop.watch import falls_due


def test_what_falls_due_is_spread_evenly_and_done_at_the_end() -> None:
    assert [step for step in range(20) if falls_due(step, 20, 5)] == [3, 7, 11, 15, 19]
    assert [step for step in range(3) if falls_due(step, 3, 10)] == [0, 1, 2]
    assert [step for step in range(7) if falls_due(step, 7, 2)] == [3, 6]


def test_pictures_are_drawn_ten_times_in_evaluation_mode_and_change_nothing(tmp_path: Path) -> None:
    plain, watched, modes = train(tmp_path / "plain"), Toy(), []

    def pictures() -> dict[str, np.ndarray]:
        modes.append(watched.training or torch.rand(3) is None)  # also draws random numbers
        return {"square": np.full((4, 6, 3), 9, np.uint8)}

    same = train(tmp_path, network=watched, pictures=pictures)
    assert same.keys() == plain.keys() and all(torch.equal(same[k], plain[k]) for k in plain)
    assert modes == [False] * TOTAL  # fewer updates than pictures: one after each
    shown = read_log(tmp_path).Images("toy/square")
    assert [e.step for e in shown] == list(range(TOTAL)) and (shown[0].width, shown[0].height) == (6, 4)


def test_speed_and_epoch_scores_are_logged(tmp_path: Path) -> None:
    values = iter((0.25, 0.75, 0.5, 0.1))
    train(tmp_path, replace(RECIPE, epochs=4), score=lambda: {"score": next(values)})
    assert len(speed := curve(tmp_path, "images_per_second")) == TOTAL and min(speed) > 0
    events = {e.step: e.value for e in read_log(tmp_path).Scalars("toy/rating/score")}
    assert events == pytest.approx({1: 0.25, 3: 0.75, 5: 0.5, 7: 0.1})


def test_the_bar_shows_loss_terms_and_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, str]] = []
    monkeypatch.setattr(Progress, "set_postfix", lambda self, told, refresh: said.append(told))
    train(tmp_path)
    assert list(said[0]) == ["loss", "fit", "valid", "images/s"] and float(said[-1]["images/s"]) > 0
    assert float(said[-1]["loss"]) == pytest.approx(float(said[-1]["fit"]) + float(said[-1]["valid"]), abs=2e-4)


@pytest.mark.slow
def test_a_full_disk_is_told_once_with_the_folder(tmp_path: Path) -> None:
    """Here a largest size of files; TensorBoard writes in a thread of its own."""
    lines = (
        "import functools, resource, sys",
        "from pathlib import Path",
        "from misc.loop import watch as module",
        "module.SummaryWriter = functools.partial(module.SummaryWriter, flush_secs=0)",  # its thread writes at once
        "watch = module.Watch(Path(sys.argv[1]), 'toy', 0, None)",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))",
        "for step in range(100000):",
        "    watch.add_update(step, {'loss': 1.0}, 0.1, 1)",
    )
    ended = start(["-c", "\n".join(lines), str(tmp_path)])
    assert f"No disk space left while writing {tmp_path / 'toy'}" in ended.stderr.splitlines()[-1]
    assert "Exception in thread" not in ended.stderr
