"""Golden cases of WeCLIP (weclip.md): decoder, refined maps, labels, losses.

Whatever differs between cases of a family is read from the case: sizes, classes, names of inputs.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from golden_checks.clipes import close, fill, image, options, picture, texts
from torch import Tensor

from misc.config import Fit, override
from misc.crf.dense import CRFSettings
from misc.image.pixels import normalise_image
from misc.infer.masks import MASK_MERGES, merge_passes, scale_values, segment, with_crf
from misc.loop.fit import lr_factor, make_optimiser, set_lr
from misc.propagate.caa import doubly_stochastic, refine_by_attention, scale_to_unit
from misc.propagate.par import PAR, PixelAdaptive
from net.backbone.clip import ClipOptions
from net.groups import Group
from net.losses import balanced_cross_entropy, count_label_kinds
from net.seed.weclip import (
    SWITCH,
    FusingHead,
    MaskDecoder,
    Weclip,
    WeclipOptions,
    affinity_label,
    affinity_loss,
    cell_affinity,
    choose_layers,
    fuse_attention,
    label_crops,
)


def tags(rows: list[list[int]], classes: int) -> Tensor:
    """Class indices of each image as (B, C) of 0 and 1."""
    return torch.stack([torch.zeros(classes).index_fill_(0, torch.tensor(row), 1.0) for row in rows])


@torch.no_grad()
def check_weclip_decoder_forward(case: Any) -> None:
    """Fused map, decoder's attention, logits and affinity; the official names and the number of parameters."""
    sizes, given = case.meta["network"], case.meta["input"]["tokens"]
    head = FusingHead(sizes["blocks"], sizes["token width"], sizes["embedding"], 0.1).eval()
    decoder = MaskDecoder(sizes["embedding"], sizes["decoder heads"], sizes["decoder layers"], sizes["outputs"]).eval()
    parts = {"decoder_fts_fuse": head, "decoder": decoder}
    state = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    assert {name: list(value.shape) for name, value in state.items()} == case.meta["keys"]
    assert sum(v.numel() for v in state.values()) == case.meta["trainable parameters"]
    fill(case, state)
    noise = case.fill.stream(given["name"]).standard_normal(given["shape"]).astype(np.float32)
    tokens = torch.from_numpy((given["scale"] * noise).astype(np.float32))  # (L, B, D, h, w)
    grid = (tokens.shape[3], tokens.shape[4])
    fused = head(tokens.flatten(3).permute(1, 0, 3, 2), grid)
    seen: list[Tensor] = []
    decoder.transformer(fused.flatten(2).transpose(1, 2), lambda _, a: seen.append(a.mean_weights()))
    tolerance = case.meta["tolerance"]
    bounds = {"relative": tolerance["rtol"], "of_largest": tolerance["atol_relative_to_max_abs"]}
    case.compare("fused", fused[:, :: sizes["embedding"] // case.stored("fused").shape[1]], **bounds)
    close(case, "logits", decoder(fused))
    case.compare("attention_first", seen[0][:, ::2], **bounds)
    case.compare("attention_last", seen[-1][:, ::2], **bounds)
    close(case, "affinity", cell_affinity(fused))


def check_weclip_rfm(case: Any) -> None:
    """Layers that are chosen, what they are fused to, and the maps that these spread."""
    given, name = case.meta["input"], case.name
    height, width = given["grid"]
    cells = height * width
    stream = case.fill.stream
    layers = []
    blocks = int(re.search(r"l = 0\.\.(\d+)", given["attention"]["made_by"])[1]) + 1
    for layer in range(blocks):
        logits = (0.5 + 0.25 * layer) * stream(f"{name}/attention{layer}").standard_normal((cells + 1, cells + 1))
        logits[:, 0] += 2 * stream(f"{name}/cls{layer}").uniform()
        layers.append(torch.from_numpy(logits.astype(np.float32)).softmax(-1)[1:, 1:])
    attention = torch.stack(layers)
    vectors = torch.from_numpy(stream(f"{name}/seg").standard_normal((cells, 6)).astype(np.float32))
    affinity = (2 * vectors @ vectors.T / 6).sigmoid()
    candidates, maps = attention[-given["layers considered"] :], torch.from_numpy(case.input("cams"))
    difference = (affinity - candidates).sum((1, 2))
    close(case, "difference", difference)
    case.compare("chosen", choose_layers(candidates, affinity).to(torch.uint8))
    matrices = {"rfm": fuse_attention(candidates, affinity), "plain": attention[-8:].mean(0)}
    for kind, matrix in matrices.items():
        close(case, f"fused_{kind}", matrix)
        close(case, f"refined_{kind}", refine_by_attention(maps, matrix, given["cut"]))
    symmetric = doubly_stochastic(matrices["rfm"])
    close(case, "transition_rfm", symmetric @ symmetric)
    spread = scale_to_unit(refine_by_attention(maps, matrices["rfm"], given["cut"]))
    size = (16 * height, 16 * width)
    close(case, "maps_rfm", F.interpolate(spread[None], size=size, mode="bilinear", align_corners=False)[0])


def check_weclip_label(case: Any) -> None:
    """Background, PAR and arg-max for one crop."""
    keys, par = case.meta["input"]["keys"], case.meta["par"]
    case.expect_published(
        [par["dilations"], par["w1"], par["w2"], par["iterations"]],
        [list(PAR.dilations), PAR.width, PAR.place, WeclipOptions().iterations],
    )
    images, maps = image(case, case.meta["input"]["image"]), torch.from_numpy(case.input("maps"))
    planes = torch.cat([1 - maps.amax(0, keepdim=True), maps])
    refined = PixelAdaptive(images, PAR)(planes[None], par["iterations"])[0]
    sampled = refined[:, ::3, ::3]
    case.compare("refined", sampled, absolute=case.meta["tolerance"]["refined"]["atol"])
    whole = torch.zeros(1, max(keys) + 1, *maps.shape[1:])
    whole[0, keys] = maps
    label = label_crops(whole, tags([keys], max(keys) + 1), images, par["iterations"])[0]
    case.compare("label", label, share=_share(case.meta["tolerance"]["label"]))


def _share(text: str) -> float:
    """The fraction of pixels that must agree, of "at most 0.2 % of the pixels differ"."""
    return 1 - float(re.search(r"at most ([\d.]+) %", text)[1]) / 100


def check_weclip_losses(case: Any) -> None:
    """Pairs, counts, losses and their gradients on given logits and affinity."""
    given = case.meta["input"]
    grid, cells = tuple(given["grid"]), given["grid"][0] * given["grid"][1]
    shape = (2, case.stored("gradient_seg").shape[1], *grid)
    stream = case.fill.stream
    logits = torch.from_numpy((2 * stream(given["seg"]["name"]).standard_normal(shape)).astype(np.float32))
    noise = stream(given["affinity"]["name"]).standard_normal((2, cells, cells))
    z = torch.from_numpy((1.5 * noise).astype(np.float32))
    logits.requires_grad_()
    z.requires_grad_()
    label = torch.from_numpy(case.input("label").astype(np.int64))
    pairs = affinity_label(label, grid, given["radius"])
    close(case, "affinity_label", pairs)
    same, different = (pairs == 1).sum(), (pairs == 0).sum()
    case.compare("positive_count", same + 1)
    case.compare("negative_count", different + 1)
    background, foreground = count_label_kinds(label).values()
    never = torch.tensor(torch.inf)
    large = F.interpolate(logits, size=label.shape[1:], mode="bilinear", align_corners=False)
    close(case, "background_ce", 2 * balanced_cross_entropy(large, label, background, never))
    close(case, "foreground_ce", 2 * balanced_cross_entropy(large, label, never, foreground))
    seg = balanced_cross_entropy(large, label, background, foreground)
    affinity = affinity_loss(z.sigmoid(), pairs, same, different)
    close(case, "seg_loss", seg)
    close(case, "affinity_loss", affinity)
    loss = seg + WeclipOptions().affinity_weight * affinity
    close(case, "loss", loss)
    gradients = torch.autograd.grad(loss, (logits, z))
    close(case, "gradient_seg", gradients[0])
    close(case, "gradient_z", 1e4 * gradients[1])


def check_weclip_forward(case: Any) -> None:
    """From images to maps, labels, losses and gradients, before and after the switch; logits and affinity."""
    sizes, given, tolerance = case.meta["network"], case.meta["input"], case.meta["tolerance"]
    clip: ClipOptions = options(sizes)
    made = WeclipOptions(
        clip=clip, width=sizes["embedding"], decoder_layers=sizes["decoder layers"],
        decoder_heads=sizes["decoder heads"], cut=given["cut"], radius=given["radius"],
    )  # fmt: skip
    net = Weclip(made, sizes["outputs"] - 1).eval()
    state = {k: v for k, v in net.state_dict().items() if "_features" not in k}
    official = {k: v for k, v in case.meta["keys"].items() if not k.endswith("_new") and k != "par.kernel"}
    assert {k: list(v.shape) for k, v in state.items()} == official
    fill(case, state)
    classes = sizes["outputs"] - 1
    features = texts(case, given["texts"])
    net.encoder.set_texts(features[:classes], features[classes:])
    batch = {"image": image(case, given["image"]), "tags": tags(given["tags"], classes)}
    size = batch["image"].shape[2:]
    for kind, progress in (("early", 0.0), ("late", 0.99)):
        maps = net._maps(batch["image"], batch["tags"], kind == "late")[0]
        full = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        for number, row in enumerate(given["tags"]):
            found = full[number, sorted(row), ::4, ::4]
            case.compare(f"maps_{kind}_{number}", found, absolute=tolerance["maps"]["atol"])
        ready = batch | net.prepare(batch, progress)
        case.compare(f"label_{kind}", ready["label"], share=_share(tolerance["labels"]))
        ready |= {f"counts/{name}": count for name, count in net.counts(ready).items()}
        terms = net(ready, progress)
        close(case, f"seg_loss_{kind}", terms["seg"])
        close(case, f"affinity_loss_{kind}", terms["affinity"] / made.affinity_weight)
        net.zero_grad()
        sum(terms.values()).backward()
        parameters = dict(net.named_parameters())
        names = case.meta["outputs"][f"gradient_norms_{kind}"]["parameters"]
        close(case, f"gradient_norms_{kind}", torch.stack([parameters[name].grad.norm() for name in names]))
        close(case, f"gradient_pred_bias_{kind}", net.decoder.linear_pred.bias.grad)
    assert torch.equal(net.cam(batch["image"], batch["tags"]), maps)
    with torch.no_grad():
        tokens, _, grid = net._frozen(batch["image"])
        close(case, "affinity", cell_affinity(net.decoder_fts_fuse(tokens, grid)))
        close(case, "logits", net.logits(batch["image"]))


def check_weclip_train_schedule(case: Any) -> None:
    """The published rates, AdamW's updates with a short schedule, and the update that the switch comes with."""
    settings, short = case.meta["settings"], case.meta["short schedule"]
    recipe = Weclip.recipes["published"].cam.fit
    stated = [settings[k] for k in ("base rate", "weight decay", "warm-up updates", "power", "updates")]
    case.expect_published(stated, [recipe.lr, recipe.weight_decay, recipe.warmup_steps, recipe.power, recipe.steps])
    case.expect_published([settings["warm-up start"], "warmup_poly"], [recipe.warmup_ratio, recipe.schedule])
    fit = Fit(
        optimiser="adamw", lr=settings["base rate"], weight_decay=settings["weight decay"], power=settings["power"],
        schedule="warmup_poly", warmup_steps=settings["warm-up updates"], warmup_ratio=settings["warm-up start"],
    )  # fmt: skip
    tolerance = {"relative": case.meta["tolerance"]["rtol"], "absolute": case.meta["tolerance"]["atol"]}
    net = Weclip(WeclipOptions(clip=ClipOptions(32, 16, 64, 2, 8), width=8, blocks=2, candidates=2), 1)
    assert [group.lr_scale for group in net.param_groups()] == [settings["factor"]]
    base = settings["base rate"] * settings["factor"]
    rates = [base * lr_factor(fit, int(step), settings["updates"]) for step in case.input("steps")]
    case.compare("rates", rates, **tolerance)
    parameters = {}
    for name in ("w", "b"):
        start = case.fill.stream(case.meta["input"][name]).standard_normal(case.stored(name).shape[1:])
        parameters[name] = torch.nn.Parameter(torch.from_numpy(start.astype(np.float32)))
    fit = override(fit, {"warmup_steps": short["warm-up updates"]})
    optimiser = make_optimiser([Group(list(parameters.values()), settings["factor"])], fit, torch.device("cpu"))
    short_rates, states = [], {name: [] for name in parameters}
    for step in range(short["run"]):
        set_lr(optimiser, fit, step, short["updates"])
        short_rates.append(optimiser.param_groups[0]["lr"])
        for name, parameter in parameters.items():
            noise = case.fill.stream(f"{case.name}/g{name}{step}").standard_normal(tuple(parameter.shape))
            parameter.grad = torch.from_numpy(noise.astype(np.float32))
        optimiser.step()
        for name, parameter in parameters.items():
            states[name].append(parameter.detach().clone())
    case.compare("short_rates", short_rates, **tolerance)
    for name, kept in states.items():
        case.compare(name, torch.stack(kept), **tolerance)
    total = settings["updates"]
    case.compare("first_rfm_update", next(t + 1 for t in range(total) if t / total >= SWITCH["published"]))


def check_weclip_test_merge(case: Any) -> None:
    """The published test with a stand-in network: sizes, mean logits on the grid, masks, CRF."""
    given, settings, tolerance = case.meta["input"], case.meta["crf"], case.meta["tolerance"]
    own = Weclip.recipes["published"].own.infer
    crf = CRFSettings(
        settings["iterations"], settings["gaussian sxy"], settings["gaussian weight"], settings["bilateral sxy"],
        settings["bilateral srgb"], settings["bilateral weight"],
    )  # fmt: skip
    case.expect_published([given["long side"], tuple(given["scales"]), crf], [own.long_side, own.scales, own.crf])
    infer = override(own, {"long_side": given["long side"], "scales": tuple(given["scales"]), "crf": crf})
    outputs = case.stored("logits").shape[0]
    matrix = torch.from_numpy((2 * case.fill.stream(given["matrix"]).standard_normal((outputs, 3))).astype(np.float32))
    sizes: list[list[int]] = []

    def stand_in(images: Tensor) -> Tensor:
        sizes.append(list(images.shape))
        cells = F.avg_pool2d(images, 16)  # (B, 3, h, w)
        return 4 * torch.einsum("nc,bchw->bnhw", matrix, cells).tanh()

    image_ = picture(case, given["picture"])
    scores = segment(stand_in, image_, infer, Weclip.normalisation)
    case.compare("input_sizes", sizes)
    # the mean logits themselves: the same without the softmax, at the size of the grid
    rule = replace(MASK_MERGES[infer.merge], end=lambda merged, count: merged.div_(count))
    with patch.dict(MASK_MERGES, {infer.merge: rule}):
        inputs = scale_values(normalise_image(image_, Weclip.normalisation), infer)
        close(case, "logits", merge_passes(stand_in, inputs, case.stored("logits").shape[1:], infer, "cpu"))
    share = _share(tolerance["predictions"])
    case.compare("prediction", scores.argmax(0), share=share)
    single = override(infer, {"scales": (given["scales"][0],), "flip": False})
    one = segment(stand_in, image_, single, Weclip.normalisation)
    case.compare("prediction_one_scale", one.argmax(0), share=share)
    posterior = with_crf(scores, image_, infer, Weclip.normalisation)
    case.compare("posterior", posterior[:, ::4, ::4], absolute=tolerance["posterior"]["atol"])
    after = float(re.search(r"after the CRF ([\d.]+) %", tolerance["predictions"])[1])
    case.compare("prediction_crf", posterior.argmax(0), share=1 - after / 100)
