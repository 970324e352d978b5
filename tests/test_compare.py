"""Scripts that look at runs: several side by side (scripts/compare.py), one image in all steps (scripts/look.py)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import NEEDS_BROWSER, Browser
from PIL import Image
from running import ROOM, run

from misc.files.images import read_image, read_mask
from misc.files.runfolder import RunFolder
from net.registry import SEEDS, load_methods
from scripts import compare, look
from step import report
from step.lib.config import default_config, open_job, recorded_config
from step.lib.report import story


@pytest.fixture(scope="module")
def runs(data: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three finished runs: a and b differ in their seeds, c in its refiner; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished, folder / "a")
    assert run(data, folder / "b", "--seed", "3") == 0
    shutil.copytree(folder / "a", folder / "c")
    for name in ("run.json", "scores.json", "report.html"):
        (folder / "c" / name).unlink()
    record = json.loads((folder / "a" / "run.json").read_text())
    scores = json.loads((folder / "a" / "scores.json").read_text())
    record["config"]["refiner"] = "irn"
    (folder / "c" / "run.json").write_text(json.dumps(record))
    (folder / "c" / "scores.json").write_text(json.dumps(scores))
    return folder


def miou(folder: Path, number: int) -> float:
    return list(json.loads((folder / "scores.json").read_text()).values())[number]["miou"]


@pytest.mark.slow
def test_a_row_is_a_mean_over_seeds_and_published_figures_stand_apart(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*(str(runs / name) for name in "abc"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "compare").with_suffix(".md").read_text()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:4]]
    assert len(rows) == 2 and head[-1].startswith("published") and head[:3] == ["method", "refiner", "segmenter"]
    both, alone = ({**dict(zip(head, row, strict=True))} for row in rows)
    for column, number in (("CAM", 0), ("pseudo mask", 1), ("prediction", 2)):
        values = [miou(runs / name, number) for name in "ab"]
        assert both[column] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        assert alone[column] == f"{miou(runs / 'c', number):.2f}"
    assert both["seeds"] == "0, 3" and (both["refiner"], alone["refiner"]) == ("psa", "irn")
    assert both[head[-1]] == SEEDS["psa"].published_scores == "48.0 / 58.1 / 61.7 †"
    assert "not the same" not in text and text.splitlines()[0] in capsys.readouterr().out
    page = (tmp_path / "compare.html").read_text()
    known = {name: json.loads((runs / name / "scores.json").read_text()) for name in "abc"}
    shown = re.findall(r'<span data-score="([^"]+)">([^<]+)</span>', page)
    assert len(shown) == 9
    for path, number in shown:
        name, score, key = json.loads(path.replace("&#34;", '"'))
        assert number == f"{known[name][score][key]:.2f}"
    for name in "abc":
        assert f'aria-label="{name}"' in page and f'aria-label="mistakes of {name}"' in page


def test_settings_that_differ_and_other_data_are_told(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "d")
    path = tmp_path / "d" / "run.json"
    record = json.loads(path.read_text())
    record["config"]["cam.fit.lr"], record["data"]["val"] = 0.5, "another"
    path.write_text(json.dumps(record))
    found = [compare.read_run(folder) for folder in (runs / "a", tmp_path / "d")]
    assert [told for told, _ in compare.group_runs(found)] == ["cam.fit.lr 0.01", "cam.fit.lr 0.5"]
    (warning,) = compare.find_warnings(found)
    assert warning.startswith("The list val is not the same")
    assert [r.name for r in compare.distinct_names([found[0], compare.read_run(runs / "a")])] == [str(runs / "a")] * 2


PARTIAL = {
    "nothing but a number": lambda score: {"miou": score["miou"]},
    "no number": lambda score: {"split": "val"},
    "no number but null": lambda score: {**score, "miou": None, "threshold": None},
    "no tables": lambda score: {k: v for k, v in score.items() if k not in ("classes", "confusion", "predicted_void")},
    "classes without IoU": lambda score: {**score, "classes": [{"name": c["name"]} for c in score["classes"]]},
    "no predicted_void": lambda score: {k: v for k, v in score.items() if k != "predicted_void"},
}


@pytest.mark.parametrize("name", PARTIAL)
def test_files_that_lack_optional_fields_are_shown_as_far_as_they_go(name: str, runs: Path, tmp_path: Path) -> None:
    for place in ("first", "all") if name == "no tables" else ("all",):
        out = tmp_path / place
        shutil.copytree(runs / "a", out)
        scores, record = (json.loads((out / f"{file}.json").read_text()) for file in ("scores", "run"))
        changed = {n: PARTIAL[name](s) if place == "all" or s is scores["CAM"] else s for n, s in scores.items()}
        (out / "scores.json").write_text(json.dumps(changed))
        kept = ("config", "data", "data_root")
        (out / "run.json").write_text(json.dumps({k: record[k] for k in kept}))
        job = open_job(recorded_config(RunFolder(out)))
        assert "<h2>All scores</h2>" in story.make_page(job, [])
        report.show(job)
        assert compare.main([str(out), str(runs / "b"), "--out", str(tmp_path), "--no-pictures"]) == 0
        (out / "run.json").write_text(json.dumps({"config": {}, "data": {}, "data_root": record["data_root"]}))
        assert compare.main([str(out), str(runs / "b"), "--out", str(tmp_path), "--no-pictures"]) == 0
        with pytest.raises(ValueError, match=r"run\.json is damaged: its config has no method, preset"):
            recorded_config(RunFolder(out))


def test_a_confusion_of_other_classes_is_told(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "d")
    path = tmp_path / "d" / "scores.json"
    scores = json.loads(path.read_text())
    scores["CAM"]["confusion"].pop()
    path.write_text(json.dumps(scores))
    with pytest.raises(ValueError, match=r"scores\.json cannot be read \(the confusion of 'CAM' .*delete it"):
        RunFolder(tmp_path / "d").scores()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path)]) == 1 and "no run folder" in capsys.readouterr().err
    assert compare.main([]) == 2
    assert look.main(["x", "--run", str(tmp_path)]) == 1 and "no run folder" in capsys.readouterr().err


@pytest.mark.slow
@NEEDS_BROWSER
def test_a_browser_shows_the_comparison(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    assert compare.main([*(str(runs / name) for name in "abc"), "--out", str(tmp_path)]) == 0
    with Browser(tmp_path / "compare.html", 390, 800) as browser:
        assert browser.errors == [] and browser.requests == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.evaluate("document.querySelectorAll('.vega svg').length") == 1


def test_the_published_figures_are_those_of_the_readme() -> None:
    load_methods()
    text = (ROOM / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]*?) \|$", text, re.M))
    assert {name: cls.published_scores for name, cls in SEEDS.items() if name in rows} == rows


def test_the_recorded_configuration_is_that_of_the_run(runs: Path, data: Path) -> None:
    cfg = recorded_config(RunFolder(runs / "a"))
    known = json.loads((runs / "a" / "run.json").read_text())["config"]
    assert {k: v for k, v in cfg.recorded().items() if not k.endswith("weights")} == {
        k: v for k, v in known.items() if not k.endswith("weights")
    }
    assert cfg.root == data.resolve() and cfg.cam.fit.steps == 4
    assert cfg.cam.fit != default_config("psa", "sample").cam.fit


@pytest.mark.slow
def test_one_image_through_all_steps(runs: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "steps.png"
    assert look.main(["2025_000001", "--run", str(runs / "a"), "--out", str(out), "--device", "cpu"]) == 0
    with Image.open(out) as sheet:
        assert sheet.width > 500 and sheet.height > 500
    job = open_job(recorded_config(RunFolder(runs / "a")))
    image = read_image(job.catalog.image_path("2025_000001"))
    panels = look.show_steps(job, "2025_000001", image, None, look.torch.device("cpu"))
    names = [job.catalog.classes[c] for c in np.flatnonzero(job.catalog.tags("2025_000001"))]
    captions = [re.sub(r" above .*", "", caption) for caption, _, _ in panels]
    assert captions == [
        "image (tags of the data set)", *(f"CAM: {name}" for name in names), "CAM", "affinity label", "pseudo mask",
        "prediction before the CRF", "prediction", "truth", "mistakes of the prediction",
    ]  # fmt: skip
    # what it computes anew is what the run's files hold
    made = look.predict_masks(job, image, look.torch.device("cpu"))["prediction"]
    assert (made == read_mask(runs / "a" / "seg" / "2025_000001.png")).mean() > 0.99


@pytest.mark.slow
def test_runs_on_copies_of_large_images(data: Path, tmp_path: Path) -> None:
    flags, name = ("--long-side", "60", "--steps", "1-2"), "2025_000001"
    assert run(data, tmp_path / "run", *flags) == 0
    assert compare.main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert name in (tmp_path / "compare.html").read_text()
    job = open_job(recorded_config(RunFolder(tmp_path / "run")))
    copy = tmp_path / "run" / "smaller-60" / "images" / f"{name}.jpg"
    for word in (name, str(data / "JPEGImages" / f"{name}.jpg")):
        assert look.find_image(job, word) == (name, copy)
    assert look.main([name, "--run", str(tmp_path / "run"), "--out", str(tmp_path / "x.png")]) == 0


@pytest.mark.slow
def test_an_image_that_the_run_has_never_seen(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(tmp_path / "new.jpg")
    out = tmp_path / "new.png"
    job = open_job(recorded_config(RunFolder(runs / "a")))
    name = job.catalog.classes[0]
    call = [str(tmp_path / "new.jpg"), "--run", str(runs / "a"), "--out", str(out), "--device", "cpu"]
    assert look.main([*call, "--tags", name]) == 0 and out.exists()
    assert look.main(call) == 0  # the classes of the prediction
    assert look.main([*call, "--tags", "unicorn"]) == 1 and "no class unicorn" in capsys.readouterr().err
    assert look.main(["nothing", "--run", str(runs / "a")]) == 1 and "neither a file" in capsys.readouterr().err
