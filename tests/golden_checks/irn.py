"""Golden cases of IRNet (irnet.md): networks, losses, pair geometry, labels, walk, objects, evaluation.

Whatever differs between cases of a family is read from the case: image names, shapes, labels, sizes, settings.
"""

from __future__ import annotations

import re
import tempfile
import zlib
from pathlib import Path
from typing import Any

import golden_case
import numpy as np
import plain
import torch
from torch import Tensor

from misc.config import Fit, override
from misc.crf.dense import DenseCRF
from misc.image import pixels
from misc.image.cam import Cam
from misc.image.picture import Picture
from misc.infer import cams
from misc.loop.fit import make_optimiser, set_lr
from misc.propagate.walk import (
    affinity_losses,
    by_path_length,
    half_circle,
    pair_cells,
    pair_labels,
    path,
    path_affinity,
    transition,
)
from misc.score.metrics import Confusion, InstancePrecision, mask_at
from misc.score.objects import Instances
from net.contract import Network
from net.groups import Group
from net.refine.irn import IRN, IRNOptions, IRNWalk, _PairDistances, displacement_losses, find_centroids, find_clusters
from net.seed.irn_cam import IRNCam, IRNCamOptions
from net.shared.edge import EdgeNetwork, enlarge_cells, hard_label, propagate_scores, two_threshold_label
from voc12.transforms import TrainSample, crop_sample

NO_CLASSES = 1
"""What the boundary and displacement network is built for: none of its layers depends on the classes."""
_SAMPLED = re.compile(r"sampled \[(.*?)\]")


def load_official(network: Network, keys: dict[str, list[int]], aliases: dict[str, str], case: Any) -> None:
    """Give a network the case's weights by way of a file as the published code writes it: every tensor under all its
    names. The network's own names must be the official ones, each tensor once."""
    own = case.fill.keys_of(network)
    assert own == {name: shape for name, shape in keys.items() if name in own}
    assert {aliases.get(name, name) for name in keys} == set(own)
    factor = float(re.search(r"multiplied by (\d+(?:\.\d+)?)", case.meta["fill"])[1])
    state = {}
    for name, value in network.state_dict().items():
        state[name] = case.fill.tensor_for(name, value)
        if name.startswith("resnet50.") and value.ndim == 4:
            state[name] *= factor
    with tempfile.TemporaryDirectory() as folder:
        torch.save({name: state[aliases.get(name, name)] for name in keys}, Path(folder) / "official.pth")
        network.load_weights(str(Path(folder) / "official.pth"))
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name


def _image(case: Any) -> Tensor:
    given = case.meta["input"]["image"]
    return case.fill.image(given["name"], *given["shape"])


def _check(case: Any, name: str, value: Tensor | np.ndarray) -> None:
    """``case.check`` of the part that the output's meaning names: "sampled [::37, ::5]"."""
    value = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if found := _SAMPLED.search(case.meta["outputs"][name]["meaning"]):
        value = value[tuple(golden_case._index(part.strip()) for part in found[1].split(","))]
    case.check(name, value)


# ------------------------------------------------------------------------------------------------ networks


def check_irn_cam_net(case: Any) -> None:
    """Training forward, CAM of both pairs, loss, gradients and where there are none."""
    classes = case.meta["keys"]["classifier.weight"][0]
    network = IRNCamOptions().build(classes, {}).eval()
    load_official(network, case.meta["keys"], case.meta["aliases"], case)
    image, tags = _image(case), torch.tensor(case.meta["input"]["labels_for_loss"], dtype=torch.float32)
    logits = network.class_logits(image)
    loss = network({"image": image, "tags": tags}, 0.0)["cls"]
    loss.backward()
    _check(case, "logits", logits)
    _check(case, "loss", loss[None])
    with torch.inference_mode():
        for number, picture in enumerate(image):
            maps = network.cam(torch.stack([picture, picture.flip(-1)]), tags)
            _check(case, f"cam_pair{number}", maps[0] + maps[1].flip(-1))
    _check(case, "grad_classifier", network.classifier.weight.grad)
    _check(case, "grad_layer3_0_conv1", network.resnet50.layer3[0].conv1.weight.grad)
    _check(case, "grad_layer4_2_bn3_weight", network.resnet50.layer4[2].bn3.weight.grad)
    without = {name.split(".")[1] for name, p in network.named_parameters() if p.grad is None}
    assert without == set(case.meta["gradient_routing"]["top-level parts of resnet50 with no gradient at all"])


def check_irn_make_cam(case: Any) -> None:
    """Merged maps at image size and on the coarse grid, by the published inference settings."""
    published, outputs = IRNCam.recipes["published"].cam.infer, case.meta["outputs"]
    stride = int(re.search(r"ceil\(hs/(\d+)\)", case.meta["inputs_stored"]["cam_scale0"]["meaning"])[1])
    infer = override(published, {
        "scales": tuple(case.meta["input"]["scales"]),
        "round_up": int(re.search(r"up to a multiple of (\d+)", case.meta["description"])[1]),
        "coarse": int(re.search(r"ceil\(h/(\d+)\)", outputs["cam"]["meaning"])[1]),
    })  # fmt: skip
    case.expect_published(infer, published)
    height, width = size = tuple(case.meta["input"]["image_size"])
    keys = case.meta["input"]["label_indices (0-based foreground classes)"]
    case.compare("keys", keys)
    pictures = iter([case.input(f"cam_scale{number}") for number in range(len(infer.scales))])
    tags = np.isin(np.arange(len(case.stored("cam_scale0"))), keys)

    def network(images: Tensor, _: Tensor) -> Tensor:
        # the stored maps are the sums of both mirrors
        total = torch.from_numpy(next(pictures))
        assert total.shape[1:] == tuple(-(-side // stride) for side in images.shape[-2:])
        return torch.stack([total, torch.zeros_like(total)])

    image = np.zeros((height, width, 3), np.uint8)
    cam = cams.infer_cam(network, image, tags.astype(np.float32), infer, "imagenet")
    case.check("high_res", cam.maps)
    case.check("cam", cam.coarse)
    assert cam.maps.shape[1:] == size


def _geometry(case: Any) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Keys and aliases of the boundary and displacement network."""
    meta = case.meta if "keys" in case.meta else type(case)(case.path.with_name(case.meta["keys_from"].split()[0])).meta
    return meta["keys"], meta["aliases"]


def check_irn_edge_displacement(case: Any) -> None:
    """Boundary and displacement of the pair on its canvas, and of the whole batch without one, in both modes."""
    network = IRNOptions().build(NO_CLASSES, {}).eval()
    load_official(network, *_geometry(case), case)
    image = _image(case)
    canvas = int(re.search(r"crop_size=(\d+)", case.meta["constructor"])[1])
    with torch.inference_mode():
        taps = network.forward_pair(image[0], canvas)
        boundary = network.pair_boundary(taps, image.shape[-2:])
        _check(case, "edge", boundary[None])
        height, width = boundary.shape
        _check(case, "displacement", network.displacement_field(taps)[0, :, :height, :width])
        taps = network.resnet50.forward_stages(image)
        _check(case, "net_edge_logit", network.edge_logits(taps))
        _check(case, "net_displacement_eval", network.displacement_field(taps))
        network.train()
        _check(case, "net_displacement_train", network.displacement_field(taps))


def check_irn_aff_displacement_loss(case: Any) -> None:
    """Pair affinities, all terms and gradients of the training forward."""
    given = case.meta["input"]
    network = IRNOptions(radius=given["radius"]).build(NO_CLASSES, {}).train()
    keys, aliases = _geometry(case)
    # the file of a training holds buffers besides, which are functions of the settings
    load_official(network, keys, aliases, case)
    image, target = _image(case), torch.from_numpy(case.input("labels"))
    batch = {"image": image, "target": target}
    batch |= {f"counts/{name}": value.float() for name, value in network.counts(batch).items()}
    terms = network(batch, 0.0)
    sum(terms.values()).backward()
    assert all(p.grad is None for p in network.resnet50.parameters())
    bg, fg, neg = 4 * terms["bg"], 4 * terms["fg"], 2 * terms["neg"]
    dp_fg, dp_bg = 2 * terms["dp_fg"], 2 * terms["dp_bg"]
    total = sum(terms.values())
    _check(case, "terms", torch.stack([bg, fg, (bg + fg) / 2, neg, dp_fg, dp_bg, total]))
    _check(case, "grad_fc_edge6_weight", network.fc_edge6.weight.grad[0, :, 0, 0])
    _check(case, "grad_fc_edge1_conv", network.fc_edge1[0].weight.grad[:, :, 0, 0])
    _check(case, "grad_fc_dp7_last", network.fc_dp7[3].weight.grad[:, :, 0, 0])
    _check(case, "grad_fc_dp4_conv", network.fc_dp4[0].weight.grad)

    with torch.no_grad():
        taps = network.resnet50.forward_stages(image)
        field = network.displacement_field(taps)
        displacements, radius = network.pair_geometry(tuple(given["grid"]))
        affinity = path_affinity(network.edge_logits(taps)[:, 0].sigmoid(), displacements, radius)
    _check(case, "affinity", affinity)
    _check(case, "pos_aff", -torch.log(affinity + 1e-5))
    _check(case, "neg_aff", -torch.log(1 + 1e-5 - affinity))
    # the distances of each pair, by marking that pair's kind alone
    cells = [torch.stack(c) for c in zip(*(pair_cells([d], *given["grid"], radius=radius) for d in displacements),
                                         strict=True)]  # fmt: skip
    flat = field.flatten(2)
    difference = flat[:, :, cells[0]] - flat[:, :, cells[1]]  # (B, 2, D, P)
    wanted = torch.tensor(displacements).T[:, :, None]
    _check(case, "dp_fg", (difference - wanted).abs())
    _check(case, "dp_bg", difference.abs())
    labels = network.label_pairs(target)
    sums = _PairDistances.apply(field, labels, displacements, radius)
    for kind, (name, distances) in enumerate((("fg", (difference - wanted).abs()), ("bg", difference.abs()))):
        torch.testing.assert_close(sums[kind], (distances.sum(1) * labels[name]).sum(), rtol=1e-4, atol=1e-3)
    counts = {name: pairs.sum() for name, pairs in labels.items()}
    again = {**affinity_losses(affinity, labels, counts),
             **displacement_losses(field, labels, counts, displacements, radius)}  # fmt: skip
    assert set(again) == set(terms)


def check_irn_poly_optimizer(case: Any) -> None:
    """The published poly-SGD: its momentum is the weight decay's number, rates stay at the end."""
    found = re.search(r"lr=([\d.]+), weight_decay=([\de.-]+), max_step=(\d+)", case.meta["input"]["constructor"])
    lr, decay, total = float(found[1]), float(found[2]), int(found[3])
    momentum = case.meta["effective_momentum"][0]
    published = IRNCam.recipes["published"].cam.fit
    case.expect_published((lr, momentum, decay), (published.lr, published.momentum, published.weight_decay))
    w, v = (torch.nn.Parameter(torch.from_numpy(case.input(f"{name}0").copy())) for name in "wv")
    groups = [Group([p], lr_scale=g["lr"] / lr) for p, g in zip((w, v), case.meta["input"]["groups"], strict=True)]
    recipe = Fit(lr=lr, momentum=momentum, weight_decay=decay)
    optimiser = make_optimiser(groups, recipe, torch.device("cpu"))
    made: dict[str, list[np.ndarray]] = {"w": [], "v": [], "lr": []}
    for step in range(case.meta["outputs"]["w"]["shape"][0]):
        set_lr(optimiser, recipe, step, total)
        made["lr"].append(np.array([group["lr"] for group in optimiser.param_groups]))
        optimiser.zero_grad()
        names = {"w": w, "v": v, "sum": torch.sum}
        eval(case.meta["input"]["loss"].replace("^", "**"), {"__builtins__": {}}, names).backward()  # noqa: S307
        optimiser.step()
        for name, parameter in (("w", w), ("v", v)):
            made[name].append(parameter.detach().numpy().copy())
    for name, values in made.items():
        case.check(name, np.stack(values))


# ------------------------------------------------------------------------------------------------ pairs and labels


def _indices(radius: int, size: list[int]) -> dict[str, Any]:
    """Everything that IRNet's path index holds, from our pair geometry."""
    directions = by_path_length(half_circle(radius))
    source, target = pair_cells(directions, *size, radius=radius)
    source, target = source.view(len(directions), -1)[0], target.view(len(directions), -1)
    lengths = sorted({len(path(d)) for d in directions})
    groups = [np.array([path(d) for d in directions if len(path(d)) == n]) for n in lengths]  # (D_n, n, 2)
    return {
        "search_dst": np.array(directions), "src_indices": source.numpy(), "dst_indices": target.numpy(),
        "search_path": groups,
        "path_indices": [(g @ np.array([size[1], 1]))[..., None] + source.numpy() for g in groups],
    }  # fmt: skip


def _same(summary: dict[str, Any], value: np.ndarray) -> None:
    value = np.ascontiguousarray(value, np.int64)
    assert (summary["shape"], summary["sum"]) == (list(value.shape), int(value.sum()))
    assert summary["crc32"] == zlib.crc32(value.tobytes())


def check_irn_path_index(case: Any) -> None:
    """Directions, paths and indices: a small grid completely, others by their checksums."""
    small = _indices(case.meta["input"]["small"]["radius"], case.meta["input"]["small"]["size"])
    for name in case.names:
        kind, number = re.fullmatch(r"[^_]+_([a-z_]+)(\d*)", name).groups()
        if name.startswith("small_"):
            case.compare(name, small[kind][int(number)] if number else small[kind])
    for summary in case.meta["input"]["summarised"]:
        made = _indices(summary["radius"], summary["size"])
        case.compare(f"r{summary['radius']}_search_dst", made["search_dst"])
        assert len(made["search_dst"]) == summary["directions"]
        _same(summary["src_indices"], made["src_indices"])
        _same(summary["dst_indices"], made["dst_indices"])
        for group, cells, offsets in zip(
            summary["path_groups"], made["path_indices"], made["search_path"], strict=True
        ):
            _same(group, cells)
            assert group["search_path_crc32"] == zlib.crc32(np.ascontiguousarray(offsets, np.int64).tobytes())


def check_irn_aff_label(case: Any) -> None:
    """Label of every cell and of every pair."""
    label = EdgeNetwork.make_target(case.input("label_full")[None])
    case.compare("label_reduced", label)
    radius = case.meta["input"]["radius"]
    pairs = pair_labels(torch.from_numpy(label.copy())[None], radius, by_path_length(half_circle(radius)))
    for ours, theirs in (("bg", "bg_pos"), ("fg", "fg_pos"), ("neg", "neg")):
        case.compare(theirs, pairs[ours][0])


def _mostly(case: Any, name: str, got: np.ndarray, text: str) -> None:
    """Equal but for the share of pixels that the case allows."""
    case.compare(name, got, share=1 - float(re.search(r"at most ([\d.]+) %", text)[1]) / 100)


def check_irn_ir_label(case: Any) -> None:
    """Arg-maxes at both thresholds, their CRF labels, the label."""
    given, allowed = case.meta["input"], case.meta["tolerance"]["label arrays"]
    options = override(
        IRN.recipes["published"].label,
        {"threshold_fg": given["conf_fg_thres"], "threshold_bg": given["conf_bg_thres"]},
    )
    cam = Cam.of_maps(np.array(given["keys (0-based foreground classes)"]), case.input("high_res"))
    image = case.input("image")
    for kind, threshold, label in zip(
        ("fg", "bg"), (options.threshold_fg, options.threshold_bg), two_threshold_label(image, cam, options),
        strict=True,
    ):  # fmt: skip
        case.compare(f"{kind}_argmax", hard_label(cam.maps, threshold))
        _mostly(case, f"{kind}_crf", label, allowed)
    picture, planes = IRN.make_label(image, cam, options)
    _mostly(case, "label", picture, allowed)
    assert np.array_equal(planes[0], picture)
    assert DenseCRF(image, options.crf).size == picture.shape


def check_irn_image_ops(case: Any) -> None:
    """Resizing of images and labels, normalisation, the top left crop."""
    image, label = case.input("image"), case.input("label")
    for name in case.names:
        if match := re.fullmatch(r"(image|label)_x([\d.]+)", name):
            size = pixels.scaled_size(image.shape[:2], float(match[2]))
            resize, source = (pixels.resize_image, image) if match[1] == "image" else (pixels.resize_mask, label)
            case.compare(name, resize(source, size))
    values = pixels.normalise_image(image, "imagenet")
    step = re.search(r"sampled \[::(\d+)", case.meta["outputs"]["normalised"]["meaning"])[1]
    case.compare("normalised", values[:: int(step), :: int(step)], absolute=1e-6, relative=1e-6)
    rng = np.random.default_rng(0)
    for name in ("top_left_crop", "top_left_crop_label"):
        side = int(re.search(r"crop/pad to (\d+)", case.meta["outputs"][name]["meaning"])[1])
        corner = values[:side, :side]
        sample = TrainSample(corner, label[:side, :side], None)
        crop_sample(sample, side, rng, place="corner")
        if name.endswith("label"):
            case.compare(name, sample.mask)
        else:
            case.compare(name, sample.image[::2, ::2], absolute=1e-6, relative=1e-6)


# ------------------------------------------------------------------------------------------------ walk and objects


def check_irn_propagate(case: Any) -> None:
    """Walked scores of every setting; affinities and one step of the first."""
    boundary, scores = torch.from_numpy(case.input("edge"))[0], torch.from_numpy(case.input("cams"))
    for number, given in enumerate(case.meta["input"]["settings"]):
        walked = propagate_scores(scores, boundary, given["radius"], given["beta"], 2 ** given["exp_times"])
        _check(case, f"rw{number}", walked[:, None])
        if number == 0:
            displacements = half_circle(given["radius"])
            source, target = pair_cells(displacements, *boundary.shape)
            affinity = path_affinity(boundary[None], displacements)[0]
            _check(case, "dense_affinity", plain.dense_affinity(source, target, affinity, boundary.numel()))
            step = transition(source, target, affinity, boundary.numel(), given["beta"])
            _check(case, "transition", step.to_dense().t())


def _settings(case: Any) -> tuple[Cam, Tensor, tuple[int, int], dict[str, Any]]:
    """CAM (its coarse part is what counts), boundary, size of the image and walk settings of a case."""
    given = case.meta["input"]
    keys = next(value for name, value in given.items() if name.startswith("keys"))
    size = tuple(given["image_size"])
    cam = Cam.of_maps(np.array(keys), np.zeros((len(keys), *size), np.float32), case.input("cams"))
    walk = {"radius": given["radius"], "beta": float(given["beta"]), "logt": given["exp_times"]}
    return cam, torch.from_numpy(case.input("edge"))[0], size, walk


def check_irn_sem_seg(case: Any) -> None:
    """Walked scores and the label."""
    cam, boundary, size, walk = _settings(case)
    options = override(IRN.recipes["published"].walk, {**walk, "threshold": case.meta["input"]["sem_seg_bg_thres"]})
    walked = propagate_scores(torch.from_numpy(cam.coarse), boundary, options.radius, options.beta, 2**options.logt)
    case.compare("rw", walked[:, None], absolute=case.meta["tolerance"]["rw"])
    network = IRNOptions().build(NO_CLASSES, {})
    scores = network.walk_scores(Picture(np.zeros((*size, 3), np.uint8), torch.zeros(3, *size)), cam, boundary, options)
    _mostly(case, "label", np.array([0, *(cam.keys + 1)])[scores.argmax(0)], case.meta["tolerance"]["label"])
    assert enlarge_cells(walked, size).shape == (len(cam.keys), *size)


def check_irn_ins_seg(case: Any) -> None:
    """Centroids, objects of all classes, detections."""
    cam, boundary, size, walk = _settings(case)
    field = torch.from_numpy(case.input("displacement"))
    ends = find_centroids(field)
    share = float(re.search(r"up to ([\d.]+) %", case.meta["tolerance"]["centroids"])[1]) / 100
    case.compare("centroids", ends, share=1 - share, joint=True)
    numbers = find_clusters(field.numpy(), ends.numpy())
    found = numbers == np.arange(numbers.max() + 1)[:, None, None]
    case.compare("instance_map", found, share=1 - share, joint=True)
    options = override(IRNWalk(), {**walk, "instance_threshold": case.meta["input"]["ins_seg_bg_thres"]})
    found = IRN.find_objects(field, boundary, cam, size, options)
    case.compare("class", found.classes)
    case.compare("score", found.scores, absolute=case.meta["tolerance"]["score"])
    least = float(re.search(r"IoU > ([\d.]+)", case.meta["tolerance"]["mask"])[1])
    masks = np.unpackbits(case.stored("mask"), axis=-1, count=size[1]).astype(bool)
    ious = [(mask & truth).sum() / (mask | truth).sum() for mask, truth in zip(found.masks, masks, strict=True)]
    case.compare("mask", ious, np.ones(len(masks)), absolute=1 - least)


# ------------------------------------------------------------------------------------------------ evaluation


def _nan_as_minus_one(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values, nan=-1)


def _numbers(text: str, word: str) -> list[int]:
    """The list after a word: "labels [1, 2]"."""
    return [int(n) for n in re.search(rf"{word} \[([\d, ]*)\]", text)[1].split(",")]


def check_irn_eval(case: Any) -> None:
    """Confusion of masks and of CAMs at one background score; average precision of objects."""
    meaning = {name: stored["meaning"] for name, stored in case.meta["inputs_stored"].items()}
    classes = case.meta["outputs"]["iou"]["shape"][0]
    masks, maps = Confusion(classes), Confusion(classes)
    for number in range(sum(name.startswith("gt") for name in case.names)):
        truth, prediction = case.input(f"gt{number}"), case.input(f"pred{number}")
        masks.add(truth, np.where(prediction == 255, 0, prediction))  # IRNet counts 255 as background
        cam = (np.array(_numbers(meaning[f"cam{number}"], "keys")), case.input(f"cam{number}"))
        maps.add(truth, mask_at(cam, case.meta["input"]["cam_eval_thres"]))
    case.check("confusion", masks.matrix)
    case.check("iou", _nan_as_minus_one(masks.iou("nanmean")))
    case.check("miou", np.array([masks.miou("nanmean")]))
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = np.stack([1 - masks.truth_pixels / masks.union, 1 - masks.predicted_pixels / masks.union])
    case.check("fp_fn", _nan_as_minus_one(parts))
    case.check("cam_iou", _nan_as_minus_one(maps.iou("nanmean")))
    case.check("cam_miou", np.array([maps.miou("nanmean")]))

    def instances(number: int, kind: str) -> Instances:
        name = f"ins_{kind}{number}"
        width = int(re.search(r"\(R,\d+,(\d+)\)", meaning[name])[1])
        bits = np.unpackbits(case.input(name), axis=-1, count=width).astype(bool)
        scores = case.input(f"ins_score{number}") if kind == "pred" else np.ones(len(bits), np.float32)
        return Instances(bits, np.array(_numbers(meaning[name], "labels")), scores)

    precision = InstancePrecision(case.meta["outputs"]["ap50"]["shape"][0], (0.5, 0.7))
    for number in range(sum(name.startswith("ins_gt") for name in case.names)):
        precision.add(instances(number, "gt"), instances(number, "pred"))
    for at, name in enumerate(("50", "70")):
        case.check(f"ap{name}", _nan_as_minus_one(precision.average_precision(at)))
        case.check(f"map{name}", np.array([precision.mean(at)]))
