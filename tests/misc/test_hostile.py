"""Files that are damaged or made to do harm: a named error before anything is allocated, never a crash or a
wrong value."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from misc.files import atomic, store
from misc.files.camfiles import read_cam
from misc.files.ids import read_ids
from misc.files.images import check_image, read_image
from misc.files.pickled import read_pickled
from misc.files.runfolder import RunFolder
from misc.files.schema import Each, Number, Usual, fill, find_fault
from voc12.prepare.coco_annotations import read_coco_annotations

CAM = {"keys": np.array([0, 2]), "maps": np.zeros((2, 4, 6), np.float16), "size": np.array([16, 24])}

WRONG_CAMS = {
    "fractional class": {"keys": np.array([0.5, 2])},
    "class twice": {"keys": np.array([2, 2])},
    "negative class": {"keys": np.array([-1, 2])},
    "class of no 8-bit mask": {"keys": np.array([0, 254])},
    "infinite coarse maps": {"coarse": np.full((2, 4, 6), np.inf, np.float16)},
    "infinite maps": {"maps": np.full((2, 4, 6), np.inf, np.float16)},
    "huge size": {"size": np.array([30000, 30000])},
    "size of nothing": {"size": np.array([0, 24])},
}


@pytest.mark.parametrize("change", WRONG_CAMS.values(), ids=WRONG_CAMS)
def test_cam_files(change: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **CAM)
    assert read_cam(path).keys.tolist() == [0, 2]
    np.savez(path, **{**CAM, **change})
    with pytest.raises(ValueError, match=r"a\.npz"):
        read_cam(path)


@pytest.mark.parametrize("key", [0.5, "a", (1, 2), 2**70, True])
def test_pickled_maps_of_classes_that_are_no_numbers(key: object, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array({2: np.zeros((2, 2)), key: np.zeros((2, 2))}, object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy.*whole numbers"):
        read_cam(tmp_path / "a.npy")


def test_arrays_that_claim_more_than_there_is(tmp_path: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)})
    for name in ("a.npz", "a.npy"):
        path = tmp_path / name
        if name == "a.npz":
            with zipfile.ZipFile(path, "w") as packed:
                packed.writestr("maps.npy", head.getvalue() + b"\0" * 64)
        else:
            path.write_bytes(head.getvalue() + b"\0" * 64)
        with pytest.raises(ValueError, match=rf"{name} cannot be read \(an array claims the shape"):
            store.read_arrays(path) if name == "a.npz" else read_pickled(path)


def test_a_pickle_that_asks_for_room(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array({0: np.zeros((2, 2))}, object), allow_pickle=True)
    assert read_pickled(tmp_path / "a.npy")[0].shape == (2, 2)
    data = (tmp_path / "a.npy").read_bytes()
    start = data.index(b"\n") + 1
    (tmp_path / "a.npy").write_bytes(data[:start] + b"\x80\x02]r\xff\xff\xff\x3f.")
    with pytest.raises(ValueError, match="places to remember"):
        read_pickled(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(data[:start] + pickle.dumps(os.getcwd))
    with pytest.raises(ValueError, match="which is not read from data files"):
        read_pickled(tmp_path / "a.npy")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1j])
def test_weights_that_are_no_finite_numbers(value: complex, tmp_path: Path) -> None:
    path = tmp_path / "cam.pt"
    store.write_model(path, {"w": torch.tensor([1.0, 2.0])}, {"part": "cam"})
    assert store.read_model(path)[1] == {"part": "cam"}
    store.write_model(path, {"w": torch.tensor([1.0, value])}, {"part": "cam"})
    with pytest.raises(ValueError, match=r"cam\.pt is damaged: .*w"):
        store.read_model(path)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    for name in ("pipe.txt", "zero.txt", "loop.txt"):
        with pytest.raises(ValueError, match=name):
            read_ids(tmp_path / name)


def test_a_picture_that_is_none_is_told_without_names_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    for read in (check_image, read_image):
        with pytest.raises(ValueError, match=r"a\.jpg cannot be read \(cannot identify image file\): replace it"):
            read(tmp_path / "a.jpg")


RUN = {"config": {}, "data": {}, "steps": {"train_cam": {"done": True, "seconds": 1.5}}}


@pytest.mark.parametrize("name, good, wrong", [
    ("run.json", RUN, [[], {"config": []}, {**RUN, "steps": 3}, {**RUN, "steps": {"a": {"seconds": "x"}}}]),
    ("scores.json", {"CAM": {"miou": 31.5, "threshold": 0.3}},
     [[], {"CAM": 3}, {"CAM": {"threshold": 1.5}}, {"CAM": {"miou": float("nan")}}, {"CAM": {"classes": [3]}}]),
])  # fmt: skip
def test_json_of_another_form(name: str, good: dict, wrong: list, tmp_path: Path) -> None:
    run, path = RunFolder(tmp_path), tmp_path / name
    read = run.record if name == "run.json" else run.scores
    path.write_text(json.dumps(good))
    assert all(read()[key].items() >= value.items() for key, value in good.items())  # and usual values of the others
    for value in [*wrong, good]:
        path.write_text("[" * 100000 if value is good else json.dumps(value))
        with pytest.raises(ValueError, match=rf"{name} cannot be read"):
            read()


def test_forms() -> None:
    form = {"a": [Number(0, 1)], "?b": Each(str), "?c": Number(whole=True, none=True)}
    for value in ({"a": []}, {"a": [0, 1.0], "b": {"x": "y"}, "c": None, "d": 3}):
        assert find_fault(value, form) is None
    for value, told in (({}, "lacks 'a'"), ({"a": [2]}, r"a[0] is 2, not a number from 0 to 1"),
                        ({"a": [True]}, "a[0] is True"), ({"a": [], "b": {"x": 1}}, "b.x is 1, not str"),
                        ({"a": [], "c": 1.5}, "c is 1.5, not a whole number"), (3, "the whole is 3")):  # fmt: skip
        assert told in (find_fault(value, form) or "")
    for huge in (10**400, -(10**400)):
        assert "not a finite number" in (find_fault(huge, Number()) or "")
    form = {"a": Usual(Each({"b": Usual(str, "?")}), {}), "?c": [{"d": Usual(None, [])}]}
    assert find_fault(None, str | None) is None and "is True, not str | None" in (find_fault(True, str | None) or "")
    assert fill({}, form) == {"a": {}} and find_fault({}, form) is None and find_fault({"a": 3}, form)
    assert fill({"a": {"x": {}}, "c": [{"d": 1}, {}], "e": 5}, form) == {
        "a": {"x": {"b": "?"}}, "c": [{"d": 1}, {"d": []}], "e": 5,
    }  # fmt: skip


def instances(path: Path, **thing: object) -> None:
    annotation = {"id": 1, "image_id": 1, "category_id": 1, **thing}
    images = [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 6}]
    path.write_text(json.dumps({"images": images, "annotations": [annotation],
                                "categories": [{"id": 1, "name": "cat"}]}))  # fmt: skip


def test_run_lengths_of_both_forms(tmp_path: Path) -> None:
    for seed in range(20):
        mask = (np.random.default_rng(seed).random((4, 6)) < 0.4).astype(np.uint8)
        coded = rle.encode(np.asfortranarray(mask))["counts"].decode()
        flat = mask.flatten(order="F").tolist()
        counts, value = [0], 0
        for pixel in flat:
            if pixel != value:
                counts.append(0)
                value = pixel
            counts[-1] += 1
        for lengths in (coded, counts):
            instances(tmp_path / "a.json", segmentation={"size": [4, 6], "counts": lengths})
            assert np.array_equal(read_coco_annotations(tmp_path / "a.json").mask(1), mask)


WRONG_SHAPES = {
    "far": [[1e300, 0, 1, 1, 2, 2]],
    "outside": [[1e6, 0, 1, 1, 2, 2]],
    "not a number": [[float("nan"), 0, 1, 1, 2, 2]],
    "text": [["a", 0, 1, 1, 2, 2]],
    "too short": {"size": [4, 6], "counts": [3, 4]},
    "negative": {"size": [4, 6], "counts": [30, -6]},
    "none": {"size": [4, 6]},
    "size of another type": {"size": -9, "counts": [24]},
    "cut": {"size": [4, 6], "counts": "a~"},
    "long": {"size": [4, 6], "counts": "oooooo0"},
}


@pytest.mark.parametrize("shape", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_shapes_that_are_none(shape: object, tmp_path: Path) -> None:
    instances(tmp_path / "a.json", segmentation=shape)
    with pytest.raises(ValueError, match="annotation 1 of image 1"):
        read_coco_annotations(tmp_path / "a.json").mask(1)


@pytest.mark.parametrize("content", ["[]", '{"images": 3}', '{"images": [3], "annotations": [], "categories": []}',
                                     '{"images": [], "annotations": [], "categories": [{"id": "x", "name": 3}]}',
                                     "[" * 100000])  # fmt: skip
def test_instances_of_another_form(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_coco_annotations(tmp_path / "a.json")


def test_names_as_long_as_a_file_system_takes_are_written(tmp_path: Path) -> None:
    for name in ("x" * 251, "ä" * 125):
        store.write_bytes(tmp_path / f"{name}.png", b"1")
        assert (tmp_path / f"{name}.png").read_bytes() == b"1"
    assert len(list(tmp_path.iterdir())) == 2 and not list(tmp_path.glob(f"*{atomic.SUFFIX}"))
