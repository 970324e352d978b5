"""What people really bring: odd lists, tables, masks and pixels are read right, or refused before a run, never silently
wrong."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from layouts import mask, write
from PIL import Image

import evaluation
from misc.files.imagefiles import find_images, unread_pictures
from misc.files.images import check_image, read_image, read_indices, read_mask
from misc.image.draw import palette
from voc12.catalog import open_catalog
from voc12.masks import compare_masks, is_foreign_mask
from voc12.prepare.__main__ import main
from voc12.prepare.folder import _draw_lists
from voc12.tags import DataError


def folder(root: Path, table: str, *, names: str = "abc", classes: str = "") -> Path:
    """Images NAME.jpg and a labels.csv."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (6, 4), (90, 10, 200)).save(root / "images" / f"{name}.jpg")
    write(root / "labels.csv", table)
    if classes:
        write(root / "classes.txt", classes)
    return root


def prepare(capsys: pytest.CaptureFixture[str], root: Path, *more: str, kind: str = "folder") -> tuple[int, str]:
    """Exit status of a preparation, and what it prints."""
    capsys.readouterr()
    status = main([kind, "--root", str(root), "--workers", "0", *more])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out + captured.err


TAGS = "file,classes\na.jpg,cat\nb.jpg,dog\nc.jpg,cat\n"

# ---------------------------------------------------------------------------------------------- tables

HEADS = ["file_name,label", "Image Name,tags", "img,class", "path,labels", "image-path,classes", "name,category"]


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_tables_that_people_have(head: str, tmp_path: Path) -> None:
    data = open_catalog("folder", folder(tmp_path, TAGS.replace("file,classes", head)))
    assert data.classes == ("cat", "dog") and sum(data.tags(i) for i in "abc").tolist() == [2, 1]


SEVERAL = {
    "commas": 'a.jpg,"cat,dog"',
    "bars": "a.jpg,cat|dog",
    "Python": "a.jpg,\"['cat', 'dog']\"",
    "JSON": 'a.jpg,"[""cat"", ""dog""]"',
}


@pytest.mark.parametrize("line", SEVERAL.values(), ids=SEVERAL)
def test_several_tags_in_a_cell(line: str, tmp_path: Path) -> None:
    data = open_catalog("folder", folder(tmp_path, f"file,classes\n{line}\nb.jpg,dog\nc.jpg,cat\n"))
    assert data.classes == ("cat", "dog") and sum(data.tags(i) for i in "abc").tolist() == [2, 2]


def test_names_of_a_class_list_may_hold_what_separates(tmp_path: Path) -> None:
    table = 'file,classes\na.jpg,"road, gravel"\nb.jpg,"dog,cat"\nc.jpg,cat dog\n'
    data = open_catalog("folder", folder(tmp_path, table, classes="cat\ndog\nroad, gravel\n"))
    assert [data.tags(i).tolist() for i in "abc"] == [[0, 0, 1], [1, 1, 0], [1, 1, 0]]


REFUSED = {
    "pandas index": (",file,classes\n0,a.jpg,cat\n", "line 1: ',file,classes' looks like a header"),
    "run lengths": ("ImageId,EncodedPixels\na.jpg,1 3 10 5\n", "looks like a header"),
    "unknown head": ("what,is it\na.jpg,cat\nb.jpg,dog\n", "looks like a header"),
    "numbers": ("id,label\na,0\nb,1\n", "the class '0' is a number"),
    "blanks": ("file,tags\na,cat dog\nb,cat\nc,dog\n", "'cat dog' is made of 'cat', 'dog'"),
    "half known": ('file,tags\na,"cat,dgo"\nb,cat\n', "'cat,dgo' is made of 'cat'"),
    "words": ("image_name,tags\na,clear primary\nb,clear primary water\n", "holds the class 'clear primary'"),
    "one column": ("file,species\na.jpg,cat\n", "A column of class names is called classes"),
}


@pytest.mark.parametrize("table, told", REFUSED.values(), ids=REFUSED)
def test_a_table_that_would_make_classes_that_nobody_means(
    table: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = prepare(capsys, folder(tmp_path, table))
    assert status == 1 and told in text and "labels.csv" in text
    assert not (tmp_path / "classes.txt").exists()


def test_no_file_is_written_while_there_are_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS.replace("b.jpg,dog", "b.jpg,dgo") + "c2.jpg,dog\n")
    status, text = prepare(capsys, root, "--val-share", "0.4")
    assert status == 1 and "'dgo' and 'dog' have the same letters" in text and "not written" in text
    assert not (root / "classes.txt").exists() and not (root / "splits").exists()
    status, _ = prepare(capsys, folder(tmp_path, TAGS), "--val-share", "0.4")
    assert status == 0 and (root / "classes.txt").read_text() == "cat\ndog\n"


def test_a_class_without_image_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS, classes="__ignore__\ncat\nghost\ndog\n")
    status, text = prepare(capsys, root)
    assert status == 0 and "no image of any list has the class __ignore__, ghost" in text
    assert "'__ignore__' sounds like no class" in text
    write(root / "splits/train.txt", "a\n")
    write(root / "splits/val.txt", "b\n")
    assert "no image of train has the class dog" in prepare(capsys, root)[1]


def test_val_share_leaves_a_training_image_of_every_class(tmp_path: Path) -> None:
    rows = "".join(f"{n}.jpg,{'rare' if n == 1 else 'cat'}\n" for n in range(9))
    data = open_catalog("folder", folder(tmp_path, f"file,classes\n{rows}", names="012345678"))
    for share in (0.2, 0.5, 0.9):
        lists = _draw_lists(data, share)
        assert "1" in lists["train"] and set(lists["train"]) | set(lists["val"]) == set(data.images)
        assert any(data.tags(i)[0] for i in lists["train"])
    assert len(_draw_lists(data, 0.5)["val"]) == 4


# ---------------------------------------------------------------------------------------------- lists


def test_lists_that_meet_or_are_missing_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "my photos", TAGS)
    assert f"--root '{root}'" in prepare(capsys, root)[1]
    write(root / "splits/train.txt", "a\nb\n")
    status, text = prepare(capsys, root)
    assert status == 1 and "There is no list val" in text
    write(root / "splits/val.txt", "b\nc\n")
    status, text = prepare(capsys, root)
    assert status == 1 and "1 images of train are in val too (b)" in text
    write(root / "splits/val.txt", "c\n")
    write(root / "splits/test.txt", "a\n")
    assert "1 images of train are in test too (a)" in prepare(capsys, root)[1]


@pytest.mark.parametrize("other", ["val", "test"])
def test_a_list_that_is_a_copy_of_train_is_reported(
    other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path, TAGS)
    for name, text in {"train": "a\nb\n", "val": "c\n", other: "a\nb\n"}.items():
        write(root / f"splits/{name}.txt", text)
    status, text = prepare(capsys, root)
    assert status == 1 and f"2 images of train are in {other} too (a, b): mend the lists" in text


def test_a_folder_with_a_list_of_test_images_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS + "d.jpg,cat\ne.jpg,dog\n", names="abcde")
    write(root / "splits/test.txt", "a\ne\n")
    status, text = prepare(capsys, root)
    assert status == 0 and "NOTE: 2 images of test.txt are trained on too (a, e)" in text and "mend the" not in text
    status, text = prepare(capsys, root, "--val-share", "0.4")
    assert status == 0 and "trained on too" not in text
    lists = {name: set((root / f"splits/{name}.txt").read_text().split()) for name in ("train", "val")}
    assert lists["val"] and lists["train"] | lists["val"] == {"b.jpg", "c.jpg", "d.jpg"}
    for path in (root / "splits").glob("*.txt"):
        path.unlink()
    write(root / "splits/test.txt", "a\nb\nc\nd\ne\n")
    status, text = prepare(capsys, root, "--val-share", "0.4")
    assert status == 1 and "no image can be put into val, as each is in test.txt" in text


def test_lists_of_other_names_do_not_pass_unseen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS)
    write(root / "splits/training.txt", "a\nb\n")
    told = "splits/ has no train.txt and no val.txt (there: training.txt): every image that has tags is trained on"
    assert told in prepare(capsys, root)[1] and "They are the training images themselves" in prepare(capsys, root)[1]


def test_a_share_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = prepare(capsys, folder(tmp_path, "file,classes\na.jpg,cat\nb.jpg,dog\n"), "--val-share", "0.5")
    assert status == 1 and "no image can be put into val" in text and "There is no list" not in text


def test_pictures_and_images_that_are_passed_over_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path, TAGS.replace("b.jpg,dog", "b.jpg,"))
    (root / "images/phone.HEIC").write_bytes(b"?")
    text = prepare(capsys, root)[1]
    assert "1 pictures have formats that are not read and are left out (images/phone.HEIC)" in text
    assert "1 images have no class (b): they are taken as background only" in text
    folder_of_images = str(root / "images")
    assert unread_pictures([folder_of_images]) == [f"{folder_of_images}/phone.HEIC"]
    assert list(find_images([folder_of_images])) == ["a", "b", "c"]


def test_evaluation_scores_the_images_that_the_list_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("photo", "photo 1", "trips/rome", unicodedata.normalize("NFD", "Größe")):
        for side in ("truth", "made"):
            mask(tmp_path / side / f"{name}.png", *([0, 1] if side == "made" and name == "photo 1" else [1]))

    def iou(*lines: str) -> str:
        write(tmp_path / "list.txt", "\n".join(lines))
        words = ["--list", "list.txt", "--predict-dir", "made", "--gt-dir", "truth"]
        words = [str(tmp_path / w) if not w.startswith("--") else w for w in words]
        assert evaluation.main([*words, "--num-classes", "2"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("class 1")).split()[2]

    assert iou("photo 1") == "0.00" and iou("photo") == "100.00" and iou("photo", "photo 1") == "33.33"
    assert iou("trips/rome.jpg", "Größe.jpg", str(tmp_path / "truth/photo.png")) == "100.00"


# ---------------------------------------------------------------------------------------------- masks


def test_masks_drawn_as_255_are_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS.replace("dog", "cat"))
    for name in "abc":
        mask(root / "masks" / f"{name}.png", 255)
    told = "3 of 3 masks hold only the values 0 and 255 (a, b, c)"
    status, text = prepare(capsys, root)
    assert status == 1 and told in text and "write its class (1 for the first)" in text
    with pytest.raises(DataError, match="3 of 3 masks hold only"):
        open_catalog("folder", root).check("train")
    write(tmp_path / "list.txt", "a\nb\n")
    masks = str(root / "masks")
    files = ["--list", str(tmp_path / "list.txt"), "--predict-dir", masks, "--gt-dir", masks]
    assert evaluation.main([*files, "--num-classes", "2"]) == 1
    assert "255 means not scored" in capsys.readouterr().err
    mask(root / "masks/a.png", 1, 255)
    status, text = prepare(capsys, root)
    assert status == 1 and "2 of 3 masks hold only" in text
    (root / "labels.csv").unlink()
    write(root / "classes.txt", "cat\n")
    status, text = prepare(capsys, root)
    assert status == 0 and "NOTE: 2 of 3 masks hold only" in text  # images without an object may be meant
    mask(root / "masks/a.png", 255)
    assert prepare(capsys, root)[0] == 1


def test_masks_drawn_as_255_are_counted_in_linear_time(tmp_path: Path) -> None:
    class Id(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Id.compared += 1
            return str.__eq__(self, other)

    mask(tmp_path / "a.png", 255)
    catalog = SimpleNamespace(
        mask_path=lambda _: tmp_path / "a.png", tags=lambda _: np.ones(1), num_classes=1, classes=("cat",),
        tag_source="labels.csv", hides_objects=False,
    )  # fmt: skip
    problems, notes = compare_masks(catalog, [Id(f"{n:03}") for n in range(50)], workers=1)  # type: ignore[arg-type]
    assert "50 of 50 masks hold only" in problems[0] and not notes and Id.compared < 50


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ", "a.jpg", "sub.x/a.npy"])
def test_masks_in_other_formats_are_known_by_their_endings(name: str) -> None:
    assert is_foreign_mask(name) and not is_foreign_mask("a.png") and not is_foreign_mask("notes.txt")


def test_masks_of_other_classes_than_the_tags_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS, classes="cat\ndog\n")
    for name, value in zip("abc", (2, 1, 2), strict=True):
        mask(root / "masks" / f"{name}.png", value)
    told = "In 3 of 3 images the mask has classes that the tags lack: dog (2), cat (1)"
    status, text = prepare(capsys, root)
    assert status == 0 and told in text and "Is classes.txt in the order of the mask values?" in text
    assert any(told in warning for warning in open_catalog("folder", root).check("train"))


def test_masks_that_lack_what_is_tagged_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS, classes="cat\ndog\n")
    for name, value in zip("abc", (0, 1, 0), strict=True):  # 0 drawn for the first class
        mask(root / "masks" / f"{name}.png", value)
    told = "In 2 of 3 images the mask lacks classes that are tagged: cat (2) (a, c). Is every object drawn, and 1 (not"
    status, text = prepare(capsys, root)
    assert status == 0 and told in text and "In 1 of 3 images the mask has classes that the tags lack: cat (1)" in text
    assert any(told in warning for warning in open_catalog("folder", root).check("train"))
    for name, value in zip("abc", (1, 2, 1), strict=True):
        mask(root / "masks" / f"{name}.png", value)
    assert "In " not in prepare(capsys, root)[1]


def test_masks_that_are_no_png_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS, classes="cat\ndog\n")
    (root / "masks").mkdir()
    Image.new("L", (6, 4)).save(root / "masks/a.jpg")
    told = "masks/ holds 1 files that are not PNG and are not read (masks/a.jpg)"
    status, text = prepare(capsys, root)
    assert status == 1 and told in text
    (root / "labels.csv").unlink()
    status, text = prepare(capsys, root)
    assert status == 1 and told in text
    (root / "masks/a.jpg").rename(root / "masks/a.npy")
    assert told.replace("jpg", "npy") in prepare(capsys, root)[1]


def test_masks_in_colours_of_which_nothing_is_lost(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [255, 20, 0]], np.uint8)
    path = tmp_path / "SegmentationClass/a.png"
    path.parent.mkdir()
    for colours in (palette()[values], np.repeat(values[..., None], 3, 2)):
        Image.fromarray(colours).save(path)
        assert np.array_equal(read_mask(path), values)
    opaque = np.stack([values, np.full_like(values, 255)], -1)
    Image.fromarray(opaque, "LA").save(path)
    assert np.array_equal(read_mask(path), values)
    Image.fromarray(np.stack([values, values], -1), "LA").save(path)
    with pytest.raises(ValueError, match="is a LA image"):
        read_mask(path)
    Image.fromarray(values.astype(np.uint16)).save(path)
    assert np.array_equal(read_mask(path), values)
    write(tmp_path / "labelmap.txt", "# label:color_rgb\nbackground:0,0,0::\ncat:48,112,32::\ndog:1,2,3::\n")
    Image.fromarray(np.array([[[1, 2, 3], [0, 0, 0], [48, 112, 32]]], np.uint8)).save(path)
    assert read_mask(path).tolist() == [[2, 0, 1]]
    Image.fromarray(np.array([[[1, 2, 4], [0, 0, 0]]], np.uint8)).save(path)
    with pytest.raises(ValueError, match="is a RGB image"):
        read_mask(path)


def test_a_png_whose_checksum_is_wrong_is_damaged(tmp_path: Path) -> None:
    mask(tmp_path / "a.png", 1)
    data = bytearray((tmp_path / "a.png").read_bytes())
    at = data.index(b"IDAT") + 10
    data[at] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        read_mask(tmp_path / "a.png")


# ---------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("high, shift", [(200, 0), (1023, 2), (4094, 4), (16000, 6), (65535, 8)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_pixels_keep_their_range(high: int, shift: int, suffix: str, tmp_path: Path) -> None:
    grey = np.linspace(0, high, 24).astype(np.uint16).reshape(4, 6)
    Image.fromarray(grey).save(tmp_path / f"grey.{suffix}")
    assert np.array_equal(read_image(tmp_path / f"grey.{suffix}")[..., 1], grey >> shift)
    colour = np.stack([grey, grey[::-1], grey // 2], -1)
    assert cv2.imwrite(str(tmp_path / f"colour.{suffix}"), colour[..., ::-1])
    assert np.array_equal(read_image(tmp_path / f"colour.{suffix}"), colour >> shift)


def test_pixels_of_an_unknown_range_are_refused(tmp_path: Path) -> None:
    for values in (np.full((4, 6), 70000, np.int32), np.full((4, 6), -1, np.int32), np.zeros((4, 6), np.float32)):
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=r"a\.tif cannot be read .*save it with 8 or 16 bits"):
            read_image(tmp_path / "a.tif")


def test_what_is_left_out_of_pictures_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS)
    Image.fromarray(np.full((4, 6), 4000, np.uint16)).save(root / "images/deep.png")
    Image.new("RGBA", (6, 4)).save(root / "images/clear.png")
    Image.new("CMYK", (6, 4)).save(root / "images/print.tif")
    Image.new("L", (6, 4)).save(root / "images/pages.tif", save_all=True, append_images=[Image.new("L", (6, 4))])
    text = prepare(capsys, root)[1]
    for told in ("more than 8 bits a channel", "transparency, which is left out (clear)", "CMYK", "pages or frames"):
        assert told in text
    assert "(deep)" in text


def test_a_turned_photo_with_a_mask_that_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(root / "images/a.jpg", exif=exif)
    mask(root / "masks/a.png", 1)
    status, text = prepare(capsys, root)
    assert status == 1 and "its EXIF orientation turns" in text


# ---------------------------------------------------------------------------------------------- VOC's layout


def voc(root: Path, *names: str, encoding: str = "utf-8", classes: str = "cat\ndog\n") -> Path:
    """A set in VOC's layout, an image a list entry, each with an XML of one object of these names."""
    (root / "JPEGImages").mkdir(parents=True)
    for number, name in enumerate(names):
        Image.new("RGB", (6, 4)).save(root / "JPEGImages" / f"{number}.jpg")
        thing = f"<object><name>{name}</name></object>"
        text = f"<?xml version='1.0' encoding='{encoding}'?><annotation>{thing}</annotation>"
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{number}.xml").write_bytes(text.encode(encoding))
    if classes:
        write(root / "classes.txt", classes)
    write(root / "ImageSets/Segmentation/train.txt", "0\n")
    write(root / "ImageSets/Segmentation/val.txt", "\n".join(str(n) for n in range(1, len(names))))
    return root


def test_names_in_other_capitals_or_unknown_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = voc(tmp_path / "a", "cat", "Dog", "person")
    status, text = prepare(capsys, root, kind="voc12")
    assert status == 1 and "PROBLEM: objects whose names are no class, but for their capitals: 'Dog' (1; is it" in text
    assert "NOTE: objects whose names are no class are passed over (images): 'person' (1)" in text
    assert not (root / "labels.csv").exists()
    status, text = prepare(capsys, voc(tmp_path / "b", "cat", "dogg"), kind="voc12")
    assert status == 0 and "'dogg' (1; is it 'dog'?)" in text


@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1", "windows-1252", "utf-16"])
def test_annotations_in_the_encoding_that_they_declare(encoding: str, tmp_path: Path) -> None:
    data = open_catalog("voc12", voc(tmp_path, "Köter", "cat", encoding=encoding, classes="cat\nKöter\n"))
    assert data.tags("0").tolist() == [0, 1]


def test_class_lists_of_labelme_and_cvat_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = voc(tmp_path / "a", "cat", "dog", classes="")
    status, text = prepare(capsys, root, kind="voc12")
    assert "has no classes.txt: the classes are VOC's 20" in text
    root = voc(tmp_path / "b", "cat", "dog", classes="")
    write(root / "class_names.txt", "__ignore__\n_background_\ncat\ndog\n")
    assert open_catalog("voc12", root).classes == ("cat", "dog")
    status, text = prepare(capsys, root, kind="voc12")
    assert status == 0 and "those of class_names.txt" in text and (root / "classes.txt").read_text() == "cat\ndog\n"
    root = voc(tmp_path / "c", "cat", "dog", classes="")
    write(root / "labelmap.txt", "# label\nbackground:0,0,0::\ndog:1,1,2::\ncat:48,112,32::\n")
    (root / "ImageSets/Segmentation/val.txt").rename(root / "ImageSets/Segmentation/default.txt")
    assert open_catalog("voc12", root).classes == ("dog", "cat")
    assert "CVAT writes default.txt" in prepare(capsys, root, kind="voc12")[1]


def test_names_of_either_unicode_form_and_with_spaces(tmp_path: Path) -> None:
    root = voc(tmp_path, unicodedata.normalize("NFD", "Köter"), "cat", classes="cat\nKöter\n")
    name = unicodedata.normalize("NFD", "Größe 1")
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (root / kind / f"0.{suffix}").rename(root / kind / f"{name}.{suffix}")
    write(root / "ImageSets/Segmentation/train.txt", "Größe 1\n")
    data = open_catalog("voc12", root)
    (image_id,) = data.ids("train")
    assert data.image_path(image_id).is_file() and data.tags(image_id).tolist() == [0, 1]


def test_images_that_share_a_name_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = voc(tmp_path, "cat", "dog")
    Image.new("RGB", (6, 4)).save(root / "JPEGImages" / "1.png")
    status, text = prepare(capsys, root, kind="voc12")
    assert status == 1 and "PROBLEM: 1 images share their names" in text and "JPEGImages/1.png" in text
    assert not (root / "labels.csv").exists()


def test_a_table_with_a_header_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels\.csv has a header and no line"):
        open_catalog("folder", folder(tmp_path, "file,classes\n"))


INVISIBLE = {
    "space of no width": ("cat\u200b", r"'cat\u200b' has a character that is not seen"),
    "dict": ('"{""cat"": 1}"', "looks like a list"),
    "set": "{'cat'}",
    "quotation mark": ('"cat\nc.jpg,dog', "line 3: a cell has several lines. Is a quotation mark not closed?"),
}


@pytest.mark.parametrize("cell", INVISIBLE.values(), ids=INVISIBLE)
def test_classes_that_are_none_to_the_eye(cell: str | tuple[str, str], tmp_path: Path) -> None:
    written, told = cell if isinstance(cell, tuple) else (cell, "")
    root = folder(tmp_path, f"file,classes\na.jpg,cat\nb.jpg,{written}\n")
    if told:
        with pytest.raises(DataError) as error:
            open_catalog("folder", root)
        assert told in str(error.value) and "labels.csv" in str(error.value)
    else:
        assert open_catalog("folder", root).classes == ("cat",)


def test_a_mask_that_is_a_jpeg_in_spite_of_its_ending(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 6), np.uint8)).save(tmp_path / "a.png", "JPEG")
    for read in (read_mask, read_indices):
        with pytest.raises(ValueError, match=r"a\.png cannot be read \(it is a JPEG image in spite of its ending"):
            read(tmp_path / "a.png")


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    for name in ("a.jpg", "a.eps"):
        Image.new("RGB", (6, 4)).save(tmp_path / name, "EPS")
        for read in (read_image, read_mask, check_image):
            with pytest.raises(ValueError, match="it is PostScript, which is not read"):
                read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jfif", "JFIF", "JPG"])
def test_other_endings_of_jpeg(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "own", TAGS.replace("a.jpg", f"a.{suffix}"))
    (root / "images/a.jpg").rename(root / f"images/a.{suffix}")
    assert open_catalog("folder", root).image_path("a").name == f"a.{suffix}" and prepare(capsys, root)[0] == 0
    data = voc(tmp_path / "voc", "cat", "dog")
    (data / "JPEGImages/0.jpg").rename(data / f"JPEGImages/0.{suffix}")
    assert open_catalog("voc12", data).image_path("0").is_file()
    assert list(find_images([str(root / "images")])) == ["a", "b", "c"]


def test_file_names_in_another_encoding_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, TAGS)
    name = b"K\xf6ter"
    try:
        os.rename(bytes(root / "images/a.jpg"), bytes(root / "images") + b"/" + name + b".jpg")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    status, text = prepare(capsys, root)
    assert status == 1 and "its letters are not in UTF-8. Rename the file" in text
    assert "K_ter" in find_images([str(root / "images")])
