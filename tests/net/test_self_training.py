"""The published networks of ToCo and MoRe at full size: VOC and COCO, from ViT-B and DeiT-B."""

from __future__ import annotations

import json

import pytest
import torch
from running import ROOM

from net.seed.more import More
from net.seed.toco import Toco
from net.shared.self_training import SelfTrainedViT
from net.start_weights import PRETRAINED

PRESETS = [(cls, name) for cls in (Toco, More) for name in cls.recipes if name.startswith("published")]


def official_shapes(cls: type[SelfTrainedViT], classes: int) -> dict[str, list[int]]:
    """Names and shapes of the authors' files, which are listed for VOC's 20 classes."""
    case = json.loads((ROOM / "tests" / "golden" / f"{cls.__name__.lower()}_forward.json").read_text())
    added = classes - 20
    grown = {20: 20 + added, 21: 21 + added, 24: 24 + added, 24 + 196: 24 + 196 + added}
    return {name: [grown.get(side, side) for side in shape] for name, shape in case["keys"].items()}


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "preset"), PRESETS)
def test_a_published_network_has_the_official_tensors_and_takes_the_recipe_s_crops(
    cls: type[SelfTrainedViT], preset: str
) -> None:
    """Without memory and computation: on the meta device."""
    recipe = cls.recipes[preset].cam
    classes, side = 80 if "coco" in preset else 20, recipe.augment.crop
    assert (cls.recipes[preset].data == "coco14") == ("coco" in preset) and recipe.weights == PRETRAINED
    with torch.device("meta"):
        network = recipe.network.build(classes, {})
        assert {name: list(v.shape) for name, v in network.state_dict().items()} == official_shapes(cls, classes)
        assert ("deit" in network.pretrained_names()[0]) == ("deit" in preset)
        grid, images = (side // 16, side // 16), torch.empty(2, 3, side, side)
        maps, auxiliary = network.raw_maps(images)
        assert maps.shape == auxiliary.shape == (2, classes, *grid)
        assert network.logits(images).shape == (2, classes + 1, *grid)
