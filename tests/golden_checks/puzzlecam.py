"""Golden case of Puzzle-CAM's tiles and losses (puzzlecam.md section 3)."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.config import override
from net.losses import multilabel_soft_margin
from net.registry import SEEDS
from net.seed import puzzlecam


def check_puzzlecam_losses(case: Any) -> None:
    """Tiles, maps, every loss, the weight, the gradient and the normalised maps, with the case's stand-in network."""
    text = case.meta["description"]
    stride, padding, classes = (
        int(re.search(pattern, text)[1]) for pattern in (r"stride-(\d+)", r"padding (\d+)", r"(\d+) channels")
    )
    alpha, rise, step, steps, pieces = (
        float(re.search(pattern, text)[1])
        for pattern in (
            r"alpha=([\d.]+)", r"schedule ([\d.]+)", r"iteration (\d+) of", r"iteration \d+ of (\d+)", r"(\d+) pieces",
        )
    )  # fmt: skip
    side = int(pieces**0.5)
    images = case.evaluate(case.meta["input"]["image"])
    tags = torch.zeros(len(images), classes)
    for row, labels in zip(tags, case.meta["input"]["labels_zero_based"], strict=True):
        row[labels] = 1
    weight = nn.Parameter(torch.from_numpy(case.input("conv_weight")))

    def maps(inputs: Tensor) -> Tensor:
        return F.conv2d(inputs, weight, stride=stride, padding=padding)

    options = override(
        SEEDS["puzzlecam"].recipes["sample"].cam.network,
        {"tiles": side, "alpha": alpha, "alpha_rise": rise, "confidence": True},
    )
    network = options.build(classes, {})
    network.forward_maps = maps
    terms = network({"image": images, "tags": tags}, step / steps)
    loss = terms["cl"] + terms["pcl"] + terms["re"]
    loss.backward()
    tiles = puzzlecam.split_tiles(images, side)
    whole, joined = maps(images), puzzlecam.join_tiles(maps(tiles), side)
    sampled = case.meta["outputs"]["tiles"]["meaning"]
    assert "sampled [:, :, ::4, ::4]" in sampled
    case.check("tiles", tiles[:, :, ::4, ::4])
    case.check("features", whole)
    case.check("merged", joined)
    case.check("logits", whole.mean((2, 3)))
    case.check("cls_loss", terms["cl"])
    case.check("pcl_loss", terms["pcl"])
    case.check("conf_loss", terms["conf"])
    for name, masking, squared in (
        ("re_masking", "masking", False), ("re_none", "none", False), ("re_selection", "selection", False),
        ("re_l2_masking", "masking", True),
    ):  # fmt: skip
        case.check(name, puzzlecam.reconstruction_loss(whole, joined, tags, masking, squared))
    case.check("alpha", terms["re"] / puzzlecam.reconstruction_loss(whole, joined, tags, "masking", False))
    case.check("loss", loss)
    case.check("grad_conv", weight.grad)
    every = {"every third class": 3}[case.meta["outputs"]["cam"]["meaning"].split(", ")[-1]]
    case.check("cam", puzzlecam.divide_by_maximum(whole)[:, ::every])
    assert torch.equal(multilabel_soft_margin(joined.mean((2, 3)), tags), terms["pcl"])
