"""predict.py with tags: through the run's refiner, from a table, and with a method that needs no run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from running import digests
from test_clip import whole_clip

import predict
import run_sample
from misc.files.camfiles import read_cam
from misc.files.images import read_mask
from net.seed.clipes import Clipes
from step.lib.tagged_images import read_image_tags, split_tags

CPU = ("--machine.device", "cpu", "--machine.workers", "0")


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pseudo masks of CLIP-ES' sample recipe by a CRF with settings of its own; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ("--aff.walk.crf.iterations", "2", "--aff.walk.threshold", "0.4", "--aff.ignore-below", "0.6")
    assert run_sample.main(["clipes", "--root", str(data), "--out", str(out), *CPU, *flags, "--steps", "1-5"]) == 0
    return out


def call(out: Path, *words: str | Path) -> int:
    return predict.main([*map(str, words), "--out", str(out), *CPU])


def refused(capsys: pytest.CaptureFixture[str], out: Path, *words: str | Path) -> str:
    """The message of a call that must fail before any mask is made."""
    capsys.readouterr()
    assert call(out, *words) == 2
    assert not (out / "masks").exists()
    return capsys.readouterr().err


def table_of(run: Path, data: Path) -> str:
    """labels.csv of the run's training images."""
    classes = (data / "classes.txt").read_text().split()
    rows = [
        f"{path.stem}.jpg,{';'.join(classes[key] for key in read_cam(path).keys)}\n"
        for path in sorted((run / "cam").glob("*.npz"))
    ]
    return "file,classes\n" + "".join(rows)


@pytest.mark.slow
def test_the_runs_refiner_without_training_makes_the_runs_masks(
    made: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(table_of(made, data), encoding="utf-8")
    assert call(tmp_path / "out", data / "JPEGImages" / "2025_*.jpg", "--run", made, "--tags-from", table) == 0
    assert "masks made by the run's refiner crf; 255 where its largest score is below 0.6" in capsys.readouterr().out
    masks = digests(tmp_path / "out" / "masks", "*")
    assert len(masks) == 8 and masks == {name: digests(made / "label", name)[name] for name in masks}
    assert any((read_mask(path) == 255).any() for path in (tmp_path / "out" / "masks").iterdir())
    record = json.loads((tmp_path / "out" / "predict.json").read_text())["settings"]
    assert record["tags"].startswith("labels.csv, ") and record["refiner settings"]["crf.iterations"] == 2
    # other tags are other results
    table.write_text(table_of(made, data).replace("2025_000001.jpg,", "2025_000001.jpg, "), encoding="utf-8")
    assert call(tmp_path / "out", data / "JPEGImages" / "2025_*.jpg", "--run", made, "--tags-from", table) == 2
    assert "tags: 'labels.csv" in capsys.readouterr().err
    # every pixel gets a class where that is asked for
    words = ("--run", made, "--tags", "disc", "--ignore-below", "0")
    classes = (data / "classes.txt").read_text().split()
    words = (*words[:3], classes[0], *words[4:])
    assert call(tmp_path / "all", data / "JPEGImages" / "2025_000001.jpg", *words) == 0
    assert set(np.unique(read_mask(tmp_path / "all" / "masks" / "2025_000001.png"))) <= {0, 1}
    assert call(tmp_path / "crf", data / "JPEGImages" / "2025_000001.jpg", *words, "--refine", "crf") == 0
    assert "no refiner was used" in capsys.readouterr().out


def test_a_run_of_other_settings_says_so(made: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    old = tmp_path / "old"
    shutil.copytree(made, old)
    record = json.loads((old / "run.json").read_text())
    record["config"]["aff.walk.gone"] = 1
    (old / "run.json").write_text(json.dumps(record))
    tag = (data / "classes.txt").read_text().split()[0]
    told = refused(capsys, tmp_path / "out", data / "JPEGImages" / "2025_000001.jpg", "--run", old, "--tags", tag)
    assert "run.json describes the refiner crf in another version's settings" in told and "--refine crf" in told


def photographs(data: Path, folder: Path) -> Path:
    """A folder with images in a sub-folder, and a table: two classes, one image without an object."""
    (folder / "images" / "sub").mkdir(parents=True)
    for number, name in ((1, "a b.jpg"), (2, "sub/Ä.jpg"), (3, "sub/c.jpg")):
        shutil.copy(data / "JPEGImages" / f"2025_00000{number}.jpg", folder / "images" / name)
    (folder / "labels.csv").write_text("file,classes\na b.jpg,Tür;tree house\nsub/Ä.jpg,tree house\nc.jpg,\n")
    (folder / "classes.txt").write_text("tree house\nTür\n")
    (folder / "texts.csv").write_text("Tür,door\n")
    return folder


@pytest.mark.slow
def test_masks_without_any_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip")
    folder = photographs(data, tmp_path / "photos")
    clip = tmp_path / "clip.pt"
    torch.save(whole_clip(Clipes.recipes["sample"].cam.network.clip), clip)
    words = (folder / "images", "--method", "clipes", "--preset", "sample", "--weights", clip)
    assert call(tmp_path / "out", *words, "--tags-from", folder / "labels.csv") == 0
    told = capsys.readouterr().out
    assert "2 classes and 23 background words encoded" in told and "mean nothing" not in told
    found = tmp_path / "out" / "masks"
    masks = {path.relative_to(found).as_posix(): read_mask(path) for path in found.rglob("*.png")}
    assert set(masks) == {"a b.png", "sub/Ä.png", "sub/c.png"} and not masks["sub/c.png"].any()
    assert not (masks["sub/Ä.png"] > 1).any() and all((mask < 255).all() for mask in masks.values())
    record = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert list(record["mask values"].values()) == ["background", "tree house", "Tür"]
    assert '"classes": ["tree house", "door"]' in record["settings"]["model"]
    assert (tmp_path / "out" / "maps" / "a b_Tür.jpg").exists()
    # the same by hand, all classes in all images; the order of the names is that of the mask values
    assert call(tmp_path / "all", *words, "--tags", "Tür; tree house, old") == 0
    record = json.loads((tmp_path / "all" / "predict.json").read_text())
    assert list(record["mask values"].values()) == ["background", "Tür", "tree house, old"]
    # a second call has nothing to do
    assert call(tmp_path / "out", *words, "--tags-from", folder / "labels.csv") == 0
    assert "3 of 3 images are done already" in capsys.readouterr().out


def test_random_weights_are_said_to_mean_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image = data / "JPEGImages" / "2025_000001.jpg"
    assert call(tmp_path / "out", image, "--method", "clipes", "--preset", "sample", "--tags", "dog") == 0
    assert "these results mean nothing" in capsys.readouterr().out


def test_wrong_calls_name_the_remedy(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = data / "JPEGImages" / "2025_000001.jpg", tmp_path / "out"
    free = (image, "--method", "clipes", "--preset", "sample")
    table = tmp_path / "labels.csv"
    table.write_text("file,classes\nother.jpg,dog\n")
    for words, message in (
        ((image, "--method", "seam", "--tags", "dog"), "is trained first: make a run"),
        ((image, "--method", "yeti", "--tags", "dog"), "There is no method 'yeti'"),
        ((*free, "--tags", " ; "), "there is no class (none named)"),
        ((*free, "--tags-from", table), "has no line for 1 of 1 images"),
        ((*free, "--tags-from", tmp_path / "no.csv"), "no.csv"),
        ((*free, "--tags", "dog", "--weights", tmp_path / "no.pt"), "no.pt: there is no such file"),
        ((*free, "--tags", "dog", "--texts", table), "'file' is no class"),
    ):
        assert message in refused(capsys, out, *words), words
    for words in ((image, "--method", "clipes"), (*free, "--tags", "a", "--run", "x"),
                  (*free, "--tags", "a", "--tags-from", table)):  # fmt: skip
        assert call(out, *words) == 2 and "ive" in capsys.readouterr().err


def test_tags_of_a_command_line_and_of_a_table(tmp_path: Path) -> None:
    assert split_tags(" dog, tree house ,dog,") == ("dog", "tree house")
    assert split_tags("pot, plant; dog") == ("pot, plant", "dog")
    assert split_tags("pot, plant", ("pot, plant", "dog")) == ("pot, plant",)
    table = tmp_path / "labels.csv"
    table.write_text("x/a.jpg,dog\ny/a.jpg,cat\nb.jpg,cat\n")
    files = {"1": tmp_path / "x" / "a.jpg", "2": tmp_path / "images" / "y" / "a.jpg", "3": tmp_path / "far" / "b.png"}
    classes, tags = read_image_tags(table, files, None)
    assert classes == ("cat", "dog") and tags == {"1": ("dog",), "2": ("cat",), "3": ("cat",)}
    # a name that comes twice is no image's unless its folder says so
    with pytest.raises(ValueError, match=r"no line for 1 of 1 images \(.*far/a.jpg\)"):
        read_image_tags(table, {"1": tmp_path / "far" / "a.jpg"}, None)
    with pytest.raises(ValueError, match="no line for 2 of 2 images"):
        read_image_tags(table, {"1": tmp_path / "far" / "b.jpg", "2": tmp_path / "near" / "b.jpg"}, None)
