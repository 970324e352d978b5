"""The description in a trained network's weights file, and rebuilding the network from that file alone.

A file in weights/ is {"model": state dict, "description": JSON}: classes, normalisation, method and recipe. Nothing
else is needed to use it, and the tensors keep their official names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from misc.config import flatten, restored
from misc.files import store
from misc.files.schema import find_fault
from misc.image import pixels
from net import contract, registry
from net.contract import Network, Phase, SeedRecipe, SegmentRecipe, SegmentTest
from net.released import load_released

Part = Literal["cam", "aff", "seg"]
"""Role of a network, named as its section of the command line: CAM network (or an earlier phase of it), refiner or
segmenter."""

_NAMES = {"cam": "CAM network", "aff": "refiner", "seg": "segmentation network"}


@dataclass(frozen=True)
class Model:
    """A trained network with its classes and recipe."""

    network: Network
    """The network in evaluation mode, on the CPU."""
    method: str
    """Registered name of the network's class."""
    classes: tuple[str, ...]
    """Names of the foreground classes."""
    recipe: Any
    """Recipe of the network (contract.SeedRecipe, RefineRecipe or SegmentRecipe)."""
    fingerprint: str
    """Fingerprint of the weights file (store.fingerprint)."""


def describe_network(
    part: Part, method: str, preset: str, recipe: Mapping[str, Any], classes: Sequence[str], network: Network,
    test: SegmentTest | None = None,
) -> dict[str, Any]:
    """The description of a network that was trained by a recipe (``misc.config.flatten``) of a method and preset.

    ``test``: how a CAM network that is its own segmenter predicts masks, if the settings differ from its recipe's
    (``contract.Recipe.own``).
    """
    return {
        "part": part,
        "method": method,
        "preset": preset,
        "classes": list(classes),
        "normalisation": _normalisation(network),
        "recipe": dict(recipe),
        **network.notes(),
        **({} if test is None else {"own": flatten(test)}),
    }


def _normalisation(network: Network) -> dict[str, Any]:
    """Name and values of a network's normalisation, for JSON."""
    numbers = asdict(pixels.find_normalisation(network.normalisation))
    return {"name": network.normalisation, **{k: list(v) if isinstance(v, tuple) else v for k, v in numbers.items()}}


def load_state(network: Network, path: Path) -> None:
    """Load the weights of a file into a network. Raises ValueError if the file belongs to another network."""
    state, _ = store.read_model(path)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(
            f"{path} belongs to another network ({first[:200]}). Train this one with --redo, or use its run folder."
        ) from None


def load_model(path: Path, part: Part) -> Model:
    """Build and load the network of a file from the file's description.

    A CAM network that also predicts masks (``contract.SingleStage``) can be loaded as part seg; its recipe is then a
    SegmentRecipe.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it describes no network, or one of another part, an unknown method or another version.
    """
    registry.load_methods()
    state, description = store.read_model(path)
    if fault := find_fault(description, _DESCRIPTION):
        raise ValueError(f"{path} describes a network that this version of the project can't build ({fault}). {_OLD}")
    own = part == "seg" and _predicts_masks(description)
    if description.get("part") != part and not own:
        kind = _NAMES.get(description.get("part"), "something else")
        raise ValueError(f"{path} is a {kind}, a {_NAMES[part]} is needed: give a run's weights/{part}.pt.")
    try:
        method, classes, trained_on = description["method"], tuple(description["classes"]), description["normalisation"]
        recipe = restored(_recipe("cam" if own else part, method, description["preset"]), description["recipe"])
        _check_shapes(path, recipe, len(classes), state)
        network = _build(recipe, len(classes))
        if own:
            recipe = _as_segmenter(recipe, method, description)
    except _OtherNetwork:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} describes a {_NAMES[part]} that this version of the project can't build ({error}). {_OLD}"
        ) from error
    load_state(network, path)
    if trained_on != (here := _normalisation(network)):
        raise ValueError(
            f"{path} was trained with images normalised as {trained_on}, this version has {here}: train it again."
        )
    return Model(network.eval(), method, classes, recipe, store.fingerprint(path))


def released_model(recipe: Phase, method: str, files: Sequence[str], classes: Sequence[str]) -> Model:
    """The network of a recipe (SeedRecipe or SegmentRecipe) with the weights that its authors released, used as they
    are. ``method``: registered name of the network's class. Raises as ``net.released.load_released``."""
    network = _build(recipe, len(classes))
    network.set_class_texts(classes, {})
    load_released(network, files)
    fingerprint = "+".join(store.fingerprint(Path(file)) for file in files)
    return Model(network.eval(), method, tuple(classes), recipe, fingerprint)


def as_segmenter(recipe: Phase, test: SegmentTest) -> SegmentRecipe:
    """The recipe of a CAM network that predicts masks, with its test settings."""
    return SegmentRecipe(**{f.name: getattr(recipe, f.name) for f in fields(Phase)}, infer=test.infer)


_OLD = "Use the version that trained it, or train it again with this one."
_DESCRIPTION = {"part": str, "method": str, "preset": str, "classes": [str], "normalisation": dict, "recipe": dict,
                "?own": dict}  # fmt: skip


def _check_shapes(path: Path, recipe: Phase, num_classes: int, state: Mapping[str, torch.Tensor]) -> None:
    """ValueError where the network of a description has other tensors than its file: before memory is taken for it,
    which a wrong width could ask without end."""
    try:
        with torch.device("meta"):  # shapes alone
            expected = dict(_build(recipe, num_classes).named_parameters())  # buffers may grow when they are loaded
    except ValueError:
        raise
    except Exception:  # a network that looks at its numbers while it is built
        return
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            there, here = tuple(state[name].shape), tuple(tensor.shape)
            raise _OtherNetwork(f"{path} belongs to another network ({name} is {there} there, {here} here): train this "
                                "one with --redo, or use its run folder.")  # fmt: skip


class _OtherNetwork(ValueError):
    """The tensors of a file are not those of its description."""


def predicts_masks(path: Path) -> bool:
    """Whether the weights file of a trained network can be loaded as part seg. Raises as ``load_model``."""
    registry.load_methods()
    description = store.read_model(path)[1]
    return description.get("part") == "seg" or _predicts_masks(description)


def _predicts_masks(description: Mapping[str, Any]) -> bool:
    """Whether a network is a CAM network that also predicts masks; its earlier phases belong to the same method."""
    name = description.get("method")
    method = registry.SEEDS.get(name) if isinstance(name, str) else None
    return description.get("part") == "cam" and method is not None and issubclass(method, contract.SingleStage)


def _as_segmenter(recipe: Phase, method: str, description: Mapping[str, Any]) -> SegmentRecipe:
    """The recipe of a CAM network that predicts masks, with the test settings that its file describes."""
    own = registry.find_recipe(registry.SEEDS[method], description["preset"]).own
    assert own is not None
    return as_segmenter(recipe, restored(own, description.get("own", {})))


def _recipe(part: Part, method: str, preset: str) -> Phase:
    tables = {"cam": registry.SEEDS, "aff": registry.REFINERS, "seg": registry.SEGMENTERS}
    if method not in tables[part]:
        raise ValueError(f"there is no {_NAMES[part]} named {method}")
    if part == "cam":
        return registry.find_recipe(tables[part][method], preset).cam
    # the preset may be a variant of the CAM method's; all have fields of the same types
    return registry.find_recipe(tables[part][method], preset, "published")


def _build(recipe: Phase, num_classes: int) -> Network:
    """The network with random weights, built on earlier phases with random weights."""
    earlier: dict[str, Network] = {}
    phases = recipe.phases() if isinstance(recipe, SeedRecipe) else ()
    for name, phase in phases[:-1]:
        earlier[name] = phase.network.build(num_classes, earlier)
    return recipe.network.build(num_classes, earlier)
