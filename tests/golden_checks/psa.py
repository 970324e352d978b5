"""Golden cases of AffinityNet and its random walk (psa.md sections 5 and 6).

Whatever differs between cases of a family is read from the case: image names, shapes, classes, factors, settings.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import plain
import torch
from torch import Tensor

from misc.config import override
from misc.image.cam import Cam
from misc.image.picture import Picture, truncate_values_to_image
from misc.propagate.walk import fitting_radius, half_circle, pair_cells, walk
from net.refine.psa import (
    PSA,
    PSAOptions,
    PSAWalk,
    affinity_losses,
    pad_to_stride,
    pair_affinity,
    pair_labels,
    pool_to_cells,
)
from net.shared.background import stack_background

_NUMBER = r"(\d+(?:\.\d+)?)"


def _network(case: Any, backbone: str, classes: int = 1) -> PSA:
    """The network with the case's weights, in evaluation mode; its state dict must be the official one; no
    layer depends on the classes."""
    network = PSAOptions(backbone=backbone).build(classes, {})
    if case.meta["keys"]:
        assert list(case.fill.keys_of(network).items()) == list(case.meta["keys"].items())
    case.fill.fill_(network)
    text = case.meta["input"]["weights"]
    every = re.search(rf"every 4-D parameter (?:whose name contains (.+?) )?is multiplied by {_NUMBER}", text)
    assert every, text
    parts = re.findall(r"'(\w+)'", every[1]) if every[1] else [""]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4 and any(part in name for part in parts):
                parameter.mul_(float(every[2]))
        for name, factor in re.findall(rf"([\w.]+\.weight) is multiplied by {_NUMBER}", text):
            network.get_parameter(name).mul_(float(factor))
    return network.eval()


def _affinities(case: Any, backbone: str, *, early: bool = False) -> None:
    """Pair affinities of all images, and the dense matrix of the first where the case has one; ``early``: SEAM's
    radius rule."""
    network = _network(case, backbone)
    with torch.inference_mode():
        features = network.forward_features(case.evaluate(case.meta["input"]["x"]))
    height, width = features.shape[-2:]
    radius = fitting_radius(network.radius, height, width, early=early)
    affinity = pair_affinity(features, radius)
    case.check("aff", affinity)
    if "dense" in case.names:
        source, target = pair_cells(half_circle(radius), height, width, radius=radius)
        case.check("dense", plain.dense_affinity(source, target, affinity[0].flatten(), height * width))


def check_psa_aff_forward(case: Any) -> None:
    """AffinityNet on ResNet38."""
    _affinities(case, "resnet38")


def check_psa_aff_vgg16(case: Any) -> None:
    """AffinityNet on VGG16."""
    _affinities(case, "vgg16")


def check_seam_aff_small(case: Any) -> None:
    """SEAM's copy on a grid that is too small for the radius."""
    _affinities(case, "resnet38", early=True)


def check_psa_aff_labels_and_losses(case: Any) -> None:
    """Confident label, pair labels, loss terms and gradient."""
    planes = np.concatenate([case.input("la"), case.input("ha")])
    label = PSA.make_target(planes)
    case.compare("label", label)
    radius = int(re.search(r"radius (\d+)", case.meta["constructor"])[1])
    pairs = pair_labels(torch.from_numpy(label)[None], radius)
    for ours, theirs in (("bg", "bg_pos"), ("fg", "fg_pos"), ("neg", "neg")):
        case.compare(theirs, pairs[ours][0])

    expression = re.match(r"(.+), and the same flipped along the displacement axis", case.meta["input"]["aff_in"])[1]
    one = case.evaluate(expression)  # (1, D, P)
    affinity = torch.cat([one, one.flip(1)]).requires_grad_()
    case.check("aff_in", affinity)
    labels = {name: torch.cat([pair, pair.flip(1)]) for name, pair in pairs.items()}
    losses = affinity_losses(affinity, labels, {name: pair.sum() for name, pair in labels.items()})
    total = sum(losses.values())
    total.backward()
    for name, weight in (("bg", 4), ("fg", 4), ("neg", 2)):
        case.check(f"{name}_loss", losses[name] * weight)
    case.check("loss", total)
    case.check("grad_aff", affinity.grad)


def _settings(text: str) -> PSAWalk:
    """Settings of a walk from words such as "background (1 - max)^16, beta 8, logt 8"."""
    power = re.search(rf"\(1 ?- ?max\)\^{_NUMBER}", text)
    constant = re.search(rf"constant background {_NUMBER}", text)
    assert (power is None) != (constant is None), text
    rule = {"alpha": float(power[1])} if power else {"background": "constant", "threshold": float(constant[1])}
    beta, logt = re.search(rf"beta {_NUMBER}", text), re.search(r"logt (\d+)", text)
    return PSAWalk(**rule, beta=float(beta[1]), logt=int(logt[1]))


def _inputs(case: Any) -> tuple[Picture, Cam]:
    """Image and CAMs of the case."""
    cam = Cam.of_maps(np.array(case.meta["input"]["classes"]), case.input("cams"))
    return Picture.of_rgb(case.input("image"), "imagenet"), cam


def _assert_same_label(case: Any, name: str, scores: np.ndarray, cam: Cam) -> None:
    """Label maps agree but for 0.2 % of the pixels (ties)."""
    label = np.array([0, *(cam.keys + 1)])[scores.argmax(axis=0)]
    case.compare(name, label, share=0.998)


def _all_classes(values: Tensor, cam: Cam, classes: int) -> Tensor:
    """(K + 1, ...) -> (C + 1, ...), zero for absent classes."""
    full = values.new_zeros((classes + 1, *values.shape[1:]))
    full[torch.tensor([0, *(cam.keys + 1)])] = values
    return full


def check_psa_random_walk(case: Any) -> None:
    """Every variant: affinities, transition matrix, pooled scores before and after, label."""
    variants = {name: _settings(text) for name, text in case.meta["input"]["variants"].items()}
    classes = case.meta["outputs"][f"{next(iter(variants))}_cam_low"]["shape"][0] - 1
    network = _network(case, "resnet38", classes)
    image, cam = _inputs(case)
    for number, (name, options) in enumerate(variants.items()):
        step = network.make_transition(image.values, options)
        if number == 0:  # columns of A^beta divided by their sums; the diagonal of A is one
            columns = step.to_dense().t()
            case.check("aff_pow", columns / columns.diagonal())
        case.check(f"{name}_trans", walk(step, torch.eye(len(step)), 2**options.logt))
        scores = stack_background(cam.maps, options.background, options.alpha, options.threshold)
        pooled = pool_to_cells(torch.from_numpy(scores))
        case.check(f"{name}_cam_low", _all_classes(pooled, cam, classes))
        walked = walk(step, pooled.flatten(1), 2**options.logt).view_as(pooled)
        case.check(f"{name}_rw_low", _all_classes(walked, cam, classes))
        _assert_same_label(case, f"{name}_label", network.refine(image, cam, options), cam)


def check_seam_random_walk_crf(case: Any) -> None:
    """SEAM's walk, without and with its CRF over all classes on the padded image."""
    text = case.meta["description"]
    iterations, channels = re.search(r"\((\d+) iterations?, all (\d+) channels\)", text).groups()
    network = _network(case, "resnet38", int(channels) - 1)
    image, cam = _inputs(case)
    options = override(_settings(text), {"shrink_early": True})
    _assert_same_label(case, "label", network.refine(image, cam, options), cam)
    padded = pad_to_stride(image.values)
    case.check("crf_image", truncate_values_to_image(padded, network.normalisation))
    options = override(options, {"crf.iterations": int(iterations)})
    _assert_same_label(case, "label_crf", network.refine(image, cam, options), cam)
    case.check("crf_prob", network.spread_cam(image, cam, options))
