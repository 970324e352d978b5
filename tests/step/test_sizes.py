"""Large images are worked on as smaller copies; their masks come at full size too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from running import make_set, run

from misc.files.images import read_mask
from misc.files.runfolder import RunFolder
from step.lib import sizes
from voc12.catalog import open_catalog

LARGE = "2025_000001"


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
