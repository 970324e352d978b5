"""The networks of all recipes and batches for them, as scripts.network_speed and scripts.gpu_check measure them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from misc.config import Machine
from misc.loop.trainable import Batch
from misc.precision import place
from net import registry
from net.contract import Network, Phase

CLASSES = 20
STRIDES = {"psa": 8, "irn": 4, "edge": 4}
"""Refiner -> stride of its training target."""


@dataclass(frozen=True)
class Task:
    """One network to measure: its phase, the phases before it, and the stride of a refiner's training target."""

    name: str
    phase: Phase
    earlier: Sequence[tuple[str, Phase]] = ()
    stride: int | None = None


def tasks(preset: str) -> Iterator[Task]:
    """Every network that has a recipe of this preset: CAM networks and their earlier phases, refiners that are trained,
    segmenters."""
    for name, method in registry.SEEDS.items():
        listed = method.recipes[preset].cam.phases() if preset in method.recipes else ()
        for number, (part, phase) in enumerate(listed):
            yield Task(name if part == "cam" else f"{name}.{part}", phase, listed[:number])
    for name, refiner in registry.REFINERS.items():
        if refiner.is_trained and preset in refiner.recipes:
            yield Task(f"refiner {name}", refiner.recipes[preset], (), STRIDES[name])  # type: ignore[arg-type]
    for name, segmenter in registry.SEGMENTERS.items():
        if preset in segmenter.recipes:
            yield Task(name, segmenter.recipes[preset])


def build(task: Task, device: torch.device, machine: Machine | None = None) -> Network:
    """The task's network with random weights from a fixed seed, on earlier ones that are placed as in a run."""
    torch.manual_seed(0)
    made: dict[str, Network] = {}
    for name, phase in task.earlier:
        made[name] = phase.network.build(CLASSES, made).eval().requires_grad_(False)
        place(made[name], machine or Machine(amp="off"), device)
    network = task.phase.network.build(CLASSES, made)
    network.set_class_texts([f"class {number}" for number in range(CLASSES)], {})
    return network.to(device)


def make_batch(task: Task, size: int, device: torch.device) -> Batch:
    """Noise with two classes an image, and whatever a network may ask for."""
    random, side = np.random.default_rng(0), task.phase.augment.crop
    tags = np.zeros((size, CLASSES), np.float32)
    for index in range(size):
        tags[index, [index % CLASSES, (index + 7) % CLASSES]] = 1

    def blocks(values: int, cells: int, kind: type) -> np.ndarray:
        at = np.arange(cells) * 4 // cells
        return random.integers(0, values, (size, 4, 4)).astype(kind)[:, at[:, None], at]

    box = np.tile(np.array([0, side, 0, side - 8]), (size, 1))
    arrays = {
        "image": random.standard_normal((size, 3, side, side), np.float32), "tags": tags, "box": box,
        "mask": blocks(CLASSES + 1, side, np.int64), "saliency": 255 * blocks(2, side, np.uint8),
        "target": blocks(3, side // (task.stride or 4), np.uint8), "seed": np.arange(size),
    }  # fmt: skip
    for name, view in task.phase.views().items():
        shape = (size, 3, view.crop, view.crop)
        arrays |= {
            f"view/{name}": random.standard_normal(shape, np.float32), f"mirrored/{name}": np.arange(size) % 2 == 1,
            f"box/{name}": np.tile(np.array([0, view.crop, 0, view.crop]), (size, 1)),
        }  # fmt: skip
    return {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}


def loss_terms(
    network: Network, model: Callable[..., dict[str, Tensor]], batch: Batch, progress: float,
    context: contextlib.AbstractContextManager[Any] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The loss terms of a batch as the training loop asks for them."""
    batch = {**batch, **network.prepare(batch, progress)}
    batch |= {f"counts/{name}": count.float() for name, count in network.counts(batch).items()}
    with context or contextlib.nullcontext():
        return model(batch, progress)
