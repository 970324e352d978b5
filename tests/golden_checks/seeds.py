"""Golden cases of the CAM networks SEAM and PSA, and of the merging of their maps (seam.md, psa.md section 2).

Whatever differs between cases of a family is read from the case: image names, shapes, labels, sizes, factors.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from misc.config import CamInference, override
from misc.infer import cams
from net.contract import SeedNetwork
from net.seed import seam
from net.seed.psa import PlainCam


def _classes(case: Any) -> int:
    """Rows of the classifier, of a case without keys those of the case that its constructor names ("as seam_net")."""
    described = case if case.meta.get("keys") else case.other(re.match(r"as (\w+)", case.meta["constructor"])[1])
    return described.meta["keys"]["fc8.weight"][0]


def _tags(labels: list[list[int]], classes: int) -> Tensor:
    """Lists of class indices -> (B, C)."""
    return torch.stack([torch.zeros(classes).index_fill_(0, torch.tensor(row), 1.0) for row in labels])


def _filled(case: Any, network: SeedNetwork) -> SeedNetwork:
    """The network with the case's weights, in evaluation mode; its state dict must be the official one."""
    if case.meta.get("keys"):
        assert case.fill.keys_of(network) == case.meta["keys"]
    case.fill.fill_(network)
    text = case.meta["input"]["weights"]
    every = re.search(r"every 4-D parameter (?:whose name contains (.+?) )?is multiplied by ([\d.]+)", text)
    parts = re.findall(r"'(\w+)'", every[1]) if every[1] else [""]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4 and any(part in name for part in parts):
                parameter.mul_(float(every[2]))
        for name, columns, factor in re.findall(r"([\w.]+)\[:, :(\d+)\] is multiplied by ([\d.]+)", text):
            network.get_parameter(name)[:, : int(columns)] *= float(factor)
    return network


def _seam(case: Any, classes: int) -> SeedNetwork:
    """The published network with every dropout off."""
    options = override(seam.SeamOptions(), {"resnet38.dropout": (0.0, 0.0), "dropout": 0.0})
    return _filled(case, options.build(classes, {}))


def check_seam_net(case: Any) -> None:
    """Taps, plain and spread maps; the map that is inferred is the spread one without background."""
    network = _seam(case, _classes(case) - 1)
    x = case.evaluate(case.meta["input"]["x"])
    with torch.inference_mode():
        for name, tap in network.forward_stages(x).items():
            case.check(name, tap)
        plain, spread = network.forward_both_maps(x)
        case.check("cam_low", plain)
        case.check("cam", seam._resize(plain, x.shape[-2:]))
        spread = seam._resize(spread, x.shape[-2:])
        case.check("cam_rv", spread)
        tags = torch.ones(len(x), spread.shape[1] - 1)
        torch.testing.assert_close(network.cam(x, tags), spread[:, 1:], rtol=0, atol=1e-5)


def _check_terms(case: Any, maps: list[Tensor], tags: Tensor, losses: dict[str, Tensor]) -> None:
    """All loss terms that the case has; ``maps``: cam1, revised1, cam2, revised2."""
    _, ecr1, ecr2 = seam.equivariance_losses(*maps, tags)
    values = {
        "loss": sum(losses.values()),
        "loss_cls": losses["cls"] + losses["min"],  # the published log adds them up
        "loss_er": losses["er"],
        "loss_ecr": losses["ecr"],
        "loss_cls1": seam.pooled_class_loss(maps[0], tags),
        "loss_cls2": seam.pooled_class_loss(maps[2], tags),
        "loss_rvmin1": seam.min_pooling_loss(maps[1], tags),
        "loss_rvmin2": seam.min_pooling_loss(maps[3], tags),
        "loss_ecr1": ecr1,
        "loss_ecr2": ecr2,
    }
    for name in case.meta["outputs"]:
        if name.startswith("loss"):
            case.check(name, values[name].detach())


def check_seam_losses(case: Any) -> None:
    """Loss terms and gradients on given maps."""
    names = ("cam1", "cam_rv1", "cam2", "cam_rv2")
    maps = [case.evaluate(case.meta["input"][name]).requires_grad_() for name in names]
    tags = _tags(case.meta["input"]["labels"], maps[0].shape[1] - 1)
    losses = seam.seam_losses(*maps, tags)
    sum(losses.values()).backward()
    _check_terms(case, maps, tags, losses)
    for name, leaf in zip(("grad_cam1", "grad_rv1", "grad_cam2", "grad_rv2"), maps, strict=True):
        case.check(name, leaf.grad)


def check_seam_train_step(case: Any) -> None:
    """One step in training mode: terms, gradients, their norms (None: frozen), the published parameter groups."""
    classes = _classes(case) - 1
    network = _seam(case, classes).train()
    named = {parameter: name for name, parameter in network.named_parameters()}
    groups = [[named[parameter] for parameter in group.params] for group in network.param_groups()]
    assert groups == case.meta["parameter_groups_after_freezing"]
    assert [(g.lr_scale, g.decay) for g in network.param_groups()] == [(1, True), (2, False), (10, True), (20, False)]

    seen = []
    network.forward_both_maps = lambda images: seen.append(type(network).forward_both_maps(network, images)) or seen[-1]
    image = case.evaluate(case.meta["input"]["image1"])
    tags = _tags(case.meta["input"]["labels"], classes)
    losses = network({"image": image, "tags": tags}, 0.0)
    sum(losses.values()).backward()

    sizes = (image.shape[-2:], tuple(int(side * network.second_scale) for side in image.shape[-2:]))
    maps = [seam._resize(m.detach(), size) for pair, size in zip(seen, sizes, strict=True) for m in pair]
    _check_terms(case, maps, tags, losses)
    assert set(named.values()) == set(case.meta["grad_norms"])
    for parameter, name in named.items():
        norm = case.meta["grad_norms"][name]
        assert (parameter.grad is None) == (norm is None), name
        if norm is not None:
            case.compare(f"grad_norms/{name}", parameter.grad.norm(), norm, relative=case.tolerance)
    for name in case.meta["outputs"]:
        if name.startswith("grad_"):
            case.check(name, network.get_parameter(name.removeprefix("grad_")).grad)


def check_seam_infer(case: Any) -> None:
    """Network inputs and merged, normalised maps of one image by the published inference settings."""
    total = _classes(case) - 1
    network = _seam(case, total)
    published = network.recipes["published"].cam.infer
    scales = tuple(float(s) for s in re.search(r"scales ([\d./]+\d)", case.meta["description"])[1].split("/"))
    case.expect_published(scales, published.scales)
    infer = override(published, {"scales": scales})
    image = case.input("image")
    inputs = list(cams.scaled_inputs(image, infer, network.normalisation))
    for name in case.meta["outputs"]:
        if match := re.fullmatch(r"scale(\d+)_input", name):
            case.check(name, inputs[int(match[1])][0])
    classes = case.meta["input"]["classes"]
    tags = _tags([classes], total)[0].numpy()
    with torch.inference_mode():
        maps = cams.infer_cam(network.cam, image, tags, infer, network.normalisation).maps
    case.check("cam", maps[np.argsort(np.argsort(classes))])


def _check_classifier(case: Any, backbone: str) -> None:
    options = override(PlainCam.recipes["published"].cam.network, {"backbone": backbone})
    network = _filled(case, options.build(_classes(case), {}))
    x = case.evaluate(case.meta["input"]["x"])
    tags = _tags(case.meta["input"]["labels"], _classes(case))
    with torch.inference_mode():
        case.check("logits", network.class_logits(x))
        case.check("cam", network.cam(x, tags))
        case.check("loss", network({"image": x, "tags": tags}, 0.0)["cls"])
    assert not any(isinstance(m, nn.Dropout2d) and m.p == 0 for m in network.modules())


def check_psa_cls_resnet38(case: Any) -> None:
    """Scores, maps and loss of the classifier on ResNet38."""
    _check_classifier(case, "resnet38")


def check_psa_cls_vgg16(case: Any) -> None:
    """Scores, maps and loss of the classifier on VGG16."""
    _check_classifier(case, "vgg16")


def check_psa_cam_merge(case: Any) -> None:
    """Merging and normalisation of given maps by the published inference settings."""
    infer: CamInference = PlainCam.recipes["published"].cam.infer
    size = tuple(case.meta["input"]["image_size"])
    text = case.meta["input"]["maps"]
    prefix, channels = re.search(r"fill\.image\('(.+?)/i/f', 1, (\d+), h, w\)", text).groups()
    sizes = [(int(h), int(w)) for h, w in re.findall(r"\((\d+), ?(\d+)\)", text.partition("ceil of")[2])]
    assert cams.input_sizes(size, infer) == sizes
    classes = case.meta["input"]["classes"]
    passes = (
        torch.cat([case.fill.image(f"{prefix}/{i}/{f}", 1, int(channels), -(-h // 8), -(-w // 8)) for f in (0, 1)])
        for i, (h, w) in enumerate(sizes)
    )
    merged = cams.merge_maps((maps.relu()[:, classes] for maps in passes), size)
    case.check("cam", cams.normalise_maps(merged, infer.normalise))
