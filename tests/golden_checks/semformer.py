"""Golden cases of SemFormer: autoencoder, network and losses, maps, optimiser, evaluation (semformer.md).

Whatever differs between cases of a family is read from the case: image names, shapes, labels, sizes, factors.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from golden_case import Case, _index, array
from torch import Tensor, nn

from misc.config import CamInference, Fit
from misc.image.cam import Cam
from misc.image.picture import Picture
from misc.infer import cams
from misc.loop.fit import make_optimiser, set_lr
from misc.propagate.walk import pair_cells, path_affinity
from misc.score.erosion import erode
from misc.score.evaluate import evaluate_cams
from misc.score.metrics import mask_at
from net.backbone.transformer import AttentionSums
from net.backbone.vit import ViTOptions
from net.groups import Group
from net.refine.edge import EdgeOnly, EdgeOnlyOptions
from net.seed.semformer import (
    ImageClassPairs,
    SemFormer,
    SemFormerOptions,
    complement_error,
    valid_mask,
)
from net.seed.semformer.autoencoder import CAAE, CAAEOptions, similarity_loss, tags_with_background
from net.shared.edge import enlarge_cells, hard_label, propagate_scores, two_threshold_label


def stored(meaning: str) -> tuple[Any, ...]:
    """The index that an output's meaning names: "tokens[:, ::4]", "every 389th row", "every 4th column"."""
    if found := re.search(r"\[([\d:, ]*::[\d:, ]*)\]", meaning):
        return tuple(_index(part.strip()) for part in found[1].split(","))
    if found := re.search(r"every (\d+)(?:th|nd|rd|st) (row|column|input channel)", meaning):
        step = slice(None, None, int(found[1]))
        return (step,) if found[2] == "row" else (slice(None), step)
    return ()


def close(case: Case, name: str, value: Any, atol: float | None = None) -> None:
    """Compare a full value with the stored output at the case's tolerance, which is of the form {rtol, atol as a share
    of the largest value}; ``atol`` is another such share."""
    value = array(value)[stored(case.meta["outputs"][name]["meaning"])]
    tolerance = case.meta["tolerance"]
    of_largest = tolerance.get("atol_relative_to_max_abs", 0) if atol is None else atol
    case.compare(name, value, relative=tolerance["rtol"], of_largest=of_largest)


def reference(case: Case, name: str) -> dict[str, Any]:
    """The JSON of another case that this one refers to: beside it, or in the project's own folder."""
    return case.other(name).meta


@torch.no_grad()
def filled(case: Case, network: nn.Module, meta: dict[str, Any], scaled: dict[str, float]) -> None:
    """Give a network golden weights. Its state dict must be the official one without what is never used, in whatever
    order."""
    unused = set(meta["parameters_without_gradient"])
    keys = {k: v for k, v in meta["keys"].items() if k not in unused}
    assert case.fill.keys_of(network) == keys
    case.fill.fill_(network)
    for name, factor in scaled.items():
        network.get_parameter(name).mul_(factor)


def body(keys: dict[str, list[int]], prefix: str, heads: int) -> ViTOptions:
    """Size of a transformer from its keys."""
    width = keys[f"{prefix}.model.norm.weight"][0]
    depth = 1 + max(int(m[1]) for k in keys if (m := re.match(rf"{re.escape(prefix)}\.model\.blocks\.(\d+)\.", k)))
    patch = keys[f"{prefix}.model.patch_embed.proj.weight"][2]
    side = round(keys[f"{prefix}.grid_posembed"][1] ** 0.5)
    hidden = keys[f"{prefix}.model.blocks.0.mlp.fc1.weight"][0]
    return ViTOptions(side * patch, patch, width, depth, heads, hidden / width, 0.0)


def autoencoder(case: Case, meta: dict[str, Any], scaled: dict[str, float]) -> CAAE:
    """The CAAE of the case ``meta``."""
    keys, heads = meta["keys"], [int(h) for h in re.findall(r"(\d+) heads", meta["constructor"])]
    classes, dim = keys["crs.0.weight"]
    options = CAAEOptions(
        encoder=body(keys, "encoder.vit_backbone", heads[0]), class_dim=dim, decoder_width=keys["mlp.weight"][0],
        decoder_depth=1 + max(int(m[1]) for k in keys if (m := re.match(r"decoder\.blocks\.(\d+)\.", k))),
        decoder_heads=heads[1], reduction=re.search(r"reduction (\w+)", meta["constructor"])[1],
    )  # fmt: skip
    network = options.build(classes - 1, {})
    filled(case, network, meta, scaled)
    return network


def semformer(case: Case, meta: dict[str, Any], guide: CAAE, size: tuple[int, int], **options: Any) -> SemFormer:
    """SemFormer of the case ``meta`` with the factors of ``case``, judged at ``size``, without dropout."""
    keys = meta["keys"]
    heads = int(re.search(r"(\d+) heads", meta["constructor"])[1])
    backbone = body(keys, "segmentor.backbone", heads)

    class Judged(SemFormer):
        judged_size = size

    network = Judged(SemFormerOptions(backbone=backbone, dropout=0.0, **options), guide.classes - 1, guide)
    filled(case, network, meta, case.meta["scaled"])
    return network


def tags(labels: list[list[int]], classes: int) -> Tensor:
    """Class indices 1..C of each image -> (B, C)."""
    return torch.stack([torch.zeros(classes).index_fill_(0, torch.tensor(row) - 1, 1.0) for row in labels])


def check_caae_(case: Case) -> None:
    """Tokens, both embeddings, similarities, reconstruction, losses, and gradients: a class's semantics have one only
    where an image shows it."""
    network = autoencoder(case, case.meta, case.meta["scaled"])
    images = case.evaluate(case.meta["input"]["image"])
    batch = {"image": images, "tags": tags(case.meta["input"]["labels_foreground"], network.classes - 1)}
    labels = tags_with_background(batch["tags"])
    with torch.no_grad():
        tokens, _ = network.encoder["vit_backbone"](images)
        vectors = network.patch_vectors(images)
        values = {
            "labels": labels, "tokens": tokens, "cre": network.embed_classes(images), "crs": network.class_semantics(),
            "sim": network.class_similarities(network.pool_vectors(vectors), labels),
            "recon": network.reconstruct(vectors, images.shape[-2:]),
        }  # fmt: skip
    losses = network(batch, 0.0)
    total = sum(losses.values())
    total.backward()
    values |= {
        "sim_loss": losses["similarity"], "recon_loss": losses["reconstruction"], "loss": total,
        "grad_crs": network.crs[0].weight.grad, "grad_convert_rows": network.convert[0].weight.grad,
        "grad_posembed_norm": network.encoder["vit_backbone"].grid_posembed.grad.norm(),
    }  # fmt: skip
    for name in case.meta["outputs"]:
        close(case, name, values[name])
    absent = labels.sum(0) == 0
    assert absent.any() and not values["grad_crs"][absent].any()


def boxes(regions: np.ndarray) -> Tensor:
    """Rectangles x0, y0, x1, y1 -> (B, 4) top, bottom, left, right."""
    return torch.from_numpy(regions.astype(np.int64))[:, [1, 3, 0, 2]]


def check_semformer_crop_mask(case: Case) -> None:
    """The valid mask at the CAAE's size."""
    target, source = map(int, re.search(r"(\d+)/(\d+)", case.meta["description"]).groups())
    mask = valid_mask(boxes(case.input("regions")), (source, source), (target, target))
    for name, axis in (("mask_row_sums", 3), ("mask_col_sums", 2)):
        case.compare(name, mask.sum(axis)[:, 0])


def check_semformer_activation_losses(case: Case) -> None:
    """Suppression and complementation on given masks, and the pairs of images and classes."""
    text = case.meta["input"]["masks"]
    raw = case.evaluate(re.search(r"m = (.+?\))\.reshape", text)[1]).reshape(
        *map(int, re.search(r"reshape\((.+?)\)", text)[1].split(","))
    )
    rectangles = np.array(case.meta["input"]["regions x0,y0,x1,y1"])
    size = raw.shape[-2:]
    valid = valid_mask(boxes(rectangles), size, size)
    case.compare("grad_mask", valid)
    masks = torch.stack([raw.roll(i, 0) for i in range(len(rectangles))]) * valid
    labels = torch.from_numpy(case.input("labels"))
    pairs = ImageClassPairs.of(labels)
    for name, value in (("seen_indexes", pairs.image), ("seen_classes", pairs.number), ("seen_labels", pairs.own),
                        ("re_seen_labels", pairs.others)):  # fmt: skip
        case.compare(name, value)

    def complement(chosen: slice, inside: Tensor) -> Tensor:
        some = ImageClassPairs.of(labels[chosen])
        pixels = (inside[chosen].sum((1, 2, 3))[some.image] * some.others.any(1)).sum()
        return complement_error(masks[chosen], labels[chosen], inside[chosen]) / pixels.clamp(min=1e-5)

    everything = slice(None)
    close(case, "masks", masks)
    close(case, "act_supp", masks[:, 1:].mean() + 1 - masks[:, 0].mean())
    close(case, "act_cplt", complement(everything, valid))
    close(case, "act_cplt_no_mask", complement(everything, torch.ones_like(valid)))
    single = int(re.search(r"only image (\d+)", case.meta["outputs"]["act_cplt_single"]["meaning"])[1])
    case.compare("act_cplt_single", complement(slice(single, single + 1), valid))


def check_semformer_forward_train(case: Case) -> None:
    """Embeddings, logits, masks, all similarities, all terms, gradients, and the published parameter groups."""
    size = tuple(map(int, re.search(r"to (\d+)x(\d+)", case.meta["input"]["ae_image"]).groups()))
    guide = autoencoder(case, reference(case, "caae_forward"), case.meta["scaled_caae"]).requires_grad_(False)
    network = semformer(case, case.meta, guide, size)
    regions = np.array(case.meta["input"]["regions"])
    x = case.evaluate(case.meta["input"]["image"].split(" multiplied")[0])
    box = boxes(regions)
    x = x * valid_mask(box, x.shape[-2:], x.shape[-2:])
    batch = {"image": x, "tags": tags(case.meta["input"]["labels_foreground"], guide.classes - 1), "box": box}
    labels = tags_with_background(batch["tags"])
    with torch.no_grad():
        embeddings, logits = network.segmentor(x)
        valid = valid_mask(box, x.shape[-2:], size)
        masks = network.make_masks(logits, valid)
        small = nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=True)
        pairs = ImageClassPairs.of(labels)
        foreground, background = network.judge_masks(small, masks, pairs)
    batch |= {f"counts/{k}": v.float() for k, v in network.counts(batch).items()}
    losses = network(batch, 0.0)
    total = sum(losses.values())
    total.backward()
    values = {
        "labels": labels, "regions": regions, "grad_mask": valid, "cls_embed": embeddings, "seg_logits": logits,
        "masks": masks, "seg_sim": nn.functional.cosine_similarity(embeddings, guide.class_semantics(), dim=-1),
        "fg_pull": foreground[pairs.own], "fg_push": foreground[pairs.others],
        "bg_pull": background[pairs.others], "bg_push": background[pairs.own],
    }  # fmt: skip
    for side in ("fg", "bg"):
        values[f"cls_{side}_pull_loss"] = 1 - values[f"{side}_pull"].mean()
        values[f"cls_{side}_push_loss"] = 1 + values[f"{side}_push"].mean()
    options = network.options
    values |= {
        "seg_sim_loss": losses["similarity"], "cls_fg_loss": losses["foreground"], "cls_bg_loss": losses["background"],
        "act_supp_loss": losses["suppression"] / options.suppression_weight,
        "act_cplt_loss": losses["complement"] / options.complement_weight, "loss": total,
    }  # fmt: skip
    segmentor = network.segmentor
    gradients = {
        "grad_seg_head_weight": segmentor.seg_head[1].weight, "grad_seg_head_bias": segmentor.seg_head[1].bias,
        "grad_cls_token": segmentor.cls_token, "grad_cls_head_bias": segmentor.cls_head.bias,
    }  # fmt: skip
    values |= {name: parameter.grad for name, parameter in gradients.items()}
    values["grad_posembed_norm"] = segmentor.backbone.grid_posembed.grad.norm()
    loose = float(re.search(r"gradients: atol ([\d.e-]+)", case.meta["tolerance"]["note"])[1])
    for name in case.meta["outputs"]:
        close(case, name, values[name], loose if name.startswith("grad_") and name != "grad_mask" else None)
    assert similarity_loss(values["seg_sim"], labels).isclose(losses["similarity"])
    assert all(p.grad is None for p in guide.parameters())
    compare_groups(case, network)


def compare_groups(case: Case, network: SemFormer) -> None:
    """The published groups, without what is never used."""
    unused = set(case.meta["parameters_without_gradient"])
    named = {parameter: name for name, parameter in network.named_parameters()}
    groups = [[named[p] for p in group.params] for group in network.param_groups()]
    for group, expected in zip(groups, case.meta["parameter_groups"].values(), strict=True):
        if isinstance(expected, int):
            assert len(group) == expected
            continue
        more = [int(m[1]) for name in expected if (m := re.match(r"\.\.\. (\d+)", name))]
        listed = {name for name in expected if not name.startswith("...")} - unused
        assert listed <= set(group) and len(group) == len(listed) + sum(more)


def check_semformer_cam_merge(case: Case) -> None:
    """Network inputs, logits, attention and map of a scale, and both merged maps of an image."""
    described = case.meta["input"]
    published = SemFormer.recipes["published"].cam
    multiple = int(re.search(r"ceil(\d+)", described["resize"])[1])
    coarse = int(re.search(r"stride-(\d+)", case.meta["outputs"]["cam"]["meaning"])[1])
    infer = CamInference(scales=tuple(described["scales"]), stretch=multiple, round_up=multiple, coarse=coarse)
    case.expect_published((infer, described["cra_layers"]), (published.infer, published.network.map_layers))
    meta = reference(case, "semformer_forward_train")
    classes, _, dim = meta["keys"]["segmentor.cls_head.weight"]
    tiny = SemFormer.recipes["sample"].cam.caae.network  # nothing is judged here
    guide = replace(tiny, class_dim=dim).build(classes - 1, {})
    network = semformer(case, meta, guide, (16, 16), map_layers=described["cra_layers"])
    picture, present = case.input("image"), torch.tensor(described["labels_foreground"]) - 1
    case.compare("keys", [0, *described["labels_foreground"]])
    maps = []
    with torch.inference_mode():
        for scale, x in zip(infer.scales, cams.scaled_inputs(picture, infer, network.normalisation), strict=True):
            maps.append(network.cam(x, torch.ones(len(x), guide.classes - 1)))
            if scale == 1:
                close(case, "input_1x", x)
                close(case, "cam_1x", maps[-1])
                check_attention(case, network, x)
    given = iter(maps)
    row = np.zeros(guide.classes - 1)
    row[present] = 1
    cam = cams.infer_cam(lambda x, tags: next(given), picture, row, infer, network.normalisation)
    close(case, "cam", cam.coarse)
    close(case, "hr_cam", cam.maps)


def check_attention(case: Case, network: SemFormer, x: Tensor) -> None:
    """Logits and summed attention at scale 1; without attention the map is the rectified logits."""
    depth, last = network.options.backbone.depth, network.options.map_layers
    sums = AttentionSums(network.segmentor.classes, [0.0] * (depth - last) + [1.0] * last, [0.0] * depth)
    _, logits = network.segmentor(x, sums)
    close(case, "seg_logits_1x", logits)
    close(case, "cra_1x_raw", sums.to_patches.view_as(logits))
    low, high = sums.to_patches.amin(2, keepdim=True), sums.to_patches.amax(2, keepdim=True)
    close(case, "cra_1x", ((sums.to_patches - low) / (high - low + 1e-5)).view_as(logits))
    options = network.options
    network.options = replace(options, attention=False)
    torch.testing.assert_close(network.cam(x, torch.ones(len(x), logits.shape[1] - 1)), logits[:, 1:].relu())
    network.options = options


def check_semformer_poly_sgd(case: Case) -> None:
    """The published poly-SGD as it behaves, with Nesterov momentum of the weight decay's number."""
    text, described = case.meta["description"], case.meta["input"]
    stated = re.search(r"lr ([\d.]+), weight_decay ([\d.]+), 'momentum' ([\d.]+)", text)
    lr, decay, power = (float(v) for v in stated.groups())
    total = int(re.search(r"max_step=(\d+)", text)[1])
    momentum = float(re.search(r"effective SGD momentum is ([\d.]+)", text)[1])
    rates = [float(r) for r in re.findall(r"has lr ([\d.]+)", described)]
    w, b = (nn.Parameter(torch.from_numpy(case.input(name).copy())) for name in ("w0", "b0"))
    recipe = Fit(lr=lr, momentum=momentum, nesterov="nesterov True" in text, weight_decay=decay, power=power)
    groups = [Group([w], rates[0] / lr), Group([b], rates[1] / lr, decay=False)]
    optimiser = make_optimiser(groups, recipe, torch.device("cpu"))
    values: dict[str, list[np.ndarray]] = {"lr": [], "w": [], "b": []}
    for step, gradient in enumerate(torch.from_numpy(case.input("grads"))):
        set_lr(optimiser, recipe, step, total)
        values["lr"].append(np.array([group["lr"] for group in optimiser.param_groups]))
        w.grad, b.grad = gradient, gradient[:, 0, :4]
        optimiser.step()
        for name, parameter in (("w", w), ("b", b)):
            values[name].append(parameter.detach().numpy().copy())
    for name, rows in values.items():
        case.compare(name, np.stack(rows), relative=case.meta["tolerance"]["rtol"])


def check_semformer_evaluate(case: Case) -> None:
    """The curve with and without the published erosion, false positives and negatives, one erosion."""
    side = int(re.search(r"(\d+)x\d+ erosion", case.meta["description"])[1])
    ids = sorted(name.removeprefix("gt") for name in case.names if re.fullmatch(r"gt\d+", name))
    classes = case.stored("IoU_at_0p20").shape[0]
    thresholds = [round(float(t), 2) for t in case.input("thresholds")]

    def maps(name: str) -> tuple[np.ndarray, np.ndarray]:
        return case.input(f"keys{name}")[1:] - 1, case.input(f"hr_cam{name}").astype(np.float32)

    def curve(erosion: int) -> Any:
        return evaluate_cams(
            ids, maps, lambda name: case.input(f"gt{name}"), classes, thresholds, erosion=erosion, boundary=False,
            progress=False,
        )  # fmt: skip

    scores, plain = curve(side), curve(0)
    matrices = [scores.curve.confusion(i) for i in range(len(thresholds))]
    rtol = case.meta["tolerance"]["rtol"]
    at = thresholds.index(0.2)
    for name, value in (
        ("mIoU", 100 * scores.curve.mious()), ("mIoU_no_erosion", 100 * plain.curve.mious()),
        ("FP", [m.false_positive for m in matrices]), ("FN", [m.false_negative for m in matrices]),
        ("IoU_at_0p20", 100 * matrices[at].iou()),
    ):  # fmt: skip
        case.compare(name, value, relative=rtol, absolute=1e-9)
    assert scores.threshold == thresholds[int(np.argmax(case.stored("mIoU")))]
    keys = case.input("keys0")
    mask = mask_at(maps("0"), 0.2)
    case.compare("argmax0", mask, keys[case.stored("argmax0")])
    case.compare("eroded0", erode(mask, side), keys[case.stored("eroded0")])


# --------------------------------------------------------------------------------- labels, edge network, walk


def edge_network(case: Case, meta: dict[str, Any], folder: Path) -> EdgeOnly:
    """The edge network with the weights of ``meta``, read from a file with the official names."""
    like = {name: torch.empty(shape, dtype=torch.float32 if shape else torch.int64)
            for name, shape in meta["keys"].items()}  # fmt: skip
    state = {name: case.fill.tensor_for(name, tensor) for name, tensor in like.items()}
    for name, factor in case.meta["scaled"].items():
        state[name] *= factor
    for name, value in case.meta["set"].items():
        state[name].fill_(value)
    state["path_indices_0"] = torch.zeros(1, dtype=torch.int64)  # ignored, as are the copies under other names
    state |= {name.replace("fc_edge1", "edge_layers.0"): v for name, v in state.items() if name.startswith("fc_edge1")}
    state["backbone.0.0.weight"] = state["stage1.0.weight"]
    network = EdgeOnly(EdgeOnlyOptions())
    torch.save(state, folder / "affinity.pth")
    report = network.load_weights(str(folder / "affinity.pth"))
    assert " 0 missing" in report, report
    return network.eval()


def check_semformer_affinitynet(case: Case) -> None:
    """Edge logits, affinities in their order, pair labels, losses and gradients."""
    with TemporaryDirectory() as folder:
        network = edge_network(case, case.meta, Path(folder)).train()
    images = case.evaluate(case.meta["input"]["image"])
    network.radius = int(re.search(r"path radius (\d+)", case.meta["constructor"])[1])
    logits = network.edge_logits(network.resnet50.forward_stages(images))
    grid = logits.shape[-2:]
    displacements, radius = network.pair_geometry(grid)
    case.compare("offsets", displacements)
    source, _ = pair_cells(displacements[:1], *grid, radius=radius)
    case.compare("src_first_last", [source[0], source[-1]])
    batch = {"image": images, "target": torch.from_numpy(case.input("seg"))}
    counts = network.counts(batch)
    batch |= {f"counts/{k}": v.float() for k, v in counts.items()}
    terms = network(batch, 0.0)
    total = sum(terms.values())
    total.backward()
    values = {
        "edge": logits, "affinity": path_affinity(logits[:, 0].sigmoid(), displacements, radius),
        "n_bg_pos": counts["bg"], "n_fg_pos": counts["fg"], "n_neg": counts["neg"], "loss": total,
        "bg_loss": 4 * terms["bg"], "fg_loss": 4 * terms["fg"], "neg_loss": 2 * terms["neg"],
        "grad_fc_edge6_weight": network.fc_edge6.weight.grad, "grad_fc_edge6_bias": network.fc_edge6.bias.grad,
        "grad_fc_edge5_conv": network.fc_edge5[0].weight.grad,
    }  # fmt: skip
    for name, value in values.items():
        close(case, name, value)
    assert all(p.grad is None for p in network.resnet50.parameters())


def check_semformer_edge_inference(case: Case) -> None:
    """Boundary map of an image from itself and its mirror image on a canvas, here one that is no square."""
    with TemporaryDirectory() as folder:
        network = edge_network(case, reference(case, "semformer_affinitynet"), Path(folder))
    text = case.meta["input"]["image"]
    image = case.evaluate(text.removesuffix("[0]"))[0]
    (height, width), (high, wide) = image.shape[-2:], case.meta["input"]["canvas"]
    pair = nn.functional.pad(torch.stack([image, image.flip(-1)]), (0, wide - width, 0, high - height))
    with torch.inference_mode():
        close(case, "edge", network.pair_boundary(network.resnet50.forward_stages(pair), (height, width))[None])


def check_semformer_random_walk(case: Case) -> None:
    """The walk, and its scores at image size."""
    radius, beta, squarings = map(int, re.search(
        r"radius (\d+), beta (\d+), (\d+) squarings", case.meta["description"]).groups())  # fmt: skip
    options = EdgeOnly.recipes["published"].walk
    case.expect_published((radius, beta, squarings), (options.radius, options.beta, options.logt))
    maps, boundary = torch.from_numpy(case.input("cam")), torch.from_numpy(case.input("edge"))[0]
    walked = propagate_scores(maps, boundary, radius, beta, 2**squarings)
    close(case, "rw", walked[:, None])
    large = enlarge_cells(walked, case.meta["input"]["image size"])
    close(case, "rw_up", large / large.max())


def agreement(case: Case, name: str, got: np.ndarray) -> None:
    """The stated share of a label map's pixels is equal."""
    case.compare(name, got, share=case.meta["tolerance"]["label_agreement"])


def check_semformer_affinity_labels(case: Case) -> None:
    """Both arg-maxes, both sharpened labels, and the label that is trained on."""
    stated = re.search(r"fg_threshold=([\d.]+), bg_threshold=([\d.]+)", case.meta["description"])
    fg, bg = (float(v) for v in stated.groups())
    options = replace(EdgeOnly.recipes["published"].label, threshold_fg=fg, threshold_bg=bg)
    image, maps, keys = (case.input(name) for name in ("image", "hr_cam", "keys"))
    cam = Cam.of_maps(keys[1:] - 1, maps)
    labels = two_threshold_label(image, cam, options)
    for side, threshold, label in (("fg", fg, labels[0]), ("bg", bg, labels[1])):
        case.compare(f"{side}_argmax", hard_label(maps, threshold))
        agreement(case, f"{side}_label", keys[label])
    agreement(case, "conf", EdgeOnly.make_label(image, cam, options)[0])


def check_semformer_pseudo_label(case: Case) -> None:
    """Background, arg-max and CRF after the walk."""
    threshold, iterations = re.search(
        r"background ([\d.]+), argmax, label-unary CRF with (\d+)", case.meta["description"]
    ).groups()  # fmt: skip
    published = EdgeOnly.recipes["published"].walk
    options = replace(
        published, threshold=float(threshold), crf=replace(published.crf, iterations=int(iterations))
    )
    case.expect_published(options, published)
    image, maps, keys = (case.input(name) for name in ("image", "rw", "keys"))
    network = EdgeOnly.recipes["sample"].network.build(len(keys), {})
    x = Picture.of_rgb(image, network.normalisation)
    plain = replace(options, crf=replace(options.crf, iterations=0))
    case.compare("argmax", network.sharpen_scores(x, maps, plain).argmax(0))
    agreement(case, "label", keys[network.sharpen_scores(x, maps, options).argmax(0)])
