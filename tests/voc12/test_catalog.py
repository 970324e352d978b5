"""The data set as the steps see it: files, tags, masks, lists, and errors for damaged data."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from layouts import write
from PIL import Image

from misc.files.ids import id_of_file
from voc12.catalog import open_catalog
from voc12.data_sets.voc12 import VOC_CLASSES
from voc12.lists import pick_evenly
from voc12.table import read_table
from voc12.tags import DataError, encode_tags, names_from_xml


def xml(*names: str) -> str:
    things = "".join(f"<object><name>{name}</name><difficult>1</difficult></object>" for name in names)
    return f"<annotation><filename>x.jpg</filename>{things}</annotation>"


def picture(root: Path, image_id: str, value: int = 0, suffix: str = ".jpg") -> None:
    (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(root / "JPEGImages" / f"{image_id}{suffix}")


def mask(root: Path, image_id: str, *values: int, folder: str = "SegmentationClass") -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((4, 6), np.uint8)
    pixels.flat[: len(values)] = values
    Image.fromarray(pixels).save(root / folder / f"{image_id}.png")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three images with annotations, a list, two masks."""
    for image_id, names in (("2007_000001", ["dog", "person", "dog"]), ("2007_000002", ["tvmonitor"]), ("b.c", [])):
        picture(tmp_path, image_id)
        write(tmp_path / "Annotations" / f"{image_id}.xml", xml(*names))
    write(tmp_path / "ImageSets/Segmentation/train.txt", "2007_000001\n2007_000002\nb.c")
    write(tmp_path / "ImageSets/Segmentation/trainaug.txt", "/JPEGImages/2007_000002.jpg /Aug/2007_000002.png\n")
    mask(tmp_path, "2007_000001", 15, 12)
    mask(tmp_path, "2007_000001", 1, folder="SegmentationClassAug")
    mask(tmp_path, "2007_000002", 20, folder="SegmentationClassAug")
    return tmp_path


def test_voc_layout(voc: Path) -> None:
    data = open_catalog("voc12", voc)
    assert data.classes == VOC_CLASSES and data.num_classes == 20 and data.tag_source == "Annotations"
    assert data.ids("train") == ["2007_000001", "2007_000002", "b.c"]
    assert data.ids("train_aug") == data.ids("trainaug") == ["2007_000002"]
    assert data.image_path("b.c") == voc / "JPEGImages" / "b.c.jpg"
    assert data.mask_path("2007_000001") == voc / "SegmentationClass" / "2007_000001.png"
    assert data.mask_path("2007_000002") == voc / "SegmentationClassAug" / "2007_000002.png"
    assert data.mask_path("b.c") is None
    tags = data.tags("2007_000001")
    assert tags.dtype == np.float32 and tags.shape == (20,)
    assert [VOC_CLASSES[c] for c in np.flatnonzero(tags)] == ["dog", "person"]


def test_list_by_path(voc: Path, tmp_path: Path) -> None:
    write(tmp_path / "mine.txt", "b.c\n2007_000001\n")
    assert open_catalog("voc12", voc).ids(str(tmp_path / "mine.txt")) == ["b.c", "2007_000001"]


@pytest.mark.parametrize("above", [".", "VOCdevkit/VOC2012", "VOC2012"])
def test_root_may_be_a_parent(tmp_path: Path, above: str) -> None:
    picture(tmp_path / above, "a")
    assert open_catalog("voc12", tmp_path).image_path("a") == tmp_path / above / "JPEGImages/a.jpg"


def test_wrong_root_tells_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="VOCdevkit") as error:
        open_catalog("voc12", tmp_path / "nowhere")
    assert "does not exist" in str(error.value) and "JPEGImages" in str(error.value)


def test_unknown_data_set_and_list_tell_those_there_are(voc: Path) -> None:
    with pytest.raises(DataError, match="voc12, sample"):
        open_catalog("voc2012", voc)
    with pytest.raises(DataError, match=r"there: train, trainaug"):
        open_catalog("voc12", voc).ids("test")


def test_own_classes_with_table(tmp_path: Path) -> None:
    for image_id in ("7", "8", "9"):
        picture(tmp_path, image_id, suffix=".PNG" if image_id == "9" else ".jpg")
    write(tmp_path / "classes.txt", "cup\nred box\nhead\n\n")
    write(tmp_path / "labels.csv", 'file,classes\n7.jpg,"red box;cup"\nJPEGImages/8.jpg,\n9,head\n')
    write(tmp_path / "ImageSets/Segmentation/train.txt", "7\n8\n9\n")
    data = open_catalog("voc12", tmp_path)
    assert data.tag_source == "labels.csv"
    assert [data.tags(i).tolist() for i in ("7", "8", "9")] == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert data.image_path("9").name == "9.PNG"
    warnings = data.check("train")
    assert len(warnings) == 1 and "taken as background only" in warnings[0] and "(8)" in warnings[0]


def test_tags_from_masks_as_last_resort(tmp_path: Path) -> None:
    picture(tmp_path, "a")
    mask(tmp_path, "a", 0, 3, 255, 1)
    write(tmp_path / "ImageSets/Segmentation/train.txt", "a")
    data = open_catalog("voc12", tmp_path)
    assert data.tag_source == "masks" and np.flatnonzero(data.tags("a")).tolist() == [0, 2]
    mask(tmp_path, "a", 21)
    with pytest.raises(DataError, match="value 21, but there are 20"):
        open_catalog("voc12", tmp_path).check("train")


def test_no_tags_at_all(tmp_path: Path) -> None:
    picture(tmp_path, "a")
    write(tmp_path / "ImageSets/Segmentation/test.txt", "a")
    data = open_catalog("voc12", tmp_path)
    with pytest.raises(DataError, match="neither Annotations nor labels.csv nor a mask"):
        data.check("test")
    assert data.check("test", need_tags=False) == []
    assert len(data.fingerprint("test")) == 64


def test_class_names_that_fit_nothing(voc: Path) -> None:
    write(voc / "classes.txt", "Hund\nKatze\n")
    with pytest.raises(DataError, match="no image has a tag") as error:
        open_catalog("voc12", voc).check("train")
    assert "Hund" in str(error.value)


def test_names_of_parts_do_not_count() -> None:
    text = "<annotation><object><name>dog</name><part><name>head</name></part></object></annotation>"
    assert encode_tags(names_from_xml(text), ["head", "dog"]).tolist() == [0, 1]


def test_names_that_are_no_class_are_reported(voc: Path) -> None:
    write(voc / "Annotations/b.c.xml", xml("dog", "Dog", "Dog"))
    assert open_catalog("voc12", voc).check("train") == ["Objects whose names are no class are passed over: 'Dog' (2)."]


def test_all_problems_come_in_one_report(voc: Path) -> None:
    more = [f"gone{i:02}" for i in range(13)]
    write(voc / "ImageSets/Segmentation/bad.txt", "\n".join(["2007_000001", "2007_000002", "b.c", *more]))
    write(voc / "Annotations/2007_000001.xml", '<!DOCTYPE a [<!ENTITY b "c">]>' + xml("dog"))
    write(voc / "Annotations/2007_000002.xml", "<annotation><object>")
    with pytest.raises(DataError) as error:
        open_catalog("voc12", voc).check("bad", need_masks=True)
    text = str(error.value)
    assert "13 have no image file (gone00, " in text and "gone09, ... 3 more" in text and "gone10" not in text
    assert "14 have no mask (b.c, gone00" in text
    assert "15 have no readable tags" in text
    assert "2007_000001.xml holds a document type" in text and "2007_000002.xml is no well-formed XML" in text


def test_saliency_must_be_there_for_every_image(voc: Path, tmp_path: Path) -> None:
    catalog, folder = open_catalog("voc12", voc), tmp_path / "saliency"
    ids = catalog.ids("train")
    with pytest.raises(DataError, match=f"{len(ids)} have no saliency map ID.png in .*saliency .*--saliency DIR"):
        catalog.check("train", saliency=folder)
    folder.mkdir()
    for image_id in ids[1:]:
        (folder / f"{image_id}.png").write_bytes(b"")
    with pytest.raises(DataError, match=rf"1 have no saliency map ID.png in .* \({ids[0]}\)"):
        catalog.check("train", saliency=folder)
    (folder / f"{ids[0]}.png").write_bytes(b"")
    catalog.check("train", saliency=folder)


def test_document_type_without_entities_is_refused() -> None:
    with pytest.raises(DataError, match="document type"):
        names_from_xml('<!DOCTYPE annotation SYSTEM "http://example.org/x.dtd">' + xml("dog"))


def test_doctype_hidden_in_another_encoding_is_refused(voc: Path) -> None:
    hidden = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "c">]>' + xml("dog")
    (voc / "Annotations/b.c.xml").write_bytes(hidden.encode("utf-16"))
    with pytest.raises(DataError, match="holds a document type"):
        open_catalog("voc12", voc).tags("b.c")


def test_a_damaged_list_is_not_taken_for_a_missing_one(voc: Path) -> None:
    data = open_catalog("voc12", voc)
    assert not data.has_list("test") and not data.has_list(str(voc / "gone.txt"))
    write(voc / "ImageSets/Segmentation/trainaug.txt", "b.c\nb.c\n")
    for ask in (data.default_train_list, lambda: data.has_list("train_aug")):
        with pytest.raises(DataError, match="names images twice: b.c"):
            ask()


def test_a_table_goes_before_annotations(voc: Path) -> None:
    write(voc / "labels.csv", "file,classes\n2007_000001,cow\n")
    data = open_catalog("voc12", voc)
    assert data.tag_source == "labels.csv" and np.flatnonzero(data.tags("2007_000001")).tolist() == [9]


def test_equal_distances() -> None:
    assert pick_evenly("abcdefghi", 3) == ["a", "e", "i"]
    assert pick_evenly("ab", 5) == ["a", "b"] and pick_evenly("", 3) == []


def test_image_twice_on_a_list_and_empty_list(voc: Path) -> None:
    write(voc / "ImageSets/Segmentation/twice.txt", "b.c\n2007_000001\nb.c.jpg\n")
    write(voc / "ImageSets/Segmentation/empty.txt", "\n")
    data = open_catalog("voc12", voc)
    with pytest.raises(DataError, match=r"twice\.txt.*b\.c"):
        data.check("twice")
    with pytest.raises(DataError, match="empty"):
        data.check("empty")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file,classes\na.jpg,cup;bottle\n", "line 2: 'bottle' is no class"),
        ("a.jpg,cup\na,box\n", "line 2: image 'a' comes twice"),
        ("a.jpg,cup,box\n", "line 1 has 3 columns"),
    ],
)
def test_damaged_table(tmp_path: Path, text: str, told: str) -> None:
    write(tmp_path / "labels.csv", text)
    with pytest.raises(DataError, match=told):
        read_table(tmp_path / "labels.csv", ["cup", "box"], id_of_file)


def test_image_missing_in_table(tmp_path: Path) -> None:
    for image_id in "ab":
        picture(tmp_path, image_id)
    write(tmp_path / "labels.csv", "file,classes\na,dog\n")
    write(tmp_path / "ImageSets/Segmentation/train.txt", "a\nb\n")
    with pytest.raises(DataError, match="b: .*labels.csv has no line for it"):
        open_catalog("voc12", tmp_path).check("train")


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "empty"), ("cup\n\nbox", "line 2"), ("cup\nbox\ncup", "line 3"), ("background\ncup", "background"),
     ("\n".join(map(str, range(255))), "at most 254")],
)  # fmt: skip
def test_damaged_class_list(voc: Path, text: str, told: str) -> None:
    write(voc / "classes.txt", text)
    with pytest.raises(DataError, match=told):
        open_catalog("voc12", voc)


def test_fingerprint_knows_ids_order_and_tags(voc: Path) -> None:
    first = open_catalog("voc12", voc).fingerprint("train")
    assert open_catalog("voc12", voc).fingerprint("train") == first
    assert open_catalog("voc12", voc).fingerprint("trainaug") != first
    write(voc / "ImageSets/Segmentation/turned.txt", "2007_000002\n2007_000001\nb.c")
    assert open_catalog("voc12", voc).fingerprint("turned") != first
    write(voc / "Annotations/b.c.xml", xml("cow"))
    assert open_catalog("voc12", voc).fingerprint("train") != first


def test_one_image_in_two_formats(voc: Path) -> None:
    for number in range(12):
        for suffix in (".jpg", ".png") if number % 2 else (".webp", ".jpg"):
            picture(voc, f"x{number}", suffix=suffix)
    write(voc / "JPEGImages/._b.c.jpg", "left by a file manager")
    data = open_catalog("voc12", voc)
    assert all(data.image_path(f"x{number}").suffix == ".jpg" for number in range(12))
    assert "._b.c" not in data.images
    with pytest.raises(DataError, match="no image 'x'"):
        data.image_path("x")


def test_goes_to_worker_processes(voc: Path) -> None:
    data = open_catalog("voc12", voc)
    data.check("train")
    again = pickle.loads(pickle.dumps(data))
    assert again.fingerprint("train") == data.fingerprint("train")
