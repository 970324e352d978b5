"""Files of class-agnostic segments: every form gives the same ones, damaged and hostile ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from misc.files.runlengths import read_run_lengths, region_of_runs, runs_of_region
from misc.files.segments import read_segments, write_segments
from misc.image.segments import Segments

SIZE = (6, 9)


def masks() -> np.ndarray:
    """(3, 6, 9) bool: apart from each other, so that a picture of indices can hold them."""
    index = np.random.default_rng(3).integers(0, 4, SIZE)
    index[0, 0] = 1  # a region that begins at the first pixel
    return np.stack([index == value for value in (1, 2, 3)])


def coded(mask: np.ndarray, compressed: bool = True) -> dict[str, Any]:
    if not compressed:
        return {"size": list(mask.shape), "counts": runs_of_region(mask).tolist()}
    found = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def generator(shapes: list[Any]) -> list[dict[str, Any]]:
    """What SAM's automatic generator gives, beside the shapes themselves."""
    return [{"segmentation": shape, "area": 3, "bbox": [0, 0, 1, 1], "predicted_iou": 0.9, "point_coords": [[1.0, 2.0]],
             "stability_score": 0.97, "crop_box": [0, 0, 9, 6]} for shape in shapes]  # fmt: skip


def save(folder: Path, form: str) -> None:
    shapes = list(masks())
    if form == "lengths":
        (folder / "a.json").write_text(json.dumps(generator([coded(m, number % 2) for number, m in enumerate(shapes)])))
    elif form == "sa-1b":
        content = {"image": {"height": 6}, "annotations": generator([coded(m) for m in shapes])}
        (folder / "a.json").write_text(json.dumps(content))
    elif form == "ours":
        write_segments(folder / "a.json", shapes, SIZE, {"model": "x"})
    elif form == "pickled arrays":
        np.save(folder / "a.npy", np.array(generator(shapes), object), allow_pickle=True)
    elif form == "pickled lengths":
        np.save(folder / "a.npy", np.array(generator([coded(m) for m in shapes]), object), allow_pickle=True)
    elif form == "array":
        np.save(folder / "a.npy", masks())
    elif form == "npz":
        np.savez_compressed(folder / "a.npz", masks=masks().astype(np.uint8) * 255)
    else:
        index = sum(mask * value for mask, value in zip(shapes, (2, 5, 255 if form == "png" else 700), strict=True))
        Image.fromarray(index.astype(np.uint8 if form == "png" else np.uint16)).save(folder / "a.png")


FORMS = ("lengths", "sa-1b", "ours", "pickled arrays", "pickled lengths", "array", "npz", "png", "16-bit png")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_segments(form: str, tmp_path: Path) -> None:
    save(tmp_path, form)
    found = read_segments(tmp_path, "a", SIZE)
    assert len(found) == 3 and found.size == SIZE
    assert np.array_equal(np.stack([found.mask(number) for number in range(3)]), masks())


def test_run_lengths_are_cocos() -> None:
    for mask in (*masks(), np.zeros(SIZE, bool), np.ones(SIZE, bool)):
        runs = runs_of_region(mask)
        assert np.array_equal(region_of_runs(runs, *SIZE), mask)
        assert np.array_equal(read_run_lengths(coded(mask)["counts"], *SIZE), runs)
        again = rle.frPyObjects({"size": list(SIZE), "counts": runs.tolist()}, *SIZE)
        assert again["counts"].decode() == coded(mask)["counts"]


def test_segments_of_a_smaller_copy_are_resized_and_those_of_another_image_refused(tmp_path: Path) -> None:
    large = np.zeros((2, 40, 61), bool)
    large[0, :20], large[1, 10:, 30:] = True, True
    np.savez(tmp_path / "a.npz", large)
    small = read_segments(tmp_path, "a", (20, 30))  # half of it, rounded
    assert small.size == (20, 30) and small.mask(0)[:10].all() and not small.mask(0)[10:].any()
    assert read_segments(tmp_path, "a", (80, 122)).mask(1).sum() == 4 * large[1].sum()
    with pytest.raises(ValueError, match=r"a.npz cannot be read \(they are of 40 x 61 pixels, the image is 61 x 40\)"):
        read_segments(tmp_path, "a", (61, 40))


@pytest.mark.parametrize("values", [(0, 1, 2), (5, 9), (-1, 0)])
def test_an_array_of_other_numbers_is_no_mask(values: tuple[int, ...], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.resize(np.array(values, np.int16), (1, *SIZE)))
    with pytest.raises(ValueError, match="with more than 0 and 1 in it is no mask"):
        read_segments(tmp_path, "a", SIZE)


def test_no_file_and_several_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a has no segments .*python -m voc12.segments"):
        read_segments(tmp_path, "a", SIZE)
    with pytest.raises(ValueError, match="leaves|outside|not"):
        read_segments(tmp_path, "../a", SIZE)
    save(tmp_path, "ours"), save(tmp_path, "png")
    with pytest.raises(ValueError, match="has a.json and a.png: keep one"):
        read_segments(tmp_path, "a", SIZE)


def test_an_image_without_a_segment_has_none(tmp_path: Path) -> None:
    write_segments(tmp_path / "a.json", [], SIZE, {})
    assert len(read_segments(tmp_path, "a", SIZE)) == 0
    Image.new("L", SIZE[::-1]).save(tmp_path / "b.png")
    assert len(read_segments(tmp_path, "b", SIZE)) == 0


def one(shape: Any) -> str:
    return json.dumps([{"segmentation": shape}])


HOSTILE = {
    "no JSON": ("{", "cannot be read"),
    "another object": ('{"a": 1}', "no list of segments"),
    "deep": ("[" * 100_000, "cannot be read"),
    "a number": ("[3]", "segment 1: it has no 'segmentation'"),
    "polygons": (one([[1, 2, 3, 4, 5, 6]]), "segment 1: it has no 'segmentation' of run lengths"),
    "no size": (one({"counts": [54]}), "a segment's size is None, not height and width"),
    "a huge size": (one({"size": [65535, 65535], "counts": [65535 * 65535]}), "has 4295 megapixels, more than 100"),
    "a negative size": (one({"size": [-6, -9], "counts": [54]}), "a segment's size is"),
    "a size of words": (one({"size": ["6", 9], "counts": [54]}), "a segment's size is"),
    "too few pixels": (one({"size": [6, 9], "counts": [53]}), "no run lengths that add up to 6 x 9"),
    "a negative run": (one({"size": [6, 9], "counts": [60, -6]}), "no run lengths that add up to 6 x 9"),
    "no runs": (one({"size": [6, 9]}), "no run lengths that add up to 6 x 9"),
    "endless text": (one({"size": [6, 9], "counts": "o" * 100}), "its counts are no compressed run lengths"),
    "several sizes": (json.dumps([{"segmentation": {"size": [6, 9], "counts": [54]}},
                                  {"segmentation": {"size": [9, 6], "counts": [54]}}]), "have several sizes"),
    "too many": (json.dumps([{}] * 10_001), "lists 10001 segments, more than 10000"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_lists_are_refused_by_name(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError) as found:
        read_segments(tmp_path, "a", SIZE)
    assert str(tmp_path / "a.json") in str(found.value) and message in str(found.value)


def test_hostile_arrays_and_pictures_are_refused_by_name(tmp_path: Path) -> None:
    def told(name: str) -> str:
        with pytest.raises(ValueError) as found:
            read_segments(tmp_path, name, SIZE)
        assert str(tmp_path / name) in str(found.value)
        return str(found.value)

    np.savez(tmp_path / "two.npz", a=masks(), b=masks())
    assert "holds 2 arrays (a, b), not one" in told("two")
    np.savez(tmp_path / "flat.npz", masks()[0])
    assert "holds (6, 9), not an array (n, H, W)" in told("flat")
    np.savez(tmp_path / "float.npz", np.full((1, *SIZE), np.nan))
    assert "is no mask" in told("float")
    np.savez(tmp_path / "values.npz", np.arange(54).reshape(1, *SIZE))
    assert "with more than 0 and 1 in it is no mask" in told("values")
    np.save(tmp_path / "code.npy", np.array([print], object), allow_pickle=True)
    assert "is not read from data files" in told("code")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01")
    told("cut")
    header = b"{'descr': '|b1', 'fortran_order': False, 'shape': (9999999, 6, 9), }"
    (tmp_path / "claim.npy").write_bytes(b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header)
    assert "claims the shape" in told("claim")
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "rgb.png")
    assert "is a RGB image" in told("rgb")
    (tmp_path / "text.png").write_text("no picture")
    told("text")


def test_few_large_segments_take_little_memory() -> None:
    mask = np.zeros((3000, 4000), bool)
    mask[100:2000, 50:3000] = True
    kept = Segments.of_masks([mask] * 3, mask.shape)
    assert sum(runs.nbytes for runs in kept.runs) < 200_000 and np.array_equal(kept.mask(2), mask)
