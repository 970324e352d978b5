"""scripts/network_speed.py: a row for every step that is measured, also where torch.compile fails."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts import network_speed
from scripts.network_speed import SpeedOptions, main


def rows_of(text: str) -> list[list[str]]:
    table = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_training_and_cams_in_both_precisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SpeedOptions(("tscam",), batch=2, repeats=1, json=tmp_path / "speed.json")) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["tscam", "training"], ["tscam", "CAM"]]
    found = json.loads((tmp_path / "speed.json").read_text())
    assert all(found[f"tscam {what}"][amp] > 0 for what in ("training", "CAM") for amp in ("off", "fast", "flops"))
    assert main(SpeedOptions(("nosuch",))) == 2


def test_networks_without_a_recipe_of_the_preset_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SpeedOptions(("tscam",), preset="photos")) == 2  # it has no such recipe
    told = capsys.readouterr().err
    assert "seam" in told and "deeplabv1" in told and "toco" not in told
    assert main(SpeedOptions(preset="nosuch")) == 2
    assert "photos, published" in capsys.readouterr().err


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_operations_of_a_grouped_convolution_are_counted_once(kind: type[nn.Conv2d], groups: int) -> None:
    """One multiplication and one addition for each weight that meets an input; two gradients cost as much each."""
    layer, images = kind(8, 16, 3, stride=2, padding=1, groups=groups), torch.randn(2, 8, 6, 6, requires_grad=True)
    cells = 36 if kind is nn.ConvTranspose2d else 9  # each of them meets the whole filter
    forward = 2 * 2 * cells * (8 // groups) * 16 * 9
    assert network_speed.count_operations(lambda: layer(images)) == forward
    assert network_speed.count_operations(lambda: layer(images).sum().backward()) == 3 * forward
    assert network_speed.count_operations(lambda: layer(images.detach()).sum().backward()) == 2 * forward


def test_compiled_or_the_reason_why_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = SpeedOptions(("tscam",), batch=2, repeats=1, compile=True)
    monkeypatch.setattr(network_speed, "measure_compiled_alone", network_speed.measure_compiled)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    assert main(options) == 0
    (row,) = rows_of(capsys.readouterr().out)
    assert row[0] == "tscam" and row[1].endswith("ms") and row[2].endswith("ms") and float(row[3]) > 0

    def refuse(network: object) -> None:
        raise RuntimeError("not this one\nbecause")

    monkeypatch.setattr(torch, "compile", refuse)
    assert main(options) == 0
    (row,) = rows_of(capsys.readouterr().out)
    assert row[:3] == ["tscam", "", "RuntimeError: not this one"]


def where_it_is_kept(name: str, options: SpeedOptions) -> tuple[str, int]:
    """In place of a measurement: the compiler's cache and the process."""
    return os.environ["TORCHINDUCTOR_CACHE_DIR"], os.getpid()


def test_every_network_is_compiled_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    monkeypatch.setattr(network_speed, "measure_compiled", where_it_is_kept)
    kept, pids = zip(*(network_speed.measure_compiled_alone("tscam", SpeedOptions()) for _ in range(2)), strict=True)
    assert len(set(kept)) == len(set(pids)) == 2 and os.getpid() not in pids
    assert os.environ == before and not any(Path(folder).parent.exists() for folder in kept)
