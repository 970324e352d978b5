"""Weight files that describe themselves: any registered network is made again from its file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from misc.config import Fit, flatten, override, restored
from misc.files import store
from net import contract, registry
from net.contract import Phase
from net.foreign.reading import read_tensors
from net.model import describe_network, load_model, predicts_masks

registry.load_methods()
CLASSES = ("dog", "potted plant", "Tür")
METHODS = [("cam", name) for name in sorted(registry.SEEDS)]
METHODS += [("aff", name) for name, cls in sorted(registry.REFINERS.items()) if cls.is_trained]
METHODS += [("seg", name) for name in sorted(registry.SEGMENTERS)]
TABLES: dict[str, Any] = {"cam": registry.SEEDS, "aff": registry.REFINERS, "seg": registry.SEGMENTERS}


def recipe(part: str, name: str) -> Phase:
    found = TABLES[part][name].recipes["sample"]
    return found.cam if part == "cam" else found


def save(folder: Path, part: str, name: str, changed: Phase) -> dict[str, torch.Tensor]:
    """Write the files that a training by a recipe would; returns the weights of the last."""
    earlier: dict[str, Any] = {}
    phases = changed.phases() if isinstance(changed, contract.SeedRecipe) else ((part, changed),)
    for phase_name, phase in phases:
        network = earlier[phase_name] = phase.network.build(len(CLASSES), earlier)
        network.set_class_texts(CLASSES, {})
        description = describe_network(part, name, "sample", flatten(changed), CLASSES, network)
        store.write_model(folder / f"{phase_name}.pt", network.state_dict(), description)
    return network.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("part, name", METHODS)
def test_a_network_comes_back_from_its_file(part: Any, name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    changed = override(recipe(part, name), {"fit.lr": 0.125, "augment.crop": 96, "weights": "1 bytes, sha256 0"})
    state = save(tmp_path, part, name, changed)
    torch.manual_seed(2)
    model = load_model(tmp_path / f"{part}.pt", part)
    assert (model.method, model.classes, model.recipe) == (name, CLASSES, changed)
    assert not model.network.training
    own = model.network.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)


@pytest.mark.slow
@pytest.mark.parametrize("part, name", METHODS)
def test_the_file_is_a_plain_checkpoint_to_others(part: str, name: str, tmp_path: Path) -> None:
    """Tensors under their own names, nothing to unpickle, and our own loader takes it as a start."""
    state = save(tmp_path, part, name, recipe(part, name))
    stored = torch.load(tmp_path / f"{part}.pt", weights_only=True)
    assert stored.keys() == {"model", "description"} and stored["model"].keys() == state.keys()
    assert json.loads(stored["description"])["normalisation"]["std"]
    assert read_tensors(tmp_path / f"{part}.pt").keys() == state.keys()


WRONG_DESCRIPTIONS: dict[str, Any] = {
    "part": ["seg"], "method": ["x"], "preset": 3, "classes": [1, 2, 3], "recipe": "x", "normalisation": None,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("key", WRONG_DESCRIPTIONS)
def test_descriptions_of_another_form(key: str, tmp_path: Path) -> None:
    save(tmp_path, "seg", "deeplabv2", recipe("seg", "deeplabv2"))
    path = tmp_path / "seg.pt"
    state, description = store.read_model(path)
    for changed in ({**description, key: WRONG_DESCRIPTIONS[key]}, {k: v for k, v in description.items() if k != key}):
        store.write_model(path, state, changed)
        with pytest.raises(ValueError, match=rf"seg\.pt describes .* can't build \(.*{key}"):
            load_model(path, "seg")


def test_a_width_without_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "cam", "psa", recipe("cam", "psa"))
    state, description = store.read_model(tmp_path / "cam.pt")
    name = next(key for key in description["recipe"] if key.endswith("resnet38.width"))
    description["recipe"][name] = 500.0
    store.write_model(tmp_path / "cam.pt", state, description)
    with pytest.raises(ValueError, match=r"cam\.pt belongs to another network"):
        load_model(tmp_path / "cam.pt", "cam")


SINGLE_STAGE = sorted(name for name, cls in registry.SEEDS.items() if issubclass(cls, contract.SingleStage))


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE_STAGE)
def test_a_cam_network_that_predicts_masks_serves_as_segmenter(name: str, tmp_path: Path) -> None:
    whole = registry.SEEDS[name].recipes["sample"]
    state, changed = save(tmp_path, "cam", name, whole.cam), override(whole.own, {"infer.flip": True})
    for test in (whole.own, changed):
        model = load_model(tmp_path / "cam.pt", "seg")
        assert (model.recipe.infer, model.recipe.augment) == (test.infer, whole.cam.augment)
        assert isinstance(model.network, contract.SingleStage) and predicts_masks(tmp_path / "cam.pt")
        assert all(torch.equal(value, state[k]) for k, value in model.network.state_dict().items())
        network = model.network
        description = describe_network("cam", name, "sample", flatten(whole.cam), CLASSES, network, changed)
        store.write_model(tmp_path / "cam.pt", state, description)  # for the second round
    assert isinstance(load_model(tmp_path / "cam.pt", "cam").recipe, contract.SeedRecipe)
    save(tmp_path, "cam", "psa", recipe("cam", "psa"))
    assert not predicts_masks(tmp_path / "cam.pt")


@pytest.mark.slow
def test_an_unknown_file_or_another_part_names_the_remedy(tmp_path: Path) -> None:
    save(tmp_path, "seg", "deeplabv1", recipe("seg", "deeplabv1"))
    with pytest.raises(ValueError, match=r"seg\.pt is a segmentation network, a CAM network is needed: give a run's"):
        load_model(tmp_path / "seg.pt", "cam")
    state, description = store.read_model(tmp_path / "seg.pt")
    for other in (state, {"model": state}, {"model": state, "description": "no JSON"}, [1], {"state_dict": state}):
        store.write_weights(tmp_path / "old.pt", other)
        with pytest.raises(ValueError, match=r"old\.pt doesn't say which network .* Train with this version"):
            load_model(tmp_path / "old.pt", "seg")
    with pytest.raises(FileNotFoundError, match="none.pt does not exist"):
        load_model(tmp_path / "none.pt", "seg")
    store.write_model(tmp_path / "new.pt", state, {**description, "method": "deeplabv9"})
    with pytest.raises(ValueError, match=r"new\.pt describes .* this version of the project can't build .*Use the"):
        load_model(tmp_path / "new.pt", "seg")
    store.write_model(tmp_path / "new.pt", state, {**description, "preset": "a variant of the CAM method's"})
    assert load_model(tmp_path / "new.pt", "seg").recipe == load_model(tmp_path / "seg.pt", "seg").recipe
    store.write_model(tmp_path / "new.pt", state, {"part": "seg"})
    with pytest.raises(ValueError, match=r"new\.pt describes .* this version of the project can't build"):
        load_model(tmp_path / "new.pt", "seg")
    changed = {**description, "recipe": {**description["recipe"], "network.colour": 1}}
    store.write_model(tmp_path / "new.pt", state, changed)
    with pytest.raises(ValueError, match="has no field network.colour"):
        load_model(tmp_path / "new.pt", "seg")
    changed = {**description, "normalisation": {**description["normalisation"], "scale": 1.0}}
    store.write_model(tmp_path / "new.pt", state, changed)
    with pytest.raises(ValueError, match="was trained with images normalised as"):
        load_model(tmp_path / "new.pt", "seg")
    store.write_model(tmp_path / "new.pt", state, {**description, "classes": ["dog"]})
    with pytest.raises(ValueError, match=r"new\.pt belongs to another network"):
        load_model(tmp_path / "new.pt", "seg")


def test_settings_come_back_whole_whatever_the_order_of_their_fields() -> None:
    base = Fit(nesterov=True, momentum=0.9)
    other = Fit(nesterov=False, momentum=0.0, steps=3)
    assert restored(base, json.loads(json.dumps(flatten(other)))) == other
    assert restored(base, {"lr": 0.5}) == Fit(nesterov=True, momentum=0.9, lr=0.5)
    with pytest.raises(ValueError, match="Fit has no field rate"):
        restored(base, {"rate": 1})
