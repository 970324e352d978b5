"""Golden cases of GETAM (getam.md): network, maps, labels, losses, schedule, test. PAMR's are in par.py.

Whatever differs between cases of a family is read from the case: kind, image names, shapes, classes, settings.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from plain import exact_energy
from torch import Tensor

from misc.config import Fit, SegInference, override
from misc.crf.dense import CRFSettings
from misc.crf.energy import DenseOptions, dense_energy
from misc.crf.lattice import Lattice
from misc.image.picture import truncate_values
from misc.infer.masks import segment, with_crf
from misc.loop.fit import make_optimiser, set_lr
from net.backbone.dpt import DPTOptions
from net.groups import Group
from net.losses import multilabel_soft_margin
from net.seed.getam import (
    Getam,
    GetamLabel,
    GetamOptions,
    label_with_saliency,
    normalise_label_maps,
    saliency_target,
)

_NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"


def close(case: Any, name: str, value: Any, sampled_as: str | None = None) -> None:
    """Compare (the stored sample of) a value at the case's tolerance; some outputs are sampled as another one."""
    expected = case.stored(name)
    value = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
    text = case.meta["outputs"][sampled_as or name]["meaning"]
    sampled = re.findall(r"(?<=sampled )\[(.+?)\]", text) or re.findall(r"every \w+ class \[(.+?)\]", text)
    if sampled and value.shape != expected.shape:
        parts = [part.strip() for part in sampled[0].split(",")]
        value = value[tuple(slice(*(int(v) if v else None for v in part.split(":"))) for part in parts)]
    value = value.reshape(expected.shape)
    tolerance = case.meta["tolerance"]
    of_largest = tolerance.get("atol_relative_to_max_abs", 0)
    case.compare(name, value, relative=tolerance["rtol"], of_largest=of_largest)


def image(case: Any, key: str = "image") -> Tensor:
    """An input that the case describes as an expression in ``fill``."""
    return case.evaluate(case.meta["input"][key])


def network(case: Any) -> Getam:
    """The case's network with its weights, in evaluation mode; the state dict must be the official one."""
    text, keys = case.meta["constructor"], case.meta.get("keys")
    if "hybrid" in text:
        kind = "vitb_hybrid"
    else:
        kind = "deitb_distilled" if "distilled" in text else "deitb" if "DeiT" in text else "vitb"
    depth = len(case.meta["scaled"])
    classes = _classes(case)
    features = int(re.search(r"(\d+) decoder features", text)[1])
    net = Getam(GetamOptions(dpt=DPTOptions(backbone=kind, depth=depth, features=features)), classes).eval()
    stated = re.search(r"blocks ([\d,]+) ?(?:and (\d+))?", text)
    hooks = tuple(int(n) for part in stated.groups() if part for n in part.strip(",").split(","))
    assert net.options.dpt.hooks == hooks, "hooks"
    widths = tuple(int(n) for n in re.search(r"widths ([\d,]+\d)", text)[1].split(","))
    assert net.options.dpt.channels == widths, "widths"
    if isinstance(keys, dict):
        assert case.fill.keys_of(net) == keys
    case.fill.fill_(net)
    state = net.state_dict()
    for name, factor in case.meta["scaled"].items():
        state[name].mul_(factor)
    return net


def _classes(case: Any) -> int:
    """Number C of foreground classes."""
    return int(re.search(r"(\d+) classes", case.meta["constructor"])[1])


def present(case: Any, key: str) -> tuple[list[list[int]], Tensor]:
    """Class indices of each image as the case lists them, and as tags (B, C)."""
    rows, none = case.meta["input"][key], torch.zeros(_classes(case))
    return rows, torch.stack([none.index_fill(0, torch.tensor(row), 1.0) for row in rows])


def check_getam_forward(case: Any) -> None:
    """Both logits and the four maps."""
    net = network(case)
    x = image(case)
    with torch.inference_mode():
        classes, logits = net.forward_both(x)
        maps = net.pretrained(x)
        alone = net.class_logits(x), net.logits(x)
    close(case, "cls_logits", classes)
    close(case, "seg_logits", logits)
    for number, value in enumerate(maps, 1):
        close(case, f"layer{number}", value)
    assert torch.equal(alone[0], classes) and torch.equal(alone[1], logits)


def check_getam_map(case: Any) -> None:
    """Attention, its gradient, the contribution of each block, and the maps, of every (image, class)."""
    net = network(case)
    x, (rows, tags) = image(case), present(case, "classes_zero_based")
    attention, gradients, logits = net.attention_gradients(x, tags)
    maps = net.cam(x, tags)
    close(case, "cls_logits", logits)
    layers = (gradients * attention).clamp(min=0).mean(3) * gradients.clamp(min=0).mean(3)  # (K, L, B, T)
    pairs = [(b, k, c) for b, row in enumerate(rows) for k, c in enumerate(sorted(row))]
    case.compare("pairs", [(b, c) for b, _, c in pairs])
    prefix = net.pretrained.model.tokens
    close(case, "layers", 1e5 * torch.stack([layers[k, :, b, prefix:] for b, k, _ in pairs]))
    close(case, "getam", 1e5 * torch.stack([maps[b, c] for b, _, c in pairs]))
    first = pairs[0]
    close(case, "attn_last_cls", attention[-1, first[0]])
    close(case, "grad_last_cls", 1e3 * gradients[first[1], -1, first[0]])
    absent = torch.ones_like(tags) - tags
    assert not (maps.amax((2, 3)) * absent).any()


def check_getam_label_pipeline(case: Any) -> None:
    """From the network to the labels and the published saliency target."""
    net = network(case)
    x, (rows, tags) = image(case), present(case, "labels_zero_based")
    case.compare("labels", tags)
    colours = truncate_values(x, net.normalisation)
    case.compare("image_u8", colours)
    maps = net.cam(x, tags)
    saliency = torch.from_numpy(case.input("saliency"))
    options, norms, raw = GetamLabel(), [], []
    for b, row in enumerate(rows):
        raw += [maps[b, c] for c in sorted(row)]
        norms += list(normalise_label_maps(maps[b : b + 1, sorted(row)], colours[b : b + 1], options)[0])
    close(case, "raw", 1e5 * torch.stack(raw))
    close(case, "norm_cam", torch.stack(norms))
    made = {"image": x, "tags": tags, "saliency": saliency}
    made |= net.prepare(made, 0.75)
    values = {
        "label": made["label"], "saliency_after": made["salient"],
        "sal_target_published": saliency_target(made["salient"], "published"),
    }  # fmt: skip
    for name, value in values.items():
        case.compare(name, value, share=case.meta["tolerance"]["label_agreement"])


def check_getam_pseudo_label(case: Any) -> None:
    """The rule on given maps, exactly; of all classes only the tagged ones are looked at."""
    cut = float(re.search(rf"cut threshold {_NUMBER}", case.meta["description"])[1])
    keys = torch.from_numpy(case.input("labels")).nonzero()[:, 0]
    assert keys.tolist() == sorted(case.meta["input"]["labels_zero_based"])
    norm = torch.from_numpy(case.input("norm_cam").astype(np.float32))[keys]
    salient = torch.from_numpy(case.input("saliency") > 0)
    label, after = label_with_saliency(norm, keys, salient, GetamLabel(cut=cut))
    case.compare("label", label)
    case.compare("saliency_after", after)
    # everything salient, nothing completed or opened: what is left is the arg-max
    plain = override(GetamLabel(), {"opening": 0})
    label, _ = label_with_saliency(norm, keys, torch.ones_like(salient), plain)
    case.compare("argmax", torch.where(label == 255, 0, label))


@cache
def _small(classes: int) -> Getam:
    """A network whose losses are those of any."""
    dpt = DPTOptions(backbone="vitb", width=16, depth=4, heads=2, patch=16, features=8)
    return Getam(GetamOptions(dpt=dpt, start_layer=1), classes)


def check_getam_losses(case: Any) -> None:
    """Every term, the dense energy on the lattice and exactly, and the gradients."""
    settings = case.meta["settings"]
    logits = image(case, "seg_logits").requires_grad_()
    label, colours, inside = (torch.from_numpy(case.input(name)) for name in ("seg_label", "image", "roi"))
    label, colours, inside = label.long(), colours.float(), inside > 0
    scale = settings["scale"]
    options = DenseOptions(
        settings["dense weight"], scale, settings["sigma_rgb"], float(settings["sigma_xy"].split(" * ")[0])
    )
    salient = torch.from_numpy((case.input("saliency") > 0).astype(np.uint8))
    batch = {"label": label, "salient": salient, "image": torch.zeros_like(colours), "box": torch.zeros(len(label), 4)}
    net, terms = _small(logits.shape[1] - 1), {}
    batch |= {f"counts/{name}": count for name, count in net.counts(batch).items()}
    for rule in ("published", "intended"):
        net.options = override(net.options, {"saliency_loss": rule, "dense.weight": 0.0})
        terms[rule] = net.segmentation_losses(logits, batch)
        close(case, f"sal_loss_{rule}", terms[rule]["saliency"])
    published = terms["published"]
    close(case, "bg_ce", published["ce_background"])
    close(case, "fg_ce", published["ce_foreground"])
    close(case, "ce", published["ce_background"] + published["ce_foreground"])
    cls = multilabel_soft_margin(*(torch.from_numpy(case.input(name)) for name in ("cls_logits", "labels")))
    close(case, "cls_loss", cls)

    dense = dense_energy(logits, label, colours, inside, options)
    close(case, "dense_lattice", dense / options.weight)
    total = sum(published.values()) + dense
    close(case, "loss_published", total + cls)
    gradient = torch.autograd.grad(dense, logits, retain_graph=True)[0] / options.weight
    close(case, "grad_dense_seg", gradient)
    close(case, "grad_total_seg", torch.autograd.grad(total, logits)[0])

    exact = exact_energy(logits.detach(), label, colours, inside, options)
    for name, value in (("dense_exact", exact.energy), ("grad_dense_exact_scaled", exact.gradient),
                        ("gate", exact.gate)):  # fmt: skip
        close(case, name, value)
    close(case, "filtered_exact", exact.filtered, "filtered_lattice")
    filtered = Lattice(exact.features).filter(exact.values).transpose(1, 2).unflatten(2, exact.filtered.shape[-2:])
    close(case, "filtered_lattice", filtered)


def check_getam_poly_sgd(case: Any) -> None:
    """Learning rates and weights over both phases: the loop's schedule times the network's factor."""
    text = case.meta["description"]
    lr, decay, total, share, factor = (
        float(re.search(pattern + _NUMBER, text)[1])
        for pattern in ("lr ", r"'weight_decay' argument ", "max_step ", "cls_step ", "seg_lr_scale ")
    )
    net, total = _small(1), int(total)
    net.options = override(net.options, {"cls_share": share, "seg_lr": factor})
    assert "no weight decay" in text
    recipe = Fit(lr=lr, momentum=decay, weight_decay=0.0, power=Getam.recipes["published"].cam.fit.power)
    w = torch.nn.Parameter(torch.from_numpy(case.input("w0").copy()))
    optimiser = make_optimiser([Group([w])], recipe, torch.device("cpu"))
    rates, weights = [], []
    for step, gradient in enumerate(case.input("grads")):
        set_lr(optimiser, recipe, step, total, net.lr_scale(step / total))
        rates.append(optimiser.param_groups[0]["lr"])
        w.grad = torch.from_numpy(gradient)
        optimiser.step()
        weights.append(w.detach().numpy().copy())
    close(case, "lr", np.array(rates))
    close(case, "w", np.stack(weights))


def check_getam_test_merge(case: Any) -> None:
    """The published test on given logits: sizes, mean, softmax, and the CRF."""
    made, _, sizes = case.meta["input"]["logits"].partition(" for s in ")
    logits = {}
    for side in sizes.split(","):
        expression = re.sub(r"\bs\b", side, made.replace("str(s)", f"'{side}'"))
        logits[int(side)] = case.evaluate(expression)
    numbers = re.search(
        rf"sxy {_NUMBER} compat {_NUMBER}; bilateral sxy {_NUMBER} srgb {_NUMBER} compat {_NUMBER}; (\d+) iterations",
        case.meta["crf"],
    ).groups()
    own = Getam.recipes["published"].own.infer
    crf = CRFSettings(int(numbers[-1]), *map(float, numbers[:-1]))
    case.expect_published(crf, own.crf)
    infer: SegInference = replace(own, scales=tuple(logits), crf=crf)
    assert infer.square
    picture = case.input("image")
    asked = []

    def given(images: Tensor) -> Tensor:
        assert images.shape[2] == images.shape[3]
        asked.append(images.shape[2])
        return logits[asked[-1]]

    scores = segment(given, picture, infer, Getam.normalisation)
    assert asked == list(logits)
    close(case, "prob", scores)
    case.compare("argmax", scores.argmax(0))
    after = with_crf(scores, picture, infer, Getam.normalisation).argmax(0)
    case.compare("crf_label", after, share=case.meta["tolerance"]["label_agreement"])
