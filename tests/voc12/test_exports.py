"""``voc12.prepare from``: exports of annotation tools become folders of one's own images, with the right tags and
masks; what is wrong in them is named with file and remedy."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from misc.files.images import read_mask, write_mask
from voc12.catalog import Catalog, open_catalog
from voc12.export import EXPORTS, export_format, load_exports
from voc12.prepare.__main__ import main
from voc12.prepare.coco_annotations import read_coco_annotations

load_exports()
SIZE = (20, 30)
"""Height and width of the images."""


def picture(path: Path, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], (shade, 10, 200)).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def convert(form: str, source: Path, root: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["from", form, str(source), "--root", str(root), "--workers", "0", *more])
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return status, told.out + told.err


def tags(data: Catalog) -> dict[str, list[str]]:
    """{id: names of its classes} of the list train."""
    return {i: [data.classes[c] for c in np.flatnonzero(data.tags(i))] for i in data.ids("train")}


def made(form: str, source: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Catalog, str]:
    """The folder made of an export, and what was printed."""
    root = source.parent / "made"
    status, told = convert(form, source, root, capsys)
    assert status == 0, told
    return open_catalog("folder", root), told


def refused(
    form: str, source: Path, capsys: pytest.CaptureFixture[str], *words: str, status: int = 1
) -> None:
    """Nothing is made, and the message has these words."""
    root = source.parent / "refused"
    ended, told = convert(form, source, root, capsys)
    assert ended == status and all(word in told for word in words), told
    assert not list(root.rglob("*.*"))


# ---------------------------------------------------------------------------------------------- COCO


ANIMALS = {0: ("animals", "none"), 1: ("cat", "animals"), 2: ("dog", "animals")}


def coco(
    folder: Path, objects: list[tuple[str, int, object]], categories: dict[int, tuple[str, str]] = ANIMALS
) -> None:
    """A folder of Roboflow's: objects are (image file, category, segmentation)."""
    names = sorted({file for file, _, _ in objects})
    for number, name in enumerate(names):
        picture(folder / name, 10 * number)
    write(folder / "_annotations.coco.json", json.dumps({
        "images": [{"id": n, "file_name": f, "height": SIZE[0], "width": SIZE[1]} for n, f in enumerate(names)],
        "categories": [{"id": n, "name": c, "supercategory": s} for n, (c, s) in categories.items()],
        "annotations": [{"id": n, "image_id": names.index(f), "category_id": c, "segmentation": s, "iscrowd": 0}
                        for n, (f, c, s) in enumerate(objects)],
    }))  # fmt: skip


LEFT = [[0, 0, 15, 0, 15, 20, 0, 20]]


def test_roboflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    coco(source / "train", [("a.jpg", 1, LEFT), ("a.jpg", 2, [[20, 0, 30, 0, 30, 20, 20, 20]]), ("b.jpg", 2, [])])
    coco(source / "valid", [("c.jpg", 2, LEFT)])
    data, told = made("coco", source, capsys)
    assert data.classes == ("cat", "dog") and "animals" in told and "1 images have objects with a box" in told
    assert tags(data) == {"train/a": ["cat", "dog"], "train/b": ["dog"]} and data.ids("val") == ["valid/c"]
    mask = read_mask(data.mask_path("train/a"))
    assert mask[10, 5] == 1 and mask[10, 25] == 2 and mask[10, 17] == 0 and data.mask_path("train/b") is None


def test_categories_that_are_no_classes(tmp_path: Path) -> None:
    coco(tmp_path, [("a.jpg", 1, LEFT)], {0: ("background", ""), 1: ("cat", ""), 2: ("dog", "")})
    found = read_coco_annotations(tmp_path / "_annotations.coco.json")
    assert found.classes == ("cat", "dog") and found.left_out == ("background",) and found.mask(0)[10, 5] == 1
    coco(tmp_path, [("a.jpg", 1, LEFT)], {0: ("cat", "none"), 1: ("cat", "cat")})  # Roboflow's project of one class
    assert read_coco_annotations(tmp_path / "_annotations.coco.json").classes == ("cat",)


def test_coco_of_images_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco(tmp_path / "export", [("a.jpg", 1, LEFT)])
    (tmp_path / "export/a.jpg").unlink()
    refused("coco", tmp_path / "export", capsys, "1 images are named and not there (a.jpg)", "put them into")


def write_names(form: str, source: Path, *names: str) -> None:
    """Annotations of a format: the images, each with the class cat."""
    if form == "coco":
        images = [{"id": n, "file_name": f, "height": SIZE[0], "width": SIZE[1]} for n, f in enumerate(names)]
        things = [{"id": n, "image_id": n, "category_id": 1, "segmentation": LEFT} for n in range(len(names))]
        content = {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": things}
        write(source / "instances.json", json.dumps(content))
    elif form == "cvat":
        tagged = "".join(f'<image name="{f}" width="30" height="20"><tag label="cat"/></image>' for f in names)
        write(source / "annotations.xml", f"<annotations>{tagged}</annotations>")
    elif form == "huggingface":
        write(source / "metadata.csv", "file_name,label\n" + "".join(f"{f},cat\n" for f in names))
    elif form == "labelstudio":
        write(source / "tags.csv", "image,choice\n" + "".join(f"{f},cat\n" for f in names))
    else:
        for number, name in enumerate(names):
            content = {"shapes": [], "flags": {"cat": True}, "imagePath": name, "imageHeight": 20, "imageWidth": 30}
            write(source / f"{number}.json", json.dumps(content))


NAMING = ("coco", "cvat", "huggingface", "labelstudio", "labelme")


@pytest.mark.parametrize("form", NAMING)
def test_the_picture_at_the_named_path_is_taken(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("1.jpg", "a/1.jpg", "b/1.jpg", "images/c/1.jpg"):
        picture(tmp_path / "export" / place, len(place))
    write_names(form, tmp_path / "export", "a/1.jpg", "b/1.jpg", "c/1.jpg")
    images = {image.name for image in EXPORTS[form].read(tmp_path / "export").images}
    assert images == {"a/1.jpg", "b/1.jpg", "images/c/1.jpg"}
    (tmp_path / "export/a/1.jpg").unlink()
    refused(form, tmp_path / "export", capsys, "1 images are named and not there (a/1.jpg, which may be any of")


@pytest.mark.parametrize("form", NAMING)
def test_a_picture_elsewhere_is_taken_only_where_no_other_is_meant(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "export"
    picture(source / "1.jpg")
    write_names(form, source, "C:\\work\\b\\1.jpg")
    data, told = made(form, source, capsys)
    assert tags(data) == {"1": ["cat"]} and "NOTE: 1 images are not at the path" in told and "b\\1.jpg: 1.jpg" in told
    write_names(form, source, "b/1.jpg", "1.jpg")  # the other image is named itself
    refused(form, source, capsys, "1 images are named and not there (b/1.jpg, and 1.jpg is named otherwise too)")
    write_names(form, source, "b/1.jpg", "c/1.jpg")
    refused(form, source, capsys, "2 images are named and not there")
    shutil.rmtree(source)
    picture(source / "train/1.jpg")
    write_names(form, source, "val/1.jpg")
    refused(form, source, capsys, "1 images are named and not there (val/1.jpg)")


def test_roboflow_lists_whose_images_are_in_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco(tmp_path / "export/train", [("2.jpg", 1, LEFT)])
    coco(tmp_path / "export/valid", [("1.jpg", 1, LEFT)])
    shutil.move(tmp_path / "export/valid/1.jpg", tmp_path / "export/train/1.jpg")
    refused("coco", tmp_path / "export", capsys, "1 images are named and not there (1.jpg)")


# ---------------------------------------------------------------------------------------------- CVAT

XML = """<?xml version="1.0" encoding="utf-8"?>
<annotations><meta><task><labels><label><name>cat</name></label><label><name>dog</name></label></labels></task></meta>
<image id="0" name="a.jpg" subset="Train" width="30" height="20"><polygon label="dog" points="0,0;15,0;15,20;0,20" />
<mask label="cat" rle="2, 2" left="28" top="0" width="2" height="2" /></image>
<image id="1" name="b.jpg" subset="Validation" width="30" height="20"><tag label="cat" />
<box label="dog" xtl="1" ytl="1" xbr="5" ybr="5" /></image></annotations>"""


def test_cvat_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    write(source / "annotations.xml", XML)
    picture(source / "images/a.jpg")
    picture(source / "images/b.jpg")
    data, told = made("cvat", source, capsys)
    assert data.classes == ("cat", "dog") and tags(data) == {"a": ["cat", "dog"]} and data.ids("val") == ["b"]
    mask = read_mask(data.mask_path("a"))
    assert mask[10, 5] == 2 and mask[1, 28] == 1 and mask[0, 28] == 0 and "no mask" in told
    assert data.mask_path("b") is None and [*np.flatnonzero(data.tags("b"))] == [0, 1]


def test_cvat_turned_ellipses_and_masks_of_a_corrected_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = '<ellipse label="dog" cx="15" cy="10" rx="9" ry="1"{} />'
    lines = XML.splitlines()
    xml = lines[0] + lines[1] + '<image name="a.jpg" width="30" height="20">{}</image></annotations>'
    source, root = tmp_path / "export", tmp_path / "made"
    picture(source / "a.jpg")
    masks = []
    for turned, more in (("", ()), (' rotation="90"', ("--overwrite",))):
        write(source / "annotations.xml", xml.format(shape.format(turned)))
        assert convert("cvat", source, root, capsys, *more)[0] == 0
        masks.append(read_mask(root / "masks" / "a.png"))
    flat, upright = masks
    assert flat[10, 22] == 2 and flat[4, 15] == 0 and upright[10, 22] == 0 and upright[4, 15] == 2


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('rle="2, 2"', 'rle="2, 3"', "run lengths"),
        ("0,0;15,0", "0,0;1e9,0", "outside"),
        ('rle="2, 2"', f'rle="1{"0" * 400}"', "too large"),
        ('rle="2, 2" left="28" top="0" width="2" height="2"',
         'rle="1500000000" left="0" top="0" width="50000" height="30000"', "more pixels than the image"),
        ("0,0;15,0;15,20;0,20", "0,0;x,1", "float"),
        ('width="30"', 'width="30000000"', "height and width"),
        ("<annotations>", "<!DOCTYPE a><annotations>", "document type"),
        ('label="dog" points', 'label="bird" points', "bird"),
    ],
)
def test_cvat_that_is_wrong(old: str, new: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "export/annotations.xml", XML.replace(old, new, 1))
    picture(tmp_path / "export/a.jpg")
    picture(tmp_path / "export/b.jpg")
    refused("cvat", tmp_path / "export", capsys, "annotations.xml", word)


def test_cvat_segmentation_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    picture(source / "JPEGImages/a.jpg")
    table = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:48,112,32::\ndog:176,112,32::\n"
    write(source / "labelmap.txt", table)
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[:, :9] = (176, 112, 32)
    (source / "SegmentationClass").mkdir()
    Image.fromarray(colours).save(source / "SegmentationClass/a.png")
    write(source / "ImageSets/Segmentation/default.txt", "a\n")
    data, _ = made("cvat", source, capsys)
    assert data.classes == ("cat", "dog") and tags(data) == {"a": ["dog"]}
    assert read_mask(data.mask_path("a"))[0, [0, 20]].tolist() == [2, 0]


# ---------------------------------------------------------------------------------------------- labelme


def labelme(path: Path, *shapes: dict[str, object], **more: object) -> None:
    picture(path.with_suffix(".jpg"))
    content = {"shapes": shapes, "imagePath": f"{path.stem}.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1], **more}
    write(path, json.dumps(content))


def shape(label: str, points: list[list[float]], kind: str = "polygon", **more: object) -> dict[str, object]:
    return {"label": label, "points": points, "shape_type": kind, **more}


def test_labelme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    small = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [255, 255]], np.uint8)).save(small, "PNG")
    coded = base64.b64encode(small.getvalue()).decode()
    labelme(source / "a.json", shape("cat", [[0, 0], [15, 0], [15, 20], [0, 20]]),
            shape("dog", [[20, 4], [22, 8]], "rectangle"), shape("__ignore__", [[26, 10], [28, 10]], "circle"),
            shape("dog", [[18, 0], [19, 1]], "mask", mask=coded))  # fmt: skip
    labelme(source / "b.json", shape("dog", [[3, 3]], "point"))
    labelme(source / "c.json", flags={"cat": True, "dog": False})
    data, told = made("labelme", source, capsys)
    assert tags(data) == {"a": ["cat", "dog"], "b": ["dog"], "c": ["cat"]} and "1 images have shapes without" in told
    mask = read_mask(data.mask_path("a"))
    assert [mask[10, 5], mask[5, 21], mask[10, 26], mask[10, 24]] == [1, 2, 255, 255]
    assert mask[0:2, 18:20].tolist() == [[0, 2], [2, 2]]
    assert data.mask_path("b") is None and data.mask_path("c") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["a.json", "export it again"]),
        ('{"shapes": 3, "imagePath": "a.jpg", "imageHeight": 20, "imageWidth": 30}', ["a.json", "shapes is 3"]),
        ('{"shapes": [], "imagePath": "a.jpg", "imageHeight": 1e9, "imageWidth": 30}', ["a.json", "imageHeight"]),
    ],
)
def test_labelme_that_is_wrong(text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "export/a.jpg")
    write(tmp_path / "export/a.json", text)
    refused("labelme", tmp_path / "export", capsys, *words)


def test_labelme2voc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    picture(source / "JPEGImages/a.jpg")
    (source / "SegmentationClassPNG").mkdir()
    write_mask(source / "SegmentationClassPNG/a.png", np.full(SIZE, 2, np.uint8))
    write(source / "class_names.txt", "_background_\ncat\ndog\n")
    data, _ = made("labelme", source, capsys)
    assert data.classes == ("cat", "dog") and tags(data) == {"a": ["dog"]} and read_mask(data.mask_path("a"))[0, 0] == 2
    (source / "SegmentationClassPNG/a.png").unlink()
    refused("labelme", source, capsys, "a.jpg has no mask in SegmentationClassPNG")


# ---------------------------------------------------------------------------------------------- Label Studio

HEAD = "annotation_id,annotator,choice,created_at,id,image,lead_time\n"


def test_label_studio_address_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "export/a.jpg")
    write(tmp_path / "export/tags.csv", "image,choice\nhttp://[b.jpg,cat\n")
    refused("labelstudio", tmp_path / "export", capsys, "tags.csv: 1 images are named and not there (http://[b.jpg")


def test_label_studio_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    for name in ("a.jpg", "b 1.jpg", "c.jpg"):
        picture(source / "images" / name)
    lines = [
        '1,1,"{""choices"":[""cat"",""dog""]}",2024-01-01,1,/data/upload/1/0a1b2c3d-a.jpg,3.2\n',
        "2,1,cat,2024-01-01,2,http://host/data/b%201.jpg,2.0\n",
        "3,1,,2024-01-01,3,/data/local-files/?d=x/c.jpg,2.0\n",
    ]
    write(source / "tags.csv", HEAD + "".join(lines))
    (source / "images/phone.HEIC").write_bytes(b"?")
    data, told = made("labelstudio", source / "tags.csv", capsys)
    assert "1 pictures have formats that are not read and are left out (images/phone.HEIC)" in told
    assert tags(data) == {"a": ["cat", "dog"], "b 1": ["cat"], "c": []}
    write(source / "tags.csv", "image,first,second\na.jpg,cat,dog\n")
    refused("labelstudio", source, capsys, "tags.csv", "first, second may be the choices")
    write(source / "tags.csv", "image,choice,choice2\na.jpg,cat,dog\n")
    refused("labelstudio", source, capsys, "tags.csv", "choice, choice2 may be the choices")


@pytest.mark.parametrize("minimal", [False, True])
def test_label_studio_tasks(minimal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    picture(source / "a.jpg")
    picture(source / "b.jpg")

    def task(file: str, *names: str) -> dict[str, object]:
        if minimal:
            return {"id": 1, "image": file, "choice": names[0] if len(names) == 1 else {"choices": names}}
        result = [{"type": "choices", "value": {"choices": [n]}} for n in names]
        other = [{"type": "rectanglelabels", "value": {}}]
        return {"data": {"image": file}, "annotations": [{"result": result + other}]}

    write(source / "export.json", json.dumps([task("/data/upload/7/a.jpg", "cat", "dog"), task("b.jpg", "dog")]))
    data, told = made("labelstudio", source, capsys)
    assert tags(data) == {"a": ["cat", "dog"], "b": ["dog"]}
    assert ("annotations that are no choices are passed over: rectanglelabels (2)" in told) != minimal
    if minimal:
        write(source / "export.json", '[{"image": "a.jpg", "text": "a cat on a mat", "label": "cat"}]')
        refused("labelstudio", source, capsys, "export.json: text, label may be the choices")
        told = '[{"image": "a.jpg", "text": "a cat", "choice": "cat"}, {"image": "b.jpg", "text": "nothing here"}]'
        write(source / "export.json", told)
        shutil.rmtree(source.parent / "made")
        assert tags(made("labelstudio", source, capsys)[0]) == {"a": ["cat"], "b": []}
        write(source / "export.json", '[{"image": "a.jpg"}, {"image": "b.jpg"}]')
        refused("labelstudio", source, capsys, "export.json: no task has choices")
    write(source / "export.json", '[{"data": {"image": "a.jpg"}, "annotations": 3}]')
    refused("labelstudio", source, capsys, "export.json, task 1", "no list of annotations")


# ---------------------------------------------------------------------------------------------- folders and names


def test_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    picture(source / "train/cat/a.jpg", 1)
    picture(source / "train/dog/b.jpg", 2)
    shutil.copy(source / "train/dog/b.jpg", source / "train/cat/b.jpg")  # an image of both
    picture(source / "test/dog/a.jpg", 3)
    for place in ("images", "photos"):  # round all class folders, or within each list
        shutil.copytree(source, tmp_path / place / "export" / "images")
    for name in ("train", "test"):
        inner = tmp_path / "photos" / "export" / "images" / name
        shutil.move(inner, tmp_path / "photos" / "export" / name / "photos")
    shutil.rmtree(tmp_path / "photos" / "export" / "images")
    for place in ("images", "photos"):
        data, told = made("folders", tmp_path / place / "export", capsys)
        assert data.classes == ("cat", "dog") and len(data.ids("train")) == 2 and f"folders {place}/, which" in told
    data, told = made("folders", source, capsys)
    assert tags(data) == {"train/cat/a": ["cat"], "train/cat/b": ["cat", "dog"]}
    assert data.ids("val") == ["test/dog/a"] and "test is taken for val" in told and "several classes" in told
    picture(tmp_path / "flat/a.jpg")
    refused("folders", tmp_path / "flat", capsys, "no image in a folder of its class")


def test_marks_in_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    for name in ("a-1[1 0 1].png", "b[0,1,0].png", "c[000].png", "d.png"):
        picture(source / name)
    write(source / "classes.txt", "tumour\nstroma\nnormal\n")
    data, told = made("names", source, capsys)
    assert tags(data) == {"a-1[1 0 1]": ["tumour", "normal"], "b[0,1,0]": ["stroma"], "c[000]": []}
    assert data.ids("val") == ["d"] and "1 images have no marks" in told
    (source / "classes.txt").unlink()
    assert made("names", source, capsys) if not (tmp_path / "made").exists() else True
    picture(source / "e[1 0].png")
    refused("names", source, capsys, "e[1 0].png has 2 marks", "rename")
    (source / "e[1 0].png").unlink()
    os.mkfifo(source / "classes.txt")
    refused("names", source, capsys, "classes.txt is no file")


def test_image_folders_of_huggingface(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    for name in ("train/a.jpg", "train/b.jpg", "validation/c.jpg"):
        picture(source / name)
    write(source / "train/metadata.csv", 'file_name,text,labels\na.jpg,x,"[""cat"", ""dog""]"\nb.jpg,y,dog\n')
    write(source / "validation/metadata.jsonl", '{"file_name": "c.jpg", "label": ["cat"]}\n')
    data, _ = made("huggingface", source, capsys)
    assert tags(data) == {"train/a": ["cat", "dog"], "train/b": ["dog"]} and data.ids("val") == ["validation/c"]
    write(source / "train/metadata.csv", "file_name,label\na.jpg,0\nb.jpg,1\n")
    refused("huggingface", source, capsys, "train/metadata.csv, line 1", "is a number", "classes.txt")
    write(source / "train/metadata.csv", "file_name,text\na.jpg,x\n")
    refused("huggingface", source, capsys, "train/metadata.csv has no column of labels")
    (source / "validation/metadata.jsonl").unlink()
    write(source / "train/metadata.csv", "file_name,text,cat,dog\na.jpg,x,1,0\nb.jpg,y,1,1\n")
    shutil.rmtree(tmp_path / "made")
    assert tags(made("huggingface", source, capsys)[0]) == {"train/a": ["cat"], "train/b": ["cat", "dog"]}


def test_labels_of_huggingface_that_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0.0 and 1.0, as pandas writes them, and true and false are the numbers 0 and 1, never names."""
    source = tmp_path / "export"
    for name in ("a.jpg", "b.jpg"):
        picture(source / name)
    tables = {
        "metadata.csv": "file_name,label\na.jpg,0.0\nb.jpg,1.0\n",
        "metadata.jsonl": '{"file_name": "a.jpg", "label": false}\n{"file_name": "b.jpg", "label": true}\n',
    }
    for name, text in tables.items():
        (source / "classes.txt").unlink(missing_ok=True)
        write(source / name, text)
        refused("huggingface", source, capsys, f"{name}, line 1: the label 0 is a number", "classes.txt")
        write(source / "classes.txt", "cat\ndog\n")
        images = EXPORTS["huggingface"].read(source).images
        assert {image.name: image.classes for image in images} == {"a.jpg": ("cat",), "b.jpg": ("dog",)}
        (source / name).unlink()
    write(source / "metadata.jsonl", tables["metadata.jsonl"].replace("label", "tumour"))
    (source / "classes.txt").unlink()
    export = EXPORTS["huggingface"].read(source)
    assert export.classes == ("tumour",) and [image.classes for image in export.images] == [(), ("tumour",)]


@pytest.mark.parametrize(
    ("form", "file", "head"),
    [("huggingface", "metadata.csv", "file_name,tags"), ("labelstudio", "tags.csv", "image,choice")],
)
def test_several_names_in_a_cell(
    form: str, file: str, head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "export"
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(source / name)
    lines = f'{head}\na.jpg,"{{}}"\nb.jpg,cat\nc.jpg,dog\n'
    write(source / file, lines.format("cat,dog"))
    export = EXPORTS[form].read(source)
    assert export.classes == ("cat", "dog") and export.images[0].classes == ("cat", "dog")
    write(source / file, lines.format("cat/dog"))
    refused(form, source, capsys, file, "'cat/dog' is made of 'cat', 'dog'", "classes.txt")
    write(source / "classes.txt", "cat\ndog\ncat/dog\n")  # a name of its own
    export = EXPORTS[form].read(source)
    assert export.classes == ("cat", "dog", "cat/dog") and export.images[0].classes == ("cat/dog",)


def test_class_folders_that_lie_deeper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n, (place, name) in enumerate((p, c) for p in ("PetImages/{}", "raw/PetImages/{}") for c in ("Cat", "Dog")):
        picture(tmp_path / place.partition("/")[0] / "export" / place.format(name) / f"{n}.jpg", n)
    for top in ("PetImages", "raw"):
        data, told = made("folders", tmp_path / top / "export", capsys)
        assert data.classes == ("Cat", "Dog") and "NOTE: all images lie in folders PetImages/, which is no" in told
    for split in ("seg_train", "seg_test"):
        for name in ("forest", "sea"):
            picture(tmp_path / "intel/export" / split / split / name / f"{split}{name}.jpg", len(split + name))
    picture(tmp_path / "intel/export/seg_pred/seg_pred/1.jpg")
    data, told = made("folders", tmp_path / "intel/export", capsys)
    assert data.classes == ("forest", "sea") and len(data.ids("train")) == len(data.ids("val")) == 2
    assert "NOTE: the folders seg_pred, seg_test, seg_train are lists" in told and "1 images lie in no folder" in told
    for n, name in enumerate(("0/x", "1/x", "1/y")):
        picture(tmp_path / "batches/export" / name / f"{n}.jpg", n)
    data, told = made("folders", tmp_path / "batches/export", capsys)
    assert data.classes == ("0", "1") and "NOTE: 3 images lie in folders inside a folder of a class" in told
    assert "NOTE: the folders 0, 1 are classes whose names are numbers" in told


# ---------------------------------------------------------------------------------------------- every format


@pytest.mark.parametrize("form", EXPORTS)
def test_a_folder_without_anything(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "export").mkdir()
    refused(form, tmp_path / "export", capsys, str(tmp_path / "export"))
    refused(form, tmp_path / "nowhere", capsys, "does not exist", status=2)


def test_the_help_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["from", "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"{name}: {form.about[:20]}" in told for name, form in EXPORTS.items())
    with pytest.raises(ValueError, match="Two formats"):
        export_format("coco", "again")(lambda source: None)  # type: ignore[arg-type, return-value]


def test_a_second_call_makes_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = tmp_path / "export", tmp_path / "made"
    coco(source / "train", [("a.jpg", 1, LEFT)])
    export = EXPORTS["coco"].read(source)
    assert pickle.loads(pickle.dumps(export.images[0].mask))().shape == SIZE  # for worker processes
    assert convert("coco", source, root, capsys)[0] == 0
    image, mask = root / "images/train/a.jpg", root / "masks/train/a.png"
    assert image.samefile(source / "train/a.jpg")
    mask.unlink()
    assert convert("coco", source, root, capsys)[0] == 0 and mask.is_file()
    assert convert("coco", source, tmp_path / "copy", capsys, "--copy")[0] == 0
    assert not (tmp_path / "copy/images/train/a.jpg").samefile(source / "train/a.jpg")
    coco(source / "train", [("a.jpg", 2, LEFT)])
    status, told = convert("coco", source, root, capsys)
    assert status == 1 and "labels.csv is there with other content" in told


def test_nothing_is_left_of_a_call_with_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The corrected export is taken at once; what was there before is kept."""
    source, root = tmp_path / "export", tmp_path / "made"
    coco(source, [("a.jpg", 1, LEFT)])
    data = (source / "a.jpg").read_bytes()
    (source / "a.jpg").write_bytes(data[:-9])  # found by the check of the finished folder only
    write(root / "masks/notes.txt", "mine")
    status, told = convert("coco", source, root, capsys)
    assert status == 1 and "images/a.jpg cannot be read" in told and "Nothing that this call made" in told
    assert [path.name for path in root.rglob("*")] == ["masks", "notes.txt"]
    (source / "a.jpg").write_bytes(data)
    assert convert("coco", source, root, capsys)[0] == 0 and (root / "masks/notes.txt").is_file()
    (source / "a.jpg").write_bytes(data[:-9])
    assert convert("coco", source, root, capsys)[0] == 1 and (root / "labels.csv").is_file()


def test_images_that_become_no_part_of_the_folder_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "export"
    for name in ("cat/a.jpg", "dog/b.jpg", "loose.jpg"):
        picture(source / name, len(name))
    (source / "cat/phone.HEIC").write_bytes(b"?")
    unread = "1 pictures have formats that are not read and are left out (cat/phone.HEIC)"
    data, told = made("folders", source, capsys)
    assert set(data.images) == {"cat/a", "dog/b"} and unread in told
    assert "1 images lie in no folder of a class and are left out (loose.jpg)" in told
    shutil.rmtree(tmp_path / "made")
    write(source / "metadata.csv", "file_name,label\ncat/a.jpg,cat\ndog/b.jpg,dog\n")
    data, told = made("huggingface", source, capsys)
    assert set(data.images) == {"cat/a", "dog/b"}
    assert unread in told and "not named by the annotations and are left out (loose.jpg)" in told
    write(source / "metadata.csv", "file_name,label\ncat/a.jpg,cat\ncat/a.jpg,dog\n")
    refused("huggingface", source, capsys, "cat/a.jpg is named twice: put all its classes into one line")


def test_masks_that_lie_beside_images_without_outlines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = tmp_path / "export", tmp_path / "made"
    picture(source / "a.jpg")
    picture(source / "b.jpg", 5)
    labelme(source / "a.json", shape("cat", [[1, 1], [9, 1], [9, 9]]))
    labelme(source / "b.json", shape("cat", [[1, 1]], "point"), imagePath="b.jpg")
    write_mask(root / "masks/b.png", np.ones(SIZE, np.uint8))
    status, told = convert("labelme", source, root, capsys)
    assert status == 1 and f"1 images have no outlines in the export, but masks in {root / 'masks'} (b)" in told
    assert (root / "masks/b.png").exists() and not (root / "masks/a.png").exists()


def test_annotations_without_any_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco(tmp_path / "export", [("a.jpg", 1, LEFT)])
    file = tmp_path / "export/_annotations.coco.json"
    write(file, json.dumps({**json.loads(file.read_text()), "annotations": []}))
    refused("coco", tmp_path / "export", capsys, "PROBLEM: no image of any list has any class")


def test_sizes_that_an_export_claims_are_held_against_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a mask of that size is made."""
    coco(tmp_path / "coco/export", [("a.jpg", 1, LEFT)])
    file = tmp_path / "coco/export/_annotations.coco.json"
    text = json.loads(file.read_text())
    text["images"][0].update(height=9000, width=11000)
    write(file, json.dumps(text))
    polygon = shape("cat", [[0, 0], [15, 0], [15, 20], [0, 20]])
    labelme(tmp_path / "labelme/export/a.json", polygon, imageHeight=9000, imageWidth=11000)
    picture(tmp_path / "cvat/export/a.jpg")
    picture(tmp_path / "cvat/export/b.jpg")
    write(tmp_path / "cvat/export/annotations.xml", XML.replace('"30" height="20"', '"11000" height="9000"'))
    monkeypatch.setattr(np, "zeros", lambda *a, **k: pytest.fail("it is drawn"))
    for form in ("coco", "labelme", "cvat"):
        refused(form, tmp_path / form / "export", capsys, "a.jpg is 20 x 30 pixels high and wide, its annotations are")


def test_masks_of_objects_that_are_larger_than_the_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = io.BytesIO()
    Image.new("1", (3000, 2000)).save(large, "PNG")
    coded = base64.b64encode(large.getvalue()).decode()
    labelme(tmp_path / "labelme/export/a.json", shape("dog", [[0, 0], [1, 1]], "mask", mask=coded))
    refused("labelme", tmp_path / "labelme/export", capsys, "2000 x 3000 pixels high and wide, more than the image")


@pytest.mark.parametrize(("form", "place"), [("coco", "_annotations.coco.json"), ("folders", "cat/a.jpg"),
                                             ("folders", "cat/only.jpg")])  # fmt: skip
def test_named_pipes(form: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "export/dog/a.jpg")
    (tmp_path / "export" / place).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "export" / place)
    refused(form, tmp_path / "export", capsys, place, "is no file but a folder, a pipe or a device")


def test_what_has_changed_in_an_export_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Outlines and pixels, also where the tags are the same; --overwrite takes the new ones."""
    source, root = tmp_path / "export", tmp_path / "made"
    coco(source, [("a.jpg", 1, LEFT)])
    assert convert("coco", source, root, capsys)[0] == 0
    before = read_mask(root / "masks/a.png")
    coco(source, [("a.jpg", 1, [[16, 0, 30, 0, 30, 20, 16, 20]])])
    status, told = convert("coco", source, root, capsys)
    assert status == 1 and "masks/a.png is there with other content and is kept: --overwrite replaces it" in told
    assert np.array_equal(read_mask(root / "masks/a.png"), before)
    assert convert("coco", source, root, capsys, "--overwrite")[0] == 0
    assert not np.array_equal(read_mask(root / "masks/a.png"), before)
    (source / "a.jpg").unlink()  # a link of the same file would have followed
    picture(source / "a.jpg", 77)
    status, told = convert("coco", source, root, capsys)
    assert status == 1 and "images/a.jpg is there with other content and is kept" in told
    assert convert("coco", source, root, capsys, "--overwrite")[0] == 0
    assert (root / "images/a.jpg").samefile(source / "a.jpg")
