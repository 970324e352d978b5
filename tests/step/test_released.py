"""Checkpoints that others released, used as they are (--cam.released, --aff.released, --seg.released)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import make_set

import predict
import run_sample
from misc.files import store
from net import registry
from net.model import load_model
from step.lib.config import default_config

registry.load_methods()
# those with frozen start weights are released with a text tower, which a run's own file lacks: tests/net/test_clip.py
SEEDS = sorted(n for n, m in registry.SEEDS.items() if not m.recipes["sample"].cam.network.keeps_start_weights)
REFINERS = sorted(n for n, refiner in registry.REFINERS.items() if refiner.is_trained)
SEGMENTERS = sorted(registry.SEGMENTERS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "voc", images=4, val=2)


def release(part: str, name: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor], list[str]]:
    """A file as authors release it, its tensors, and the flags that name method, refiner and segmenter."""
    method = name if part == "cam" else "seam"
    flags = {"cam": [], "aff": ["--refiner", name], "seg": ["--segmenter", name]}[part]
    config = default_config(method, "sample", *([name] if part == "aff" else [None]), *([name] * (part == "seg")))
    phases = config.cam.phases() if part == "cam" else ((part, getattr(config, part)),)
    earlier: dict[str, registry.SeedNetwork] = {}
    torch.manual_seed(3)
    for phase_name, phase in phases:
        earlier[phase_name] = phase.network.build(2, earlier)  # type: ignore[assignment]
    state = earlier[part].state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.add_(0.01)
    path = folder / f"{name}_released.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 15, "best": 0.7}, path)
    return path, state, [method, *flags, "--machine.device", "cpu", "--machine.workers", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "name"),
    [("cam", n) for n in SEEDS] + [("aff", n) for n in REFINERS] + [("seg", n) for n in SEGMENTERS],
)
def test_a_released_checkpoint_is_taken_as_it_is(part: str, name: str, data: Path, tmp_path: Path) -> None:
    path, state, argv = release(part, name, tmp_path)
    out = tmp_path / "run"
    common = ["--data", "voc12", "--root", str(data), "--out", str(out)]  # getam asks for no saliency maps
    assert run_sample.main([*argv, *common, f"--{part}.released", str(path), "--steps", f"train_{part}"]) == 0
    written, description = store.read_model(out / "weights" / f"{part}.pt")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], value) for key, value in state.items())  # no update is made
    assert description["precision"] == "not known (released)"
    assert path.name not in json.dumps(description["recipe"])  # by its content, wherever it lies
    assert {p.name for p in (out / "weights").iterdir()} == {f"{part}.pt"}  # no phase before it
    model = load_model(out / "weights" / f"{part}.pt", part)  # type: ignore[arg-type]
    assert model.classes == tuple(json.loads(json.dumps(description["classes"])))


@pytest.mark.slow
def test_a_part_of_a_network_is_refused_and_nothing_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A classifier's backbone is a start, no released network; nor is a file of values that are not finite."""
    path, state, argv = release("cam", "psa", tmp_path)
    common = ["--data", "voc12", "--root", str(data), "--out", str(tmp_path / "run"), "--steps", "train_cam"]
    torch.save({key: value for key, value in state.items() if not key.startswith("fc8")}, path)
    assert run_sample.main([*argv, *common, "--force", "--cam.released", str(path)]) == 2
    assert "it lacks fc8.weight" in capsys.readouterr().err
    state["fc8.weight"][0, 0] = torch.inf
    torch.save(state, path)
    assert run_sample.main([*argv, *common, "--force", "--cam.released", str(path)]) == 2
    assert "not finite" in capsys.readouterr().err
    assert run_sample.main([*argv, *common, "--cam.released", "nowhere.pth"]) == 2
    assert "--cam.released nowhere.pth: there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "run" / "weights" / "cam.pt").exists()


@pytest.mark.slow
def test_scores_and_new_images_rest_on_the_released_file(data: Path, tmp_path: Path) -> None:
    """Step 2 scores its CAMs, and predict.py uses the file that the run made of it."""
    path, _, argv = release("cam", "psa", tmp_path)
    out = tmp_path / "run"
    common = ["--data", "voc12", "--root", str(data), "--out", str(out), "--cam.infer.scales", "1.0"]
    common += ["--machine.amp", "off"]
    assert run_sample.main([*argv, *common, "--cam.released", str(path), "--steps", "1-2"]) == 0
    score = json.loads((out / "scores.json").read_text())["CAM"]
    assert score["start_weights"] == "released checkpoint psa_released.pth, as it is"
    assert score["precision"] == {"training": "not known (released)", "inference": "float32"}
    image = next((data / "JPEGImages").iterdir())
    classes = store.read_model(out / "weights" / "cam.pt")[1]["classes"]
    words = [str(image), "--run", str(out), "--tags", classes[0], "--out", str(tmp_path / "masks"), "--fast"]
    assert predict.main([*words, "--machine.device", "cpu", "--machine.workers", "0"]) == 0


def test_parts_that_were_released_one_by_one(data: Path, tmp_path: Path) -> None:
    """CRT: deits_cam.pth and res152_cam.pth."""
    _, state, argv = release("cam", "crt", tmp_path)
    files = []
    for part in ("transformer", "cnn"):
        files.append(tmp_path / f"{part}.pth")
        torch.save({k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}, files[-1])
    common = ["--data", "voc12", "--root", str(data), "--steps", "train_cam"]
    assert run_sample.main([*argv, *common, "--out", str(tmp_path / "one"), "--cam.released", str(files[0])]) == 2
    both = ",".join(map(str, files))
    assert run_sample.main([*argv, *common, "--out", str(tmp_path / "two"), "--cam.released", both]) == 0
    written, _ = store.read_model(tmp_path / "two" / "weights" / "cam.pt")
    assert all(torch.equal(written[key], value) for key, value in state.items())
