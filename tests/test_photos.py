"""scripts/photos.py: rows of its study are run, and go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from scripts.photos import PhotosOptions, PhotoStudy

SMALL = "timm/test_efficientnet"
FLAGS = f"--PART.network.backbone {SMALL} --PART.fit.steps 1 --PART.fit.batch-size 2"
ROWS = ("irn_cam-edge-0", "irn_cam-edge-0-edge-logt-6")


@pytest.mark.slow
def test_a_row_and_its_variant_are_run_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model(SMALL.removeprefix("timm/")).state_dict(), tmp_path / "weights.pth")
    flags = " ".join(FLAGS.replace("PART", part) for part in ("cam", "aff", "seg"))
    options = PhotosOptions(
        data, tmp_path / "weights.pth", tmp_path / "out", "cpu", workers=1, rows=ROWS, train_list="train",
        flags=tuple(flags.split()),
    )  # fmt: skip
    PhotoStudy(options).run()
    told = capsys.readouterr().out
    assert "failed" not in told, told
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "out" / "rows.jsonl").read_text().splitlines())}
    assert set(rows) == set(ROWS)
    plain, variant = (rows[name] for name in ROWS)
    assert plain["cam"] == variant["cam"] and plain["val_tune"] >= 0 and "val_tune" not in variant
    assert plain["masks"] >= 0 and variant["masks"] >= 0
    PhotoStudy(options).run()
    assert not capsys.readouterr().out
