"""The page of a run: what it says of a tiny run, and that a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import NEEDS_BROWSER, Browser, find_browser
from PIL import Image
from running import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from misc.files.images import layer_bytes, read_mask, write_mask
from misc.files.runfolder import RunFolder
from misc.image import draw
from misc.loop.terms import RATING
from step.lib.report import charts, choose, findings, gallery, judge, story
from step.lib.report.curves import TrainingCurve, read_curves
from step.lib.report.page import NO_CHARTS, NOT_DRAWN, keep_flags, load_library
from voc12.catalog import open_catalog

NUMBER = re.compile(r'<span data-score="([^"]+)">([^<]+)</span>')


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert run(data, out, "--cam.selection", "train_miou", "--cam.fit.epochs", "2") == 0
    return out


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return (finished / "report.html").read_text()


def look_up(scores: object, path: str) -> float:
    """The value at a marked path."""
    for key in json.loads(path.replace("&#34;", '"')):
        scores = scores[key]  # type: ignore[index]
    assert isinstance(scores, float)
    return scores


@pytest.mark.slow
def test_every_number_on_the_page_is_that_of_the_score_file(page: str, finished: Path) -> None:
    scores = json.loads((finished / "scores.json").read_text())
    shown = NUMBER.findall(page)
    assert shown
    for path, text in shown:
        digits = len(text.partition(".")[2])
        assert text == f"{look_up(scores, path):.{digits}f}", path
    paths = {tuple(json.loads(path.replace("&#34;", '"'))) for path, _ in shown}
    for name, score in scores.items():
        assert (name, "miou") in paths
        assert {(name, "classes", i, "iou") for i in range(len(score["classes"]))} <= paths
    specs = json.loads(re.search(r'<script type="application/json" id=specs>(.*?)</script>', page, re.S)[1])
    bars = next(s["data"]["values"] for s in specs.values() if "yOffset" in s.get("encoding", {}))
    named = {title: next(name for name in scores if name.startswith(title)) for title in ("pseudo", "predictions")}
    stages = {"CAM": "CAM", "pseudo mask": named["pseudo"], "prediction": named["predictions"]}
    assert {row["stage"] for row in bars} == set(stages)
    for row in bars:
        known = {c["name"]: c["iou"] for c in scores[stages[row["stage"]]]["classes"]}
        assert row["iou"] == known[row["class"]]
    curve = next(s["data"]["values"] for s in specs.values() if "threshold" in s["data"]["values"][0])
    assert [p["miou"] for p in curve] == [p["miou"] for p in scores["CAM"]["curve"]]


def test_the_page_is_self_contained_and_small(page: str) -> None:
    assert len(page) < 10e6
    assert set(re.findall(r"(?:\bsrc|href)=\W*(\w+:?)", page.partition("<script>")[0])) == {"data:"}
    assert "default-src 'none'" in page and "vegaEmbed" in page


def test_the_curves_are_those_of_the_log(finished: Path) -> None:
    curves = {(c.training, c.term): c for c in read_curves(finished / "log")}
    assert {t for t, _ in curves} == {"cam", "aff", "seg"}
    assert curves["cam", "images_per_second"].updates == [0, 1, 2, 3] and min(
        curves["cam", "images_per_second"].values
    ) > 0
    assert len(curves["cam", "rating/train_miou"].values) == 2  # epochs
    assert len(curves["cam", "lr"].values) == 4 and curves["cam", "lr"].values[0] == pytest.approx(0.01)


def test_the_epoch_whose_weights_were_kept_is_marked() -> None:
    curve = TrainingCurve("cam", f"{RATING}train_miou", [0.0, 1.0, 2.0], [0.2, 0.5, 0.4])
    assert curve.is_rating and not curve.is_loss
    assert [row["best"] for row in charts.rating_chart(curve, "train_miou")["data"]["values"]] == [False, True, False]
    assert [TrainingCurve("cam", term, [], []).is_loss for term in ("er", "lr", "images_per_second")] == [
        True, False, False
    ]  # fmt: skip


def test_flags_are_not_broken_at_the_end_of_a_line() -> None:
    told = keep_flags("give --cam.fit.lr-x 1 & a <b> -- or --out.")
    assert told.startswith("give <span class=flag>--cam.fit.lr-x</span> 1 &amp; a &lt;b&gt; -- or <span class=flag>")


def test_test_settings_are_told_once(finished: Path) -> None:
    scores = json.loads((finished / "scores.json").read_text())
    twice = {"a": scores["CAM"], "b": scores["CAM"], **{name: s for name, s in scores.items() if name != "CAM"}}
    cells = [row[-1] for row in story._score_table(twice).rows]
    assert cells[1] == "as above" and cells[0].startswith("scales") and set(cells) > {cells[0], "as above"}
    boxes = {"boxes: PxAP": {"value": 1.0, "split": "val", "images": 3, "threshold": None, "threshold_choice": "all",
                             "tags": "none"}}  # fmt: skip
    assert "boundary mIoU %" not in story._score_table(boxes).head


def test_tensorboard_shows_the_cams_of_the_same_images_during_the_training(finished: Path, data: Path) -> None:
    log = EventAccumulator(str(finished / "log" / "cam"), size_guidance={"images": 0}).Reload()
    catalog = open_catalog("voc12", data)
    tagged = [i for i in catalog.ids("train") if catalog.tags(i).any()]
    assert log.Tags()["images"] == [f"cam/{i}" for i in tagged[:4]]
    for tag in log.Tags()["images"]:
        shown = log.Images(tag)
        assert [e.step for e in shown] == [0, 1, 2, 3]
        count = 1 + int(catalog.tags(tag.removeprefix("cam/")).sum())  # the image and a map of each tag
        picture = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)))
        image = np.asarray(Image.open(catalog.image_path(tag.removeprefix("cam/"))))
        assert abs(picture.shape[1] - count * (image.shape[1] + 4)) <= 4


def test_a_layer_file_holds_the_layer() -> None:
    mask = np.zeros((40, 50), np.uint8)
    mask[5:20, 5:30], mask[25:, 30:], mask[30:, :10] = 1, 12, 255
    layer = draw.mask_layer(mask)
    again = np.asarray(Image.open(io.BytesIO(layer_bytes(layer))).convert("RGBA"))
    assert (again[..., 3] == layer[..., 3]).all()
    assert (again[layer[..., 3] > 0] == layer[layer[..., 3] > 0]).all()


# ---------------------------------------------------------------------------------------------- single images


def judged(
    image_id: str, iou: float | None, tags: tuple[int, ...] = (0,), found: tuple[int, ...] | None = None
) -> judge.Judgement:
    found = tags if found is None else found
    ious = {} if iou is None else {"CAM": {c: iou for c in tags}}
    return judge.Judgement(
        image_id, tags, ious, frozenset(tags), {"CAM": 0.5}, {"CAM": frozenset(found)}, None if iou else 0.5
    )


def test_images_are_judged_by_what_their_masks_say(finished: Path, data: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    catalog = open_catalog("voc12", data)
    images = judge.RunImages.of(catalog, RunFolder(out))
    image_id = next(i for i in catalog.ids("train") if catalog.tags(i).sum() == 1)
    (tag,) = np.flatnonzero(catalog.tags(image_id)).tolist()
    truth = read_mask(catalog.mask_path(image_id))
    write_mask(out / "label" / f"{image_id}.png", np.where(truth == 255, 0, truth))
    write_mask(out / "seg" / f"{image_id}.png", np.zeros_like(truth))
    seen = judge.judge_image(images, image_id)
    assert seen.tags == (tag,) and seen.present == {tag} and judge.last_stage([seen]) == "prediction"
    assert seen.iou("pseudo mask") == 1 and seen.iou("prediction") == 0
    assert seen.not_found("prediction") == [tag] and seen.not_found("pseudo mask") == []
    other = np.where(truth == tag + 1, 2 - tag, truth)  # the other class
    write_mask(out / "seg" / f"{image_id}.png", np.where(other == 255, 0, other))
    assert judge.judge_image(images, image_id).not_tagged("prediction") == [1 - tag]
    scores = json.loads((finished / "scores.json").read_text())
    assert images.threshold == scores["CAM"]["threshold"]


def test_masks_that_do_not_fit_are_named(finished: Path, data: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    catalog = open_catalog("voc12", data)
    image_id = catalog.ids("train")[0]
    write_mask(out / "label" / f"{image_id}.png", np.zeros((3, 4), np.uint8))
    with pytest.raises(ValueError, match=f"{image_id}: prediction has 3 x 4 pixels"):
        judge.judge_images(judge.RunImages.of(catalog, RunFolder(out)), catalog.ids("train"), 2)


def test_agreement_is_the_mean_over_pairs_and_ignores_what_one_leaves_out() -> None:
    a = np.array([[1, 1, 0, 0]], np.uint8)
    assert judge.agreement_of([a, a], 2) == 1 and judge.agreement_of([a], 2) is None
    assert judge.agreement_of([a, np.array([[1, 0, 0, 0]], np.uint8)], 2) == 0.5
    assert judge.agreement_of([a, np.array([[1, 255, 0, 0]], np.uint8)], 2) == 1
    assert judge.agreement_of([a * 0, a * 0], 2) == 1
    assert judge.agreement_of([a, a, a * 0], 2) == pytest.approx(1 / 3)


def test_groups_are_worst_median_best_by_class_and_tags_not_found() -> None:
    many = [judged(f"i{n:02d}", n / 40, tags=(n % 2,)) for n in range(1, 41)]
    many.append(judged("lost", 0.9, tags=(0, 1), found=(0,)))
    groups = choose.choose_groups(many, "CAM", ("ant", "bee"), ["i07"])
    assert groups["worst"][:3] == ["i01", "i02", "i03"] and groups["best"][0] == "i40"
    assert "i20" in groups["median"] and groups["tag not found"] == ["lost"] and groups["evenly picked"] == ["i07"]
    assert groups["class bee"][:2] == ["i01", "i03"] and groups["class bee"][-1] == "i39"
    assert "i02" not in groups["class bee"]
    unknown = [judged("a", None), judged("b", None, found=(0, 1))]
    groups = choose.choose_groups(unknown, "CAM", ("ant", "bee"))
    assert set(groups) >= {"least agreement", "class without its tag"} and "worst" not in groups
    assert groups["class without its tag"] == ["b"]


def test_a_gallery_that_does_not_fit_says_how_many_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {i: gallery.Card(i, (), "x" * 1000, (2, 2), [], []) for i in "abcd"}
    monkeypatch.setattr(gallery, "MOST_BYTES", 2500)
    made = gallery.make_gallery("t", "", {"worst": ["b", "a"], "best": ["a", "c", "d"]}, cards)
    assert [c.image_id for c in made.cards] == ["b", "a"] and made.left_out == 2
    assert made.groups == {"worst": 2, "best": 1} and made.cards[1].groups == ("worst", "best")


# ---------------------------------------------------------------------------------------------- findings


def score_of(matrix: list[list[int]], void: list[int] | None = None) -> dict:
    counts, lost = np.array(matrix), np.array(void or [0] * len(matrix))
    hits = counts.diagonal()
    ious = 100 * hits / np.maximum(1, counts.sum(1) + lost + counts.sum(0) - hits)
    names = ["background", "ant", "bee", "cat"][: len(matrix)]
    return {
        "confusion": matrix, "predicted_void": lost.tolist(),
        "classes": [{"name": n, "iou": float(i)} for n, i in zip(names, ious, strict=True)],
    }  # fmt: skip


@pytest.mark.parametrize(("matrix", "reason"), [
    ([[900, 0, 0], [60, 40, 0], [0, 0, 100]], "parts of it are missed"),
    ([[900, 0, 0], [95, 5, 0], [0, 0, 100]], "it is hardly found at all"),
    ([[900, 0, 0], [5, 40, 55], [0, 0, 100]], "it is taken for bee"),
    ([[800, 100, 0], [0, 100, 0], [0, 0, 100]], "it spreads over the background"),
    ([[900, 0, 0], [0, 100, 0], [0, 120, 180]], "bee is taken for it"),
])  # fmt: skip
def test_the_reason_of_a_bad_class_is_its_largest_loss(matrix: list[list[int]], reason: str) -> None:
    assert findings.examine_class(score_of(matrix), 1).reason == reason


def test_a_class_is_examined_in_figures() -> None:
    seen = findings.examine_class(score_of([[800, 50, 0], [30, 60, 10], [0, 0, 100]]), 1)
    assert seen.recall == 0.6 and seen.precision == pytest.approx(60 / 110)
    assert seen.lost_to == (("background", 0.3), ("bee", 0.1)) and seen.taken_from[0][0] == "background"
    told = seen.sentence().replace("\u00a0", " ")
    assert "60 % of its true pixels are found, 30 % are taken for background, 10 % are taken for bee" in told
    assert "Of the pixels called ant, 45 % are background" in told


def test_worst_and_best_are_of_classes_in_the_truth() -> None:
    score = score_of([[900, 0, 5, 0], [10, 90, 0, 0], [0, 0, 0, 0], [50, 0, 0, 50]])
    assert findings.extreme_classes(score) == (3, 1)  # bee is in no image
    rows, shares, columns = findings.row_shares(score)
    assert rows == ["background", "ant", "cat"] and columns == ["background", "ant", "bee", "cat"]
    assert np.allclose(np.sum(shares, 1), 100) and shares[2] == [50, 0, 0, 50]
    rows, shares, columns = findings.row_shares(score_of([[90, 0], [20, 60]], [10, 20]))
    assert columns[-1] == "no class" and shares[1] == [20, 60, 20]


def test_steps_are_told_by_their_largest_loss() -> None:
    assert "loses 10.0 points from pseudo mask to prediction" in findings.tell_steps(
        [("CAM", 50.0), ("pseudo mask", 70.0), ("prediction", 60.0)]
    )
    assert "missing in the CAM" in findings.tell_steps([("CAM", 50.0), ("pseudo mask", 70.0)])
    assert findings.tell_steps([("CAM", 50.0)]) == ""


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.mark.slow
@NEEDS_BROWSER
def test_a_browser_shows_the_page(finished: Path) -> None:
    pytest.importorskip("vl_convert")
    report = finished / "report.html"
    charts = report.read_text().count("<div class=vega ")
    with Browser(report) as browser:
        assert browser.errors == [] and browser.requests == []
        assert browser.evaluate("document.querySelectorAll('.vega svg').length") == charts >= 5
        shown = "[...document.querySelectorAll('.gallery')].map(g => g.querySelectorAll('.card:not([hidden])').length)"
        first = browser.evaluate(shown)
        browser.evaluate("""for (const p of document.querySelectorAll('.pick'))
            { p.value = ''; p.dispatchEvent(new Event('change')) }""")
        every = browser.evaluate(shown)
        assert all(a <= b for a, b in zip(first, every, strict=True)) and min(first) > 0
        assert every == browser.evaluate(
            "[...document.querySelectorAll('.gallery')].map(g => g.querySelectorAll('.card').length)"
        )
        browser.evaluate("""(() => { const s = document.querySelector('.opacity'); s.value = 0.25;
            s.dispatchEvent(new Event('input')) })()""")
        assert browser.evaluate("getComputedStyle(document.querySelector('.layer')).opacity") == "0.25"
        assert browser.evaluate(
            "[...document.querySelectorAll('[data-score]')].every(e => e.textContent.trim() !== '')"
        )


@pytest.mark.slow
@NEEDS_BROWSER
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_the_page_without_scrolling_sideways(finished: Path, dark: bool) -> None:
    with Browser(finished / "report.html", 390, 800, dark) as browser:
        assert browser.errors == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        colours = browser.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert (ink > paper) == dark


@pytest.mark.slow
@NEEDS_BROWSER
def test_the_browser_sees_errors_and_requests(tmp_path: Path) -> None:
    """What the tests above rely on."""
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('no'); fetch('https://example.invalid/x'); nothing()</script>")
    with Browser(bad) as browser:
        assert any("no" in e for e in browser.errors) and any("nothing" in e for e in browser.errors)
        assert browser.requests == ["https://example.invalid/x"]


@pytest.mark.slow
def test_without_the_package_of_the_charts_the_page_says_so(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # its import fails
    load_library.cache_clear()
    try:
        flags = ("--cam.selection", "train_miou", "--cam.fit.epochs", "2", "--steps", "report", "--redo")
        assert run(data, out, *flags) == 0
    finally:
        load_library.cache_clear()
    assert NO_CHARTS in capsys.readouterr().out
    page = out / "report.html"
    assert page.stat().st_size < (finished / "report.html").stat().st_size - 500_000
    if find_browser():
        with Browser(page) as browser:
            assert browser.errors == []
            assert browser.evaluate("document.querySelector('.vega').textContent") == NOT_DRAWN
            assert browser.evaluate("document.querySelector('.finding').textContent") == NO_CHARTS


def test_thumbnails_are_small(page: str) -> None:
    for data in re.findall(r"data:image/jpeg;base64,([^)\"]+)", page)[:3]:
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= gallery.LARGEST
