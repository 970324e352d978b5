"""Single objects: their files and pictures, the truth from a data set, average precision, and a whole run with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from running import make_set

import run_sample
from misc.config import CamInference
from misc.files import store
from misc.files.camfiles import read_cam
from misc.files.images import read_mask
from misc.infer import cams
from misc.score.evaluate import EvaluationError, evaluate_instances
from misc.score.metrics import InstancePrecision
from misc.score.objects import Instances, read_instances, true_instances, write_instances
from voc12.catalog import open_catalog


def boxes(*placed: tuple[int, int, int, int], classes: list[int], scores: list[float] | None = None) -> Instances:
    """Rectangles (top, bottom, left, right) in an image of 10 x 13."""
    masks = np.zeros((len(placed), 10, 13), bool)
    for mask, (top, bottom, left, right) in zip(masks, placed, strict=True):
        mask[top:bottom, left:right] = True
    values = [1.0] * len(placed) if scores is None else scores
    return Instances(masks, np.array(classes, np.int64), np.array(values, np.float32))


# ------------------------------------------------------------------------------------------------ files


def test_instances_survive_their_file(tmp_path: Path) -> None:
    made = boxes((0, 4, 0, 5), (2, 9, 3, 13), classes=[3, 0], scores=[0.25, 0.75])
    write_instances(tmp_path / "a.npz", made)
    read = read_instances(tmp_path / "a.npz")
    assert np.array_equal(read.masks, made.masks) and read.masks.dtype == bool
    assert read.classes.tolist() == [3, 0] and read.scores.tolist() == [0.25, 0.75]
    write_instances(tmp_path / "b.npz", Instances.none((10, 13)))
    assert read_instances(tmp_path / "b.npz").masks.shape == (0, 10, 13)
    store.write_arrays(tmp_path / "c.npz", keys=np.zeros(1))
    with pytest.raises(ValueError, match="holds no instances"):
        read_instances(tmp_path / "c.npz")


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="as many classes"):
        Instances(np.zeros((2, 3, 3), bool), np.zeros(1, np.int64), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="bool"):
        Instances(np.zeros((1, 3, 3)), np.zeros(1, np.int64), np.zeros(1, np.float32))


def test_the_picture_shows_the_best_in_front_and_none_of_score_zero() -> None:
    made = boxes((0, 6, 0, 6), (2, 8, 2, 8), (0, 10, 9, 13), classes=[0, 1, 2], scores=[0.5, 0.9, 0.0])
    picture = made.picture()
    assert picture[3, 3] == 1 and picture[0, 0] == 2 and not picture[:, 9:].any()
    assert not Instances.none((4, 5)).picture().any()
    many = Instances(np.eye(300, dtype=bool).reshape(300, 15, 20), np.zeros(300, np.int64), np.ones(300, np.float32))
    assert set(np.unique(many.picture())) == set(range(255))


def test_the_truth_is_read_from_both_masks() -> None:
    objects, classes = np.zeros((2, 6, 8), np.uint8)
    objects[0:2, 0:3], classes[0:2, 0:3] = 1, 7
    objects[4:6, 5:8], classes[4:6, 5:8] = 3, 2
    objects[2], classes[2] = 255, 255
    truth = true_instances(objects, classes)
    assert truth.classes.tolist() == [6, 1] and truth.masks.sum((1, 2)).tolist() == [6, 6]
    assert len(true_instances(np.full((3, 3), 255, np.uint8), np.zeros((3, 3), np.uint8)).masks) == 0
    with pytest.raises(ValueError, match="differ in size"):
        true_instances(objects, classes[:3])
    classes[4:6, 5:8] = 0
    with pytest.raises(ValueError, match="object 3 .* has no class"):
        true_instances(objects, classes)


# ------------------------------------------------------------------------------------------------ average precision


def precision(*pairs: tuple[Instances, Instances]) -> InstancePrecision:
    counted = InstancePrecision(3)
    for truth, found in pairs:
        counted.add(truth, found)
    return counted


def test_right_objects_have_full_precision_and_classes_count_one_by_one() -> None:
    truth = boxes((0, 5, 0, 5), (5, 10, 6, 13), classes=[0, 2])
    counted = precision((truth, truth))
    assert counted.average_precision().tolist()[0] == 1 and np.isnan(counted.average_precision()[1])
    assert counted.mean() == counted.mean(1) == 1
    swapped = Instances(truth.masks, np.array([2, 0]), truth.scores)
    assert precision((truth, swapped)).mean() == 0


def test_a_second_hit_on_an_object_is_false_and_the_surer_comes_first() -> None:
    truth = boxes((0, 5, 0, 5), (5, 10, 6, 13), classes=[0, 0])
    # the surest misses, then one object is found twice, then the other once
    found = boxes(
        (0, 2, 9, 13), (0, 5, 0, 5), (0, 5, 0, 4), (5, 10, 6, 13), classes=[0] * 4, scores=[0.9, 0.8, 0.7, 0.6]
    )
    # precision at the hits: 1/2 and 2/4; the envelope is 1/2 throughout
    assert precision((truth, found)).average_precision()[0] == 0.5
    surer = Instances(found.masks, found.classes, np.array([0.1, 0.8, 0.2, 0.6], np.float32))
    assert precision((truth, surer)).average_precision()[0] == 1


def test_the_iou_decides_and_so_does_its_bound() -> None:
    truth, found = boxes((0, 10, 0, 10), classes=[0]), boxes((0, 10, 0, 6), classes=[0])
    counted = precision((truth, found))  # IoU 0.6
    assert counted.average_precision(0)[0] == 1 and counted.average_precision(1)[0] == 0


def test_objects_without_detections_and_detections_without_objects() -> None:
    one, nothing = boxes((0, 5, 0, 5), classes=[1]), Instances.none((10, 13))
    assert precision((one, nothing)).average_precision()[1] == 0
    assert np.isnan(precision((nothing, one)).mean())
    unsure = boxes((0, 5, 0, 5), classes=[1], scores=[0.5])
    assert precision((one, unsure), (nothing, one)).average_precision()[1] == 0.5
    assert precision((one, one), (nothing, unsure)).average_precision()[1] == 1


def test_parts_together_are_the_whole() -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(6):
        truth = boxes((0, 5, 0, 5), (5, 10, 6, 13), classes=[0, 1])
        shift = int(rng.integers(0, 3))
        found = boxes((shift, 5, 0, 5), (5, 10, 6 + shift, 13), classes=[0, 1], scores=rng.random(2).tolist())
        pairs.append((truth, found))
    parts = precision(*pairs[:2]).merge(precision(*pairs[2:]))
    np.testing.assert_array_equal(parts.average_precision(1), precision(*pairs).average_precision(1))
    with pytest.raises(ValueError, match="same classes"):
        parts.merge(InstancePrecision(4))


def test_other_sizes_and_classes_are_refused_before_anything_is_counted() -> None:
    truth = boxes((0, 5, 0, 5), classes=[0])
    counted = InstancePrecision(3)
    other = Instances(np.ones((1, 4, 4), bool), np.array([0]), np.ones(1, np.float32))
    with pytest.raises(ValueError, match="4 x 4"):
        counted.add(truth, other)
    with pytest.raises(ValueError, match="the prediction has the class 3"):
        counted.add(truth, boxes((0, 5, 0, 5), classes=[3]))
    assert not counted.objects.any()


def test_scores_of_a_set_are_json_and_problems_have_names() -> None:
    def truth(name: str) -> Instances:
        return boxes((0, 5, 0, 5), classes=[int(name) % 2])

    record = evaluate_instances(["0", "1"], truth, truth, 3, progress=False).to_dict(["a", "b", "c"], "train")
    assert json.loads(json.dumps(record)) == record
    assert (record["ap50"], record["ap70"], record["objects"], record["images"]) == (100, 100, 2, 2)
    assert [c["ap50"] for c in record["classes"]] == [100, 100, None] and record["classes"][0]["index"] == 1

    def broken(name: str) -> Instances:
        if name == "1":
            raise FileNotFoundError("instance/1.npz does not exist")
        return truth(name)

    with pytest.raises(EvaluationError, match="1: instance/1.npz"):
        evaluate_instances(["0", "1"], broken, truth, 3, progress=False)


# ------------------------------------------------------------------------------------------------ coarse CAMs


def test_coarse_maps_are_added_up_on_their_own_grid() -> None:
    image = np.random.default_rng(0).integers(0, 255, (37, 50, 3), dtype=np.uint8)
    made = iter(torch.rand(4, 2, 3, 4, 6).unbind())
    kept = []

    def network(images: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        kept.append(next(made))
        return kept[-1]

    infer = CamInference(scales=(1.0, 0.5), round_up=16, coarse=4)
    tags = np.array([1, 0, 1], np.float32)
    cam = cams.infer_cam(network, image, tags, infer, "imagenet")
    assert cam.maps.shape == (2, 37, 50) and cam.coarse is not None and cam.coarse.shape == (2, 10, 13)
    low = [m[:, [0, 2]] for m in kept]
    np.testing.assert_array_equal(cam.coarse, cams.scale_by_maximum(cams.merge_maps(low, (10, 13))).numpy())
    full = cams.merge_maps(low, (48, 64))[:, :37, :50]  # at sides that are multiples of 16, then cut
    np.testing.assert_allclose(cam.maps, cams.scale_by_maximum(full).numpy(), rtol=1e-6)
    nothing = cams.infer_cam(network, image, 0 * tags, infer, "imagenet")
    assert nothing.maps.shape == (0, 37, 50) and nothing.coarse is not None and nothing.coarse.shape == (0, 10, 13)


# ------------------------------------------------------------------------------------------------ a whole run

TINY = """
--machine.workers 0 --machine.device cpu --steps 1-5
--cam.fit.steps 3 --cam.fit.batch-size 4 --cam.augment.crop 48 --cam.augment.long-side 48 64
--aff.fit.steps 2 --aff.fit.batch-size 4 --aff.augment.crop 48 --aff.walk.canvas 48 --aff.walk.logt 2
--aff.label.crf.iterations 1 --aff.walk.crf.iterations 0
""".split()


def arguments(data: Path, out: Path, *flags: str) -> list[str]:
    return ["irn_cam", "--root", str(data), "--out", str(out), *TINY, *flags]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer than 20 images (irnet.md section 12)."""
    return make_set(tmp_path_factory.mktemp("data") / "set", images=5, val=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    assert run_sample.main(arguments(data, out)) == 0
    return out


def test_a_catalog_knows_its_objects(data: Path) -> None:
    catalog = open_catalog("voc12", data)
    for image_id in catalog.ids("train"):
        path = catalog.object_path(image_id)
        assert path is not None
        truth = true_instances(read_mask(path), read_mask(data / "SegmentationClass" / path.name))
        assert len(truth.masks) >= 1 and set(truth.classes) == set(np.flatnonzero(catalog.tags(image_id)))
    assert catalog.object_path("nothing") is None


@pytest.mark.slow
def test_a_run_writes_and_scores_its_objects(finished: Path, data: Path) -> None:
    ids = open_catalog("voc12", data).ids("train")
    for image_id in ids:
        found = read_instances(finished / "instance" / f"{image_id}.npz")
        picture = read_mask(finished / "instance" / f"{image_id}.png")
        mask = read_mask(finished / "label" / f"{image_id}.png")
        assert found.masks.shape[1:] == picture.shape == mask.shape
        assert np.array_equal(picture, found.picture())
        assert not found.masks.any(0)[picture > 0].size or found.masks.any(0)[picture > 0].all()
        assert read_cam(finished / "cam" / f"{image_id}.npz").coarse is not None
    score = store.read_json(finished / "scores.json")["pseudo objects after the walk"]
    assert (score["step"], score["split"], score["images"]) == ("random_walk", "train", 5)
    assert 0 <= score["ap50"] <= 100 and score["objects"] >= 5 and score["walk"]["instances"] is True
    weights, _ = store.read_model(finished / "weights" / "aff.pt")
    assert weights["mean_shift.running_mean"].abs().sum() > 0  # measured before the weights were written


@pytest.mark.slow
def test_the_report_shows_objects(finished: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sample.main(arguments(data, finished, "--steps", "report")) == 0
    page = (finished / "report.html").read_text()
    assert "pseudo objects after the walk" in page and "AP50" in page and 'aria-label="objects"' in page
    assert "AP50" in capsys.readouterr().out


def test_objects_are_an_option_and_go_with_their_step(finished: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    flags = ["--aff.walk.no-instances", "--steps", "random_walk", "--redo", "--force"]
    assert run_sample.main(arguments(data, tmp_path / "run", *flags)) == 0
    assert not (tmp_path / "run" / "instance").exists()
    assert "pseudo objects after the walk" not in store.read_json(tmp_path / "run" / "scores.json")
    name = "label/2025_000001.png"  # the masks do not depend on it
    assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
def test_without_masks_of_objects_there_is_no_score(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(data, tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "SegmentationObject")
    flags = ["--steps", "random_walk", "--redo"]
    assert run_sample.main(arguments(tmp_path / "set", tmp_path / "run", *flags)) == 0
    assert "images without masks of single objects" in capsys.readouterr().out
    assert "pseudo objects after the walk" not in store.read_json(tmp_path / "run" / "scores.json")
    assert (tmp_path / "run" / "instance" / "2025_000001.npz").exists()
