"""Golden cases of MoRe (more.md): network, graph module, start weights, maps, losses, updates, schedule, test.

Whatever differs between cases of a family is read from the case.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from misc.crf.dense import DenseCRF
from misc.image.pixels import resize_maps
from misc.infer.cams import scale_by_span
from misc.infer.online import merge_batch_maps, present_classes, threshold_label
from net.backbone.vit import ViTOptions
from net.losses import balanced_cross_entropy, count_label_kinds
from net.seed.more import (
    ClassTokenViT,
    GraphModule,
    More,
    MoreOptions,
    certain_patches,
    draw_uncertain,
    mean_margin,
    token_contrast,
    uncertain_patches,
)
from net.shared.self_training import Term

from .toco import (
    CRF_SHARE,
    backbone_of,
    close,
    compare_test_scores,
    crf_of,
    drawn,
    filled,
    given_draws,
    made,
    tags_of,
    wrapped_rgb,
    wrapping,
)
from .toco_training import Training


def more(case: Any, **options: Any) -> More:
    """The case's network."""
    text = case.meta["constructor"]
    backbone, aux = backbone_of(text)
    classes = case.meta.get("classes") or int(re.search(r"(\d+) classes with background", text)[1]) - 1
    return filled(case, More(MoreOptions(backbone=backbone, aux_layer=aux, **options), classes))


def tokens_of(case: Any, key: str) -> Tensor:
    """An input that is ``fill.image`` without its third axis: (B, T, D)."""
    return made(case, key)[:, :, 0].contiguous()


def check_more_forward(case: Any) -> None:
    """Tokens, logits and maps; the unscaled attention logits of the last block, which nothing uses, from outside."""
    network, images = more(case, map="lam"), made(case, "image")
    seen = []
    last = network.encoder.blocks[-1].attn
    last.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        tokens, patches, auxiliary = network.encoder(images)
        maps, auxiliary_maps = network.raw_maps(images)
        spare = tokens.shape[1] - maps.shape[1]
        query, key, _ = seen[0].unflatten(2, (3, last.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, n, T, d) each
        score = (query[:, :, spare : tokens.shape[1]] @ key[:, :, tokens.shape[1] :].transpose(2, 3)).sum(1)
        values = {
            "class_tokens": tokens[:, spare:], "enhanced": network.class_tokens(tokens, patches), "tokens": patches,
            "aux_tokens": auxiliary, "cls": network.classify(images, 0),
            "cls_aux": network.aux_classifier.class_logits(auxiliary), "seg": network.logits(images), "cam": maps,
            "cam_aux": auxiliary_maps, "lam": network.cam(images, torch.ones(len(images), maps.shape[1])),
            "score": score.view_as(maps),
        }  # fmt: skip
    for name, value in values.items():
        close(case, name, value)


def check_more_gcr(case: Any) -> None:
    """Neighbours, output and gradients."""
    width, ratio = (float(re.search(rf"{word} ([\d.]+)", case.meta["constructor"])[1]) for word in ("width", "ratio"))
    tokens, patches, weight = (tokens_of(case, key) for key in ("tokens", "patches", "weight"))
    module = filled(case, GraphModule(int(width), int(ratio * tokens.shape[1])))
    tokens.requires_grad_()
    patches.requires_grad_()
    places = module.find_neighbours(tokens, patches)[3]
    case.compare("neighbours", places.sort(2).values)
    output = module(tokens, patches)
    close(case, "output", output)
    loss = (output * weight).sum()
    names = {"grad_tokens": tokens, "grad_tail": module.tail_proj.weight, "grad_head": module.head_proj.weight}
    *gradients, none = torch.autograd.grad(loss, [*names.values(), patches], allow_unused=True)
    assert none is None
    for name, gradient in zip(names, gradients, strict=True):
        close(case, name, gradient)


def check_more_init(case: Any) -> None:
    """Class token and positions from an ImageNet classifier; the random ones by their law."""
    text = case.meta["constructor"]
    spare, classes = (int(number) for number in re.search(r"\((\d+) \+ (\d+)\)", text).groups())
    side, width = int(re.search(r"grid (\d+)x", text)[1]), int(re.search(r"width (\d+)", text)[1])
    encoder = ClassTokenViT(ViTOptions(16 * side, 16, width, 1, 2), classes, -1)
    state = encoder.from_classifier({key: made(case, key)[:, :, 0] for key in ("cls_token", "pos_embed")})
    random, rest = state["pos_embed"][:, :spare], state["pos_embed"][:, spare:]
    low, high = -2, 2
    assert f"cut off at {low} and {high}" in case.meta["random"]["law"]
    assert low <= random.min() < -0.5 and 0.5 < random.max() <= high
    replaced = torch.full_like(random, case.meta["random"]["replaced_by"])
    case.check("cls_token", state["cls_token"])
    case.check("pos_embed", torch.cat([replaced, rest], 1))


def check_more_lam_merge(case: Any) -> None:
    """Merged maps, their product, the labels of the present classes, the masks after the CRF."""
    network, images, tags = more(case), made(case, "image"), tags_of(case)
    keys, real = present_classes(torch.ones_like(tags))

    def raw(x: Tensor) -> tuple[Tensor, ...]:
        return (network.attention_maps(x), *network.raw_maps(x))

    with torch.no_grad():
        rule = network.settings.map_merge
        lam, cam, auxiliary = merge_batch_maps(raw, images, keys, case.meta["scales"], ("max", rule, rule))
        one = scale_by_span(resize_maps(network.attention_maps(images), images.shape[-2:]))
    fused = scale_by_span(one * cam)
    present = tags[:, :, None, None]
    values = {
        "lam": lam, "cam": cam, "cam_aux": auxiliary, "fused": fused,
        **{f"{name}_label": threshold_label(maps * present, keys, 0.5, 0.5)
           for name, maps in (("lam", lam), ("cam", cam), ("fused", fused))},
        "aux_label_05": threshold_label(auxiliary * present, keys, MoreOptions().certain_high, MoreOptions().low),
    }  # fmt: skip
    for name, value in values.items():
        close(case, name, value)
    pictures = wrapped_rgb(images, network.normalisation).permute(0, 2, 3, 1).byte().numpy()
    for index, picture in enumerate(pictures):
        own = tags[index].nonzero()[:, 0]
        name = f"crf{index}"
        scores = torch.cat([1 - lam[index, own].amax(0, keepdim=True), lam[index, own]])
        refined = DenseCRF(np.ascontiguousarray(picture), crf_of(case))(scores.numpy()).argmax(0)
        case.compare(name, np.concatenate([[0], own.numpy() + 1])[refined], share=CRF_SHARE)


def check_more_losses(case: Any) -> None:
    """Terms and gradients on given tokens and labels."""
    tokens, fmap = tokens_of(case, "tokens").requires_grad_(), made(case, "fmap").requires_grad_()
    tags = torch.from_numpy(case.input("labels")).float()
    label = torch.from_numpy(case.input("grid_label")).long()
    mct = token_contrast(tokens)
    cle = certain_patches(tokens, fmap, label, tags, case.meta["temperature_cle"])
    permutation = drawn(case, case.name + ".perm{}")
    taken = torch.stack([draw_uncertain(one, permutation, False) for one in label])
    case.compare("draws", np.array(permutation.asked))
    une = uncertain_patches(tokens, fmap, taken, tags, taken.sum())
    close(case, "mct", mct)
    close(case, "mct_with_mean", (mct + mean_margin(tokens, tags)) / 2)
    close(case, "cle", cle)
    close(case, "une", une)
    close(case, "grad_mct", 1000 * torch.autograd.grad(mct, tokens)[0])
    close(case, "grad_cle", 1000 * torch.autograd.grad(cle, tokens)[0])
    close(case, "grad_une", 1000 * torch.autograd.grad(une, fmap)[0])
    factor = int(re.search(r"enlarged by (\d+)", case.meta["outputs"]["seg"]["meaning"])[1])
    large = F.interpolate(label[:, None].float(), scale_factor=factor)[:, 0].long()
    logits = resize_maps(made(case, "seg_logits"), large.shape[-2:])
    close(case, "seg", balanced_cross_entropy(logits, large, **count_label_kinds(large)))
    nothing = torch.full_like(large, 255)
    close(case, "seg_none", balanced_cross_entropy(logits, nothing, **count_label_kinds(nothing)))


def check_more_schedule(case: Any) -> None:
    """Weights of the terms and the switch of maps at the given iterations, of the published recipes."""
    for name, preset in (("voc", "published"), ("coco", "published_coco")):
        recipe, rows = More.recipes[preset].cam, case.stored(name)
        options, total = recipe.network, recipe.fit.steps
        terms = [options.mct, options.ptc, options.cle, options.une, options.seg, options.reg]
        done = rows[:, 0] / total
        ours = [[at * total, 1, 1, *(term.at(at) for term in terms), at > options.switch] for at in done]
        case.compare(name, np.array(ours, float), relative=case.meta["tolerance"]["rtol"])


@wrapping()
def check_more_train_step(case: Any) -> None:
    """Updates from given pictures and draws: before the decoder's terms, with them, after the switch."""
    s, tags = case.meta["settings"], tags_of(case)
    weights, total = s["weights"], 20000
    start = 2000 / total
    network = more(
        case, high=s["high"], low=s["low"], temperature=s["temperature_cle"], scales=tuple(s["scales"]),
        switch=s["switch_to_final_maps_after"] / total, images_per_gpu=case.meta["input"]["image{k}"]["shape"][0],
        **{name: Term(weights[name]) for name in ("ptc", "cle", "une")},
        **{name: Term(weights[name], start) for name in ("seg", "reg")},
    )  # fmt: skip
    training = Training(case, network, len(case.meta["groups"]["sizes"]))
    permutation = drawn(case, case.name + ".perm{}")
    for number, step in enumerate(s["n_iter"]):
        images = made(case, "image{k}", number)
        batch, progress = {"image": images, "tags": tags}, step / total
        maps, keys, real = network.online_maps(batch)
        with given_draws("net.seed.more", permutation, len(images)):
            batch = training.prepare(number, batch, progress)
        label = network.decoder_labels(images, maps[0], keys, real)
        late = progress > network.settings.switch
        values = {"label": label, "mask_ptc": batch["token_label"], "mask_cle": batch["certain_label"],
                  "mask_une": batch["certain_label" if late else "token_label"]}  # fmt: skip
        for name, value in values.items():
            close(case, f"{name}{number}", value)
        terms = network(batch, progress)
        full = {**batch, "label": label, **{f"counts/{k}": v for k, v in count_label_kinds(label).items()}}
        with torch.no_grad():
            bare = network(full, max(progress, 0.2))
        scale = {"cls": 1, "cls_aux": 1, "mct": 1, **weights}
        stated = case.meta["outputs"][f"losses{number}"]["meaning"]
        order = [name for name in re.findall(r"[a-z_]+", stated) if name in scale]
        close(case, f"losses{number}", torch.stack([bare[name] / scale[name] for name in order]))
        training.step(number, terms, 1e7 * bare["reg"] / weights["reg"])
    training.finish()


def check_more_test_merge(case: Any) -> None:
    """The VOC rule: squares straight from the image."""
    own = More.recipes["published"].own.infer
    assert own.crf == crf_of(case)
    network = more(case)
    infer = replace(own, scales=tuple(int(case.meta["side"] * scale) for scale in case.meta["scales"]))
    for number in range(len(case.meta["input"])):
        compare_test_scores(case, network, number, "", str(number), infer)
