"""A folder of one's own images: accepted layouts, lists made up if missing, and errors for damaged folders."""

from __future__ import annotations

import pickle
import unicodedata
from pathlib import Path

import pytest
from layouts import mask, write
from PIL import Image

from misc.files.images import read_image
from voc12.catalog import Catalog, open_catalog
from voc12.lists import NoSuchList
from voc12.tags import DataError


def picture(path: Path, size: tuple[int, int] = (6, 4), value: int = 90) -> None:
    """An image of ``size`` (width, height) in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 10, 200)).save(path)


def opened(root: Path) -> Catalog:
    return open_catalog("folder", root)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Three tagged images and one without tags; classes in an order of their own; no masks, no lists."""
    for name in ("a.jpg", "my dog 1.PNG", "sub/b.c.bmp", "new.webp"):
        picture(tmp_path / "images" / name)
    write(tmp_path / "labels.csv", "file,classes\nmy dog 1.PNG,dog\na,cat;dog\nsub/b.c.bmp,\n")
    write(tmp_path / "classes.txt", "dog\ncat\n")
    return tmp_path


def test_images_tags_and_the_lists_that_are_made_up(own: Path) -> None:
    data = opened(own)
    assert data.classes == ("dog", "cat") and data.tag_source == "labels.csv"
    assert data.ids("train") == ["my dog 1", "a", "sub/b.c"] and data.ids("val") == ["new"]
    assert data.ids("all") == ["my dog 1", "a", "sub/b.c", "new"]
    assert data.image_path("sub/b.c") == own / "images" / "sub" / "b.c.bmp"
    assert [data.tags(i).tolist() for i in data.ids("train")] == [[1, 0], [1, 1], [0, 0]]
    assert data.mask_path("a") is None and not data.has_list("test")
    assert any("every image that has tags is trained on" in text for text in data.check("train"))
    assert data.check("val", need_tags=False) == [
        "splits/ has no train.txt and no val.txt: the images without tags are predicted (all, where all have tags)."
    ]
    with pytest.raises(DataError, match="new: .*labels.csv has no line for it"):
        data.check("val")


def test_where_all_images_have_tags_it_is_said_that_val_was_trained_on(own: Path) -> None:
    (own / "images" / "new.webp").unlink()
    data = opened(own)
    assert data.ids("val") == data.ids("train")
    assert any("They are the training images themselves" in text for text in data.check("val", need_tags=False))


def test_lists_name_images_as_people_write_them(own: Path) -> None:
    write(own / "splits" / "train.txt", "\ufeffimages/my dog 1.PNG\r\nsub\\b.c\r\n")
    write(own / "mine.txt", "./a.jpg\nnew\n")
    data = opened(own)
    assert data.ids("train") == ["my dog 1", "sub/b.c"] and data.ids(str(own / "mine.txt")) == ["a", "new"]
    with pytest.raises(NoSuchList, match=r"no list 'val' in .*splits \(there: train\)"):
        data.ids("val")
    assert not data.has_list("val") and not data.has_list(str(own / "gone.txt"))


@pytest.mark.parametrize("text, told", [("", "is empty"), ("a\na.jpg\n", "names images twice: a"),
                                        ("../a.jpg\n", "not allowed"), ("/a.jpg\n", "not allowed")])  # fmt: skip
def test_a_damaged_list_is_an_error_not_a_missing_list(text: str, told: str, own: Path) -> None:
    write(own / "splits" / "train_aug.txt", text)
    data = opened(own)
    with pytest.raises(DataError, match=told):
        data.has_list("train_aug")
    with pytest.raises(DataError, match=told):
        data.default_train_list()


def test_images_need_no_folder_of_their_own_if_the_table_names_them(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "2024" / "b.tif")
    picture(tmp_path / "2024" / "not mine.tif")
    write(tmp_path / "labels.csv", "file,cup\n2024/b.tif,1\na.jpg,0\n")
    data = opened(tmp_path)
    assert data.images == {"2024/b": "2024/b.tif", "a": "a.jpg"} and data.classes == ("cup",)
    assert any("There is no classes.txt: mask value n is the n-th of cup" in text for text in data.check("train"))


def test_images_beside_the_image_folder_can_be_named_too(own: Path) -> None:
    picture(own / "extra" / "x.jpg")
    with (own / "labels.csv").open("a") as file:
        file.write("extra/x.jpg,cat\n")
    assert opened(own).image_path("extra/x") == own / "extra" / "x.jpg"


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", ".gif", ".ppm", ".tga", ".jp2", ".JPEG"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    picture(tmp_path / "images" / f"a{suffix}", (30, 20))
    write(tmp_path / "labels.csv", f"file,cup\na{suffix},1\n")
    data = opened(tmp_path)
    assert data.ids("train") == ["a"] and read_image(data.image_path("a")).shape == (20, 30, 3)


@pytest.mark.parametrize("on_disk, in_table", [("NFD", "NFC"), ("NFC", "NFD")])
def test_letters_with_accents_match_in_whatever_form_they_are_stored(
    on_disk: str, in_table: str, tmp_path: Path
) -> None:
    picture(tmp_path / "images" / unicodedata.normalize(on_disk, "Größé 日本.jpg"))
    mask(tmp_path / "masks" / unicodedata.normalize(on_disk, "Größé 日本.png"), 1)
    write(tmp_path / "labels.csv", unicodedata.normalize(in_table, "Größé 日本.jpg,cup\n"))
    data = opened(tmp_path)
    (image_id,) = data.ids("train")
    assert data.image_path(image_id).is_file() and data.mask_path(image_id) is not None
    assert data.check("train", need_masks=True)


def test_two_files_of_one_name(own: Path) -> None:
    picture(own / "images" / "a.png")
    with pytest.raises(DataError, match=r"1 images .*images/a.jpg and images/a.png.*Remove or rename"):
        opened(own).check("train")
    write(own / "labels.csv", "file,classes\na.png,cat\n")  # the table decides
    assert opened(own).image_path("a").name == "a.png"


def test_a_listed_image_that_is_not_there(own: Path) -> None:
    with (own / "labels.csv").open("a") as file:
        file.write("gone.jpg,cat\n")
    with pytest.raises(DataError, match=r"1 have no image file \(gone\)\. Add them, or shorten the list"):
        opened(own).check("train")


def test_hidden_files_links_in_circles_and_other_files_do_no_harm(own: Path) -> None:
    write(own / "images" / "._a.jpg", "left by a file manager")
    write(own / "images" / "notes.txt", "no image")
    write(own / "images" / ".cache" / "z.jpg", "")
    (own / "images" / "sub" / "up").symlink_to(own / "images")
    assert set(opened(own).images) == {"a", "my dog 1", "sub/b.c", "new"}


def test_masks(own: Path) -> None:
    mask(own / "masks" / "sub" / "b.c.png", 2, 255)
    data = opened(own)
    assert data.mask_path("sub/b.c") == own / "masks" / "sub" / "b.c.png"
    (own / "labels.csv").unlink()
    data = opened(own)
    assert data.tag_source == "masks" and data.ids("train") == ["sub/b.c"]
    assert data.tags("sub/b.c").tolist() == [0, 1]


def test_what_is_needed_is_reported(own: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        opened(own / "nowhere")
    (own / "labels.csv").unlink()
    with pytest.raises(DataError, match="has no labels.csv: write one with a line 'file,class1;class2'"):
        opened(own)


def test_goes_to_worker_processes(own: Path) -> None:
    data = opened(own)
    data.check("train")
    assert pickle.loads(pickle.dumps(data)).fingerprint("all") == data.fingerprint("all")
