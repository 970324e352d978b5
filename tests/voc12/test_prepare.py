"""Preparing VOC 2012 with SBD, COCO 2014 and a folder of one's own, on small downloads made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from layouts import as_coco, as_folder, write
from PIL import Image
from pycocotools import mask as rle
from running import digests, make_set

from misc.files import images
from misc.files.images import read_image, read_mask, write_mask
from voc12 import tags
from voc12.catalog import open_catalog
from voc12.prepare.__main__ import main
from voc12.prepare.coco_annotations import read_coco_annotations
from voc12.prepare.sbd import find_sbd_maps, read_sbd_mask
from voc12.tags import DataError


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit status of a command, and all it prints."""
    capsys.readouterr()
    status = main([*map(str, words), "--workers", "0"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out + captured.err


# ---------------------------------------------------------------------------------------------- SBD


def sbd_file(path: Path, mask: Any, **changes: Any) -> None:
    """A file in SBD's structure: struct GTcls of Boundaries (20 sparse maps), Segmentation, CategoriesPresent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.asarray(mask, np.uint8)
    boundaries = np.empty((20, 1), object)
    for c in range(20):
        boundaries[c, 0] = scipy.sparse.csc_matrix((mask == c + 1).astype(float))
    present = np.unique(mask[mask > 0]).astype(np.uint8)[:, None]
    truth = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present, **changes}
    scipy.io.savemat(path, {"GTcls": {k: v for k, v in truth.items() if v is not None}}, do_compression=True)


@pytest.mark.parametrize("mask", [[[0, 1, 20], [15, 0, 0]], [[3]], [[0, 2, 2, 0]]])
def test_sbd_maps(mask: list[list[int]], tmp_path: Path) -> None:
    sbd_file(tmp_path / "x.mat", mask)
    read = read_sbd_mask(tmp_path / "x.mat")
    assert read.dtype == np.uint8 and read.tolist() == mask


def test_what_is_no_sbd_map_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.mat"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"Segmentation": None}, "GTcls has no Segmentation .it has .*Boundaries"),
        ({"Segmentation": np.array([[21]])}, r"values outside 0\.\.20"),
        ({"Segmentation": np.array([[0.5]])}, r"values outside 0\.\.20"),
        ({"Segmentation": "text"}, "not a map of numbers"),
        ({"Segmentation": np.zeros((2, 3, 4))}, r"\(2, 3, 4\), not a map of numbers"),
    ]
    for changes, told in cases:
        sbd_file(path, [[0]], **changes)
        with pytest.raises(DataError, match=rf"x\.mat.*{told}"):
            read_sbd_mask(path)
    scipy.io.savemat(path, {"GTinst": {"Segmentation": np.zeros((2, 2))}})
    with pytest.raises(DataError, match="holds GTinst, not GTcls .*give cls/"):
        read_sbd_mask(path)
    scipy.io.savemat(path, {"GTcls": np.zeros((2, 2))})
    with pytest.raises(DataError, match="GTcls has no Segmentation"):
        read_sbd_mask(path)
    for content, told in ((b"no mat file", "damaged"), (b"", "damaged"), (b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM",
                                                                         "MATLAB 7.3")):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(DataError, match=told):
            read_sbd_mask(path)
    with pytest.raises(DataError, match="does not exist"):
        read_sbd_mask(tmp_path / "gone.mat")
    with pytest.raises(DataError, match="looked for ID.mat"):
        find_sbd_maps(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------- VOC 2012


def annotation(*objects: tuple[str, int]) -> str:
    things = "".join(f"<object><name>{n}</name><difficult>{d}</difficult></object>" for n, d in objects)
    return f"<annotation>{things}</annotation>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A devkit of 2 train and 1 val images, and 3 images that only SBD has masks of; one of SBD's is in val too."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    objects = {"t1": [("dog", 0)], "t2": [("cat", 0), ("dog", 1)], "v1": [("cow", 0)], "s1": [("cow", 0)],
               "s2": [("dog", 0)], "s3": [("cat", 0)]}  # fmt: skip
    for number, (image_id, things) in enumerate(objects.items()):
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (number, 0, 0)).save(root / "JPEGImages" / f"{image_id}.jpg")
        write(root / "Annotations" / f"{image_id}.xml", annotation(*things))
    write(root / "ImageSets/Segmentation/train.txt", "t1\nt2\n")
    write(root / "ImageSets/Segmentation/val.txt", "v1\n")
    for image_id, value in (("t1", 12), ("t2", 8), ("v1", 10)):
        write_mask(root / "SegmentationClass" / f"{image_id}.png", np.full((4, 6), value, np.uint8))
    for image_id, value in (("v1", 3), ("t1", 3), ("s1", 10), ("s2", 12), ("s3", 8)):
        sbd_file(tmp_path / "sbd" / "dataset" / "cls" / f"{image_id}.mat", np.full((4, 6), value))
    return tmp_path


def test_train_aug_from_sbd(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = voc / "VOCdevkit" / "VOC2012"
    status, text = run(capsys, "voc12", "--root", voc, "--sbd", voc / "sbd")
    assert status == 0 and "All is well" in text
    data = open_catalog("voc12", root)
    assert data.ids("train_aug") == ["s1", "s2", "s3", "t1", "t2"] and data.default_train_list() == "train_aug"
    assert {p.stem for p in (root / "SegmentationClassAug").iterdir()} == {"s1", "s2", "s3"}
    # official masks stay before SBD's
    assert [read_mask(data.mask_path(i)).max() for i in ("s1", "t1", "v1")] == [10, 12, 10]
    assert data.tag_source == "labels.csv" and np.flatnonzero(data.tags("t2")).tolist() == [7, 11]
    assert "train_aug 5 10582 5 1.200 <- not as published" in " ".join(text.split())
    before = digests(root, "**/*")
    status, text = run(capsys, "voc12", "--root", root, "--sbd", voc / "sbd")
    assert status == 0 and "written" not in text and digests(root, "**/*") == before


def test_train_aug_from_the_folder_that_is_passed_round(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = voc / "VOCdevkit" / "VOC2012"
    for image_id in ("v1", "t1", "t2", "s1", "s3"):
        (root / "SegmentationClassAug").mkdir(exist_ok=True)
        Image.new("L", (6, 4), 3).save(root / "SegmentationClassAug" / f"{image_id}.png")  # grey, as it is
    assert run(capsys, "voc12", "--root", root)[0] == 0
    assert open_catalog("voc12", root).ids("train_aug") == ["s1", "s3", "t1", "t2"]


def test_train_aug_without_masks_from_the_lists_of_sbd(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learning from tags needs the list alone."""
    root, lists = voc / "VOCdevkit" / "VOC2012", voc / "benchmark_RELEASE" / "dataset"
    write(lists / "train.txt", "s1\nt1\n")
    write(lists / "val.txt", "s2\nv1\n")
    assert run(capsys, "voc12", "--root", root, "--sbd-lists", voc)[0] == 0
    data = open_catalog("voc12", root)
    assert data.ids("train_aug") == ["s1", "s2", "t1", "t2"]  # VOC's train joins, its val does not
    assert data.mask_path("s1") is None and not (root / "SegmentationClassAug").exists()
    assert np.flatnonzero(data.tags("s1")).tolist() == [9]
    empty = root / "JPEGImages"
    assert run(capsys, "voc12", "--root", root, "--sbd-lists", empty)[0] == 0  # the list is there: SBD's are not read
    (root / "ImageSets/Segmentation/train_aug.txt").unlink()
    status, text = run(capsys, "voc12", "--root", root, "--sbd-lists", empty)
    assert status != 0 and "No lists of SBD" in text
    status, text = run(capsys, "voc12", "--root", root, "--sbd-lists", voc / "nowhere")
    assert status == 2 and "--sbd-lists" in text


def test_difficult_objects_and_tags_of_masks(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = voc / "VOCdevkit" / "VOC2012"
    assert run(capsys, "voc12", "--root", root, "--no-difficult")[0] == 0
    assert np.flatnonzero(open_catalog("voc12", root).tags("t2")).tolist() == [7]
    assert not (root / "ImageSets/Segmentation/train_aug.txt").exists()
    status, text = run(capsys, "voc12", "--root", root)
    assert status == 1 and "labels.csv is there with other content and is kept: --overwrite" in text
    assert run(capsys, "voc12", "--root", root, "--overwrite", "--tags", "masks")[0] == 0
    write(root / "Annotations/t1.xml", "damaged")
    assert np.flatnonzero(open_catalog("voc12", root).tags("t2")).tolist() == [7]


def test_every_missing_or_damaged_file_is_reported(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = voc / "VOCdevkit" / "VOC2012"
    (root / "JPEGImages/t1.jpg").unlink()
    (root / "JPEGImages/s1.jpg").write_bytes(b"\xff\xd8 cut short")
    (root / "Annotations/t2.xml").write_text("<annotation><object>")
    (root / "SegmentationClass/v1.png").write_bytes(b"\x89PNG cut short")
    Image.new("RGB", (6, 4), (1, 2, 3)).save(root / "SegmentationClass/t2.png")
    sbd_file(voc / "sbd/dataset/cls/s2.mat", np.full((5, 6), 12))
    (voc / "sbd/dataset/cls/s3.mat").write_bytes(b"cut short")
    write(root / "ImageSets/Segmentation/train_aug.txt", "t1\nt2\ns1\nv1\n")
    status, text = run(capsys, "voc12", "--root", root, "--sbd", voc / "sbd")
    problems = [line for line in text.splitlines() if line.startswith("PROBLEM")]
    for told in ("t1 is on a list and has no image file", r"s1: .*cannot", "t2.xml is no well-formed XML", "v1.png",
                 "t2.png is a RGB image", r"s2.mat is (5, 6)", "s3.mat", "1 images of train_aug are in val too (v1)"):
        assert any(told.split(".*")[0] in line and told.split(".*")[-1] in line for line in problems), told
    assert status == 1 and len(problems) == 9 and "9 problems" in text  # s1 twice: its map and its image
    assert not (root / "labels.csv").exists()


# ---------------------------------------------------------------------------------------------- COCO 2014

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}, {"id": 13, "name": "stop sign"}]


def square(x: int, y: int, side: int) -> list[float]:
    """A polygon."""
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def coco_json(path: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> None:
    content = {"images": images, "annotations": [{"id": n, "iscrowd": 0, **a} for n, a in enumerate(annotations)],
               "categories": CATEGORIES}  # fmt: skip
    write(path, json.dumps(content))


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    """Three training images, one of them without objects, one with a crowd; one val image."""
    images = []
    for split, numbers in (("train", (9, 5, 30)), ("val", (42,))):
        entries = []
        for number in numbers:
            file = f"COCO_{split}2014_{number:012d}.jpg"
            (tmp_path / f"{split}2014").mkdir(exist_ok=True)
            Image.new("RGB", (12, 8), (number, 0, 0)).save(tmp_path / f"{split}2014" / file)
            entries.append({"id": number, "file_name": file, "height": 8, "width": 12})
        images.append(entries)
    crowd = np.zeros((8, 12), np.uint8)
    crowd[:, 6:] = 1
    runs = [int(v) for v in (48, 48)]  # 6 columns off, 6 columns on
    objects = [
        {"image_id": 9, "category_id": 1, "segmentation": [square(0, 0, 6)]},
        {"image_id": 9, "category_id": 90, "segmentation": [square(4, 0, 4)]},
        {"image_id": 5, "category_id": 1, "iscrowd": 1, "segmentation": {"size": [8, 12], "counts": runs}},
        {"image_id": 5, "category_id": 13, "segmentation": [square(0, 0, 8), square(10, 0, 2)]},
    ]
    coco_json(tmp_path / "annotations/instances_train2014.json", images[0], objects)
    coded = rle.encode(np.asfortranarray(crowd))
    last = {"size": coded["size"], "counts": coded["counts"].decode()}
    coco_json(tmp_path / "annotations/instances_val2014.json", images[1],
              [{"image_id": 42, "category_id": 90, "segmentation": last}])  # fmt: skip
    return tmp_path


IDS = {n: f"COCO_{'val' if n == 42 else 'train'}2014_{n:012d}" for n in (5, 9, 30, 42)}


def test_coco_lists_tags_and_masks(coco_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="is not prepared: run python -m voc12.prepare coco14 --root"):
        open_catalog("coco14", coco_root)
    status, text = run(capsys, "coco14", "--root", coco_root)
    assert status == 0 and "train 3 82783 3 1.333" in " ".join(text.split())
    data = open_catalog("coco14", coco_root)
    assert data.classes == ("person", "stop sign", "toothbrush")  # by id, which is not the order of the file
    assert data.ids("train") == [IDS[5], IDS[9], IDS[30]] and data.ids("train_tagged") == [IDS[5], IDS[9]]
    assert data.ids("val") == data.ids("val_tagged") == [IDS[42]]
    assert [data.tags(IDS[n]).tolist() for n in (5, 9, 30, 42)] == [[1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]]
    masks = {n: read_mask(data.mask_path(IDS[n])) for n in IDS}
    wanted = np.zeros((8, 12), np.uint8)
    wanted[:6, :6] = 1
    wanted[:4, 4:8] = 3  # the later object is on top
    assert np.array_equal(masks[9], wanted)
    wanted = np.zeros((8, 12), np.uint8)
    wanted[:, :8] = wanted[:2, 10:] = 2  # both polygons, and no crowd
    assert np.array_equal(masks[5], wanted)
    assert not masks[30].any() and (masks[42][:, 6:] == 3).all() and not masks[42][:, :6].any()
    assert data.check("train", need_masks=True) and data.check("val", need_masks=True) == []
    before = digests(coco_root, "**/*")
    assert run(capsys, "coco14", "--root", coco_root)[0] == 0 and digests(coco_root, "**/*") == before


def test_crowds_may_be_left_out_of_the_tags_and_ignored_in_the_masks(
    coco_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--no-crowd-tags", "--crowd-masks", "ignore")
    assert run(capsys, "coco14", "--root", coco_root, *flags)[0] == 0
    data = open_catalog("coco14", coco_root)
    mask = read_mask(data.mask_path(IDS[5]))
    assert data.tags(IDS[5]).tolist() == [0, 1, 0]
    assert (mask[:, :8] == 2).all() and (mask[2:, 10:] == 255).all() and (mask[:2, 10:] == 2).all()


def test_one_half_of_coco_is_enough_and_a_missing_image_is_reported(
    coco_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(coco_root / "val2014")
    (coco_root / "annotations/instances_val2014.json").unlink()
    (coco_root / "images").mkdir()
    (coco_root / "train2014").rename(coco_root / "images/train2014")
    assert run(capsys, "coco14", "--root", coco_root)[0] == 0
    (coco_root / "images/train2014" / f"{IDS[30]}.jpg").unlink()
    status, text = run(capsys, "coco14", "--root", coco_root, "--no-decode")
    assert status == 1 and f"{IDS[30]} is on a list and has no image file" in text


COCO_FAULTS: dict[str, tuple[Any, str]] = {
    "json": ("{", "is damaged"),
    "kind": ({"images": [], "annotations": []}, "is no instances file: it lacks one of the lists"),
    "entry": ({"images": [{"id": 1}], "annotations": [], "categories": CATEGORIES}, "lacks 'file_name'"),
    "image": ({"images": [], "annotations": [{"id": 7, "image_id": 1, "category_id": 1}], "categories": CATEGORIES},
              "annotation 7 is of image 1, which the file does not list"),
}  # fmt: skip


@pytest.mark.parametrize("content, told", COCO_FAULTS.values(), ids=COCO_FAULTS)
def test_a_wrong_instances_file(content: Any, told: str, coco_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = coco_root / "annotations/instances_train2014.json"
    write(path, content if isinstance(content, str) else json.dumps(content))
    status, text = run(capsys, "coco14", "--root", coco_root)
    assert status == 1 and told in text and str(path) in text


@pytest.mark.parametrize("shape, told", [("x", "is a str, not polygons"), ([[1, 2, 3, 4]], "at least three points"),
                                         ({"size": [3, 3], "counts": [9]}, "of size [3, 3], the image is 8 x 12")])
def test_a_wrong_segmentation_costs_its_image_only(
    shape: Any, told: str, coco_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = coco_root / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = shape
    write(path, json.dumps(content))
    status, text = run(capsys, "coco14", "--root", coco_root)
    assert status == 1 and told in text and text.count("PROBLEM: ") == 1
    assert {p.stem for p in (coco_root / "SegmentationClass/train2014").iterdir()} == {IDS[5], IDS[30]}


# ---------------------------------------------------------------------------------------------- one's own


def test_voc_coco_and_folder_are_the_same_set_three_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc_root = make_set(tmp_path / "voc12")
    as_folder(voc_root, tmp_path / "folder")
    as_coco(voc_root, tmp_path / "coco14")
    assert run(capsys, "folder", "--root", tmp_path / "folder")[0] == 0
    assert run(capsys, "coco14", "--root", tmp_path / "coco14")[0] == 0
    assert run(capsys, "voc12", "--root", voc_root)[0] == 0
    sets = [open_catalog(name, tmp_path / name) for name in ("voc12", "folder", "coco14")]
    for split in ("train", "val"):
        assert len({data.fingerprint(split) for data in sets}) == 1
        for image_id in sets[0].ids(split):
            voc, folder, coco = (read_mask(data.mask_path(image_id)) for data in sets)
            assert np.array_equal(voc, folder)
            assert np.array_equal(np.where(voc == 255, 0, voc), coco)  # COCO has no ignored rim


@pytest.fixture
def own(tmp_path: Path) -> Path:
    root = tmp_path / "own"
    for n in range(10):
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (n, 0, 0)).save(root / "images" / f"my {n}.jpg")
    lines = [f"my {n}.jpg,{'cup;Pen' if n % 2 else 'cup'}\n" for n in range(10)]
    write(root / "labels.csv", "file,classes\n" + "".join(lines))
    return root


def test_a_folder_gets_its_class_list_and_splits(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "folder", "--root", own, "--val-share", 0.2)
    assert status == 0 and "--data folder --root" in text
    assert (own / "classes.txt").read_text() == "Pen\ncup\n"
    data = open_catalog("folder", own)
    train, val = data.ids("train"), data.ids("val")
    assert (len(train), len(val)) == (8, 2) and sorted(train + val) == sorted(f"my {n}" for n in range(10))
    assert data.check("train") == [] and "2 cup" in " ".join(text.split())
    status, text = run(capsys, "folder", "--root", own, "--val-share", 0.2)
    assert status == 0 and "written" not in text
    status, text = run(capsys, "folder", "--root", own, "--val-share", 0.5)
    assert status == 1 and "--overwrite" in text and open_catalog("folder", own).ids("val") == val


def test_what_is_wrong_with_a_folder_is_reported(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "images/my 0.jpg").unlink()
    (own / "images/my 9.jpg").rename(own / "images/My 9.jpg")
    (own / "images/my 1.jpg").write_bytes(b"\xff\xd8 cut short")
    for name, height, value in (("my 2", 30, 0), ("my 3", 30, 9), ("my 4", 29, 0), ("cup", 30, 0)):
        write_mask(own / "masks" / f"{name}.png", np.full((height, 40), value, np.uint8))
    (own / "masks/my 5.png").write_bytes(b"\x89PNG cut short")
    Image.new("RGB", (40, 30), (1, 2, 3)).save(own / "masks/my 6.png")
    write(own / "classes.txt", "cup\nCup\nPen\n")
    status, text = run(capsys, "folder", "--root", own)
    problems = "\n".join(line for line in text.splitlines() if line.startswith("PROBLEM"))
    for told in ("'Cup' and 'cup' differ in capitals only", "1 masks belong to no image (cup)", "my 0 is on a list",
                 "my 9 is on a list and has no image file (there is My 9: capitals count)",
                 "my 1.jpg cannot be read", "holds the value 9, but there are 3 classes", "(29, 40)",
                 "my 5.png cannot be read", "my 6.png is a RGB image: masks hold class indices"):  # fmt: skip
        assert told in problems, told
    assert status == 1 and problems.count("PROBLEM") == 9 and "my 2" not in problems


def test_large_photographs_are_reported_with_the_remedy(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "megapixels" not in run(capsys, "folder", "--root", own)[1]
    Image.new("L", (4000, 3000)).save(own / "images/my 0.jpg")
    status, text = run(capsys, "folder", "--root", own, "--no-decode")
    assert status == 0 and "NOTE: 1 images have more than 1.5 megapixels (the largest, my 0: 4000 x 3000)" in text
    assert f"prepare shrink --root {own} --out DIR" in text


def test_a_list_of_ten_masks_leaves_the_other_lists_as_they_are(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = open_catalog("folder", own)
    write(own / "splits/check.txt", "my 2.jpg\n")
    data = open_catalog("folder", own)
    assert data.ids("check") == ["my 2"]
    assert all(data.ids(name) == before.ids(name) for name in ("train", "val", "all"))
    status, text = run(capsys, "folder", "--root", own)
    assert status == 0 and all(f"\n{name} " in text for name in ("check", "train", "val"))


def test_large_photographs_are_made_smaller(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (400, 300), (9, 9, 9)).save(own / "images/my 0.jpg", exif=exif)
    write_mask(own / "masks/my 0.png", np.full((400, 300), 2, np.uint8))
    out = tmp_path / "small"
    limits: set[float] = set()
    monkeypatch.setattr(images, "_check_head", lambda image, largest: limits.add(largest))
    got = run(capsys, "shrink", "--root", own, "--out", out, "--long-side", 100)
    assert limits == {400}  # of images and masks: shrink is what everything else points to
    assert got[0] == 0, got[1]
    data = open_catalog("folder", out)
    assert data.ids("train") == open_catalog("folder", own).ids("train")
    assert read_image(data.image_path("my 0")).shape == (100, 75, 3)
    assert read_mask(data.mask_path("my 0")).shape == (100, 75)
    assert read_image(data.image_path("my 1")).shape == (30, 40, 3)
    assert data.fingerprint("train") == open_catalog("folder", own).fingerprint("train")


# ---------------------------------------------------------------------------------------------- command line


def test_help_names_every_flag_and_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, shown in ((["--help"], ("voc12", "coco14", "folder", "shrink")),
                         (["voc12", "--help"], ("--root", "--sbd", "--no-difficult", "--tags", "(default: xml)"))):
        with pytest.raises(SystemExit) as end:
            main(words)
        text = capsys.readouterr().out
        assert end.value.code == 0 and all(word in text for word in shown)
    assert main(["folder", "--root", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.strip().startswith("error: --root ") and error.strip().count("\n") == 0


@pytest.mark.parametrize("words, told", [
    (["voc12", "--root", "nowhere"], "--root nowhere: there is no such folder"),
    (["voc12", "--root", ".", "--sbd", "nowhere"], "--sbd nowhere: there is no such folder"),
    (["coco14", "--root", "nowhere"], "--root nowhere: there is no such folder"),
    (["coco14", "--root", ".", "--annotations", "nowhere"], "--annotations nowhere: there is no such folder"),
    (["folder", "--root", ".", "--val-share", "1.5"], "--val-share 1.5 is not possible"),
    (["shrink", "--root", "nowhere", "--out", "x"], "--root nowhere: there is no such folder"),
    (["shrink", "--root", ".", "--out", "x", "--long-side", "3"], "--long-side 3 is not possible"),
    (["from", "evil", ".", "--root", "x"], "no format 'evil'"),
    (["from", "coco", "nowhere", "--root", "x"], "nowhere does not exist"),
])  # fmt: skip
def test_a_wrong_argument_is_refused_before_any_work(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = run(capsys, *words)
    assert status == 2 and told in text and not list(tmp_path.iterdir())


def test_too_few_images_to_train_on_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer than 50 in all, or 10 of a class."""
    (tmp_path / "images").mkdir()

    def prepare(dogs: int, cats: int) -> str:
        names = [*["dog"] * dogs, *["cat"] * cats]
        for n, _ in enumerate(names):
            (tmp_path / "images" / f"{n}.jpg").touch()
        (tmp_path / "labels.csv").write_text("file,classes\n" + "".join(f"{n}.jpg,{c}\n" for n, c in enumerate(names)))
        status, text = run(capsys, "folder", "--root", tmp_path, "--no-decode")
        assert status == 0 and "All is well" in text
        return text

    assert "NOTE: train has 5 images: that is too few to train on (as a rule, 50 or more" in prepare(3, 2)
    text = prepare(41, 9)
    assert "too few" not in text and "NOTE: fewer than 10 images of train have the class cat (9)" in text
    assert "too few" not in prepare(40, 10) + text and "fewer than" not in prepare(40, 10)


def test_annotations_and_instances_agree_on_names() -> None:
    assert tags.names_from_xml(annotation(("dog", 0), ("cat", 1)), difficult=False) == ["dog"]
    with pytest.raises(DataError, match="does not exist: put COCO's annotations there"):
        read_coco_annotations(Path("nowhere.json"))
