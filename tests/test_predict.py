"""predict.py: masks of new images, whatever they are like, from a run's networks and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import digests
from test_single_stage import command

import predict
import run_sample
from misc.files import store
from misc.files.camfiles import read_cam
from misc.files.images import read_mask
from misc.image import draw, pixels
from step.lib.config import default_config

CPU = ("--machine.device", "cpu", "--machine.workers", "2")


@pytest.fixture
def seg(finished: Path, tmp_path: Path) -> Path:
    """The trained segmentation network's file alone, far from its run folder."""
    return Path(shutil.copy(finished / "weights" / "seg.pt", tmp_path / "moved.pt"))


def call(out: Path, *words: str | Path) -> int:
    return predict.main([*map(str, words), "--out", str(out), *CPU])


def told(capsys: pytest.CaptureFixture[str], out: Path, *words: str | Path, status: int = 2) -> str:
    """The message of a call that must be refused before any work (status 2), or fail in it (1)."""
    capsys.readouterr()
    assert call(out, *words) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.rpartition("\nerror: ")[2]


# ------------------------------------------------------------------------------------------- segmentation network


@pytest.mark.slow
def test_a_file_alone_predicts_what_the_run_predicted(finished: Path, data: Path, seg: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(out, data / "JPEGImages" / "2026_*.jpg", "--weights", seg) == 0
    assert digests(out / "masks", "*") == digests(finished / "seg", "2026_*.png") and len(digests(out, "masks/*")) == 3
    assert call(tmp_path / "run", data / "JPEGImages" / "2026_*.jpg", "--run", finished) == 0
    assert digests(tmp_path / "run", "masks/*") == digests(out, "masks/*")
    record = json.loads((out / "predict.json").read_text())
    classes = [line.strip() for line in (data / "classes.txt").read_text().splitlines()]
    assert list(record["mask values"].values()) == ["background", *classes]
    for path in (out / "masks").iterdir():
        with Image.open(path) as mask, Image.open(out / "overlays" / f"{path.stem}.jpg") as overlay:
            assert mask.mode == "P" and mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
            legend = overlay.height - mask.height  # of the classes in the mask
            assert overlay.width == mask.width and (legend > 0) == bool(np.asarray(mask).any())


@pytest.mark.slow
def test_probabilities_sum_to_one_and_agree_with_the_mask(seg: Path, data: Path, tmp_path: Path) -> None:
    image = data / "JPEGImages" / "2026_000001.jpg"
    assert call(tmp_path / "out", image, "--weights", seg, "--probabilities", "--fast") == 0
    stored = store.read_arrays(tmp_path / "out" / "probabilities" / "2026_000001.npz")
    mask = read_mask(tmp_path / "out" / "masks" / "2026_000001.png")
    assert stored["probabilities"].shape == (3, *mask.shape) and tuple(stored["size"]) == mask.shape
    np.testing.assert_allclose(stored["probabilities"].astype(np.float32).sum(0), 1, atol=2e-3)
    assert (stored["probabilities"].argmax(0) == mask).mean() > 0.99  # float16 makes a few ties


def odd_images(folder: Path, data: Path) -> dict[str, tuple[int, int]]:
    """Images of every kind, and their (height, width) as a person sees them; None of those that are broken."""
    folder.mkdir()
    source = data / "JPEGImages" / "2026_000001.jpg"
    image = Image.open(source).convert("RGB")
    width, height = image.size
    size = (height, width)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "exif.jpg", exif=exif)
    image.save(folder / "Ä b.gif", save_all=True, append_images=[image.rotate(180)] * 2)
    image.convert("L").save(folder / "grey.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    alpha = image.copy()
    alpha.putalpha(90)
    alpha.save(folder / "alpha.png")
    Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    image.resize((2000, 10)).save(folder / "long.png")
    image.resize((10, 2000)).save(folder / "tall.png")
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    image.resize((1300, 900)).save(folder / "large.jpg")
    (folder / "cut.jpg").write_bytes(source.read_bytes()[:1500])
    (folder / "text.png").write_text("no image")
    (folder / "empty.webp").touch()
    return {
        "exif": size, "Ä b": size, "grey": size, "cmyk": size, "alpha": size, "sixteen": size, "long": (10, 2000),
        "tall": (2000, 10), "one": (1, 1), "large": (900, 1300),
    }  # fmt: skip


@pytest.mark.slow
def test_odd_images_work_or_are_reported_and_the_others_go_on(
    seg: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = odd_images(tmp_path / "odd", data)
    error = told(capsys, tmp_path / "out", tmp_path / "odd", "gone.jpg", "--weights", seg, "--fast", status=1)
    assert "predict: 4 of 14 images failed, the others are finished" in error
    for line in ("cut: ValueError: Image", "text.png cannot be read", "empty.webp cannot be read",
                 "Image gone.jpg does not exist"):  # fmt: skip
        assert line in error
    masks = {p.stem: read_mask(p).shape for p in (tmp_path / "out" / "masks").iterdir()}
    assert masks == sizes


def test_an_image_is_turned_before_it_is_predicted(seg: Path, data: Path, tmp_path: Path) -> None:
    image = Image.open(data / "JPEGImages" / "2026_000001.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    assert call(tmp_path / "out", tmp_path / "a.png", tmp_path / "b.png", "--weights", seg, "--fast") == 0
    first, second = digests(tmp_path / "out", "masks/*").values()
    assert first == second


@pytest.mark.slow
def test_large_images_are_shrunk_for_the_network_only(
    seg: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.open(data / "JPEGImages" / "2026_000001.jpg").convert("RGB")
    large = image.resize((10 * image.width, 10 * image.height), Image.Resampling.BICUBIC)
    large.save(tmp_path / "large.png")
    words = (tmp_path / "large.png", "--weights", seg, "--fast", "--probabilities")
    assert call(tmp_path / "a", *words) == 0
    assert "1 images were downscaled to 0.014 megapixels" in capsys.readouterr().out  # 6 crops of 48 x 48
    seen = store.read_arrays(tmp_path / "a" / "probabilities" / "large.npz")["probabilities"]
    assert seen.shape[1] * seen.shape[2] <= 6 * 48 * 48 and read_mask(tmp_path / "a/masks/large.png").shape == (
        large.height, large.width
    )  # fmt: skip
    assert call(tmp_path / "b", *words, "--max-megapixels", "0") == 0
    seen = store.read_arrays(tmp_path / "b" / "probabilities" / "large.npz")["probabilities"]
    assert seen.shape[1:] == (large.height, large.width)


def test_labels_of_resized_scores_are_those_of_resizing_all() -> None:
    scores = np.random.default_rng(0).random((4, 5, 7), np.float32)
    whole = pixels.torch.nn.functional.interpolate(
        pixels.torch.from_numpy(scores)[None], size=(33, 20), mode="bilinear", align_corners=False
    )[0]
    assert (draw.resized_argmax(scores, (33, 20)) == whole.argmax(0).numpy()).all()
    assert (draw.resized_argmax(scores, (5, 7)) == scores.argmax(0)).all()


def test_only_what_is_missing_or_older_than_its_image_is_made_again(
    seg: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = shutil.copytree(data / "JPEGImages", tmp_path / "images"), tmp_path / "out"
    words = (folder / "2026_*", "--weights", seg, "--fast")
    assert call(out, *words) == 0
    first = {p.name: p.stat().st_mtime_ns for p in (out / "masks").iterdir()}
    (out / "masks" / "2026_000002.png").unlink()
    os.utime(folder / "2026_000003.jpg", (4e9, 4e9))
    capsys.readouterr()
    assert call(out, *words) == 0 and "1 of 3 images are done already" in capsys.readouterr().out
    after = {p.name: p.stat().st_mtime_ns for p in (out / "masks").iterdir()}
    assert [name for name in sorted(first) if first[name] == after[name]] == ["2026_000001.png"]


@pytest.mark.slow
def test_results_of_another_model_or_settings_are_not_mixed(
    finished: Path, seg: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = data / "JPEGImages" / "2026_000001.jpg", tmp_path / "out"
    assert call(out, image, "--weights", seg, "--fast") == 0
    error = told(capsys, out, image, "--weights", seg)
    assert "results of another model or other settings:\n  fast: True there, False now\nUse another --out" in error
    shutil.copy(seg, tmp_path / "b.pt")
    assert call(out, image, "--weights", tmp_path / "b.pt", "--fast") == 0  # the same model from another place
    state, description = store.read_model(seg)
    store.write_model(tmp_path / "b.pt", {k: v + 0 if v.ndim else v for k, v in state.items()}, {**description, "x": 1})
    assert "model: '" in told(capsys, out, image, "--weights", tmp_path / "b.pt", "--fast")
    before = (out / "masks" / "2026_000001.png").stat().st_mtime_ns
    assert call(out, image, "--weights", seg, "--fast", "--redo") == 0
    assert (out / "masks" / "2026_000001.png").stat().st_mtime_ns > before


@pytest.mark.slow
def test_a_cam_network_that_predicts_masks_is_its_own_segmenter(data: Path, tmp_path: Path) -> None:
    """With the test settings of its run, from the run and from the file alone; and as ONNX."""
    out, images = tmp_path / "run", data / "JPEGImages" / "2026_*.jpg"
    assert run_sample.main(command(data, out)) == 0
    alone = shutil.copy(out / "weights" / "cam.pt", tmp_path / "moved.pt")
    for name, words in (("a", ("--run", out)), ("b", ("--weights", alone))):
        assert call(tmp_path / name, images, *words) == 0
        assert digests(tmp_path / name / "masks", "*") == digests(out / "seg", "2026_*.png")
    assert call(tmp_path / "fast", images, "--run", out, "--fast") == 0
    if importlib.util.find_spec("onnxruntime"):
        assert call(tmp_path / "onnx", "--run", out, "--export", "onnx") == 0
        assert [p.name for p in (tmp_path / "onnx").iterdir()] == ["cam.onnx"]


# ------------------------------------------------------------------------------------------- tags


def names(data: Path) -> list[str]:
    return [line.strip() for line in (data / "classes.txt").read_text().splitlines()]


def test_tags_give_the_runs_own_maps_and_masks(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cam = next(p for p in sorted((finished / "cam").iterdir()) if len(read_cam(p).keys) == 1)
    tag = names(data)[int(read_cam(cam).keys[0])]
    assert call(tmp_path / "out", data / "JPEGImages" / f"{cam.stem}.jpg", "--run", finished, "--tags", tag) == 0
    assert "masks made by the random walk of the run's refiner psa" in capsys.readouterr().out
    assert digests(tmp_path / "out" / "maps", "*.npz") == {cam.name: digests(finished, f"cam/{cam.name}").popitem()[1]}
    assert (tmp_path / "out" / "maps" / f"{cam.stem}_{tag}.jpg").exists()
    label = (finished / "label" / f"{cam.stem}.png").read_bytes()
    assert (tmp_path / "out" / "masks" / f"{cam.stem}.png").read_bytes() == label


@pytest.mark.slow
def test_without_a_refiner_a_crf_or_a_threshold_is_used_and_reported(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part"
    (part / "weights").mkdir(parents=True)
    shutil.copy(finished / "weights" / "cam.pt", part / "weights")
    image, tags = data / "JPEGImages" / "2025_000001.jpg", ",".join(names(data))
    assert call(tmp_path / "a", image, "--run", part, "--tags", tags) == 0
    assert "masks made by a dense CRF from the background score 0.3 (no refiner was used)" in capsys.readouterr().out
    words = ("--run", finished, "--tags", f" {tags} ,", "--refine", "threshold", "--threshold", "0.5")
    assert call(tmp_path / "b", image, *words) == 0
    cam = read_cam(tmp_path / "b" / "maps" / "2025_000001.npz")
    assert list(cam.keys) == [0, 1]
    wanted = np.where(cam.maps.max(0) > 0.5, cam.maps.argmax(0) + 1, 0)
    assert (read_mask(tmp_path / "b" / "masks" / "2025_000001.png") == wanted).all()
    found = json.loads((finished / "scores.json").read_text())["CAM"]["threshold"]
    assert call(tmp_path / "c", image, "--run", finished, "--tags", tags, "--refine", "crf") == 0
    assert f"background score {found:g} (no refiner" in capsys.readouterr().out
    assert "no trained refiner" in told(capsys, tmp_path / "d", image, "--run", part, "--tags", tags, "--refine=walk")


@pytest.mark.slow
def test_odd_images_with_tags(finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = odd_images(tmp_path / "odd", data)
    words = (tmp_path / "odd", "--run", finished, "--tags", names(data)[0], "--fast")
    error = told(capsys, tmp_path / "out", *words, status=1)
    assert "3 of 13 images failed" in error
    assert {p.stem: read_mask(p).shape for p in (tmp_path / "out" / "masks").iterdir()} == sizes
    assert read_cam(tmp_path / "out" / "maps" / "large.npz").size == sizes["large"]


# ------------------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_wrong_words_name_the_remedy(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = data / "JPEGImages" / "2026_000001.jpg", tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    part = tmp_path / "part" / "weights"
    part.mkdir(parents=True)
    shutil.copy(finished / "weights" / "cam.pt", part)
    for words, message in (
        ((image, "--run", finished, "--tags", "yeti"), "there is no class yeti in this network. It knows: " ),
        ((image, "--run", finished, "--tags", " ,"), "no class (none named)"),
        ((image, "--weights", finished / "weights" / "cam.pt"), "is a CAM network, a segmentation network is needed"),
        ((image, "--run", part.parent), "or give --tags to make masks with its CAM network"),
        ((image, "--weights", tmp_path / "no.pt"), "no.pt does not exist"),
        ((image, "--weights", image), "): give another file, or, if"),
        ((empty, "--run", finished), "There is no image in"),
    ):
        assert message in told(capsys, out, *words)
    for words in ([image], [image, "--run", finished, "--weights", "x"], [image, "--weights", "x", "--tags", "a"],
                  ["--run", finished], [image, "--run", finished, "--export", "onnx"],
                  [image, "--method", "clipes", "--tags", "a", "--threshold", "0.5"],
                  [image, "--method", "clipes", "--tags", "a", "--refine", "crf"],
                  [image, "--run", finished, "--preset", "sample"], [image, "--run", finished, "--texts", "x"],
                  [image, "--run", finished, "--classes", "x"]):  # fmt: skip
        assert call(out, *words) == 2 and re.search("[Gg]ive |[Ll]eave ", capsys.readouterr().err)
    assert not (out / "masks").exists()


@pytest.mark.slow
def test_a_network_leaves_as_onnx(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert call(tmp_path / "out", "--run", finished, "--export", "onnx") == 0
    assert "differs from PyTorch by at most" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["seg.onnx"]


# ------------------------------------------------------------------------------------------- released checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "section", "tags"), [("psa", "cam", True), ("psa", "seg", False), ("toco", "cam", False)]
)
def test_a_released_file_predicts_as_a_run_made_of_it(
    method: str, section: str, tags: bool, data: Path, tmp_path: Path
) -> None:
    """The CAM network, the segmentation network, a CAM network that predicts masks."""
    torch.manual_seed(1)
    network = getattr(default_config(method, "sample"), section).network.build(2, {})
    released = tmp_path / "released.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, released)
    run_folder = tmp_path / "run"
    flags = ["--root", str(data), "--out", str(run_folder), f"--{section}.released", str(released), *CPU]
    assert run_sample.main([method, *flags, "--steps", f"train_{section}"]) == 0
    classes = tmp_path / "names.txt"
    classes.write_text("\n".join(store.read_model(run_folder / "weights" / f"{section}.pt")[1]["classes"]))
    image = next((data / "JPEGImages").iterdir())
    words = [image, "--fast", *(["--tags", classes.read_text().split("\n")[0]] if tags else [])]
    assert call(tmp_path / "one", *words, "--run", run_folder) == 0
    new = ("--released", released, "--method", method, "--preset", "sample", "--classes", classes)
    assert call(tmp_path / "two", *words, *new) == 0
    masks = [digests(tmp_path / name, "masks/*", "maps/*") for name in ("one", "two")]
    assert masks[0] == masks[1] and len(masks[0]) >= 1


def test_a_released_file_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seg: Path, data: Path
) -> None:
    image = next((data / "JPEGImages").iterdir())
    out, file = tmp_path / "out", tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, file)
    assert "there is no such file" in told(capsys, out, image, "--released", "gone.pth", "--method", "psa")
    assert "no method 'nothing'" in told(capsys, out, image, "--released", file, "--method", "nothing")
    assert told(capsys, out, image, "--released", file, "--method", "toco", "--preset", "sample")
    whole = ("--released", file, "--method", "psa")
    for words, message in (
        (("--released", file), "--released FILE needs --method"), ((*whole, "--weights", seg), "neither --run nor"),
        ((*whole, "--tags", "dog", "--refine", "walk"), "nor --refine walk, which needs a run"),
    ):  # fmt: skip
        assert call(out, image, *words) == 2
        assert message in " ".join(capsys.readouterr().err.split())  # the message is broken into lines
    assert not out.exists()


@pytest.mark.parametrize(
    "text", ["[]", '{"settings": 7, "mask values": {}}', '{"settings": {}, "mask values": [1]}', "{"]
)
def test_a_record_of_another_form_is_refused_by_name(text: str, seg: Path, data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predict.json").write_text(text)
    image = next((data / "JPEGImages").glob("*.jpg"))
    assert "predict.json cannot be read" in told(capsys, tmp_path / "out", image, "--weights", seg)
