"""One's own images through the whole pipeline: without masks, many classes, odd images, three layouts of one set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from layouts import as_coco, as_folder
from PIL import Image
from running import TINY, digests, make_set

import run_sample
from misc.files.camfiles import read_cam
from misc.files.images import read_image, read_mask, write_mask
from misc.image.draw import palette
from scripts import scale, sheet
from voc12.catalog import open_catalog
from voc12.prepare.__main__ import main as prepare


def run(data: str, root: Path, out: Path, *flags: str) -> int:
    """Exit status of a tiny run on a data set."""
    words = ["psa", "--preset", "sample", "--data", data, "--root", str(root), "--out", str(out)]
    return run_sample.main([*words, *TINY, *flags])


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "voc12")


@pytest.fixture(scope="module")
def own(generated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, no masks, no lists, no class list; names with spaces and accents; a table as Excel writes it; three
    images without tags."""
    root = tmp_path_factory.mktemp("own")
    as_folder(generated, root)
    for name in ("masks", "splits"):
        shutil.rmtree(root / name)
    (root / "classes.txt").unlink()
    lines = (root / "labels.csv").read_text(encoding="utf-8").splitlines()[1:9]
    for image in (root / "images").iterdir():
        image.rename(image.with_name(f"Größe {image.name}"))
    text = "\r\n".join(["file,classes", *(f"Größe {line}" for line in lines)]) + "\r\n"
    (root / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return root


@pytest.mark.slow
def test_images_and_tags_alone_give_masks_and_overlays(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("folder", own, out) == 0
    said = capsys.readouterr().out
    for name in ("CAM", "pseudo masks after the walk", "predictions (deeplabv1 trained on pseudo masks)"):
        assert f"{name}: no score. The list" in said
    assert "scores: none." in said and said.count("The list train has no true masks, so scores are left out.") == 3
    page = (out / "report.html").read_text()
    assert "The list train has no true masks" in page and "The list val has no true masks" in page
    assert "<h2>Classes" not in page and not (out / "scores.json").exists()
    assert "What can be said without true masks" in page and "least agreement" in page and "Worst class" not in page

    data = open_catalog("folder", own)
    assert data.num_classes == 2 and len(data.ids("train")) == 8 and len(data.ids("val")) == 3
    made = {"label": data.ids("train"), "seg": [*data.ids("val"), *data.ids("train")]}
    for folder, ids in made.items():
        for image_id in ids:
            mask = read_mask(out / folder / f"{image_id}.png")
            assert mask.shape == read_image(data.image_path(image_id)).shape[:2] and mask.max() <= 2

    before = digests(out, "label/*", "seg/*", "weights/*.pt")
    assert run("folder", own, out, "--overlays") == 0  # asked for afterwards
    assert "[1/9] train_cam: done already" in capsys.readouterr().out
    assert digests(out, "label/*", "seg/*", "weights/*.pt") == before
    for folder, ids in made.items():
        assert {p.name for p in (out / f"{folder}_overlay").iterdir()} == {f"{i}.jpg" for i in ids}
        picture = read_image(out / f"{folder}_overlay" / f"{ids[0]}.jpg")
        height, width, _ = read_image(data.image_path(ids[0])).shape
        assert picture.shape[1] == width and picture.shape[0] >= height  # a legend may stand below
    assert run("folder", own, out, "--overlays", "--redo", "--steps", "random_walk") == 0
    assert not (out / "seg_overlay").exists() and (out / "label_overlay").exists()


@pytest.mark.slow
def test_odd_images(own: Path, tmp_path: Path) -> None:
    root, out = shutil.copytree(own, tmp_path / "odd"), tmp_path / "out"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 4), np.uint8)
    frames = [Image.fromarray(pixels[..., :3]), Image.fromarray(255 - pixels[..., :3])]
    frames[0].save(root / "images" / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(pixels).save(root / "images" / "clear.png")
    Image.fromarray(pixels[:1, :1, :3]).save(root / "images" / "dot.bmp")
    Image.fromarray(np.tile(pixels[..., :3], (2, 167, 1))[:50, :10000]).save(root / "images" / "strip.jpg")
    name = open_catalog("folder", own).classes[0]
    with (root / "labels.csv").open("a") as file:
        file.writelines(f"{image},{name}\n" for image in ("moving.gif", "dot.bmp", "strip.jpg"))
        file.write("clear.png,\n")
    sizes = {"moving": (40, 60), "clear": (40, 60), "dot": (1, 1), "strip": (50, 10000)}
    (root / "odd.txt").write_text("\n".join(sizes))
    flags = ("--val-list", str(root / "odd.txt"), "--aff.label.crf.iterations", "0", "--seg.infer.crf.iterations", "0")
    assert run("folder", root, out, *flags) == 0
    for image_id, size in sizes.items():
        for folder in ("label", "seg", "aff_label"):
            assert read_mask(out / folder / f"{image_id}.png").shape == size
    assert not read_mask(out / "label" / "clear.png").any()


@pytest.mark.slow
def test_the_sheet_shows_a_field_at_several_values(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("folder", own, out, "--steps", "1-4") == 0
    before = digests(out, "**/*")
    common = ["psa", "--preset", "sample", "--data", "folder", "--root", str(own), "--out", str(out)]
    common += [*TINY, "--rows", "2", "--count", "3"]
    for field, values in (("background", ("0", "1")), ("aff.label.alpha_low", ("1", "9")), ("aff.walk.beta", ("1",))):
        picture = tmp_path / "sheets" / f"{field}.png"
        capsys.readouterr()
        assert sheet.main([*common, "--field", field, "--values", *values, "--sheet", str(picture)]) == 0
        said = capsys.readouterr().out
        assert "3 images of train" in said and "mIoU" not in said and read_image(picture).shape[0] > 2 * 120
        if field == "background":
            kept = {line.split()[1]: line.split()[3::2] for line in said.splitlines()[3:5]}
            assert kept["1"] == ["0.0", "0.0", "0.0"] and float(kept["0"][1]) > 0
    assert digests(out, "**/*") == before
    for field, told in (("seg.infer", "give background, or a numeric setting"), ("aff.walk.no", "has no field 'no'")):
        assert sheet.main([*common, "--field", field]) == 1
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_voc_coco_and_folder_give_the_same_run(
    generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_folder(generated, tmp_path / "folder")
    as_coco(generated, tmp_path / "coco14")
    assert prepare(["coco14", "--root", str(tmp_path / "coco14"), "--workers", "0"]) == 0
    made = {}
    for data in ("voc12", "folder", "coco14"):
        root = generated if data == "voc12" else tmp_path / data
        assert run(data, root, tmp_path / f"run-{data}") == 0
        made[data] = digests(tmp_path / f"run-{data}", "weights/*.pt", "cam/*", "label/*", "seg/*")
    assert made["voc12"] == made["folder"] == made["coco14"]
    scores = [json.loads((tmp_path / f"run-{data}" / "scores.json").read_text()) for data in ("voc12", "folder")]
    assert scores[0] == scores[1] and len(scores[0]) == 4


@pytest.mark.slow
def test_eighty_classes(generated: Path, tmp_path: Path) -> None:
    root = tmp_path / "many"
    as_folder(generated, root)
    names = [f"thing {n}" for n in range(1, 81)]
    used = (root / "classes.txt").read_text().split()
    names[56], names[79] = used
    (root / "classes.txt").write_text("\n".join(names))
    for path in (root / "masks").iterdir():
        mask = read_mask(path)
        write_mask(path, np.where(mask == 1, 57, np.where(mask == 2, 80, mask)).astype(np.uint8))
    out = tmp_path / "out"
    assert run("folder", root, out) == 0
    data = open_catalog("folder", root)
    for image_id in data.ids("train"):
        cam = read_cam(out / "cam" / f"{image_id}.npz")
        assert cam.keys.tolist() == np.flatnonzero(data.tags(image_id)).tolist() and set(cam.keys) <= {56, 79}
        assert set(np.unique(read_mask(out / "label" / f"{image_id}.png"))) <= {0, 57, 80}
    with Image.open(out / "label" / f"{data.ids('train')[0]}.png") as stored:
        assert np.array_equal(np.array(stored.getpalette()).reshape(-1, 3), palette())
    assert len(np.unique(palette(), axis=0)) == 256
    scores = json.loads((out / "scores.json").read_text())
    assert all(len(score["classes"]) == 81 for score in scores.values())
    assert [score.get("seen_in_training") for score in scores.values()] == [None, None, 0, 0]


@pytest.mark.slow
def test_part_of_the_masks_is_reported(generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "part"
    as_folder(generated, root)
    data = open_catalog("folder", root)
    (root / "masks" / f"{data.ids('train')[0]}.png").unlink()
    assert run("folder", root, tmp_path / "out", "--steps", "1-2") == 0
    assert "CAM: no score. Only 7 of the 8 images of the list train have true masks" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind, told", [("colour", "is a RGB image: masks hold class indices in one 8-bit channel"),
                                        ("corrupt", "cannot be read"), ("size", "make the prediction at the size")])
def test_a_wrong_mask_is_named(
    kind: str, told: str, generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "bad"
    as_folder(generated, root)
    path = root / "masks" / f"{open_catalog('folder', root).ids('train')[2]}.png"
    if kind == "colour":
        Image.new("RGB", Image.open(path).size, (1, 2, 3)).save(path)
    elif kind == "corrupt":
        path.write_bytes(path.read_bytes()[:60])
    else:
        write_mask(path, read_mask(path)[:-1])
    assert run("folder", root, tmp_path / "out", "--steps", "1-2") == 1
    error = capsys.readouterr().err
    assert told in error and path.stem in error and "Traceback" not in error


def test_the_measurement_of_large_sets_runs_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale.main(images=30, at=tmp_path)
    assert capsys.readouterr().out.count(" MB\n") == 11 and not list(tmp_path.iterdir())
