"""net/verify.py: every published and sample recipe passes it, and a mistake in a new method is reported in one
sentence."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import a_method
import numpy as np
import pytest
import torch
from a_method import ThreeLayers

from misc.config import override
from net import registry
from net.contract import Network
from net.verify import verify_refiner, verify_seed, verify_segmenter

registry.load_methods()
registry.SEEDS.pop("three_layers", None)  # registered by importing it
CLASSES = 3


@pytest.fixture
def whole() -> Iterator[Any]:
    """The new method's only phase."""
    yield ThreeLayers.recipes["sample"].cam.phases()


def told(monkeypatch: pytest.MonkeyPatch, name: str, slip: Any, phases: Any) -> str:
    """The sentence that tells of ``slip`` in place of the method's ``name``."""
    monkeypatch.setattr(ThreeLayers, name, slip, raising=False)
    with pytest.raises(ValueError) as found:
        verify_seed(phases, CLASSES)
    text = str(found.value)
    assert a_method.__file__ in text and "picture" not in text and "\n" not in text
    return text


@pytest.mark.parametrize("name", sorted(registry.SEEDS))
def test_every_method_passes(name: str) -> None:
    verify_seed(registry.SEEDS[name].recipes["sample"].cam.phases(), CLASSES)
    verify_seed(registry.SEEDS[name].recipes["sample"].cam.phases(), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry.REFINERS))
def test_every_refiner_passes(name: str) -> None:
    for classes in (CLASSES, 1):
        verify_refiner(registry.REFINERS[name], registry.REFINERS[name].recipes["sample"], classes)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry.SEGMENTERS))
def test_every_segmenter_passes(name: str) -> None:
    verify_segmenter(registry.SEGMENTERS[name].recipes["sample"], CLASSES)


def test_random_numbers_of_the_run_are_not_touched(whole: Any) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seeded(look: bool) -> tuple[float, float, float]:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if look:
            verify_seed(whole, CLASSES)
        return draws()

    assert seeded(True) == seeded(False)


WRONG_LOSSES = {
    "a tensor": (lambda self, batch, progress: batch["image"].mean(), "forward gives Tensor, not a dictionary"),
    "nothing": (lambda self, batch, progress: {}, "forward gives dict, not a dictionary of named loss terms"),
    "a number": (lambda self, batch, progress: {"cls": 1.0}, "the loss term 'cls' is float, not a scalar tensor"),
    "one an image": (
        lambda self, batch, progress: {"cls": self.head.weight.sum() * batch["tags"][:, 0]},
        r"the loss term 'cls' is a tensor of shape \(2,\), not a scalar",
    ),
    "late": (
        lambda self, batch, progress: {"cls": self.head.weight.sum() / (0.999 - progress)},
        "the loss term 'cls' is -?inf with random weights",
    ),
    "constant": (lambda self, batch, progress: {"cls": batch["tags"].sum()}, "no loss term depends on a parameter"),
    "a wrong name": (
        lambda self, batch, progress: {"cls": batch["labels"].sum()},
        r"a training step on two images of 64 x 64 pixels fails with KeyError: 'labels'",
    ),
}


@pytest.mark.parametrize("slip", WRONG_LOSSES)
def test_a_wrong_loss_is_reported(slip: str, monkeypatch: pytest.MonkeyPatch, whole: Any) -> None:
    forward, said = WRONG_LOSSES[slip]
    assert re.search(rf"ThreeLayers.*{said}", told(monkeypatch, "forward", forward, whole))


def test_wrong_maps_and_scores_are_reported(monkeypatch: pytest.MonkeyPatch, whole: Any) -> None:
    right = ThreeLayers.cam
    wrong = {
        lambda self, images, tags: right(self, images, tags)[:, :-1]: r"gives \(1, 2, 16, 20\), but \(1, 3",
        lambda self, images, tags: right(self, images, tags)[0]: r"cam gives \(3, 16, 20\), but \(1, 3, h, w\) is",
        lambda self, images, tags: None: r"cam gives NoneType, but \(1, 3, h, w\) is",
        lambda self, images, tags: self.tail(images): "cam fails on one image of 64 x 80 pixels with AttributeError",
    }
    for cam, said in wrong.items():
        assert re.search(f"ThreeLayers.{said}|ThreeLayers.cam {said}", told(monkeypatch, "cam", cam, whole))
    monkeypatch.setattr(ThreeLayers, "cam", right)
    monkeypatch.setattr(ThreeLayers, "classify", lambda self, images, num_classes: torch.zeros(1, num_classes + 1))
    with pytest.raises(ValueError, match=r"classify gives \(1, 4\), but \(1, 3\) is required"):
        verify_seed(whole, CLASSES)


def test_a_wrong_build_or_normalisation_is_reported(monkeypatch: pytest.MonkeyPatch, whole: Any) -> None:
    assert "normalisation 'none' is not one of" in told(monkeypatch, "normalisation", "none", whole)

    def build(self: Any, num_classes: int, earlier: dict[str, Network]) -> Any:
        return torch.nn.Linear(1, self.widths)

    monkeypatch.setattr(a_method.ThreeLayerOptions, "build", build)
    with pytest.raises(ValueError, match="a_method.py: building the network fails with AttributeError"):
        verify_seed(whole, CLASSES)


def test_a_phase_that_trains_nothing_has_no_loss_to_check(monkeypatch: pytest.MonkeyPatch, whole: Any) -> None:
    ((name, phase),) = whole
    monkeypatch.setattr(ThreeLayers, "forward", None)
    try:
        still = override(phase, {"fit.steps": 0})
    except ValueError:
        pytest.skip("no recipe has 0 updates")
    verify_seed([(name, still)], CLASSES)


@pytest.mark.slow
def test_wrong_labels_targets_and_scores_of_a_refiner_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = registry.REFINERS["psa"]
    recipe, right = cls.recipes["sample"], (cls.make_label, cls.refine)

    def refused(name: str, slip: Any, said: str) -> None:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=rf"net/refine/psa.py: PSA\w*\.?{said}"):
            patch.setattr(cls, name, slip)
            verify_refiner(cls, recipe, CLASSES)

    refused("make_label", classmethod(lambda c, *a: (right[0](*a)[0][1:], right[0](*a)[1])), r"make_label \(picture\)")
    refused("make_target", classmethod(lambda c, planes: planes[:, :7]), ": a training step on two images of")
    refused("refine", lambda self, *a: right[1](self, *a)[1:], r"refine gives \(2, 64, 80\), but \(3, 64, 80\) is")
