"""python -m voc12.segments with a tiny SAM of random weights: resumed, in parts, and refused where it can't work."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import pytest
from running import make_set

from misc.files.images import read_image
from misc.files.segments import read_segments
from voc12 import segments

pytest.importorskip("transformers")
EASY = ("--quality", "0", "--stability", "0", "--points", "3", "--device", "cpu", "--workers", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of a downloaded SAM."""
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamMaskDecoderConfig,
        SamModel,
        SamProcessor,
        SamPromptEncoderConfig,
        SamVisionConfig,
        set_seed,
    )

    set_seed(0)
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=64,
            patch_size=16, window_size=2, global_attn_indexes=[0], num_pos_feats=8, mlp_dim=16,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sam")
    SamModel(config).save_pretrained(folder)
    processor = SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip
    SamProcessor(processor).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_set(tmp_path / "data", images=4, val=1)


def call(*words: str | Path) -> int:
    return segments.main([str(word) for word in words])


@pytest.mark.slow
def test_segments_of_every_image_in_parts_and_once(model: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("--root", data, "--model", model, *EASY)
    assert call(*words, "--list", "train", "--shard", "0/2") == 0
    assert len(list((data / "Segments").glob("2*.json"))) == 2
    assert call(*words) == 0
    files = sorted((data / "Segments").glob("2*.json"))
    assert [path.stem for path in files] == sorted(path.stem for path in (data / "JPEGImages").glob("*.jpg"))
    found = 0
    for path in files:
        size = read_image(data / "JPEGImages" / f"{path.stem}.jpg").shape[:2]
        listed = read_segments(data / "Segments", path.stem, size)
        found += len(listed)
        assert listed.size == size and all(listed.mask(number).any() for number in range(len(listed)))
    assert found > 0
    before = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    capsys.readouterr()
    assert call(*words) == 0 and "4 of 5 images are done already" in capsys.readouterr().out
    assert [path for path in files if path.stat().st_mtime_ns == before[path]] == files[1:]
    # others are not mixed with these
    assert call(*words, "--points", "2") == 2
    assert "holds segments made with" in capsys.readouterr().err and len(files) == 5


def test_large_images_are_shrunk_and_hard_ones_have_no_segment(model: Path, data: Path) -> None:
    words = ("--root", data, "--model", model, "--list", "val", *EASY[4:])
    assert call(*words, "--quality", "0", "--stability", "0", "--long-side", "32", "--out", data / "small") == 0
    image = next(path for path in (data / "small").glob("2*.json")).stem
    size = read_image(data / "JPEGImages" / f"{image}.jpg").shape[:2]
    assert max(size) > 32 and read_segments(data / "small", image, size).size == size
    assert call(*words, "--quality", "0.99", "--stability", "0.99", "--out", data / "none") == 0
    assert len(read_segments(data / "none", image, size)) == 0


def test_what_is_missing_is_reported_with_the_remedy(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*words: str | Path) -> str:
        assert call(*words, *EASY) == 2
        return capsys.readouterr().err

    assert "is not i/n" in told("--root", data, "--model", model, "--shard", "2/2")
    assert "there is no such data set" in told("--root", data, "--model", model, "--data", "nothing")
    shutil.rmtree(data / "Segments", ignore_errors=True)
    (tmp_path / "empty").mkdir()
    empty = " ".join(told("--root", data, "--model", tmp_path / "empty").split())
    assert "give the folder of a downloaded model" in empty
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("transformers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "pip install -r requirements-sam.txt" in told("--root", data, "--model", model)
    assert not (data / "Segments").exists()
