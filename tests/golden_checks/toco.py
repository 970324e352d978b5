"""Golden cases of ToCo (toco.md): network, projection, maps and labels, crops, losses, schedule, test. MoRe's
(more.py) use the helpers.

Whatever differs between cases of a family is read from the case: sizes, classes, scales, thresholds, weights.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from plain import exact_energy
from torch import Tensor

from misc.config import SegInference
from misc.crf.dense import CRFSettings, DenseCRF
from misc.crf.energy import DenseOptions, dense_energy
from misc.image.picture import restore_values
from misc.image.pixels import box_mask, resize_maps
from misc.infer.masks import merge_passes, scale_values
from misc.infer.online import (
    merge_batch_maps,
    present_classes,
    refined_label,
    region_of_interest,
    score_planes,
    threshold_label,
)
from misc.loop.fit import lr_factor, move_copies
from misc.propagate.par import PAR, PixelAdaptive
from net.backbone.vit import ViTOptions
from net.losses import balanced_cross_entropy, count_label_kinds
from net.seed.toco import Toco, TocoOptions, class_contrast, crop_candidates, crop_flags, cut_crops
from net.shared.self_training import (
    VIT_B,
    count_token_pairs,
    patch_contrast,
    token_pairs,
)

LABEL_SHARE = 0.999
CRF_SHARE = 0.99


def close(case: Any, name: str, value: Any, *, of_largest: float | None = None) -> None:
    """Compare (the stored sample of) a value at the case's tolerance; integers may differ in 0.1 % of the entries."""
    expected = case.stored(name)
    value = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if value.shape != expected.shape and value.ndim == expected.ndim:  # stored is every n-th entry of an axis
        value = value[tuple(slice(None, None, -(-a // b)) for a, b in zip(value.shape, expected.shape, strict=True))]
    value = value.reshape(expected.shape)
    tolerance = case.meta["tolerance"]
    if np.issubdtype(expected.dtype, np.integer):
        case.compare(name, value, share=LABEL_SHARE)
    elif of_largest is not None:
        case.compare(name, value, of_largest=of_largest)
    else:
        case.compare(name, value, relative=tolerance["rtol"], of_largest=tolerance.get("atol_relative_to_max_abs", 0))


def made(case: Any, key: str, number: int | None = None, *, name: str | None = None) -> Tensor:
    """An input that the case describes: ``fill.image`` of a name and shape, times a factor where it says so."""
    given = case.meta["input"][key]
    value = case.fill.image((name or given["name"]).format(i=number, k=number), *given["shape"])
    factor = re.match(r"([\d.]+) \* fill.image", given["made_by"])
    return value * float(factor[1]) if factor else value


def wrapped_rgb(images: Tensor, normalisation: str) -> Tensor:
    """``truncate_values`` as the public code has it, of the cases' inputs only: these leave 0 .. 255, which no image
    does, and a cast to 8 bits wraps them round."""
    return restore_values(images, normalisation).trunc().remainder(256)


def tags_of(case: Any) -> Tensor:
    """(B, C) tags."""
    return torch.tensor(case.meta["input"]["labels"], dtype=torch.float32)


def drawn(case: Any, stem: str) -> Callable[[int], np.ndarray]:
    """The case's permutations, by a counter over the draws; ``asked`` lists what they were drawn from."""
    asked: list[int] = []

    def permutation(count: int) -> np.ndarray:
        asked.append(count)
        return np.random.RandomState(zlib.crc32(stem.format(len(asked) - 1).encode())).permutation(count)

    permutation.asked = asked  # type: ignore[attr-defined]
    return permutation


@contextmanager
def given_draws(module: str, permutation: Callable[[int], np.ndarray], count: int) -> Iterator[None]:
    """Inside, the samples' random streams that a module asks for permute as the case says."""
    stream = SimpleNamespace(permutation=permutation)
    with patch(f"{module}.sample_streams", lambda batch: [stream] * count):
        yield


def wrapping() -> Any:
    """Inside, self-trained networks see colours by ``wrapped_rgb``."""
    return patch("net.shared.self_training.truncate_values", wrapped_rgb)


def backbone_of(text: str) -> tuple[ViTOptions, int]:
    """The encoder and auxiliary layer that a case's constructor describes in words."""
    aux = int(re.search(r"(?:aux|auxiliary) layer (-?\d+)", text)[1])
    if "ViT-B/16" in text:
        return VIT_B, aux
    patch, width, depth, ratio = (int(re.search(rf"{word} (\d+)", text)[1])
                                  for word in ("patch", "width", "depth", "MLP ratio"))  # fmt: skip
    heads, side = (int(re.search(pattern, text)[1]) for pattern in (r"(\d+) heads", r"\((\d+) px\)"))
    return ViTOptions(side, patch, width, depth, heads, ratio, drop_path=0.0), aux


def filled(case: Any, network: Any) -> Any:
    """The network with the case's weights, in evaluation mode; the state dict must be the official one."""
    if "keys" in case.meta:
        assert case.fill.keys_of(network) == case.meta["keys"]
    case.fill.fill_(network)
    after = case.meta["after_fill"]
    for name, value in network.state_dict().items():
        for suffix, factor in after.get("multiply", []):
            if name.endswith(suffix):
                value.mul_(factor)
        for suffix, constant in after.get("set", []):
            if name.endswith(suffix):
                value.fill_(constant)
    return network


def toco(case: Any, **options: Any) -> Toco:
    """The case's network."""
    text = case.meta["constructor"]
    backbone, aux = backbone_of(text)
    classes = case.meta.get("classes") or int(re.search(r"(\d+) classes with background", text)[1]) - 1
    return filled(case, Toco(TocoOptions(backbone=backbone, aux_layer=aux, **options), classes))


def check_toco_forward(case: Any) -> None:
    """Tokens, logits and maps."""
    network, images = toco(case), made(case, "image")
    with torch.no_grad():
        tokens, patches, auxiliary = network.encoder(images)
        maps, auxiliary_maps = network.raw_maps(images)
        values = {
            "cls_token": tokens[:, 0], "tokens": patches, "aux_tokens": auxiliary, "cls": network.classify(images, 0),
            "cls_aux": network.aux_classifier.class_logits(auxiliary), "seg": network.logits(images), "cam": maps,
            "cam_aux": auxiliary_maps,
        }  # fmt: skip
        assert torch.equal(network.cam(images, torch.ones(len(images), maps.shape[1])), maps)
    for name, value in values.items():
        close(case, name, value)


def check_toco_projection(case: Any) -> None:
    """The momentum update, then both projections of all views."""
    network = toco(case, momentum=case.meta["momentum"])
    views = [made(case, "global_crops", i) for i in range(case.meta["input"]["global_crops"]["count"])]
    crops = [made(case, "local_crops", i) for i in range(case.meta["input"]["local_crops"]["count"])]
    move_copies(network)
    with torch.no_grad():
        tokens, patches, _ = network.encoder(torch.cat(views))
        teacher, student = network.project(tokens[:, 0], torch.stack(crops, 1))
        first = patches[: len(views[0])]
    state = network.state_dict()
    values = {
        "out_teacher": teacher, "out_student": student, "teacher_mlp4": state["proj_head_t.mlp.4.weight"],
        "teacher_v": state["proj_head_t.last_layer.weight_v"], "cls": network.classifier.class_logits(first),
        "seg": network.decoder(first),
    }  # fmt: skip
    for name, value in values.items():
        close(case, name, value)


def check_toco_cam_merge(case: Any) -> None:
    """Raw and merged maps of all classes, and the labels of the present ones."""
    network, images, tags = toco(case), made(case, "image"), tags_of(case)
    thresholds = case.meta["thresholds"]
    high, low = thresholds["high"], thresholds["low"]
    with torch.no_grad():
        for name, value in zip(("raw_cam", "raw_cam_aux"), network.raw_maps(torch.cat([images, images.flip(-1)])),
                               strict=True):  # fmt: skip
            close(case, name, value)
        everything, _ = present_classes(torch.ones_like(tags))
        rules = (network.settings.map_merge,) * 2
        merged = merge_batch_maps(network.raw_maps, images, everything, case.meta["scales"], rules)
    for name, value in zip(("cam", "cam_aux"), merged, strict=True):
        close(case, name, value)
    network.settings = replace(network.settings, scales=tuple(case.meta["scales"]), high=high, low=low)
    (maps, auxiliary), keys, _ = network.online_maps({"image": images, "tags": tags})
    background = thresholds["background"]
    close(case, "label", threshold_label(maps, keys, background, background))
    close(case, "roi_mask", region_of_interest(auxiliary, high, low))
    inside = box_mask(torch.tensor(case.meta["boxes"]), images.shape[-2:])
    close(case, "label_mid", threshold_label(maps, keys, high, low).masked_fill(~inside, 255))
    network.settings = replace(network.settings, mirrored_box=True)
    grid = network.token_label(auxiliary, keys, {"box/image": torch.tensor(case.meta["boxes_grid"])})
    close(case, "label_aux_grid", grid)


def check_toco_pseudo_label(case: Any) -> None:
    """Probabilities before and after PAR, and the label with and without it."""
    images, tags = made(case, "image"), tags_of(case)
    stated = case.meta["input"]["cam"]["made_by"]
    offset, factor, least, most = (float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", stated))
    maps = (offset + factor * made(case, "cam")).clamp(least, most)
    high, low = case.meta["thresholds"]["high"], case.meta["thresholds"]["low"]
    iterations = int(re.search(r"(\d+) iterations", case.meta["constructor"])[1])
    keys, real = present_classes(tags)
    colours = wrapped_rgb(images, "imagenet") / 255
    close(case, "colours", colours)
    half = [side // 2 for side in images.shape[-2:]]
    labels = []
    for index, (picture, own, present) in enumerate(zip(colours, keys, real, strict=True)):
        mine = maps[index, own[present]]
        refine = PixelAdaptive(resize_maps(picture[None], half), PAR)
        for kind, threshold in (("high", high), ("low", low)):
            soft = score_planes(mine, threshold, half)
            if kind == "high":
                close(case, f"soft_{kind}{index}", soft)
            close(case, f"refined_{kind}{index}", refine(soft[None], iterations)[0])
        labels.append(refined_label(picture, mine, own[present], high, low, iterations))
    outside = ~box_mask(torch.tensor(case.meta["boxes"]), images.shape[-2:])
    close(case, "label", torch.stack(labels).masked_fill(outside, 255))
    chosen = maps.gather(1, keys[:, :, None, None].expand(-1, -1, *maps.shape[-2:])) * real[:, :, None, None]
    close(case, "label_before", threshold_label(chosen, keys, high, low).masked_fill(outside, 255))


def check_toco_crop_masks(case: Any) -> None:
    """Candidates, crops and flags by the given draws."""
    side, count = case.meta["crop"], case.meta["number"]
    region, images = torch.from_numpy(case.input("roi_mask")).long(), made(case, "image")
    network = Toco(TocoOptions(backbone=ViTOptions(32, 16, 8, 3, 2), crops=count, crop_side=side, projection=4), 1)
    draws = [drawn(case, f"{case.name}.{index}") for index in range(len(region))]
    crops, flags = network.local_crops(images, region, draws)
    candidates = [crop_candidates(mask, side, count) for mask in region]
    close(case, "candidates", [len(found) for found in candidates])
    corners = torch.stack([
        found[torch.from_numpy(drawn(case, f"{case.name}.{index}")(len(found))[:count])]
        for index, found in enumerate(candidates)
    ])  # fmt: skip
    close(case, "positions", corners)
    close(case, "crops", crops)
    shares = [cut_crops(mask[None].float(), c, side).mean((1, 2, 3)) for mask, c in zip(region, corners, strict=True)]
    close(case, "share", torch.stack(shares))
    assert all(torch.equal(crop_flags(m, c, side), f[2:]) for m, c, f in zip(region, corners, flags, strict=True))
    close(case, "flags", flags.byte())


def check_toco_losses(case: Any) -> None:
    """Terms and gradients; the dense energy on the lattice and exactly."""
    grid = torch.from_numpy(case.input("grid_label")).long()
    fmap = made(case, "fmap").requires_grad_()
    same, different = token_pairs(grid.flatten(1))
    pairs = torch.full_like(same, 255, dtype=torch.uint8).masked_fill(same, 1).masked_fill(different, 0)
    close(case, "aff", pairs)
    counts = count_token_pairs(grid)
    close(case, "pairs", torch.stack(list(counts.values())))
    ptc = patch_contrast(fmap, grid, **counts)
    close(case, "ptc", ptc)
    close(case, "grad_ptc", 1000 * torch.autograd.grad(ptc, fmap)[0])

    teacher, student = (torch.from_numpy(case.input(name)) for name in ("teacher", "student"))
    student.requires_grad_()
    for name, flags in (("ctc", "flags"), ("ctc2", "flags2")):
        value = class_contrast(teacher, student, torch.from_numpy(case.input(flags)) > 0, case.meta["temperature"])
        close(case, name, value)
        if name == "ctc":
            close(case, "grad_ctc", 1000 * torch.autograd.grad(value, student)[0])

    small = made(case, "seg_logits").requires_grad_()
    logits = resize_maps(small, case.meta["size"])
    label = torch.from_numpy(case.input("seg_label")).long()
    kinds = count_label_kinds(label)
    seg = balanced_cross_entropy(logits, label, **kinds)
    close(case, "seg", seg)
    for name, kind in (("seg_bg", label == 0), ("seg_fg", label > 0)):
        kept = label.masked_fill(~kind, 255)
        close(case, name, 2 * balanced_cross_entropy(logits, kept, **count_label_kinds(kept)))
    close(case, "grad_seg", 1000 * torch.autograd.grad(seg, small, retain_graph=True)[0])

    options = DenseOptions()
    colours = restore_values(made(case, "image"), "imagenet")
    inside = box_mask(torch.tensor(case.meta["boxes"]), label.shape[-2:])
    energy = dense_energy(logits, label, colours, inside, options)
    close(case, "reg_lattice", 1e7 * energy, of_largest=0.01)
    close(case, "grad_reg", 1e9 * torch.autograd.grad(energy, small)[0], of_largest=0.01)
    exact = exact_energy(logits.detach(), label, colours, inside, options)
    close(case, "reg_exact", exact.energy / len(label) if exact.energy.ndim else exact.energy)
    close(case, "gate", exact.gate)


def check_toco_schedule(case: Any) -> None:
    """Rates and weights of the published recipes at the given iterations."""
    for name, preset in (("voc", "published"), ("coco", "published_coco")):
        recipe = Toco.recipes[preset].cam
        total, options = recipe.fit.steps, recipe.network
        rows = case.stored(name)
        factors = [lr_factor(recipe.fit, int(step), total) for step in rows[:, 0]]
        slow = np.array(factors) * recipe.fit.lr
        case.compare(name, np.stack([rows[:, 0], slow, 10 * slow], 1), relative=case.meta["tolerance"]["rtol"])
        terms = [options.ptc, options.ctc, options.seg, options.reg]
        weights = [[1.0, 1.0, *(term.at(step / total) for term in terms)] for step in rows[:, 0]]
        case.compare(f"{name}_weights", np.array(weights), relative=case.meta["tolerance"]["rtol"])
    steps = case.stored("coco")[:, 0]
    from_aux = [step / total <= options.aux_labels_until for step in steps]
    case.compare("coco_label_from_aux", np.array(from_aux, np.uint8))
    assert not Toco.recipes["published"].cam.network.aux_labels_until


def crf_of(case: Any) -> CRFSettings:
    """The case's CRF."""
    stated = case.meta["crf"]
    gauss, bilateral = stated["gauss"], stated["bilateral"]
    return CRFSettings(stated["iterations"], gauss["sxy"], gauss["compat"], bilateral["sxy"], bilateral["srgb"],
                       bilateral["compat"])  # fmt: skip


def compare_test_scores(case: Any, network: Any, number: int, prefix: str, suffix: str, infer: SegInference) -> None:
    """Merged logits, softmax, arg-max and CRF of a test image."""
    values = made(case, f"image{number}")[0].permute(1, 2, 0).numpy()
    scores = merge_passes(network.logits, scale_values(values, infer), values.shape[:2], infer, "cpu")
    # the outputs of the rules are softmaxes: logits are compared up to a constant per pixel
    name = f"{prefix}logits{suffix}"
    expected, logits = torch.from_numpy(case.stored(name)), torch.from_numpy(scores)[:, ::2, ::2].log()
    logits = logits - logits.mean(0) + expected.mean(0)
    tolerance = case.meta["tolerance"]
    case.compare(name, logits, relative=tolerance["rtol"], of_largest=tolerance["atol_relative_to_max_abs"])
    close(case, f"{prefix}pred{suffix}", scores.argmax(0).astype(np.uint8))
    picture = wrapped_rgb(made(case, f"image{number}"), "imagenet")[0].permute(1, 2, 0).byte().numpy()
    refined = DenseCRF(np.ascontiguousarray(picture), infer.crf)(scores)
    case.compare(f"{prefix}crf{suffix}", refined[:, ::4, ::4], absolute=0.01)
    case.compare(f"{prefix}crf_pred{suffix}", refined.argmax(0), share=CRF_SHARE)
    if (prob := f"{prefix}prob{suffix}") in case.names:
        close(case, prob, scores)


def check_toco_test_merge(case: Any) -> None:
    """The VOC rule and the COCO rule."""
    network = toco(case)
    for rule, preset in (("voc", "published"), ("coco", "published_coco")):
        own = Toco.recipes[preset].own.infer
        assert own.crf == crf_of(case)
        infer = replace(own, scales=tuple(case.meta["scales"]), squash=case.meta["squash"] if own.squash else 0)
        for number in range(len(case.meta["input"])):
            compare_test_scores(case, network, number, f"{rule}{number}_", "", infer)


def sampled_as(name: str, value: Tensor, expected: np.ndarray) -> Tensor:
    """Every max(1, side // 12)-th entry of each dimension."""
    index = tuple(slice(None, None, max(1, side // 12)) for side in value.shape)
    assert value[index].shape == expected.shape, name
    return value[index]
