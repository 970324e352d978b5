"""Large images are worked on as smaller copies; their masks come at full size too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import arguments, make_set, run, start

from misc.files.images import read_mask
from misc.files.runfolder import RunFolder
from step.lib import sizes
from voc12.catalog import open_catalog

LARGE = "2025_000001"


@pytest.mark.slow
def test_a_large_image_is_shrunk_and_its_masks_come_at_full_size(tmp_path: Path) -> None:
    data, out = make_set(tmp_path / "data"), tmp_path / "out"
    for folder, suffix, filter_ in (("JPEGImages", "jpg", 2), ("SegmentationClass", "png", 0)):
        path = data / folder / f"{LARGE}.{suffix}"
        with Image.open(path) as image:
            wide = image.resize((image.width * 4, image.height * 4), filter_)
        wide.save(path)
    size = (wide.height, wide.width)
    assert run(data, out, "--long-side", "100", "--steps", "1-5") == 0
    run_folder = RunFolder(out)
    small, full = (read_mask(path) for path in (run_folder.label(LARGE), run_folder.full(run_folder.label(LARGE))))
    assert max(small.shape) == 100 and full.shape == size
    assert [p.stem for p in (out / "label_full").iterdir()] == [LARGE]
    assert (np.unique(full) == np.unique(small)).all()
    assert run_folder.scores()["CAM"]["images"] > 0  # scored against the smaller copy of its mask


def test_images_of_the_right_size_are_used_as_they_are(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data")
    catalog = open_catalog("voc12", data)
    before = dict(catalog.images)
    assert sizes.use_copies(catalog, RunFolder(tmp_path / "run"), 4000) == {} and catalog.images == before


@pytest.mark.slow
def test_parts_write_their_own_masks_at_full_size(tmp_path: Path) -> None:
    data, out = make_set(tmp_path / "data"), tmp_path / "out"
    ids = (data / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    flags = ("--long-side", "60")  # all images are larger
    assert run(data, out, *flags, "--steps", "1-4") == 0
    for part, made in (("0/2", ids[::2]), ("1/2", ids)):
        assert run(data, out, *flags, "--steps", "random_walk", "--shard", part) == 0
        assert {p.stem for p in (out / "label_full").iterdir()} == set(made)


@pytest.mark.slow
def test_a_copy_is_made_again_when_its_mask_changes(tmp_path: Path) -> None:
    data, out = make_set(tmp_path / "data"), tmp_path / "out"
    flags = ("--long-side", "60", "--steps", "train_cam")
    assert run(data, out, *flags) == 0
    mask, copy = data / "SegmentationClass" / f"{LARGE}.png", out / "smaller-60" / "masks" / f"{LARGE}.png"
    with Image.open(mask) as image:
        edited = Image.fromarray(np.full((image.height, image.width), 2, np.uint8))
    edited.save(mask)
    later = mask.stat().st_mtime + 5
    os.utime(mask, (later, later))
    assert run(data, out, *flags) == 0
    assert (read_mask(copy) == 2).all()


@pytest.mark.slow
def test_two_processes_share_the_copies_out(tmp_path: Path) -> None:
    data, out = make_set(tmp_path / "data"), tmp_path / "out"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["run_sample.py", *arguments(data, out, "--long-side", "60", "--steps", "train_cam")]
    ended = start([*torchrun, *command])
    assert ended.returncode == 0, ended.stderr
    assert len(list((out / "smaller-60" / "images").iterdir())) == 11  # 8 of train, 3 of val
