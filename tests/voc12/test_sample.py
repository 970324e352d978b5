"""The generated sample set: deterministic, in VOC's layout, consistent, and what section 9 of the design promises."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from misc.image.draw import palette
from voc12.generated.__main__ import main
from voc12.generated.draw import draw_picture, draw_saliency
from voc12.generated.marks import MARKS, class_names
from voc12.generated.sets import generate

ROOM = Path(__file__).resolve().parents[2]


def digests(root: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its bytes."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read_list(root: Path, split: str) -> list[str]:
    return (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample") / "set"
    generate(root, images=12, val=6, classes=3, seed=5)
    return root


def is_empty(root: Path, name: str) -> bool:
    """Whether a picture shows no object."""
    return not np.array(Image.open(root / "SegmentationClass" / f"{name}.png")).any()


@pytest.mark.slow
def test_same_parameters_give_the_same_bytes_in_another_process(sample: Path, tmp_path: Path) -> None:
    options = "--images 12 --val 6 --classes 3 --seed 5".split()
    command = [sys.executable, "-m", "voc12.generated", str(tmp_path / "again"), *options]
    subprocess.run(command, cwd=ROOM, check=True)
    assert digests(tmp_path / "again") == digests(sample)


def test_another_seed_gives_other_pictures() -> None:
    assert draw_picture(0, "train", 0).rgb.tobytes() != draw_picture(1, "train", 0).rgb.tobytes()
    assert draw_picture(0, "train", 0).rgb.tobytes() != draw_picture(0, "val", 0).rgb.tobytes()


@pytest.mark.slow
def test_smaller_set_is_a_prefix(sample: Path, tmp_path: Path) -> None:
    generate(tmp_path / "small", images=4, val=2, classes=3, seed=5)
    whole, small = digests(sample), digests(tmp_path / "small")
    shared = [name for name in small if name.split("/")[0] not in ("ImageSets", "sample.json", ".lock")]
    assert len(shared) == 6 * 5 + 1  # five files an image, and classes.txt
    assert all(small[name] == whole[name] for name in shared)
    for split in ("train", "val"):
        ids = read_list(tmp_path / "small", split)
        assert ids == read_list(sample, split)[: len(ids)]


def test_lists_and_files(sample: Path) -> None:
    train, val = read_list(sample, "train"), read_list(sample, "val")
    assert (len(train), len(val)) == (12, 6) and not set(train) & set(val)
    assert read_list(sample, "trainval") == train + val
    assert train[0] == "2025_000001"
    assert (sample / "classes.txt").read_text().splitlines() == list(class_names(3))
    kinds = {"JPEGImages": ".jpg", "Annotations": ".xml", "Saliency": ".png"}
    kinds |= {"SegmentationClass": ".png", "SegmentationObject": ".png"}
    for folder, suffix in kinds.items():
        assert {p.name for p in (sample / folder).iterdir()} == {i + suffix for i in train + val}


def test_masks_are_palette_images_with_an_ignore_rim(sample: Path) -> None:
    for name in read_list(sample, "trainval"):
        image = Image.open(sample / "SegmentationClass" / f"{name}.png")
        things = np.array(Image.open(sample / "SegmentationObject" / f"{name}.png"))
        mask = np.array(image)
        assert image.mode == "P" and image.size == Image.open(sample / "JPEGImages" / f"{name}.jpg").size
        assert image.getpalette() == palette().ravel().tolist()
        assert set(np.unique(mask)) <= {0, 1, 2, 3, 255}
        assert np.array_equal(things == 255, mask == 255) and np.array_equal(things == 0, mask == 0)
        # No two regions touch: between any two neighbours of different value lies the rim.
        for values in (mask, things):
            for a, b in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1])):
                assert ((a == b) | (a == 255) | (b == 255)).all()
        assert (mask == 255).mean() < 0.25 and (mask == 255).any() == mask.any()


def test_annotations_agree_with_the_masks(sample: Path) -> None:
    names = list(class_names(3))
    for name in read_list(sample, "trainval"):
        root = ET.parse(sample / "Annotations" / f"{name}.xml").getroot()
        mask = np.array(Image.open(sample / "SegmentationClass" / f"{name}.png"))
        things = np.array(Image.open(sample / "SegmentationObject" / f"{name}.png"))
        size = tuple(int(root.findtext(f"size/{key}")) for key in ("height", "width", "depth"))
        assert size == (*mask.shape, 3) and root.findtext("filename") == f"{name}.jpg"
        assert root.findtext("segmented") == "1"
        told = [names.index(thing.findtext("name")) + 1 for thing in root.iter("object")]
        assert set(told) == set(np.unique(mask)) - {0, 255}
        assert set(range(1, len(told) + 1)) == set(np.unique(things)) - {0, 255}
        for number, thing in enumerate(root.iter("object"), 1):
            y, x = np.nonzero(things == number)
            assert set(mask[y, x]) == {told[number - 1]}
            x0, y0, x1, y1 = (int(thing.findtext(f"bndbox/{key}")) - 1 for key in ("xmin", "ymin", "xmax", "ymax"))
            assert 0 <= x0 <= x.min() and x.max() <= x1 < mask.shape[1]
            assert 0 <= y0 <= y.min() and y.max() <= y1 < mask.shape[0]
            edges = (things[y0 : y1 + 1, x0], things[y0 : y1 + 1, x1], things[y0, x0 : x1 + 1], things[y1, x0 : x1 + 1])
            assert all(np.isin(edge, (number, 255)).any() for edge in edges)  # the box is tight round object and rim
            assert {thing.findtext("truncated"), thing.findtext("difficult")} <= {"0", "1"}


def test_saliency_is_one_noisy_channel_that_follows_the_objects(sample: Path) -> None:
    scores = []
    for name in read_list(sample, "trainval"):
        image = Image.open(sample / "Saliency" / f"{name}.png")
        mask = np.array(Image.open(sample / "SegmentationClass" / f"{name}.png"))
        assert image.mode == "L" and image.size == mask.shape[::-1]
        if is_empty(sample, name):
            continue
        found, true = np.array(image) > 127, (mask > 0) & (mask < 255)
        scores.append((found & true).sum() / (found | true)[mask < 255].sum())
    assert 0.6 < np.mean(scores) < 0.98


@pytest.mark.slow
def test_pictures_are_what_the_design_says() -> None:
    pictures = [draw_picture(2, "train", index) for index in range(40)]
    assert all(p.rgb.shape[0] != p.rgb.shape[1] for p in pictures)
    assert {p.rgb.shape[0] > p.rgb.shape[1] for p in pictures} == {True, False}
    assert all(100 <= max(p.rgb.shape) <= 160 for p in pictures) and len({p.rgb.shape for p in pictures}) > 20
    assert {len(p.labels) for p in pictures} == {0, 1, 2, 3}
    shares, offsets = [], []
    for picture in pictures:
        for number in range(1, len(picture.labels) + 1):
            body, mark = picture.instances == number, picture.marks == number
            assert not (mark & ~body).any()
            assert mark.sum() > 0.9 * 90  # at least about 11 pixels across although something may be in front
            shares.append(mark.sum() / body.sum())
            centre = np.argwhere(body).mean(axis=0)
            offsets.append(np.linalg.norm(np.argwhere(mark).mean(axis=0) - centre) / np.sqrt(body.sum()))
            assert 0.15 < max(np.ptp(np.argwhere(body), axis=0)) / max(body.shape) < 0.85
    assert 0.12 < np.median(shares) < 0.27 and max(shares) < 0.54  # of what is seen of the body: at least half of it
    assert np.median(offsets) > 0.1  # not centred


@pytest.mark.slow
def test_near_objects_and_pictures_without_any() -> None:
    classes = 3
    pictures = [draw_picture(0, "val", index, classes, (64, 80)) for index in range(60)]
    empty = [index for index, p in enumerate(pictures) if not p.labels]
    assert 1 <= len(empty) <= 12 and empty[0] >= 2 * classes  # a tenth; small sets have none
    for index in empty:
        assert not any(plane.any() for plane in (*pictures[index].masks(), pictures[index].marks))
        assert len(draw_picture(0, "val", index, classes, (64, 80), single=True).labels) == 1
    single = [p.instances > 0 for p in pictures if len(p.labels) == 1]
    near = [body for body in single if max(np.ptp(np.argwhere(body), axis=0)) > 0.6 * max(body.shape)]
    assert len(near) > 0.2 * len(pictures)


@pytest.mark.slow
def test_mark_is_seen_in_the_picture() -> None:
    """The pixels of a mark stand out: their colours spread far more than those of the body around it."""
    for index in range(20):
        picture = draw_picture(3, "val", index, classes=len(MARKS))
        for number in range(1, len(picture.labels) + 1):
            mark = picture.rgb[picture.marks == number].astype(float)
            plain = picture.rgb[(picture.instances == number) & (picture.marks == 0) & ~picture.rim].astype(float)
            assert np.linalg.norm(mark.std(axis=0)) > 1.5 * np.linalg.norm(plain.std(axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 12, len(MARKS)])
def test_classes_are_balanced_in_both_splits(classes: int) -> None:
    for split in ("train", "val"):
        count = 3 * classes
        pictures = [draw_picture(0, split, index, classes, (64, 80)) for index in range(count)]
        seen = Counter(label for p in pictures for label in set(p.labels))
        assert set(seen) == set(range(1, classes + 1)) and min(seen.values()) >= 3
        masks = [set(np.unique(p.masks()[0])) - {0, 255} for p in pictures]
        assert masks == [set(p.labels) for p in pictures]


def test_long_side_is_kept() -> None:
    picture = draw_picture(0, "train", 0, long_side=(300, 300))
    assert max(picture.rgb.shape) == 300 and picture.rim.any()
    assert draw_saliency(0, "train", 0, picture).shape == picture.instances.shape


def test_finished_set_is_left_alone_and_another_one_refused(sample: Path) -> None:
    times = {p: p.stat().st_mtime_ns for p in sample.rglob("*")}
    generate(sample, images=12, val=6, classes=3, seed=5)
    with pytest.raises(FileExistsError, match=r"seed is 5, asked for 6.*another folder"):
        generate(sample, images=12, val=6, classes=3, seed=6)
    assert {p: p.stat().st_mtime_ns for p in sample.rglob("*")} == times


@pytest.mark.slow
def test_interrupted_set_is_done_again(sample: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "JPEGImages" / "2025_000001.jpg").write_bytes(b"half")
    (root / "sample.json.part").write_text((sample / "sample.json").read_text())
    generate(root, images=12, val=6, classes=3, seed=5)
    assert digests(root) == digests(sample)


def test_foreign_folder_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "ImageSets").mkdir()
    with pytest.raises(FileExistsError, match="neither empty nor a sample set"):
        generate(tmp_path, images=1, val=1)
    assert [p.name for p in tmp_path.iterdir()] == ["ImageSets"]


@pytest.mark.parametrize(
    "wrong",
    [{"classes": 0}, {"classes": 99}, {"images": 0}, {"seed": -1}, {"long_side": (20, 40)}, {"long_side": (90, 80)}],
)
def test_impossible_parameters_are_errors_before_any_work(wrong: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(tmp_path / "set", **wrong)
    assert not (tmp_path / "set").exists()


def test_command_line_tells_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", str(tmp_path / "set"), "--classes", "99"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "1 to 14 classes" in capsys.readouterr().err


def test_parameters_are_recorded(sample: Path) -> None:
    record = json.loads((sample / "sample.json").read_text())
    assert record["images"] == 12 and record["classes"] == 3 and record["long_side"] == [100, 160]
