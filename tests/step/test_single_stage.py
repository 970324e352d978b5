"""The single-stage run of GETAM: its own masks, other segmenters, saliency maps, two processes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from running import ROOM, digests, start
from test_distributed import TORCHRUN, close, curves

import run_sample
from misc.files import store
from misc.files.images import write_mask

TINY = """
--machine.workers 0 --machine.device cpu --cam.weights none --aff.weights none
--cam.network.dpt.backbone vitb --cam.network.dpt.image-size 48 --cam.network.dpt.width 32 --cam.network.dpt.heads 2
--cam.network.dpt.depth 4 --cam.network.dpt.dropout 0 --cam.network.dpt.features 8
--cam.network.start-layer 1 --cam.network.label.epsilon 1e-9
--cam.fit.steps 4 --cam.fit.batch-size 4 --cam.fit.micro-batch 2 --cam.fit.optimiser sgd --cam.fit.lr 0.01
--cam.augment.long-side 48 64 --cam.augment.crop 48 --cam.infer.scales 1.0
--aff.network.resnet38.width 0.0625 --aff.fit.steps 2 --aff.fit.batch-size 4 --aff.augment.crop 48 --aff.walk.logt 2
--aff.label.crf.iterations 1 --seg.infer.crf.iterations 1
""".split()
OWN = ["--seg.infer.scales", "48", "64"]
SEPARATE = """
--segmenter deeplabv1 --seg.weights none --seg.network.resnet38.width 0.0625 --seg.fit.steps 2 --seg.fit.batch-size 4
--seg.augment.crop 48 --seg.infer.scales 1.0 --aff.walk.background constant --aff.walk.threshold 0
""".split()


def command(data: Path, out: Path, *flags: str) -> list[str]:
    """The command line of a tiny run, single-stage unless a segmenter is named."""
    own = [] if "--segmenter" in flags else OWN
    return ["getam", "--root", str(data), "--out", str(out), *TINY, *own, *flags]


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished single-stage run; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "single"
    assert run_sample.main(command(data, out)) == 0
    return out


@pytest.mark.slow
def test_a_single_stage_run_needs_no_pseudo_masks(single: Path, data: Path) -> None:
    assert {p.name for p in (single / "weights").iterdir()} == {"cam.pt"}
    assert not (single / "aff_label").exists() and not (single / "label").exists()
    assert len(list((single / "seg").iterdir())) == 11 and (single / "report.html").exists()
    scores = json.loads((single / "scores.json").read_text())
    name = "predictions (getam itself, trained on tags)"
    assert list(scores) == ["CAM", name, f"{name}, before the CRF"]
    assert scores[f"{name}, before the CRF"]["crf_iterations"] == 0 < scores[name]["crf_iterations"]
    assert scores["predictions (getam itself, trained on tags)"]["scales"] == [48, 64]
    record = json.loads((single / "run.json").read_text())
    assert list(record["steps"]) == ["train_cam", "make_cam", "infer_seg", "report"]
    terms = curves(single / "log" / "cam")
    assert len(terms["cam/cls"]) == 4 and len(terms["cam/ce_foreground"]) == 1  # updates 0 to 2, then 3
    assert terms["cam/lr"][3] == pytest.approx(0.01 * (1 - 3 / 4) ** 0.9)  # the sample recipe keeps the rate


@pytest.mark.slow
def test_its_maps_go_through_any_refiner_and_segmenter(
    single: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "many"
    # the maps are there: what their training would need is not asked for
    flags = ["--cams", str(single), "--saliency", "nowhere"]
    assert run_sample.main(command(data, out, *flags, *SEPARATE)) == 0
    told = capsys.readouterr().out
    assert "cam: trained already" in told and "make_cam: 8 of 8 images are done already" in told
    assert digests(out, "cam/*", "weights/cam.pt") == digests(single, "cam/*", "weights/cam.pt")
    assert len(list((out / "label").iterdir())) == 8 and (out / "weights" / "seg.pt").exists()
    names = list(json.loads((out / "scores.json").read_text()))
    assert names[0] == "CAM" and names[-2] == "predictions (deeplabv1 trained on pseudo masks)"


@pytest.mark.slow
def test_cams_of_other_settings_or_none_are_refused(
    single: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cams", str(single), *SEPARATE, "--cam.fit.lr", "0.5"]
    assert run_sample.main(command(data, tmp_path / "other", *flags)) == 2
    assert re.search(r"other settings or data:\n  cam.fit.lr: 0.01 there, 0.5 now", capsys.readouterr().err)
    assert not (tmp_path / "other").exists()
    assert run_sample.main(command(data, tmp_path / "none", "--cams", str(tmp_path / "nowhere"))) == 2
    assert "no run with finished steps train_cam and make_cam is there" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_missing_in_a_single_stage_run_are_reported(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*argv: str) -> str:
        assert run_sample.main(list(argv)) == 2
        assert not (tmp_path / "new" / "weights").exists()
        return capsys.readouterr().err

    new = command(data, tmp_path / "new")
    assert "--segmenter own: psa predicts no masks itself. There are: deeplabv1" in told("psa", "--segmenter", "own")
    assert "so nothing else is trained. Name a segmenter: deeplabv1" in told(*new, "--steps", "1-7")
    assert "--masks truth: with --segmenter own" in told(*new, "--masks", "truth")


@pytest.mark.slow
def test_missing_and_wrong_saliency_is_reported_before_or_with_its_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some").mkdir()
    for path in sorted((data / "Saliency").iterdir())[2:]:
        (tmp_path / "some" / path.name).write_bytes(path.read_bytes())
    flags = ["--saliency", str(tmp_path / "some")]
    assert run_sample.main(command(data, tmp_path / "out", *flags)) == 2
    error = capsys.readouterr().err
    assert f"2 have no saliency map ID.png in {tmp_path / 'some'} (2025_000001, 2025_000002)" in error
    assert "--saliency DIR" in error and not (tmp_path / "out").exists()
    without = [*flags, "--steps", "1", "--cam.network.label.no-saliency"]
    assert run_sample.main(command(data, tmp_path / "without", *without)) == 0
    for name in ("2025_000001.png", "2025_000002.png"):
        write_mask(tmp_path / "some" / name, np.zeros((7, 9), np.uint8))
    assert run_sample.main(command(data, tmp_path / "again", *flags)) == 1
    assert re.search(r"saliency map is 7 x 9 pixels \(height x width\), the image", capsys.readouterr().err)


@pytest.mark.slow
def test_two_processes_train_both_phases_as_one_does(single: Path, data: Path, tmp_path: Path) -> None:
    ended = start([*TORCHRUN, str(ROOM / "run_sample.py"), *command(data, tmp_path / "two", "--steps", "1")])
    assert ended.returncode == 0, ended.stderr
    assert "2 process(es) x 1 micro-batch(es) x 2" in ended.stdout
    one, two = (curves(folder / "log" / "cam") for folder in (single, tmp_path / "two"))
    assert one.keys() == two.keys() and len(one) == 6
    for term, values in one.items():
        assert values == pytest.approx(two[term], rel=1e-3, abs=1e-5), term
    weights = [store.read_model(folder / "weights" / "cam.pt")[0] for folder in (single, tmp_path / "two")]
    assert close(*weights)
