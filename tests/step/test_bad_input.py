"""Bad input in a run: it is told by name, and costs nothing that is finished."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from running import digests
from test_run import IDS, MADE, VAL, lists, refused, said

from misc.files.camfiles import read_cam
from misc.files.images import read_mask, write_mask
from misc.files.runfolder import RunFolder
from step.lib.image_check import check_images, keep_checked

pytestmark = pytest.mark.usefixtures("no_default_folders")


def spoil_jpeg(own: Path, image_id: str) -> bytes:
    path = own / "JPEGImages" / f"{image_id}.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


@pytest.mark.slow
def test_a_listed_image_that_is_not_there(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "JPEGImages" / f"{IDS[2]}.jpg").unlink()
    told = refused(capsys, own, tmp_path / "new")
    assert f"1 have no image file ({IDS[2]}). Add them" in told and str(own) in told
    assert not (tmp_path / "new").exists()
    with lists(own, "train").open("w") as file:
        file.write("\n".join(i for i in IDS if i != IDS[2]))
    lists(own, "more").write_text("\n".join(IDS))
    assert IDS[2] in refused(capsys, own, tmp_path / "new", "--score-list", "more")


@pytest.mark.slow
@pytest.mark.parametrize("text, told", [("", "is empty"), ("../../etc/passwd\n", "'../../etc/passwd' is not allowed")])
def test_a_bad_list(text: str, told: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists(own, "train").write_text(text)
    message = refused(capsys, own, tmp_path / "new")
    assert told in message and "train.txt" in message and not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["size", "value"])
def test_a_wrong_true_mask_spares_what_is_finished(
    kind: str, own: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own / "SegmentationClass" / f"{IDS[1]}.png"
    whole, mask = path.read_bytes(), read_mask(path)
    bad = mask[:-3] if kind == "size" else np.where(mask == 0, 9, mask)
    write_mask(path, bad)
    out = tmp_path / "out"
    told = refused(capsys, own, out, status=1)
    assert IDS[1] in told and ("9" in told if kind == "value" else str(mask.shape[0] - 3) in told)
    assert digests(out, "cam/*") == digests(finished, "cam/*")
    told = refused(capsys, own, tmp_path / "truth", "--masks", "truth", "--steps", "train_seg", status=1)
    assert IDS[1] in told
    path.write_bytes(whole)
    said(capsys, own, out, "--steps", "1-2")
    assert (out / "scores.json").exists()


def test_a_truncated_image_is_told_before_training(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every list that a step reads, at every start until it is whole."""
    whole, out = spoil_jpeg(own, VAL[1]), tmp_path / "new"
    told = refused(capsys, own, out)
    assert "1 images of this run's lists" in told and not out.exists()
    assert re.search(rf"{VAL[1]}\.jpg cannot be read .*replace it, or take it off the list", told)
    (own / "JPEGImages" / f"{VAL[1]}.jpg").write_bytes(whole)
    said(capsys, own, out, "--steps", "1")
    assert set(json.loads((out / "checked_images.json").read_text())) == set(IDS)
    spoil_jpeg(own, IDS[2])
    assert f"{IDS[2]}.jpg cannot be read" in refused(capsys, own, out, "--steps", "1", "--redo")
    assert (out / "weights" / "cam.pt").exists()


@pytest.mark.parametrize("text", [None, "{", '{"a": 3}', "[]"])
def test_notes_of_whole_images_that_are_damaged(text: str | None, tmp_path: Path) -> None:
    """They are made anew; a file of a time before 1970 is as good as any."""
    file = tmp_path / "a.jpg"
    Image.new("RGB", (6, 4)).save(file)
    os.utime(file, ns=(-(10**9), -(10**9)))
    job: Any = SimpleNamespace(run=RunFolder(tmp_path), catalog=SimpleNamespace(image_path=lambda image_id: file))
    keep_checked(job.run, check_images(job, ["a"]))
    if text is not None:
        job.run.checked_images.write_text(text)
    assert check_images(job, ["a"])["a"] == [file.stat().st_size, -(10**9)]
    keep_checked(job.run, check_images(job, ["a"]))
    assert list(json.loads(job.run.checked_images.read_text())) == ["a"]


def test_damage_within_an_image_stops_training_by_name(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of the file is as it should be: only the loader sees it."""
    path = own / "JPEGImages" / f"{IDS[2]}.jpg"
    Image.open(path).save(path.with_suffix(".png"))
    path.unlink()
    damaged = bytearray(path.with_suffix(".png").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.with_suffix(".png").write_bytes(damaged)
    for workers in ("0", "2"):
        told = refused(capsys, own, tmp_path / "new", "--machine.workers", workers, status=1)
        assert re.search(rf"{IDS[2]}\.png cannot be read .*replace it, or take it off the list", told)


@pytest.mark.slow
def test_failing_images_cost_no_other_and_the_same_command_goes_on(
    own: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    said(capsys, own, out, "--steps", "1")
    whole = {i: spoil_jpeg(own, i) for i in IDS[1:3]}
    told = refused(capsys, own, out)  # trainings are still to come
    assert IDS[1] in told and IDS[2] in told and not (out / "cam").exists()
    told = refused(capsys, own, out, "--steps", "2", status=1)
    assert "make_cam: 2 of 8 images failed" in told and f"{IDS[1]}.jpg cannot be read" in told and IDS[2] in told
    assert {p.stem for p in (out / "cam").iterdir()} == set(IDS) - set(whole)
    record = json.loads((out / "run.json").read_text())
    assert record["steps"]["train_cam"]["done"] and "make_cam" not in record["steps"]
    for image_id, content in whole.items():
        (own / "JPEGImages" / f"{image_id}.jpg").write_bytes(content)
    assert "make_cam: 6 of 8 images are done already" in said(capsys, own, out)
    assert digests(out, *MADE) == digests(finished, *MADE)


@pytest.mark.slow
def test_a_cam_file_cut_short_is_named_and_made_again_once_deleted(
    out: Path, data: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = out / "cam" / f"{IDS[5]}.npz"
    path.write_bytes(path.read_bytes()[:200])
    (out / "aff_label" / f"{IDS[5]}.png").unlink()
    (out / "aff_label" / f"{IDS[5]}.npz").unlink()
    for workers in ("0", "2"):
        told = refused(capsys, data, out, "--machine.workers", workers, status=1)
        assert re.search(rf"make_aff_label: 1 of 1 .*\n.*{IDS[5]}\.npz cannot be read .*delete it", told)
    path.unlink()
    said(capsys, data, out)
    assert digests(out, *MADE) == digests(finished, *MADE)


@pytest.mark.slow
def test_unusual_images_work_and_one_without_tags_is_background(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = own / "JPEGImages"

    def picture(image_id: str) -> Image.Image:
        return Image.open(folder / f"{image_id}.jpg").convert("RGB")

    picture(IDS[0]).convert("CMYK").save(folder / f"{IDS[0]}.jpg")
    Image.fromarray(np.array(picture(IDS[1]).convert("L")).astype(np.uint16) * 257).save(folder / f"{IDS[1]}.png")
    (folder / f"{IDS[1]}.jpg").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    # stored lying on its side, so that it stands once it is turned
    picture(IDS[2]).transpose(Image.Transpose.ROTATE_90).save(folder / f"{IDS[2]}.jpg", exif=exif)
    note = own / "Annotations" / f"{IDS[3]}.xml"
    note.write_text(re.sub(r"<object>.*</object>", "", note.read_text(), flags=re.S))
    out = tmp_path / "out"
    assert f"1 images have no tag ({IDS[3]}): taken as background only" in said(capsys, own, out)
    for image_id in IDS[:4]:
        mask = read_mask(out / "label" / f"{image_id}.png")
        assert mask.shape == read_mask(own / "SegmentationClass" / f"{image_id}.png").shape
    assert not read_mask(out / "label" / f"{IDS[3]}.png").any()
    assert len(read_cam(out / "cam" / f"{IDS[3]}.npz").keys) == 0


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_a_message(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ("--cam.fit.lr", "1e30", "--machine.checkpoint-every", "1", "--cam.network.resnet38.freeze-bn")
    told = refused(capsys, data, out, *flags, status=1)
    assert "cam: the loss is not finite at update" in told and "smaller --cam.fit.lr" in told
    kept = torch.load(out / "log" / "cam_nonfinite_rank0.pt", weights_only=True)
    assert kept[0]["image"].shape == (4, 3, 48, 48)
    assert (out / "weights" / "cam.resume.pt").exists() and not (out / "weights" / "cam.pt").exists()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_message_and_keeps_what_is_finished(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, replace = tmp_path / "out", os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == f"{IDS[4]}.npz":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        told = refused(capsys, data, out, status=1)
    assert f"No disk space left while writing {out / 'cam' / IDS[4]}.npz. Free some" in told
    written = {path.stem for path in (out / "cam").iterdir()}
    assert {*IDS[:4]} <= written and IDS[4] not in written
    said(capsys, data, out, "--steps", "1-2")
    assert digests(out, "cam/*") == digests(finished, "cam/*")
