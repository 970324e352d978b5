"""CUB-200-2011's layout: reading it, and the generated set that has it."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from misc.files.images import read_image
from voc12.catalog import open_catalog
from voc12.generated.sets import generate
from voc12.tags import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cub") / "set"
    generate(root, images=7, val=4, classes=3, seed=2, long_side=(64, 90), layout="cub")
    return root


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(made, tmp_path / "own")


def test_the_generated_set_is_read_as_cub(made: Path) -> None:
    catalog = open_catalog("cub200", made)
    assert catalog.aim == "boxes" and catalog.num_classes == 3 and not catalog.masks
    train, test = catalog.ids("train"), catalog.ids("test")
    assert (len(train), len(test)) == (7, 4) and not set(train) & set(test) and catalog.ids("val") == test
    assert not catalog.check("test", need_boxes=True)
    for image_id in train + test:
        tags, (box,) = catalog.tags(image_id), catalog.boxes(image_id)
        assert tags.sum() == 1
        assert catalog.image_path(image_id).parent.name == catalog.classes[int(tags.argmax())]
        region = catalog.region(image_id)
        assert region is not None and region.shape == read_image(catalog.image_path(image_id)).shape[:2]
        x, y, width, height = cv2.boundingRect(region)
        assert box.tolist() == [x, y, x + width, y + height]
        assert set(np.unique(region)) == {0, 1}


def test_every_class_has_its_turn(made: Path) -> None:
    catalog = open_catalog("cub200", made)
    assert np.sum([catalog.tags(i) for i in catalog.ids("train")], axis=0).min() >= 2


def test_the_layouts_are_two_sets_that_do_not_mix(made: Path) -> None:
    generate(made, images=7, val=4, classes=3, seed=2, long_side=(64, 90), layout="cub")  # left as it is
    with pytest.raises(FileExistsError, match="layout is cub, asked for None"):
        generate(made, images=7, val=4, classes=3, seed=2, long_side=(64, 90))


def test_the_archive_may_lie_in_a_folder_of_its_own_name(own: Path, tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    shutil.move(own, tmp_path / "parent" / "CUB_200_2011")
    assert open_catalog("cub200", tmp_path / "parent").ids("train")


def test_a_set_without_segmentations_has_no_regions(own: Path) -> None:
    shutil.move(own / "segmentations", own.parent / "segmentations")
    catalog = open_catalog("cub200", own)
    assert catalog.region(catalog.ids("test")[0]) is not None  # beside it, as the archives leave them
    shutil.rmtree(own.parent / "segmentations")
    catalog = open_catalog("cub200", own)
    assert catalog.region(catalog.ids("test")[0]) is None


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("bounding_boxes.txt", "\n2 ", "\n99 ", "has no line for image 2"),
        ("bounding_boxes.txt", "\n2 ", "\n2 many ", "no numbers: 'many"),
        ("train_test_split.txt", "\n2 1", "\n2", "line 2: '2' is not an id of its own and 1"),
        ("train_test_split.txt", "\n2 1", "\n1 1", "line 2: '1 1' is not an id of its own"),
        ("image_class_labels.txt", "\n3 ", "\n3 7", "a class that classes.txt lacks"),
    ],
)
def test_lists_that_do_not_fit_are_named(own: Path, name: str, old: str, new: str, message: str) -> None:
    path = own / name
    text = path.read_text()
    if "many" in new:
        text = "\n".join("2 many a few" + " x" if line.startswith("2 ") else line for line in text.splitlines())
    else:
        text = text.replace(old, new, 1)
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        open_catalog("cub200", own)
    assert name in str(error.value)


def test_a_missing_list_a_missing_image_and_an_unknown_split_are_named(own: Path) -> None:
    catalog = open_catalog("cub200", own)
    with pytest.raises(DataError, match="no list 'dev'.*CUB has train and test"):
        catalog.ids("dev")
    first = catalog.ids("test")[0]
    catalog.image_path(first).unlink()
    with pytest.raises(DataError, match=rf"of 4 images\n  1 have no image file \({first}\)"):
        open_catalog("cub200", own).check("test")
    (own / "images.txt").write_text((own / "images.txt").read_text().replace(first, f"../../{first}"))
    with pytest.raises(ValueError, match=r"Image id '.*\.\./\.\./.*' is not allowed"):
        open_catalog("cub200", own)
    (own / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt does not exist: give the folder of CUB"):
        open_catalog("cub200", own)


def test_data_sets_of_masks_have_no_boxes(tmp_path: Path) -> None:
    generate(tmp_path / "voc", images=2, val=1, classes=2, long_side=(64, 70))
    catalog = open_catalog("voc12", tmp_path / "voc")
    assert catalog.aim == "masks" and catalog.region(catalog.ids("val")[0]) is None
    with pytest.raises(DataError, match="voc12 has no boxes.*as cub200"):
        catalog.check("val", need_boxes=True)
