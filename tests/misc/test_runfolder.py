"""The run folder: what it records, what it refuses, what a failing step leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import start

from misc.files import store
from misc.files.runfolder import OtherConfiguration, RunFolder

CONFIG = {"method": "seam", "cam.fit.lr": 0.1, "cam.infer.scales": (1.0, 0.5)}
DATA = {"train": "1234"}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.begin(CONFIG, {"workers": 2}, DATA, force=False)
    return run


def test_every_kind_of_file_has_its_place(run: RunFolder) -> None:
    paths = [
        run.weights("cam"), run.cam("a"), run.aff_label("a"), run.aff_planes("a"), run.label("a"), run.seg("a"), run.log
    ]  # fmt: skip
    wanted = "weights/cam.pt cam/a.npz aff_label/a.png aff_label/a.npz label/a.png seg/a.png log"
    assert [str(p.relative_to(run.root)) for p in paths] == wanted.split()
    for place in (run.cam, run.aff_label, run.aff_planes, run.label, run.seg):
        with pytest.raises(ValueError, match="not allowed"):
            place("../a")


def test_the_record_says_what_made_the_run(run: RunFolder) -> None:
    record = run.record()
    assert record["config"]["cam.fit.lr"] == 0.1 and record["data"] == DATA and record["machine"] == {"workers": 2}
    assert record["world_size"] == 1 and len(record["command"]) == 1
    assert {"python", "torch", "numpy"} <= record["versions"].keys() and record["git_commit"]


def test_the_same_configuration_goes_on_and_every_command_is_kept(run: RunFolder) -> None:
    with run.step("train_cam"):
        pass
    run.begin(CONFIG, {"workers": 0}, DATA, force=False)
    assert run.finished("train_cam") and len(run.record()["command"]) == 2 and run.record()["machine"]["workers"] == 0


def test_another_configuration_is_refused_with_the_fields_that_differ(run: RunFolder) -> None:
    other = {**CONFIG, "cam.fit.lr": 0.2, "new": 1}
    with pytest.raises(OtherConfiguration) as told:
        run.begin(other, {}, {"train": "5678"}, force=False)
    text = str(told.value)
    for line in ("cam.fit.lr: 0.1 there, 0.2 now", "new: None there, 1 now", "data.train: '1234' there, '5678' now"):
        assert line in text
    assert "method" not in text and "--force" in text and str(run.root) in text
    assert run.record()["config"]["cam.fit.lr"] == 0.1
    with run.step("train_cam"):
        pass
    run.begin(other, {}, DATA, force=True)
    assert run.record()["config"]["cam.fit.lr"] == 0.2 and run.finished("train_cam")


def test_a_failing_step_is_not_done_and_leaves_the_earlier_ones(run: RunFolder) -> None:
    with run.step("train_cam"):
        pass
    with pytest.raises(RuntimeError), run.step("make_cam"):
        raise RuntimeError("failed")
    assert run.finished("train_cam") and not run.finished("make_cam")
    taken = run.record()["steps"]["train_cam"]
    assert taken["seconds"] >= 0 and taken["peak_memory_mb"] > 1


def test_a_part_of_a_step_is_not_the_whole_and_times_add_up(run: RunFolder) -> None:
    with run.step("make_cam", done=False):
        pass
    assert not run.finished("make_cam")
    record = run.record()
    record["steps"]["make_cam"]["seconds"] = 100
    store.write_json(run.root / "run.json", record)
    with run.step("make_cam"):
        pass
    assert run.finished("make_cam") and run.record()["steps"]["make_cam"]["seconds"] >= 100


def test_scores_are_kept_until_their_step_is_forgotten(run: RunFolder) -> None:
    for step, name in (("make_cam", "CAM"), ("random_walk", "pseudo masks")):
        with run.step(step):
            run.add_score(name, {"miou": 50.0})
    with run.step("make_cam"):
        run.add_score("CAM", {"miou": 60.0})
    assert run.scores()["CAM"]["miou"] == 60 and run.scores()["pseudo masks"]["step"] == "random_walk"
    run.forget("random_walk")
    assert list(run.scores()) == ["CAM"] and not run.finished("random_walk") and run.finished("make_cam")
    run.forget("infer_seg")


def test_a_damaged_record_is_named_with_a_remedy(run: RunFolder) -> None:
    (run.root / "run.json").write_text('{"config": ')
    with pytest.raises(ValueError, match=r"run\.json cannot be read .*delete it and run again"):
        run.begin(CONFIG, {}, DATA, force=False)


def test_settings_with_which_nothing_was_made_may_change(run: RunFolder) -> None:
    other = {**CONFIG, "aff.walk.beta": 7, "seg.fit.lr": 1.0}
    with pytest.raises(OtherConfiguration, match="seg.fit.lr"):
        run.begin(other, {}, DATA, force=False, free=["aff."])
    assert not run.begin(other, {}, DATA, force=False, free=["aff.", "seg."])
    assert run.record()["config"]["aff.walk.beta"] == 7
    assert run.begin(CONFIG | {"method": "psa"}, {}, DATA, force=True)


@pytest.mark.slow
def test_one_process_at_a_time_or_several_that_share(run: RunFolder, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from misc.files.runfolder import OtherConfiguration, RunFolder\n"
        f"root, config, data = Path({str(run.root)!r}), {CONFIG!r}, {DATA!r}\n"
        "try: RunFolder(root).begin(config, {}, data, force='force' in sys.argv, shared='shared' in sys.argv)\n"
        "except OtherConfiguration as error: print(error)\n"
        "else: print('began')"
    )
    run.begin(CONFIG, {}, DATA, force=False)
    for argv in ([], ["shared"], ["force"]):
        assert "another process is at work in this run folder" in start(["-c", code, *argv]).stdout, argv
    run.begin(CONFIG, {}, DATA, force=False, shared=True)
    assert start(["-c", code, "shared"]).stdout == "began\n"
    assert "another process" in start(["-c", code]).stdout
