"""The driver from end to end on a tiny data set: files, scores, going on, parts, doing again."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from running import TINY, arguments, digests, run

import run_sample
from misc.files import store
from misc.files.camfiles import read_cam
from misc.files.images import read_image, read_mask
from misc.precision import has_fast_bf16
from step import plan, select
from step.lib import parsing
from step.lib.config import open_job

MADE = ("weights/*.pt", "cam/*", "aff_label/*", "label/*", "seg/*")
IDS = [f"2025_{i:06d}" for i in range(1, 9)]
VAL = [f"2026_{i:06d}" for i in range(1, 4)]
pytestmark = pytest.mark.usefixtures("no_default_folders")


def lists(root: Path, name: str) -> Path:
    return root / "ImageSets" / "Segmentation" / f"{name}.txt"


def refused(capsys: pytest.CaptureFixture[str], data: Path, out: Path, *flags: str, status: int = 2) -> str:
    """The message of a run that must be refused before any work (status 2), or fail in it (1)."""
    capsys.readouterr()
    assert run(data, out, *flags) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.rpartition("\nerror: ")[2]


def said(capsys: pytest.CaptureFixture[str], data: Path, out: Path, *flags: str) -> str:
    """What a run that must succeed prints."""
    capsys.readouterr()
    assert run(data, out, *flags) == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- a whole run


def test_every_step_makes_its_files(finished: Path) -> None:
    assert digests(finished, "weights/*").keys() == {f"weights/{n}.pt" for n in ("cam", "aff", "seg")}
    for folder, suffixes, ids in (("cam", ["npz"], IDS), ("aff_label", ["npz", "png"], IDS), ("label", ["png"], IDS),
                                  ("seg", ["png"], VAL + IDS)):  # fmt: skip
        wanted = {f"{i}.{suffix}" for i in ids for suffix in suffixes}
        assert {p.name for p in (finished / folder).iterdir()} == wanted
    record = json.loads((finished / "run.json").read_text())
    assert list(record["steps"]) == [s.name for s in select([])] and all(s["done"] for s in record["steps"].values())
    assert record["config"]["cam.fit.steps"] == 4 and record["data"].keys() == {"train", "val"}


def test_masks_have_the_size_of_their_images_and_only_known_classes(finished: Path, data: Path) -> None:
    for folder, ids in (("label", IDS), ("seg", VAL), ("aff_label", IDS)):
        for image_id in ids:
            mask = read_mask(finished / folder / f"{image_id}.png")
            assert mask.shape == read_image(data / "JPEGImages" / f"{image_id}.jpg").shape[:2]
            assert set(np.unique(mask)) <= {0, 1, 2, 255}
    cam = read_cam(finished / "cam" / f"{IDS[0]}.npz")
    truth = read_mask(data / "SegmentationClass" / f"{IDS[0]}.png")
    assert set(cam.keys + 1) == set(np.unique(truth)) - {0, 255} and cam.size == truth.shape


def test_scores_say_where_they_come_from(finished: Path) -> None:
    scores = json.loads((finished / "scores.json").read_text())
    cam, walked, predicted, before = scores.values()
    assert list(scores)[-1] == f"{list(scores)[-2]}, before the CRF"
    assert (predicted["crf_iterations"], before["crf_iterations"]) == (1, 0)
    assert list(scores)[0] == "CAM" and cam["step"] == "make_cam" and predicted["step"] == "infer_seg"
    assert (cam["split"], cam["images"], cam["tags"]) == ("train", 8, "true tags")
    assert cam["threshold_choice"] == "searched on train" and len(cam["curve"]) == 60
    assert (predicted["split"], predicted["images"], predicted["tags"]) == ("val", 3, "none")
    assert all(0 <= s["miou"] <= 100 for s in (cam, walked, predicted))
    assert [s["start_weights"] for s in (cam, walked, predicted)] == ["random"] * 3
    word = "bfloat16 autocast" if has_fast_bf16("cpu") else "float32"  # the sample recipes' fast
    assert [s["precision"] for s in (cam, walked, predicted)] == [{"training": word, "inference": word}] * 3


def test_published_recipes_on_voc_insist_on_train_aug(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training on train's 1,464 images without a word is how people lose five points."""
    argv = ["seam", "--preset", "published", "--data", "voc12", "--root", str(own), "--cam.weights", "none"]
    argv += ["--out", str(tmp_path / "run"), "--steps"]

    def check(*flags: str) -> str:
        """The list that a run goes through, after its inputs were checked."""
        job = open_job(parsing.parse([*argv, *flags]))
        plan.check_inputs(job, select(job.cfg.steps, job.aim))
        return job.train_list

    file = tmp_path / "network.pth"
    file.write_bytes(b"is read later")
    released = ["train_cam", "make_cam", "--cam.released", str(file)]
    for steps in (["train_cam"], ["make_cam"], released, ["random_walk"]):
        with pytest.raises(ValueError, match="is for the list train_aug"):
            check(*steps)
    assert run_sample.main([*argv, "train_cam"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("train_aug", "voc12.prepare", "--sbd-lists", "--train-list train"))
    assert not (tmp_path / "run").exists()
    check("train_cam", "--cam.released", str(file))  # goes through no images
    check("infer_seg")
    assert check("train_cam", "make_cam", "--train-list", "train") == "train"
    assert check("train_cam", "--train-list", str(lists(own, "val"))) == str(lists(own, "val"))
    assert check("train_cam", "--preset", "sample") == "train"
    lists(own, "train_aug").write_text("\n".join(IDS))
    assert check("train_cam", "make_cam") == "train_aug"


@pytest.mark.slow
def test_a_training_begins_with_its_list(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, data, tmp_path / "new", "--steps", "train_cam")
    assert "cam: trains on the list train, 8 images." in told
    assert "trains on the list" not in said(capsys, data, tmp_path / "new", "--steps", "train_cam")
    told = said(capsys, data, tmp_path / "start", "--steps", "train_cam", "--cam.fit.steps", "0")
    assert "trains on the list" not in told


def test_the_report_is_one_page(finished: Path) -> None:
    page = (finished / "report.html").read_text().partition("<script>")[0]
    assert page.count("data:image/jpeg;base64,") == len(VAL) + len(IDS) and "cam.fit.lr" in page
    assert (finished / "pictures.png").stat().st_size > 1000
    assert "name=viewport" in page and "prefers-color-scheme: dark" in page
    assert page.count("<div class=scroll><table>") == page.count("<table>") >= 3  # no table widens a narrow page
    assert "searched on the scored list used its truth" in page
    assert json.loads((finished / "run.json").read_text())["command"][0] in html.unescape(page)


@pytest.mark.slow
def test_the_report_is_made_of_files_alone(out: Path, data: Path) -> None:
    page = (out / "report.html").read_text()
    assert len(re.findall('aria-label="prediction"', page)) == len(VAL) + len(IDS)
    shutil.rmtree(out / "weights")
    assert run(data, out, "--steps", "report", "--redo") == 0
    again = (out / "report.html").read_text()
    pictures = [re.findall("data:image/(?:jpeg|png);base64,([^\")]*)", text) for text in (page, again)]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(out: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(out, *MADE)
    told = said(capsys, data, out)
    assert told.count("done already") == len(select([])) and "next: " not in told
    assert "[8/9] localise: does not apply: sample has no boxes to find." in told
    assert "pseudo masks after the walk" in told  # the scores
    assert digests(out, *MADE) == before
    told = said(capsys, data, out, "--steps", "train_cam")
    assert "next: " not in told and "pseudo masks after the walk" in told


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes(finished: Path, data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "again", "--machine.workers", "2") == 0
    assert digests(tmp_path / "again", *MADE) == digests(finished, *MADE)


@pytest.mark.slow
def test_a_missing_file_is_made_again_and_nothing_else(
    out: Path, finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "cam" / f"{IDS[3]}.npz").unlink()
    (out / "weights" / "aff.pt").unlink()
    told = said(capsys, data, out)
    assert "make_cam: 7 of 8 images are done already" in told
    assert told.count("done already (--redo") == 5  # the page is made anew
    assert digests(out, *MADE) == digests(finished, *MADE)


@pytest.mark.slow
def test_steps_can_be_done_one_after_the_other(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "steps"
    told = said(capsys, data, out, "--steps", "train_cam", "2")
    assert told.count("next: ") == 1 and told.rstrip().endswith("--steps make_aff_label")
    assert not (out / "aff_label").exists()
    said(capsys, data, out, "--steps", "3-5")
    assert not (out / "weights" / "seg.pt").exists()
    assert digests(out, *MADE) == {k: v for k, v in digests(finished, *MADE).items() if "seg" not in k}


@pytest.mark.slow
def test_a_step_without_what_it_needs_names_it(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, data, tmp_path / "new", "--steps", "make_cam")
    assert "make_cam needs the files of train_cam, and there are none in" in told
    assert "--steps train_cam-make_cam" in told
    told = refused(capsys, data, tmp_path / "new", "--steps", "5")
    assert "random_walk needs the files of make_cam and train_aff," in told and "--steps train_cam-random_walk" in told
    assert not (tmp_path / "new").exists()
    assert "random_walk" in refused(capsys, data, tmp_path / "new", "--steps", "train_seg")
    flags = ("--steps", "train_seg", "--masks", "truth", "--seg.weights", "cam")
    assert "cam.pt does not exist. Run train_cam first" in refused(capsys, data, tmp_path / "truth", *flags)


@pytest.mark.slow
def test_parts_together_are_the_whole(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parts"
    told = said(capsys, data, out, "--shard", "0/2")
    assert "[4/9] train_aff: needs all 2 parts" in told and "nothing" not in told
    assert {p.stem for p in (out / "cam").iterdir()} == set(IDS[::2]) and not (out / "scores.json").exists()
    said(capsys, data, out, "--shard", "1/2")
    assert {p.stem for p in (out / "aff_label").iterdir()} == set(IDS)
    told = said(capsys, data, out)
    assert "[1/9] train_cam: done already" in told and "make_cam: 8 of 8 images are done already" in told
    assert digests(out, *MADE) == digests(finished, *MADE)
    assert (out / "scores.json").read_text() == (finished / "scores.json").read_text()


@pytest.mark.slow
def test_redo_does_the_named_step_again_and_what_rests_on_it(
    out: Path, finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "label" / f"{IDS[0]}.png").write_bytes(b"edited")
    (out / "weights" / "seg.resume.pt").write_bytes(b"left by an interrupted training")
    (out / "weights" / "cam.pt").touch()
    said(capsys, data, out, "--redo", "--steps", "random_walk")
    assert not (out / "weights" / "seg.pt").exists() and not (out / "weights" / "seg.resume.pt").exists()
    assert not (out / "seg").exists() and not (out / "report.html").exists()
    assert list(json.loads((out / "scores.json").read_text())) == ["CAM", "pseudo masks after the walk"]
    said(capsys, data, out)
    assert digests(out, *MADE) == digests(finished, *MADE)


def test_redo_of_a_part_is_refused(out: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--redo with --shard" in refused(capsys, data, out, "--redo", "--shard", "0/2")
    assert (out / "cam").exists()


@pytest.mark.slow
def test_true_masks_can_be_trained_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, data, tmp_path / "truth", "--masks", "truth", "--steps", "6", "7")
    assert "trained on true masks" in told


@pytest.mark.slow
def test_voc12_root_chooses_the_data_set(data: Path) -> None:
    for words in (["--voc12_root", str(data)], ["--voc12-root", str(data)], [f"--voc12_root={data}"]):
        cfg = parsing.parse(["seam", *words])
        assert cfg.data == "voc12" and cfg.root == data
    assert parsing.parse(["seam", "--root", str(data)]).data == "sample"


@pytest.mark.slow
def test_a_folder_of_ones_own_needs_no_other_word(tmp_path: Path) -> None:
    cfg = parsing.parse(["--data", "folder", "--root", str(tmp_path)])
    assert (cfg.method, cfg.preset, cfg.data, cfg.long_side) == ("irn_cam", "photos", "folder", 1024)
    networks = (cfg.cam.network, cfg.seg.network)
    assert {network.backbone for network in networks} == {"timm/tf_efficientnet_lite0.in1k"}
    assert cfg.cam.weights == "pretrained" and cfg.seg.weights == "cam"  # no FILE anywhere
    walk = cfg.aff.walk  # what was found on photographs: docs/photographs.md
    assert (cfg.refiner, walk.background, walk.logt, walk.crf.iterations) == ("edge", "otsu", 8, 5)
    assert parsing.parse(["seam", "--data", "folder", "--root", "x"]).preset == "photos"
    assert parsing.parse(["mctformer", "--data", "folder", "--root", "x"]).preset == "sample"  # it has no photos
    assert parsing.parse(["seam", "--data", "folder", "--root", "x", "--preset", "published"]).preset == "published"


@pytest.mark.slow
@pytest.mark.parametrize("at, told", [
    (0, "the training cam has no resume point yet and begins anew, what was finished before is kept: start the same"),
    (1, "start the same command again (without --redo) to continue train_cam from its last resume point."),
])  # fmt: skip
def test_an_interrupted_training_says_where_it_goes_on(
    at: int, told: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupted(seed: int, step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr("misc.loop.fit.seed_step", interrupted)
    assert run(data, tmp_path / "out", "--machine.checkpoint-every", "1") == 130
    assert f"\ninterrupted: {told}" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_says_so_and_leaves_nothing_half(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, replace = tmp_path / "out", os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(target).name == f"{IDS[4]}.npz":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        assert run(data, out) == 130
    kept = "(without --redo) to continue make_cam; images that are finished are kept."
    assert f"interrupted: start the same command again {kept}" in capsys.readouterr().err
    written = {path.stem for path in (out / "cam").iterdir()}
    assert not list(out.rglob("*.part")) and {*IDS[:4]} <= written and IDS[4] not in written  # threads write ahead
    assert run(data, out, "--steps", "1-2") == 0
    assert digests(out, "cam/*") == digests(finished, "cam/*")


# ---------------------------------------------------------------------------------------------- another configuration


@pytest.mark.slow
def test_another_configuration_is_refused_unless_forced(
    out: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(out, *MADE)
    told = refused(capsys, data, out, "--cam.fit.lr", "0.5", "--aff.walk.beta", "2")
    assert "cam.fit.lr: 0.01 there, 0.5 now" in told and "aff.walk.beta: 8.0 there, 2.0 now" in told
    assert str(out) in told and "--force" in told and "cam.fit.steps" not in told
    many = refused(capsys, data, out, "--preset", "published", "--cam.weights", "none")
    assert len(many.splitlines()) <= 14 and re.search(r"\n  and \d+ more\n", many)
    said(capsys, data, out, "--aff.walk.beta", "2", "--force", "--redo", "--steps", "random_walk")
    after = digests(out, *MADE)
    assert after == {k: v for k, v in before.items() if k in after} or after != before
    assert json.loads((out / "run.json").read_text())["config"]["aff.walk.beta"] == 2


@pytest.mark.slow
def test_settings_of_later_steps_may_change_until_these_have_made_something(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    said(capsys, data, out, "--steps", "1-2")
    said(capsys, data, out, "--aff.walk.beta", "2", "--seg.fit.lr", "0.5", "--steps", "3")
    told = refused(capsys, data, out, "--aff.walk.beta", "3", "--seg.fit.lr", "0.25", "--steps", "4")
    assert "aff.walk.beta: 2.0 there, 3.0 now" in told and "seg.fit.lr" not in told
    said(capsys, data, out, "--aff.walk.beta", "2", "--seg.fit.lr", "0.25", "--steps", "4")


@pytest.mark.slow
def test_all_settings_may_change_while_nothing_was_made(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a start without weights says to give a file: that works in the same folder."""
    out = tmp_path / "out"

    def unreachable(*_: object) -> None:
        raise ValueError("no weights here")

    with monkeypatch.context() as patch:
        patch.setattr("step.train_cam.build_network", unreachable)
        assert run(data, out, "--steps", "1") == 1
    assert "no weights here" in capsys.readouterr().err and (out / "run.json").exists()
    said(capsys, data, out, "--cam.fit.lr", "0.5", "--steps", "1")
    assert "cam.fit.lr" in refused(capsys, data, out, "--cam.fit.lr", "0.25", "--steps", "1")


@pytest.mark.slow
def test_cams_of_a_longer_list_serve_a_part_of_it(
    out: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part.txt"
    part.write_text("\n".join(IDS[:5]) + "\n")
    flags = ("--cams", str(out), "--train-list", str(part), "--score-list", str(part), "--steps", "3-5")
    said(capsys, data, tmp_path / "new", *flags)
    assert sorted(p.stem for p in (tmp_path / "new" / "label").iterdir()) == sorted(IDS[:5])
    (out / "cam" / f"{IDS[1]}.npz").unlink()
    assert f"no CAMs of 1 images of this run's list, such as {IDS[1]}" in refused(
        capsys, data, tmp_path / "other", *flags
    )


@pytest.mark.slow
def test_what_an_unfinished_step_has_left_is_not_taken_for_the_forced_settings(
    out: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((out / "run.json").read_text())
    del record["steps"]["infer_seg"]
    (out / "run.json").write_text(json.dumps(record))
    picture = next((out / "seg").glob("*.png"))
    picture.write_bytes(b"of other settings")
    text = said(capsys, data, out, "--seg.infer.scales", "0.5", "--force", "--steps", "infer_seg")
    assert "Removed what infer_seg had begun with the other settings" in text
    assert picture.read_bytes() != b"of other settings"


def test_other_data_is_another_configuration(
    out: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists(own, "train").write_text("\n".join(IDS[:-1]) + "\n")
    assert "data.train: " in refused(capsys, own, out)


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused(out: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "cam" / f"{IDS[0]}.npz").unlink()
    shutil.copy(out / "weights" / "seg.pt", out / "weights" / "cam.pt")
    assert re.search(r"cam\.pt belongs to another network .*--redo", refused(capsys, data, out, status=1))
    store.write_weights(out / "other.pt", {"blocks.0.weight": torch.zeros(3)})
    told = refused(capsys, data, out.with_name("new"), "--cam.weights", str(out / "other.pt"))
    assert "other.pt" in told and not (out.with_name("new") / "weights" / "cam.pt").exists()


@pytest.mark.slow
def test_a_weight_file_is_known_by_its_content_not_by_its_place(
    out: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--steps", "train_cam", "--redo", "--force", "--cam.weights")
    first = shutil.copy(out / "weights" / "cam.pt", tmp_path / "start.pt")
    said(capsys, data, out, *flags, str(first))
    moved = shutil.move(first, tmp_path / "elsewhere.pt")
    assert "train_cam: done already" in said(capsys, data, out, "--steps", "train_cam", "--cam.weights", str(moved))
    state, description = store.read_model(moved)
    state["fc8.weight"] += 1
    store.write_model(moved, state, description)
    told = refused(capsys, data, out, "--steps", "train_cam", "--cam.weights", str(moved))
    assert re.search(r"cam\.weights: '\d+ bytes, sha256 \w{64}' there, '\d+ bytes, sha256", told)


@pytest.mark.slow
def test_a_resume_point_of_other_settings_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, replace = tmp_path / "out", os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(target).name == "cam.pt":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        assert run(data, out) == 130
    told = refused(capsys, data, out, "--cam.fit.lr", "0.5", "--force", status=1)
    assert "cam.resume.pt is the resume point of another training (fit.lr was 0.01, is 0.5)" in told
    said(capsys, data, out, "--cam.fit.lr", "0.5", "--redo", "--steps", "train_cam")


def test_the_settings_of_these_tests_are_all_flags() -> None:
    cfg = parsing.parse(arguments(Path("data"), Path("out")))
    assert cfg.cam.fit.steps == 4 and cfg.machine.workers == 0 and len(TINY) > 20
