"""python -m scripts.box_scores: maps of other code in wsolevaluation's layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from misc.files.images import write_mask
from scripts.box_scores import main, read_map


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of 448 x 224 pixels, whose map is their object's mask on the grid of 224."""
    meta = tmp_path / "metadata"
    meta.mkdir()
    (meta / "image_ids.txt").write_text("birds/a.jpg\nbirds/b.jpg\n")
    (meta / "image_sizes.txt").write_text("birds/a.jpg,448,224\nbirds/b.jpg,448,224\n")
    (meta / "localization.txt").write_text("birds/a.jpg,40,20,139,99\nbirds/b.jpg,0,0,9,9\nbirds/b.jpg,40,20,139,99\n")
    (tmp_path / "maps" / "birds").mkdir(parents=True)
    for name in "ab":
        scores = np.zeros((224, 224), np.float32)
        scores[20:100, 20:70] = 1
        np.save(tmp_path / "maps" / "birds" / f"{name}.jpg.npy", scores)
        write_mask(tmp_path / "masks" / "birds" / f"{name}.jpg.png", scores.astype(np.uint8))
    return tmp_path


def test_maps_on_their_objects_get_all_and_one_elsewhere_half(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = folder / "scores.json"
    assert main(folder / "maps", folder / "metadata", folder / "masks", interval=0.1, out=told) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == json.loads(told.read_text())
    assert (scores["images"], scores["MaxBoxAcc"], scores["MaxBoxAccV2"], scores["PxAP"]) == (2, 100, 100, 100)
    np.save(folder / "maps" / "birds" / "b.jpg.npy", np.eye(224, dtype=np.float32)[::-1] * 0.5)
    assert main(folder / "maps", folder / "metadata", interval=0.1) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["MaxBoxAcc"] == 50 and "PxAP" not in scores


def test_maps_of_another_size_are_enlarged_and_stretched(folder: Path) -> None:
    path = folder / "maps" / "small.npy"
    small = np.zeros((14, 14), np.float32)
    small[3:6, 2:9] = 7
    np.save(path, small - 3)
    scores = read_map(path, 224)
    assert scores.shape == (224, 224) and (scores.min(), scores.max()) == (0, 1) and scores[72, 88] > 0.8


def test_what_is_no_map_or_is_missing_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "maps" / "birds" / "a.jpg.npy"
    for wrong, told in (
        (np.full((224, 224), 2.0), "must be in 0 .. 1"), (np.full((8, 8), np.nan), "NaN"),
        (np.zeros((1, 8, 8)), "shape (1, 8, 8)"),
    ):  # fmt: skip
        np.save(path, wrong)
        assert main(folder / "maps", folder / "metadata") == 1
        assert told in capsys.readouterr().err
    path.unlink()
    assert main(folder / "maps", folder / "metadata") == 1
    assert "no such map" in capsys.readouterr().err
    (folder / "metadata" / "localization.txt").write_text("birds/a.jpg,1,2\n")
    assert main(folder / "maps", folder / "metadata") == 1
    assert "line 1" in capsys.readouterr().err
