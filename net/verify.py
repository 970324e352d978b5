"""Runs a tiny batch through a network before any work starts, to report mistakes in a method's file at once and by
name.

Each function builds the network from the recipe on the CPU with random weights, and discards it: neither the weights
nor the random numbers of the run change.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from misc.image.cam import Cam
from misc.image.labels import IGNORE
from misc.image.picture import Picture, truncate_values_to_image
from misc.image.pixels import find_normalisation
from misc.image.segments import Segments
from misc.loop.trainable import Batch
from net.contract import (
    AffinityNetwork,
    Network,
    Phase,
    Refiner,
    RefineRecipe,
    RefineSettings,
    SeedNetwork,
    Segmenter,
    SingleStage,
)

_TINY = (64, 224)
"""Image sides to try: the first one that a network accepts; if none, that of the training crop."""
_WIDER = 16
"""Images for maps are wider than high by this many pixels."""


def verify_seed(phases: Sequence[tuple[str, Phase]], num_classes: int) -> None:
    """Check the losses of every phase of a CAM method, and maps, class scores and (for ``SingleStage``) logits of the
    last.

    Raises a ValueError that names the file and describes the mistake in one sentence.
    """
    with _undisturbed():
        earlier: dict[str, Network] = {}
        for name, phase in phases:
            network = _built(phase, num_classes, earlier)
            _check_losses(network, phase, lambda size: _tags(num_classes))
            earlier[name] = network.eval().requires_grad_(False)
        if not isinstance(network, SeedNetwork):
            raise ValueError(f"{_file(network)}: {type(network).__name__} is not a SeedNetwork, so it gives no CAMs.")
        tags = _tags(num_classes)["tags"][:1]

        def maps(images: Tensor) -> Tensor:
            with torch.set_grad_enabled(network.map_needs_gradient):
                return network.cam(images, tags)

        _check_map(network, "cam", maps, phase, num_classes)
        with torch.no_grad():
            scores = _asked(network, "classify", lambda images: network.classify(images, num_classes), _sides(phase))
            _check_shape(network, "classify", scores, (1, num_classes))
            if isinstance(network, SingleStage):
                _check_map(network, "logits", network.logits, phase, num_classes + 1)


def verify_refiner(cls: type[Refiner], recipe: RefineSettings, num_classes: int) -> None:
    """Check the scores of a refiner; if it is trained, its labels and losses too. Raises as ``verify_seed``."""
    with _undisturbed():
        if issubclass(cls, AffinityNetwork):
            assert isinstance(recipe, RefineRecipe)
            refiner = _built(recipe, num_classes, {})
            _check_affinity_training(refiner, recipe, num_classes)
            refiner.eval()
            sides = _sides(recipe)
        else:
            refiner, sides = cls(), _TINY[:1]

        def scores(images: Tensor) -> Any:
            rgb = truncate_values_to_image(images[0], refiner.normalisation)
            halves = np.arange(rgb.shape[1])[None] < rgb.shape[1] // 2
            segments = Segments.of_masks([np.broadcast_to(halves, rgb.shape[:2])], rgb.shape[:2])
            picture = Picture(rgb, images[0], segments if refiner.wants_segments else None)
            return refiner.refine(picture, _cam(num_classes, picture.size), recipe.walk)

        refined = _asked(refiner, "refine", scores, sides)
        classes = len(_cam(num_classes, (8, 8)).keys)
        _check_shape(refiner, "refine", refined, (classes + 1, *refined.shape[1:]))
        if refined.shape[2] - refined.shape[1] != _WIDER:
            raise ValueError(f"{_file(refiner)}: the scores of refine do not have the height and width of the image.")


def verify_segmenter(phase: Phase, num_classes: int) -> None:
    """Check losses and logits of a segmentation network. Raises as ``verify_seed``."""

    def masks(size: int) -> Batch:
        mask = torch.arange(2 * size * size).view(2, size, size) % (num_classes + 1)
        mask[:, 0] = IGNORE
        return {**_tags(num_classes), "mask": mask}

    with _undisturbed():
        network = _built(phase, num_classes, {})
        _check_losses(network, phase, masks)
        if not isinstance(network, Segmenter):
            raise ValueError(f"{_file(network)}: {type(network).__name__} is not a Segmenter, so it gives no masks.")
        with torch.no_grad():
            _check_map(network.eval(), "logits", network.logits, phase, num_classes + 1)


# ------------------------------------------------------------------------------------------------ pieces


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Restores the states of all random number generators."""
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)


def _built(phase: Phase, num_classes: int, earlier: Mapping[str, Network]) -> Any:
    """The phase's network in training mode.

    Batch normalisation uses and keeps the batch's statistics even if it is frozen: frozen statistics need trained
    weights, and with random ones activations overflow.
    """
    try:
        network = phase.network.build(num_classes, earlier)
    except Exception as error:
        raise ValueError(f"{_file(phase.network)}: building the network fails with {_words(error)}.") from error
    if not isinstance(network, Network):
        raise ValueError(f"{_file(phase.network)}: build gives a {type(network).__name__}, which is not a Network.")
    try:
        find_normalisation(network.normalisation)
    except ValueError as error:
        raise ValueError(f"{_file(network)}: {error}") from None
    network.set_class_texts([f"class {number}" for number in range(num_classes)], {})
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = 1.0
    return network


def _file(thing: object) -> str:
    """File of an object's class; relative to the checkout if it is in net/."""
    path = Path(inspect.getfile(type(thing)))
    root = Path(__file__).parent
    return path.relative_to(root.parent).as_posix() if path.is_relative_to(root) else str(path)


def _words(error: Exception) -> str:
    """An error in words, with the line of the method's file (or else the last line) that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(Path(__file__).parent) and f.filename != __file__]
    last = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})".replace("\n", " ")


def _tags(num_classes: int) -> Batch:
    """Tags of two images: the first class, the last class."""
    tags = torch.zeros(2, num_classes)
    tags[0, 0] = tags[1, -1] = 1
    return {"tags": tags}


def _cam(num_classes: int, size: Sequence[int]) -> Cam:
    """CAMs of at most two classes that rise from left to right and from right to left."""
    height, width = size
    rising = np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1))
    keys = np.arange(min(2, num_classes))
    return Cam.of_maps(keys, np.stack([rising, rising[:, ::-1]])[: len(keys)].copy())


def _sides(phase: Phase) -> list[int]:
    """Sides of images to try, the training crop's last."""
    crop = phase.augment.crop
    return [*(side for side in _TINY if side < crop), crop]


def _asked(thing: Network | Refiner, what: str, call: Callable[[Tensor], Any], sides: Sequence[int]) -> Any:
    """The result of ``call`` for one image that is not square. If it fails, a ValueError names the method's file."""
    for side in sides:
        try:
            return call(torch.linspace(-1, 1, 3 * side * (side + _WIDER)).view(1, 3, side, side + _WIDER))
        except Exception as error:
            refused = error
    raise ValueError(
        f"{_file(thing)}: {type(thing).__name__}.{what} fails on one image of {side} x {side + _WIDER} pixels with "
        f"{_words(refused)}."
    ) from refused


def _check_affinity_training(network: AffinityNetwork, recipe: RefineRecipe, num_classes: int) -> None:
    """Check the labels that an affinity network makes, and the losses of a training on them."""
    made: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def labels(size: int) -> Batch:
        picture = np.zeros((size, size, 3), np.uint8)
        picture[: size // 2] = 255
        made[size] = network.make_label(picture, _cam(num_classes, (size, size)), recipe.label)
        return {**_tags(num_classes), "target": torch.from_numpy(np.stack([network.make_target(made[size][1])] * 2))}

    _check_losses(network, recipe, labels)
    for size, (picture, planes) in made.items():
        _check_shape(network, "make_label (picture)", picture, (size, size))
        _check_shape(network, "make_label (planes)", planes, (planes.shape[0], size, size))


def _check_losses(network: Network, phase: Phase, extra: Callable[[int], Batch]) -> None:
    """Check the loss terms at the beginning and the end of the training, if the phase is trained."""
    if phase.fit.steps == 0:
        return
    name = f"{_file(network)}: {type(network).__name__}"
    for progress in (0.0, 0.999):
        for side in _sides(phase):
            try:
                terms = _losses(network, phase, side, progress, extra(side))
                break
            except Exception as error:
                refused = error
        else:
            raise ValueError(
                f"{name}: a training step on two images of {side} x {side} pixels fails with {_words(refused)}."
            ) from refused
        if not isinstance(terms, dict) or not terms:
            raise ValueError(f"{name}.forward gives {type(terms).__name__}, not a dictionary of named loss terms.")
        for term, value in terms.items():
            if not isinstance(value, Tensor) or value.ndim != 0:
                shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}.forward: the loss term {term!r} is {shape}, not a scalar tensor.")
            if not value.isfinite():
                raise ValueError(f"{name}.forward: the loss term {term!r} is {value.item()} with random weights.")
        if not sum(terms.values()).requires_grad:
            raise ValueError(f"{name}.forward: no loss term depends on a parameter that is trained.")


def _losses(network: Network, phase: Phase, side: int, progress: float, extra: Batch) -> Any:
    """Loss terms of two images of ``side`` pixels, computed as in the training loop."""
    values = torch.linspace(-2, 2, 2 * 3 * side * side).view(2, 3, side, side)
    images, box = values.sin(), torch.tensor([[0, side, 0, side]] * 2)
    batch = {"image": images, "box": box, "seed": torch.tensor([1, 2]), **extra}
    for name in phase.views():
        batch |= {f"view/{name}": images, f"box/{name}": box, f"mirrored/{name}": torch.tensor([False, True])}
    if phase.network.wants_saliency:
        batch["saliency"] = torch.arange(2 * side * side).view(2, side, side).remainder(256).to(torch.uint8)
    batch |= network.prepare(batch, progress)
    batch |= {f"counts/{name}": count for name, count in network.counts(batch).items()}
    return network(batch, progress)


def _check_map(network: Network, what: str, call: Callable[[Tensor], Any], phase: Phase, channels: int) -> None:
    """Check that ``call`` gives a map (1, channels, h, w), h and w at least 1."""
    maps = _asked(network, what, call, _sides(phase))
    size = tuple(maps.shape[2:]) if isinstance(maps, Tensor) and maps.ndim == 4 and maps.numel() else ("h", "w")
    _check_shape(network, what, maps, (1, channels, *size))


def _check_shape(thing: Network | Refiner, what: str, value: Any, wanted: tuple[Any, ...]) -> None:
    """Raise ValueError if an array or tensor has another shape."""
    shape = tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
    if shape != wanted:
        text = ", ".join(map(str, wanted))
        raise ValueError(f"{_file(thing)}: {type(thing).__name__}.{what} gives {shape}, but ({text}) is required.")
