"""Golden cases of AReAM: both networks, entropy, labels, losses, training steps, inference, CRF and evaluation.

Whatever differs between cases of a family is read from the case: image names, shapes, labels, sizes, settings. Those of
the refinement itself are in par.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from golden_case import Case
from golden_checks.mctformer import _sampled, vit_options
from golden_checks.transcam import body, fill, shares, tags
from torch import Tensor

from misc.config import override
from misc.crf.dense import CRFSettings, DenseCRF
from misc.image.pixels import NORMALISATIONS
from misc.infer import cams
from misc.loop.fit import lr_factor
from misc.score.evaluate import evaluate_cams, evaluate_masks
from net.backbone.transformer import QueryKey
from net.seed.aream_conformer import AreamConformer, AreamConformerOptions
from net.seed.aream_mctformer import AreamMCTformer, AreamMCTformerOptions
from net.shared import aream
from net.shared.aream import Aream, patch_pair_labels, patch_pair_losses
from net.shared.background import stack_background


def _network(case: Case, **changes: Any) -> Aream:
    """The case's network, in evaluation mode, with the published options but for ``changes``."""
    described = case if "keys" in case.meta else case.other(re.match(r"as (\w+)", case.meta["constructor"])[1])
    keys, text = described.meta["keys"], described.meta["constructor"]
    if "pos_embed" in keys:
        options = AreamMCTformer.recipes["published"].cam.network
        changes["backbone"], classes = vit_options(keys, text), keys["cls_token"][1]
        assert isinstance(options, AreamMCTformerOptions)
    else:
        options = AreamConformer.recipes["published"].cam.network
        changes["backbone"], classes = body(described), keys["cnn_head.weight"][0]
        assert isinstance(options, AreamConformerOptions)
    network = override(options, changes).build(classes, {})
    if described is case:
        assert case.fill.keys_of(network) == keys
    fill(case, network)  # multiplies too
    return network.eval()


def _image(case: Case) -> Tensor:
    """The normalised batch, (B, 3, H, W)."""
    made = case.meta["input"]["image"]
    assert made["made_by"].startswith("fill.image")
    return case.fill.image(made["name"], *made["shape"])


def _entropies(case: Case) -> tuple[float, ...]:
    """From "linspace(3.0, 4.2, 12) + 0.15*cos(0..11)"."""
    first, last, count, factor = re.search(
        r"linspace\(([\d.]+), ([\d.]+), (\d+)\) \+ ([\d.]+)\*cos", case.meta["input"]["entropy"]
    ).groups()
    numbers = np.linspace(float(first), float(last), int(count)) + float(factor) * np.cos(np.arange(int(count)))
    return tuple(numbers.tolist())


def _settings(case: Case) -> dict[str, Any]:
    """Options that a case states."""
    given = case.meta["input"]
    settings: dict[str, Any] = {"split": given["layer_index"], "scales": tuple(given["scales"])}
    if "thresholds" in given:
        settings["low"], settings["high"] = given["thresholds"]
    return settings


def _close(case: Case, name: str, value: Any) -> None:
    """Compare absolutely, at the case's tolerance."""
    case.compare(name, case.sample(name, value), absolute=case.tolerance)


@torch.no_grad()
def _check_forward(case: Case, names: tuple[str, str, str]) -> None:
    """Logits of both classifiers, the map, and logits of the attention in all layers."""
    network, seen = _network(case), []
    logits, maps = network.forward_maps(_image(case), lambda _, attention: seen.append(attention.products()))
    values = dict(zip(names, (*logits, maps), strict=True))
    values["att_logits"] = _sampled(
        case, "att_logits", torch.stack(seen), ("layer", "image", "head", "row", "column")
    )
    for name in case.meta["outputs"]:
        case.check(name, values[name])


def check_aream_mct_forward(case: Case) -> None:
    """MCTformer-V2; the map is rectified."""
    _check_forward(case, ("class_logits", "patch_logits", "feature_map"))


def check_aream_conformer_forward(case: Case) -> None:
    """Conformer without doubling; the map is signed."""
    _check_forward(case, ("cnn_logits", "att_class_logits", "cam"))


def check_aream_entropy(case: Case) -> None:
    """Entropy of given maps after given attention: of every image and layer, their means, and what training uses."""
    height, width = case.meta["input"]["grid"]
    first, last, layers = re.match(r".*linspace\(([\d.]+), ([\d.]+), (\d+)\)", case.meta["input"]["att"]).groups()
    factors = torch.linspace(float(first), float(last), int(layers))
    drawn_by = r"fill\.stream\('(.+?)<i>'\)\.standard_normal"  # the stream's name, in which KIND stands for the kind
    attention, shape = case.meta["input"]["att"], r"\(\((\d+),1,(\d+),T,T\)\)"
    attention_name, *shape = re.search(drawn_by + shape, attention).groups()
    found = re.search(r"([\d.]+) \* " + drawn_by + r"\(\(1,(\d+),h,w\)\)", case.meta["input"]["cam"])
    factor, maps_name, classes = found.groups()
    for kind, tokens in re.findall(r"KIND (\w+): T = (\d+)", case.meta["input"]["att"]):
        epsilon = {"mct": AreamMCTformer, "conformer": AreamConformer}[kind].entropy_epsilon
        rows, tokens = [], int(tokens)
        for number, described in enumerate(case.meta["input"]["images"]):
            size = (int(shape[0]), 1, int(shape[1]), tokens + height * width, tokens + height * width)
            stream = case.fill.stream(f"{attention_name.replace('KIND', kind)}{number}")
            drawn = torch.from_numpy(stream.standard_normal(size))
            affinity = (factors.view(-1, 1, 1, 1, 1) * drawn.float()).softmax(-1).mean(2)[..., tokens:, tokens:]
            stream = case.fill.stream(f"{maps_name.replace('KIND', kind)}{number}")
            maps = stream.standard_normal((1, int(classes), height, width))
            maps = float(factor) * torch.from_numpy(maps).float()
            maps = maps.relu() if kind == "mct" else maps
            maps = maps * tags([described["present_classes"]], int(classes))[:, :, None, None]
            rows.append(torch.stack([aream.map_entropy(layer, maps, epsilon)[0] for layer in affinity]))
        entropies = torch.stack(rows)
        case.check(f"{kind}_per_image", entropies)
        case.check(f"{kind}_mean", entropies.mean(0))
        case.check(f"{kind}_normalised", np.array(aream.scale_entropy(entropies.mean(0).tolist())))


def check_aream_aff_loss(case: Case) -> None:
    """Loss of each layer, their means, and the gradient."""
    factor, name, shape, shift = re.match(
        r"(\d+) \* fill\.stream\('(.+?)'\)\.standard_normal\(\((.+?)\)\) - ([\d.]+)", case.meta["input"]["logits"]
    ).groups()
    drawn = case.fill.stream(name).standard_normal([int(side) for side in shape.split(",")])
    logits = (torch.from_numpy(drawn) * float(factor) - float(shift)).float().requires_grad_()
    target = torch.from_numpy(case.input("in_target"))
    losses = patch_pair_losses(list(logits), target)
    text = re.search(r"weights ([\d., ]+);", case.meta["outputs"]["entropy_weighted"]["meaning"])[1]
    weighted = (losses * torch.tensor([float(w) for w in text.split(",")])).mean()
    weighted.backward()
    case.check("per_layer", losses)
    case.check("uniform", losses.mean())
    case.check("entropy_weighted", weighted)
    case.check("grad", logits.grad)
    case.check("all_ignored", patch_pair_losses(list(logits), torch.full_like(target, 255)).mean())


def _colours(normalised: Tensor) -> Tensor:
    norm = NORMALISATIONS["imagenet"]
    return normalised * torch.tensor(norm.std).view(3, 1, 1) + torch.tensor(norm.mean).view(3, 1, 1)


def check_aream_pseudo_label(case: Case) -> None:
    """Labels with both background scores, merged, and of pairs; with or without a box."""
    shown, labels = _image(case), case.meta["input"]["labels"]
    classes = 1 + max(map(max, labels))  # all others are zero
    maps = torch.zeros(len(shown), classes, *shown.shape[-2:])
    for number, keys in enumerate(labels):
        maps[number, keys] = torch.from_numpy(case.input(f"in_cam{number}"))
    box = case.meta["input"]["img_box"]
    low, high = aream.pseudo_labels(
        _colours(shown), maps, tags(labels, classes), case.meta["input"]["thresholds"], box and torch.tensor(box)
    ).unbind(1)
    merged = aream.merge_score_labels(low, high)
    stride = int(re.search(r"stride (\d+)", case.meta["outputs"]["aff"]["meaning"])[1])
    pairs = patch_pair_labels(merged, [side // stride for side in shown.shape[-2:]])
    pixels, entries = shares(case)
    for name, value in (("seg_low", low), ("seg_high", high), ("seg", merged)):
        case.compare(name, value, share=pixels)
    case.compare("aff", pairs, share=entries)


def check_aream_msf_cam(case: Case) -> None:
    """Training-time maps of all classes, layers weighted alike and by entropy."""
    for name, entropy in (("cam_uniform", ()), ("cam_entropy", _entropies(case))):
        _close(case, name, _network(case, entropy=entropy, **_settings(case)).training_cam(_image(case)))


def check_aream_train_step(case: Case) -> None:
    """Labels of a step; given the stored ones, its loss terms and the norms of some gradients; both weightings."""
    losses, norms = (float(number) for number in re.findall(r"relative (\de-\d)", case.meta["tolerance"]))
    (share,) = shares(case)
    for kind, entropy in (("uniform", ()), ("entropy", _entropies(case))):
        network = _network(case, entropy=entropy, **_settings(case))
        classes = network.forward_maps(_image(case))[1].shape[1]
        batch = {"image": _image(case), "tags": tags(case.meta["input"]["labels"], classes)}
        if case.meta["input"]["img_box"]:
            batch["box"] = torch.tensor(case.meta["input"]["img_box"])
        case.compare(f"seg_{kind}", network.make_labels(batch), share=share)
        stored = torch.from_numpy(case.input(f"seg_{kind}"))
        network.make_labels = lambda batch, stored=stored: stored
        terms = network(batch, network.options.warmup)
        assert list(network(batch, network.options.warmup - 1e-9)) == list(network.names)
        total = sum(terms.values())
        total.backward()
        deep: list[Tensor] = []

        def visit(layer: int, attention: QueryKey, network: Aream = network, deep: list[Tensor] = deep) -> None:
            if layer >= network.options.split:
                deep.append(aream.patch_logits(attention, network.tokens))

        with torch.no_grad():
            _, maps = network.forward_maps(batch["image"], visit)
        pairs = patch_pair_labels(stored, maps.shape[-2:])
        case.compare(f"aff_{kind}", pairs)
        values = {
            "cls_loss": sum(terms[name] for name in network.names),
            f"loss_{kind}": total,
            f"aff_loss_{kind}": terms["pair"] / network.options.pair_weight,
            f"aff_per_layer_{kind}": patch_pair_losses(deep, pairs),
        }
        for name, value in values.items():
            case.compare(name, value, relative=losses)
        listed = case.meta["outputs"][f"grad_norms_{kind}"]["parameters"]
        found = [network.get_parameter(name).grad.norm() for name in listed]
        case.compare(f"grad_norms_{kind}", found, relative=norms)


def check_aream_infer(case: Case) -> None:
    """Merged maps of whole images by the recipe."""
    network = _network(case)
    infer = override(network.recipes["published"].cam.infer, {"scales": tuple(case.meta["input"]["scales"])})
    for number, described in enumerate(case.meta["input"]["images"]):
        keys = described["present_classes"]
        classes = network.forward_maps(torch.zeros(1, 3, 32, 32))[1].shape[1]
        present = tags([keys], classes)[0].numpy()
        with torch.inference_mode():
            image = case.input(described["image"])
            maps = cams.infer_cam(network.cam, image, present, infer, network.normalisation).maps
        case.compare(f"key{number}", np.flatnonzero(present))
        _close(case, f"cam{number}", maps)


def check_aream_crf(case: Case) -> None:
    """Posteriors and labels for both rules of the background, and of a label image."""
    text = case.meta["constructor"]
    steps, *kernels = re.search(
        r"(\d+) steps; Gaussian sxy (\d+) weight (\d+); bilateral sxy (\d+), srgb (\d+), weight (\d+)", text
    ).groups()
    hard = re.search(r"for label images: bilateral sxy (\d+), srgb (\d+), weight (\d+)", text).groups()
    settings = CRFSettings(int(steps), *map(float, kernels))
    crf = DenseCRF(case.input("in_image"), settings)
    values = np.array([0, *(key + 1 for key in case.meta["input"]["present_classes"])])
    labels_share, probability_share = shares(case)
    for name in case.meta["outputs"]:
        found = re.fullmatch(r"crf_(score|alpha)([\d.]+)", name)
        if not found:
            continue
        rule, number = {"score": "constant", "alpha": "power"}[found[1]], float(found[2])
        posterior = crf(stack_background(case.input("in_cam"), rule, number, number))
        case.compare(name, values[posterior.argmax(0)], share=labels_share)
        sampled = case.sample(f"prob_{name}", posterior)
        case.compare(f"prob_{name}", sampled, absolute=case.tolerance, share=probability_share)
    text = case.meta["outputs"]["label_crf"]["meaning"]
    confidence, count = re.search(r"gt_prob ([\d.]+), (\d+) labels", text).groups()
    settings = CRFSettings(int(steps), *map(float, kernels[:2]), *map(float, hard))
    posterior = DenseCRF(case.input("in_image"), settings).from_labels(
        case.input("in_label"), int(count), float(confidence)
    )
    case.compare("label_crf", posterior.argmax(0), share=labels_share)


def check_aream_evaluate(case: Case) -> None:
    """mIoU of maps at some thresholds and of label images.

    Published, an image without a prediction counts as entirely right; here it is an error, so the truth stands in.
    """
    images = case.meta["input"]["images"]
    truths = [case.input(f"gt{number}" if f"gt{number}" in case.names else f"in_gt{number}")
              for number in range(len(images))]  # fmt: skip
    classes = int(re.search(r"(\d+) classes", case.meta["outputs"]["miou_npy_f64"]["meaning"])[1])

    def maps(name: str) -> tuple[np.ndarray, np.ndarray]:
        number = int(name)
        if images[number]["prediction"]:
            return np.array(images[number]["key"]), case.input(f"in_cam{number}")
        there = np.setdiff1d(np.unique(truths[number]), [0, 255])
        return there.astype(np.int64) - 1, (truths[number] == there[:, None, None]).astype(np.float32)

    def mask(name: str) -> np.ndarray:
        return case.input(f"in_png{name}") if images[int(name)]["prediction"] else truths[int(name)]

    every = [str(number) for number in range(len(images))]
    for name, ids in (
        ("miou_npy_f64", every),
        ("miou_npy_without_missing_f64", [i for i in every if images[int(i)]["prediction"]]),
    ):
        thresholds = case.meta["outputs"][name]["thresholds"]
        scores = evaluate_cams(
            ids, maps, lambda i: truths[int(i)], classes, thresholds, boundary=False, progress=False
        )
        case.compare(name, 100 * scores.curve.mious(), absolute=case.tolerance)
    confusion = evaluate_masks(every, mask, lambda i: truths[int(i)], classes, progress=False).confusion
    case.compare("miou_png_f64", 100 * confusion.miou(), absolute=case.tolerance)


def check_aream_schedule(case: Case) -> None:
    """Rates of both recipes, timm's of every epoch and the cosine's of every step, and groups of both networks."""
    outputs = case.meta["outputs"]
    text = outputs["mct_lr_per_epoch_f64"]["meaning"]
    epochs, base = int(re.search(r"0\.\.(\d+)", text)[1]) + 1, float(re.search(r"base ([\d.]+e-\d+)", text)[1])
    published = AreamMCTformer.recipes["published"].cam.fit
    case.expect_published((epochs, base), (published.epochs, published.lr))
    recipe = replace(published, epochs=epochs, lr=base)
    one, seven = (
        [base * lr_factor(recipe, step, epochs * updates) for step in range(epochs * updates)] for updates in (1, 7)
    )
    case.compare("mct_lr_per_epoch_f64", one, relative=case.tolerance)
    np.testing.assert_allclose(seven, np.repeat(one, 7))  # updates an epoch

    text = outputs["conformer_lr_per_step_f64"]["meaning"]
    total = int(re.search(r"0\.\.(\d+)", text)[1]) + 1
    base, end = (float(number) for number in re.search(r"base ([\d.e-]+), start and final ([\d.e-]+)\)", text).groups())
    epochs, warmup = (int(n) for n in re.search(r"for (\d+) epochs of \d+ steps, (\d+) warm-up", text).groups())
    published = AreamConformer.recipes["published"].cam.fit
    recipe = replace(published, epochs=epochs, lr=base, warmup_epochs=warmup, warmup_lr=end, final_lr=end)
    case.expect_published(recipe, published)
    rates = [base * lr_factor(recipe, step, total) for step in range(total)]
    case.compare("conformer_lr_per_step_f64", rates, relative=case.tolerance)

    for cls, kind in ((AreamMCTformer, "mct"), (AreamConformer, "conformer")):
        with torch.device("meta"):
            network = cls.recipes["published"].cam.network.build(1, {})  # no group depends on the classes
        if kind == "mct":
            network.norm.requires_grad_(True)  # published groups hold it, though it never gets a gradient
        names = {parameter: name for name, parameter in network.named_parameters()}
        decay = cls.recipes["published"].cam.fit.weight_decay
        groups = {(g.lr_scale, decay * g.decay): [names[p] for p in g.params] for g in network.param_groups()}
        stated = case.meta[f"{kind}_param_groups"]
        assert len(groups) == len(stated)
        for expected in stated:
            listed = groups[expected.get("lr_scale", 1.0), expected["weight_decay"]]
            assert len(listed) == expected["count"]
            first = [name for name in expected["names"] if name != "..."]
            assert listed[: len(first)] == first
            for name in ("cls_token", "pos_embed"):
                assert (name in listed) == expected.get(f"has_{name}", name in listed)
