"""scripts/gpu_check.py on the CPU: what it measures, records and prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from net import registry
from scripts import gpu_check
from scripts.gpu_check import Check, GpuCheckOptions, main, markdown
from scripts.measured_networks import build, loss_terms, make_batch, tasks

CPU = torch.device("cpu")
registry.load_methods()


@pytest.mark.slow
def test_operators_are_measured_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(GpuCheckOptions(tmp_path, device="cpu", tiny=True, parts=("operators",))) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["torch"] == torch.__version__
    assert len(results["operators"]) == 4
    assert all(row["apart"] == 0 and row["GPU ms"] > 0 for row in results["operators"].values())
    capsys.readouterr()
    assert main(GpuCheckOptions(tmp_path, markdown=True)) == 0
    table = capsys.readouterr().out
    assert "| operators" in table and "CRF, 10 iterations, flat" in table and "device: CPU" in table


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    check = Check(tmp_path, 1, CPU, tiny=True)

    def fails() -> gpu_check.Result:
        raise ValueError("no such kernel")

    check.record("agree", "a", fails)
    check.record("agree", "b", lambda: {"loss": 0.5})
    (failure,) = check.failures()
    assert failure.startswith("agree a: ValueError: no such kernel at tests")
    assert json.loads((tmp_path / "results.json").read_text())["agree"]["b"] == {"loss": 0.5}
    assert "0.5" in markdown({"machine": {}, **check.results})


def test_nothing_begins_when_the_time_is_up(tmp_path: Path) -> None:
    check = Check(tmp_path, 0.0, CPU, tiny=True)
    check.record("agree", "a", lambda: pytest.fail("it began"))
    assert check.results == {}


def test_what_runs_beside_is_collected(tmp_path: Path) -> None:
    check = Check(tmp_path, 1, CPU, tiny=True)
    beside = {"cpu": check.begin([sys.executable, "-c", "raise SystemExit('no run')"], tmp_path / "run_cpu")}
    check.collect(beside, "cpu")
    (failure,) = check.failures()
    assert not beside and "exit status 1" in failure and "no run" in failure


def test_unknown_parts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(GpuCheckOptions(tmp_path, parts=("agre",))) == 2
    assert "agre" in capsys.readouterr().err


def test_every_network_that_is_trained_is_listed() -> None:
    names = {task.name.removeprefix("refiner ").partition(".")[0] for task in tasks("published")}
    trained = {name for name, refiner in registry.REFINERS.items() if refiner.is_trained}
    assert names == {*registry.SEEDS, *registry.SEGMENTERS, *trained}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["irn_cam", "refiner psa", "toco", "semformer"])
def test_batches_fit_their_networks(name: str, tmp_path: Path) -> None:
    task = next(task for task in tasks("sample") if task.name == name)
    network, batch = build(task, CPU).eval(), make_batch(task, 2, CPU)
    assert all(term.isfinite() for term in loss_terms(network, network, batch, 0.9).values())
    found = Check(tmp_path, 1, CPU, tiny=True).agree(task)
    assert found["float32 loss"] == 0 < found["bf16 gradient"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["irn_cam", "deeplabv1"])
def test_cams_and_predictions_are_measured(name: str, tmp_path: Path) -> None:
    task = next(task for task in tasks("sample") if task.name == name)
    found = Check(tmp_path, 1, CPU, tiny=True).infer(task, "off")
    assert set(found) == {"images/s", "new sizes/s", "of 4/s"} and all(rate > 0 for rate in found.values())
