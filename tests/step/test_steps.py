"""The table of steps, the configuration, and the contract of every registered network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import picture_of
from torch import Tensor
from torchvision.ops import StochasticDepth

from misc import config as settings
from misc.config import Fit
from misc.files.camfiles import write_cam
from misc.files.runfolder import RunFolder
from misc.image.cam import Cam, otsu_threshold
from misc.image.picture import Picture
from misc.image.segments import Segments
from net import contract, registry
from net.contract import Batch, Network, Phase
from step import STEPS, select
from step.lib import parsing
from step.lib.config import Config, default_config
from step.lib.inference import settle_walk

registry.load_methods()

CLASSES = 3
PRESETS = [(name, preset) for name, cls in sorted(registry.SEEDS.items()) for preset in cls.recipes]


# ---------------------------------------------------------------------------------------------- steps


def test_every_step_has_its_file() -> None:
    for step in STEPS:
        assert step.run().__module__ == f"step.{step.name}"


@pytest.mark.parametrize(
    "wanted, names",
    [
        ([], "train_cam make_cam make_aff_label train_aff random_walk train_seg infer_seg report"),
        (["2-4"], "make_cam make_aff_label train_aff"),
        (["report", "1"], "train_cam report"),
        (["make_cam-train_aff", "3"], "make_cam make_aff_label train_aff"),
        (["7", "infer_seg"], "infer_seg"),
        (["7-9"], "infer_seg localise report"),
    ],
)
def test_steps_are_named_by_number_name_and_range(wanted: list[str], names: str) -> None:
    assert [s.name for s in select(wanted)] == names.split()


@pytest.mark.parametrize("wanted", ["0", "10", "make", "2-", "-2", "2-10", "", "²"])
def test_what_is_no_step_is_refused_with_the_list(wanted: str) -> None:
    with pytest.raises(ValueError, match="no such step.*1 train_cam.*8 localise, 9 report"):
        select([wanted])


def test_data_sets_of_boxes_have_a_pipeline_of_their_own() -> None:
    assert [s.name for s in select([], "boxes")] == ["train_cam", "localise", "report"]
    assert [s.name for s in select(["2"], "boxes")] == ["make_cam"]


def test_a_range_runs_forwards() -> None:
    with pytest.raises(ValueError, match="4-2: the range runs backwards"):
        select(["4-2"])


# ---------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "recipe, refiner, segmenter",
    list(product(PRESETS, sorted(registry.REFINERS), sorted(registry.SEGMENTERS))),
)
def test_every_combination_has_a_configuration(recipe: tuple[str, str], refiner: str, segmenter: str) -> None:
    method, preset = recipe
    base = registry.SEEDS[method].recipes[preset].base
    cfg = default_config(method, preset, refiner, segmenter)
    assert (cfg.method, cfg.refiner, cfg.segmenter) == (method, refiner, segmenter)
    aff = registry.find_recipe(registry.REFINERS[refiner], preset, base)
    seg = registry.find_recipe(registry.SEGMENTERS[segmenter], preset, base)
    assert type(cfg.aff) is type(aff) and type(cfg.seg.network) is type(seg.network)
    assert cfg.cam.phases()[-1][0] == "cam"
    flat = cfg.recorded()
    assert flat["cam.fit.lr"] == cfg.cam.fit.lr and "machine.workers" not in flat


@pytest.mark.slow
@pytest.mark.parametrize("method, preset", PRESETS)
def test_every_method_has_a_command_line(method: str, preset: str) -> None:
    cfg = parsing.parse([method, "--preset", preset, "--cam.fit.lr", "0.125", "--seg.infer.scales", "16", "32"])
    assert cfg.preset == preset and cfg.cam.fit.lr == 0.125 and cfg.seg.infer.scales == (16.0, 32.0)
    default = default_config(method, preset)
    unchanged = dataclasses.replace(
        cfg, cam=dataclasses.replace(cfg.cam, fit=default.cam.fit),
        seg=dataclasses.replace(cfg.seg, infer=default.seg.infer),
    )  # fmt: skip
    assert unchanged == default


def test_a_method_brings_its_own_settings_of_its_refiner_and_no_other() -> None:
    own = default_config("seam", "published")
    assert own.aff.walk.alpha == 6 and own.aff.walk.logt == 6
    plain = registry.REFINERS["psa"].recipes["published"]
    assert plain.walk.alpha == 16 and registry.SEEDS["seam"].recipes["published"].refine["walk.alpha"] == 6


def test_a_variant_takes_the_recipe_of_its_name_of_refiner_and_segmenter_or_else_of_its_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    psa, seam = registry.REFINERS["psa"], registry.SEEDS["seam"]
    variant = dataclasses.replace(seam.recipes["published"], refine={}, segment={})
    monkeypatch.setattr(seam, "recipes", {**seam.recipes, "people": dataclasses.replace(variant, base="sample")})
    assert default_config("seam", "people").aff == psa.recipes["sample"]
    monkeypatch.setattr(seam, "recipes", {**seam.recipes, "people": variant})
    assert default_config("seam", "people").aff == psa.recipes["published"]
    own = settings.override(psa.recipes["published"], {"walk.beta": 3.0})
    monkeypatch.setattr(psa, "recipes", {**psa.recipes, "people": own})
    cfg = default_config("seam", "people")
    assert cfg.aff == own and cfg.seg == registry.SEGMENTERS["deeplabv1"].recipes["published"]
    with pytest.raises(ValueError, match="seam has no preset 'nothing'. There are: published, sample, photos, people"):
        default_config("seam", "nothing")


@pytest.mark.parametrize("what", [("nothing",), ("seam", "sample", "nothing"), ("seam", "sample", None, "nothing")])
def test_unknown_names_are_refused_with_the_list(what: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"There is no (method|refiner|segmenter) 'nothing'. There are: .*[a-z]"):
        default_config(*what, *(["sample"] if len(what) == 1 else []))


def test_overrides_reach_nested_fields_and_name_what_is_none() -> None:
    cfg = default_config("seam", "sample")
    changed = settings.override(cfg, {"aff.walk.beta": 3.0, "seed": 7})
    assert changed.aff.walk.beta == 3 and changed.seed == 7 and cfg.aff.walk.beta != 3
    with pytest.raises(ValueError, match="Fit has no field 'rate'; its fields are epochs, steps"):
        settings.override(cfg, {"cam.fit.rate": 1})
    with pytest.raises(ValueError, match="lr = -1 is not possible: it must be above 0"):
        settings.override(cfg, {"cam.fit.lr": -1})


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Fit)])
def test_every_field_of_a_recipe_has_an_explanation(field: str) -> None:
    source = Path(settings.__file__).read_text()
    assert f'\n    {field}: ' in source and source.split(f"\n    {field}: ")[1].split("\n")[1].strip().startswith('"""')


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "0/0", "1/2/3"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not i/n"):
        Config(shard=text).shard_part()
    assert Config(shard="1/3").shard_part() == (1, 3)


# ---------------------------------------------------------------------------------------------- contracts


def shrunk(options: Any) -> Any:
    """Options of a network with every ``width`` in them quartered."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "width" and isinstance(value, float):
            changes[field.name] = value / 4
        elif dataclasses.is_dataclass(value):
            changes[field.name] = shrunk(value)
    return dataclasses.replace(options, **changes)


def built(phase: Phase, earlier: Mapping[str, Network]) -> Network:
    torch.manual_seed(0)
    network = shrunk(phase.network).build(CLASSES, earlier)
    network.set_class_texts([f"class {number}" for number in range(CLASSES)], {})
    return network


def seed_networks(name: str) -> dict[str, Network]:
    """The networks of all phases of a method."""
    networks: dict[str, Network] = {}
    for phase_name, phase in registry.SEEDS[name].recipes["sample"].cam.phases():
        networks[phase_name] = built(phase, {k: v.eval() for k, v in networks.items()})
    return networks


def keeps_start_weights(name: str) -> bool:
    """Whether a method classifies with a network that is not trained."""
    return registry.SEEDS[name].recipes["sample"].cam.network.keeps_start_weights


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def check_training(network: Network, batch: Batch) -> None:
    """Named finite scalar terms; groups that hold each trained parameter once; a gradient for all of them."""
    network.train()
    groups = [p for group in network.param_groups() for p in group.params]
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(groups) == len(set(groups)) and set(groups) == set(trained) and trained
    for progress in (0.0, 0.5, 0.99):
        made = {**batch, **network.prepare(batch, progress)}
        assert not any(v.requires_grad for v in made.values())
        assert not any(p.grad is not None and p.grad.any() for p in network.parameters())  # preparing leaves none
        counts = {f"counts/{k}": v.float() for k, v in network.counts(made).items()}
        terms = network({**made, **counts}, progress)
        assert terms and all(isinstance(k, str) and v.shape == () for k, v in terms.items())
        assert all(torch.isfinite(v) for v in terms.values()), terms
        sum(terms.values()).backward()
        assert network.lr_scale(progress) > 0
        without = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
        assert not without or network.finds_unused, without
        assert all(torch.isfinite(p.grad).all() for p in trained if p.grad is not None)
        network.zero_grad()


def side(phase: Phase) -> int:
    """Side of the training images."""
    return min(phase.augment.crop, 96)


def with_views(batch: Batch, phase: Phase) -> Batch:
    """The batch with seeds, and the images again as every view that the phase wants."""
    count = len(batch["image"])
    made = {**batch, "seed": torch.arange(count)}
    for name in phase.views():
        mirrored = torch.zeros(count, dtype=torch.bool)
        made |= {f"view/{name}": batch["image"], f"box/{name}": batch["box"], f"mirrored/{name}": mirrored}
    return made


@pytest.mark.parametrize("name", sorted(registry.SEEDS))
def test_seed_networks_train(name: str) -> None:
    phases = dict(registry.SEEDS[name].recipes["sample"].cam.phases())
    for phase_name, network in seed_networks(name).items():
        if phases[phase_name].fit.steps == 0:
            assert not any(p.requires_grad for p in network.parameters())
            continue
        size = side(phases[phase_name])
        batch = {
            "image": pictures(3, size, size), "tags": torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]]),
            "box": torch.tensor([[0, size, 0, size], [3, size, 0, size - 5], [0, size, 0, size]]),
        }  # fmt: skip
        if phases[phase_name].network.wants_saliency:
            batch["saliency"] = 255 * (torch.arange(size * size).view(1, size, size) % 40 < 20).repeat(3, 1, 1).byte()
        check_training(network, with_views(batch, phases[phase_name]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (49, 75), (91, 58)])
@pytest.mark.parametrize("name", sorted(registry.SEEDS))
def test_seed_networks_give_a_map_for_every_class_at_any_size(name: str, size: tuple[int, int]) -> None:
    network = seed_networks(name)["cam"].eval()
    assert isinstance(network, contract.SeedNetwork)
    with torch.set_grad_enabled(network.map_needs_gradient):
        maps = network.cam(pictures(2, *size), torch.tensor([[1.0, 0, 1]] * 2))
    assert maps.shape[:2] == (2, CLASSES) and maps.ndim == 4 and min(maps.shape[2:]) >= 2
    assert torch.isfinite(maps).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(n for n in registry.SEEDS if not keeps_start_weights(n)))
def test_seed_networks_classify_without_tags_as_they_were_trained(name: str) -> None:
    """After some updates on two plain images of one class each, the scores tell these apart."""
    phase = dict(registry.SEEDS[name].recipes["sample"].cam.phases())["cam"]
    network, size = seed_networks(name)["cam"], side(phase)
    images = torch.stack([torch.full((3, size, size), -1.0), torch.full((3, size, size), 1.0)])
    batch = {
        "image": images, "tags": torch.tensor([[1.0, 0, 0], [0, 0, 1]]),
        "box": torch.tensor([[0, size, 0, size]] * 2),
    }  # fmt: skip
    batch = with_views(batch, phase)
    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    network.train()
    for module in network.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    for _ in range(48):
        optimiser.zero_grad()
        made = {**batch, **network.prepare(batch, 0.0)}
        counts = {f"counts/{k}": v.float() for k, v in network.counts(made).items()}
        sum(network({**made, **counts}, 0.0).values()).backward()
        optimiser.step()
    for module in network.modules():  # so few updates say nothing about running statistics
        module.training = isinstance(module, torch.nn.BatchNorm2d)
    scores = network.classify(images, CLASSES).detach()
    assert scores.shape == (2, CLASSES) and torch.isfinite(scores).all()
    assert scores[0, 0] > scores[1, 0] and scores[1, 2] > scores[0, 2]


def soft_cam(keys: list[int], height: int, width: int) -> Cam:
    maps = np.random.default_rng(0).random((len(keys), height, width), np.float32)
    if keys:
        maps[:, : height // 2] *= 0.05
        maps[0, :, : width // 3] = 0.95
    return Cam.of_maps(np.array(keys, np.int64), maps)


@pytest.mark.parametrize("name", sorted(n for n, cls in registry.REFINERS.items() if not cls.is_trained))
def test_plain_refiners_refine(name: str) -> None:
    """Any size and number of classes, the image's own colours; an untouched mask where the CAMs are certain."""
    method = registry.REFINERS[name]
    assert issubclass(method, contract.PlainRefiner)
    for recipe in method.recipes.values():
        for keys, shape in (([0, 2], (64, 64)), ([1], (49, 75))):
            image = np.full((*shape, 3), 10, np.uint8)
            image[:, : shape[1] // 3] = 200
            picture = Picture.of_rgb(image, method.normalisation)
            if method.wants_segments:
                picture = dataclasses.replace(picture, segments=Segments.of_masks([image[..., 0] == 200], shape))
            cam = soft_cam(keys, *shape)
            with torch.inference_mode():
                scores = method().refine(picture, cam, recipe.walk)
            assert scores.shape == (len(keys) + 1, *shape) and scores.dtype == np.float32 and np.isfinite(scores).all()
            best = scores.argmax(0)
            assert (best[:, : shape[1] // 3 - 2] == 1).mean() > 0.95  # what is certain, and of one colour


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(n for n, cls in registry.REFINERS.items() if cls.is_trained))
def test_refiners_label_train_and_refine(name: str) -> None:
    method = registry.REFINERS[name]
    recipe = method.recipes["sample"]
    size = side(recipe)
    image = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    targets = []
    for keys in ([0, 2], [1], []):
        picture, planes = method.make_label(image, soft_cam(keys, size, size), recipe.label)
        assert picture.shape == (size, size) and picture.dtype == np.uint8
        assert set(np.unique(picture)) <= {0, 255, *(k + 1 for k in keys)}
        assert planes.ndim == 3 and planes.shape[1:] == (size, size) and planes.dtype in (np.float16, np.uint8)
        if keys:
            targets.append(torch.from_numpy(np.ascontiguousarray(method.make_target(planes))))
    network = built(recipe, {})
    assert isinstance(network, contract.AffinityNetwork)
    check_training(network, {"image": pictures(2, size, size), "target": torch.stack(targets)})
    network.eval()
    for keys, shape in (([0, 2], (64, 64)), ([1], (49, 75)), ([], (91, 58))):
        with torch.inference_mode():
            scores = network.refine(picture_of(pictures(1, *shape)[0]), soft_cam(keys, *shape), recipe.walk)
        assert scores.shape == (len(keys) + 1, *shape) and scores.dtype == np.float32 and np.isfinite(scores).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry.REFINERS))
def test_refiners_that_find_objects_refine_alike(name: str) -> None:
    method = registry.REFINERS[name]
    recipe = method.recipes["sample"]
    if not method.finds_instances(recipe.walk):
        with pytest.raises(NotImplementedError):
            method.find_instances(None, None, None, recipe.walk)  # type: ignore[arg-type]
        return
    network = built(recipe, {}).eval()
    for keys, shape in (([0, 2], (64, 64)), ([1], (49, 75)), ([], (91, 58))):
        with torch.inference_mode():
            arguments = picture_of(pictures(1, *shape)[0]), soft_cam(keys, *shape), recipe.walk
            scores, found = network.find_instances(*arguments)
            np.testing.assert_array_equal(scores, network.refine(*arguments))
        assert found.masks.shape[1:] == shape and set(found.classes.tolist()) <= set(keys)
        assert np.isfinite(found.scores).all() and found.masks.any(axis=(1, 2)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry.SEGMENTERS))
def test_segmenters_train_and_give_logits_at_any_size(name: str) -> None:
    recipe = registry.SEGMENTERS[name].recipes["sample"]
    network = built(recipe, {})
    assert isinstance(network, contract.Segmenter)
    size = side(recipe)
    mask = torch.randint(0, CLASSES + 1, (2, size, size), generator=torch.Generator().manual_seed(2))
    mask[:, :7] = 255
    check_training(network, {"image": pictures(2, size, size), "mask": mask})
    network.eval()
    for height, width in ((64, 64), (49, 75), (91, 58)):
        with torch.inference_mode():
            logits = network.logits(pictures(2, height, width))
        assert logits.shape[:2] == (2, CLASSES + 1) and torch.isfinite(logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry.SEGMENTERS))
def test_a_batch_without_any_label_gives_a_finite_loss(name: str) -> None:
    network = built(registry.SEGMENTERS[name].recipes["sample"], {}).train()
    batch = {"image": pictures(2, 64, 64), "mask": torch.full((2, 64, 64), 255)}
    counts = {f"counts/{k}": v.float() for k, v in network.counts(batch).items()}
    assert sum(network({**batch, **counts}, 0.0).values()).item() == 0


# ------------------------------------------------------------------------------------------------ background scores


def test_the_walk_takes_the_background_score_that_make_cam_found_best(tmp_path: Path) -> None:
    """AReAM's published recipe names none."""
    walk = default_config("aream_mctformer", "published").aff.walk
    assert walk.threshold is None
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="--aff.walk.threshold"):
        settle_walk(walk, run)
    run.add_score("CAM", {"threshold": 0.47})
    assert settle_walk(walk, run).threshold == 0.47
    given = dataclasses.replace(walk, threshold=0.3)
    assert settle_walk(given, run) is given


def test_the_rule_otsu_splits_the_cams_without_any_mask(tmp_path: Path) -> None:
    walk = registry.REFINERS["none"].recipes["photos"].walk
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="has no CAMs from which a background score could be found"):
        settle_walk(walk, run)
    low, high = np.full((2, 8, 8), 0.1, np.float32), np.full((2, 8, 8), 0.1, np.float32)
    low[0, :2], high[1, :, :5] = 0.5, 0.7
    for name, maps in (("a", low), ("b/c", high)):
        write_cam(run.cam(name), Cam.of_maps(np.array([0, 3]), maps))
    write_cam(run.cam("none"), Cam.of_maps(np.zeros(0, np.int64), np.zeros((0, 8, 8), np.float32)))
    found = settle_walk(walk, run).threshold
    assert 0.1 < found < 0.5
    assert otsu_threshold([low]) == pytest.approx(0.3, abs=0.01)  # in the middle of the gap


@pytest.mark.parametrize(
    ("method", "searched", "fixed"),
    [("irn_cam", 0.59, 0.15), ("crt", 0.59, 0.15), ("aream_mctformer", 0.79, None), ("aream_conformer", 0.79, None)],
)
def test_published_background_scores(method: str, searched: float, fixed: float | None) -> None:
    infer = default_config(method, "published").cam.infer
    assert (infer.search_to, infer.fixed_background) == (searched, fixed)
