"""Golden cases of the pixel-adaptive refinement: PAR (aream.md section 5) and PAMR (getam.md section 4)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.propagate.par import PAMR, PAR, Kernel, PixelAdaptive, distances, neighbours


def numbers(text: str) -> list[float]:
    """The numbers of a text, in brackets and between commas."""
    return [float(number) for number in re.findall(r"[\d.]+", text)]


def coloured(case: Any) -> Tensor:
    """The image that a case describes as normalised and brought back: (B, 3, H, W) of about [0, 1]."""
    made = case.meta["input"]["image"]
    std, mean = (torch.tensor(numbers(part)).view(3, 1, 1) for part in re.findall(r"\(([\d.,]+)\)", made["made_by"]))
    return case.fill.image(made["name"], *made["shape"]) * std + mean


def check_par_refine(case: Any) -> None:
    """Masks after all, one and three iterations, the neighbours and their distances."""
    width, place = (float(re.search(rf"{name} = ([\d.]+)", case.meta["constructor"])[1]) for name in ("w1", "w2"))
    image, mask = coloured(case), torch.from_numpy(case.input("in_mask"))
    outputs = case.meta["outputs"]
    found = re.search(r"dilations ([\d,]+)", outputs["refined"]["meaning"])
    dilations = tuple(int(d) for d in found[1].split(","))
    case.expect_published(Kernel(dilations, width, place=place), PAR)
    for name in ("refined", "one_iteration", "small"):
        text = outputs[name]["meaning"]
        stated = re.search(r"dilations ([\d, ]+)", text)
        kernel = Kernel(tuple(int(d) for d in stated[1].split(",")) if stated else dilations, width, place=place)
        iterations = int(re.search(r"(\d+) iteration", text)[1])
        case.check(name, PixelAdaptive(image, kernel)(mask, iterations))
    case.check("neighbours", torch.stack([n[:, 0] for n in neighbours(mask, dilations)], 1))
    case.check("pos", distances(dilations))


def check_getam_pamr(case: Any) -> None:
    """Weights, and maps after one and ten iterations; maps are first brought to the image, with aligned corners."""
    found = re.search(r"dilations ([\d,]+), with (\d+) and (\d+) iterations", case.meta["description"])
    kernel = replace(PAMR, dilations=tuple(int(d) for d in found[1].split(",")))
    case.expect_published(kernel, PAMR)
    image = torch.from_numpy(case.input("image")).float()
    maps = torch.from_numpy(case.input("maps"))
    maps = F.interpolate(maps, size=image.shape[-2:], mode="bilinear", align_corners=True)
    refine = PixelAdaptive(image, kernel)
    step = int(re.search(r"sampled \[\.\.\., ::(\d+)", case.meta["outputs"]["affinity"]["meaning"])[1])
    values = {
        "affinity": refine.weights[:, None, :, ::step, ::step],
        "out1": refine(maps, int(found[2])),
        "out": refine(maps, int(found[3])),
    }
    tolerance = case.meta["tolerance"]
    for name, value in values.items():
        of_largest = tolerance["atol_relative_to_max_abs"]
        case.compare(name, value, relative=tolerance["rtol"], of_largest=of_largest)
