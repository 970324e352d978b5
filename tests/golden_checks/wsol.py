"""Golden cases of TS-CAM and of localisation: network, CUB's data, boxes, metrics (wsol.md)."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_case import array
from golden_checks.mctformer import vit_options
from torch import nn

from misc.config import Fit
from misc.loop.fit import lr_factor
from misc.score import wsol
from net.backbone.transformer import AttentionSums
from net.losses import class_loss
from net.seed.tscam import TsCam
from voc12.catalog import open_catalog


def fill(case: Any, network: nn.Module, keys: dict[str, list[int]]) -> None:
    """The case's weights, in evaluation mode; the state dict must be the official one."""
    assert case.fill.keys_of(network) == keys
    case.fill.fill_(network)
    text = case.meta["fill"]
    suffix, factor = re.search(r"key ends with '([\w.]+)' (?:is multiplied by|times) (\d+)", text).groups()
    for name, value in network.state_dict().items():
        if name.endswith(suffix):
            value.mul_(float(factor))
    network.eval()


def part(case: Any, name: str, value: Any) -> np.ndarray:
    """The part of a value that the output's meaning says is stored; "the same": as of the output before."""
    value, outputs = array(value), case.meta["outputs"]
    text, before = outputs[name]["meaning"], list(outputs)[list(outputs).index(name) - 1]
    if text.startswith("the same") and "sampled" not in text:
        text = outputs[before]["meaning"]
    if found := re.search(r"sampled \[(.+?)\]", text):
        value = value[tuple(
            slice(*(int(v) if v else None for v in p.split(":"))) if ":" in p else int(p)
            for p in found[1].replace(" ", "").split(",")
        )]  # fmt: skip
    return value


def sampled(case: Any, name: str, value: Any) -> None:
    """Compare the stored part relative to its largest entry."""
    case.compare(name, part(case, name, value), of_largest=case.meta["tolerance"]["max_abs_error_over_max_abs"])


def made(case: Any, described: dict[str, Any]) -> torch.Tensor:
    """An input that the case describes by its name and shape."""
    return case.fill.image(described["name"], *described["shape"])


def one_hot(targets: list[int], classes: int) -> torch.Tensor:
    return nn.functional.one_hot(torch.tensor(targets), classes).float()


def check_tscam_forward(case: Any) -> None:
    """Logits, semantic and coupled maps, attention and loss."""
    classes = case.meta["keys"]["head.bias"][0]
    size = replace(vit_options(case.meta["keys"], case.meta["constructor"]), drop_path=0.0)
    network = replace(TsCam.recipes["published"].cam.network, deit=size).build(classes, {})
    fill(case, network, case.meta["keys"])
    x = made(case, case.meta["input"]["image"])
    tags = one_hot(case.meta["input"]["targets"], classes)
    with torch.inference_mode():
        sums = AttentionSums(1, [1.0] * len(network.blocks), [0.0] * len(network.blocks))
        sampled(case, "semantic_maps", network.semantic_maps(x, sums))
        attention = sums.to_patches
        sampled(case, "attention", attention.unflatten(2, network.grid)[:, 0])
        sampled(case, "logits", network.classify(x, classes))
        sampled(case, "logits", network.train().class_logits(x))
        sampled(case, "loss", network({"image": x, "tags": tags}, 0.0)["cls"][None])
        sampled(case, "cams", network.eval().cam(x, tags))
    torch.testing.assert_close(
        class_loss(network.class_logits(x), tags, "cross_entropy"),
        nn.functional.cross_entropy(network.class_logits(x), tags.argmax(1)),
    )


def check_wsol_cub_sample(case: Any) -> None:
    """Class and box of each row through the reader of the folder, and the rates of the step schedule."""
    side = _grid_side(case.meta["description"])
    rows = case.meta["input"]["rows [image width, image height, line of bounding_boxes.txt without the id (x y w h)]"]
    labels = case.meta["input"]["class ids in the file (1-based)"]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        lines = {
            "classes.txt": [f"{i} {i:03}.Bird{i}" for i in range(1, max(labels) + 1)],
            "images.txt": [f"{i} {label:03}.Bird{label}/bird_{i}.jpg" for i, label in enumerate(labels, 1)],
            "image_class_labels.txt": [f"{i} {label}" for i, label in enumerate(labels, 1)],
            "train_test_split.txt": [f"{i} 0" for i in range(1, len(rows) + 1)],
            "bounding_boxes.txt": [f"{i} {row[2]}" for i, row in enumerate(rows, 1)],
        }
        for name, content in lines.items():
            (root / name).write_text("\n".join(content))  # no final newline: no digit may be lost
        catalog = open_catalog("cub200", root)
        for image_id, (width, height, _) in zip(catalog.ids("test"), rows, strict=True):
            box = wsol.scaled_boxes(catalog.boxes(image_id), (height, width), side, clip=True)
            found.append([catalog.tags(image_id).argmax(), *box[0]])
    case.compare("label_and_box", found)

    epochs = case.meta["outputs"]["lr_per_epoch"]["shape"][0]
    every = int(re.search(r"LR_STEPS \[(\d+)\]", case.meta["description"])[1])
    lr, per_epoch = case.meta["input"]["start lr"], 3
    fit = Fit(epochs=epochs, lr=lr, schedule="step", step_epochs=(every,))
    rates = [lr * lr_factor(fit, step, epochs * per_epoch) for step in range(epochs * per_epoch)]
    case.compare("lr_per_epoch", rates[::per_epoch], relative=1e-6)
    assert rates == np.repeat(rates[::per_epoch], per_epoch).tolist()


def _grid_side(text: str) -> int:
    """224 of "on the resized 224x224 image"."""
    return int(re.search(r"(\d+)x\1", text)[1])


def _compare_boxes(case: Any, name: str, got: np.ndarray) -> None:
    """The stated tolerance of boxes."""
    pixel, share = re.search(r"within (\d+) pixel, at least (\d+) % exact", case.meta["tolerance"]["boxes"]).groups()
    case.compare(name, got, absolute=float(pixel))
    case.compare(name, got, share=float(share) / 100)


def check_wsol_boxes(case: Any) -> None:
    """Resized, normalised maps and their boxes at all sizes and thresholds."""
    maps, sizes = case.input("maps"), case.meta["input"]["sizes"]
    grown = [np.stack([wsol.resize_map(m, size) for m in maps]) for size in sizes]
    case.compare("resized", part(case, "resized", grown[0]), absolute=case.meta["tolerance"]["resized"])
    cuts = case.meta["input"]["thresholds"]
    boxes = [[[wsol.fixed_box(m, cut) for cut in cuts] for m in listed] for listed in grown]
    _compare_boxes(case, "boxes", np.array(boxes))


def check_wsol_metrics(case: Any) -> None:
    """Flags of every image, and the accuracy of the classification."""
    given, cams, logits = case.meta["input"], case.input("cams"), case.input("logits")
    side, cut = given["crop_size"], given["cam_threshold"]
    columns: dict[str, list[float]] = {}
    verdicts = []
    (truths,) = (value for key, value in given.items() if key.startswith("ground_truth_boxes"))
    for maps, scores, target, text in zip(cams, logits, given["targets"], truths, strict=True):
        truth = np.array([int(v) for v in text.split()]).reshape(-1, 4)
        best = wsol.best_classes(scores)
        boxes = [wsol.fixed_box(wsol.resize_map(m, side), cut) for m in maps]  # of every class
        verdict = wsol.judge_boxes(best, np.stack(boxes)[best], boxes[target], target, truth)
        verdicts.append(verdict)
        kinds = ("right", "cls_wrong", "multi_instances", "region_part", "region_more", "region_wrong")
        flags = {kind: verdict.error == ours for kind, ours in zip(kinds, wsol.ERRORS, strict=True)}
        flags |= {"iou_gt_class": verdict.iou, "loc_gt_known": verdict.gt_known}
        flags |= {k: getattr(verdict, k) for k in ("cls_top1", "cls_top5", "loc_top1", "loc_top5")}
        for name, flag in flags.items():
            columns.setdefault(name, []).append(float(flag))
    tolerance = case.meta["tolerance"]
    assert set(columns) | {"accuracy"} == set(case.meta["outputs"])
    for name, values in columns.items():
        allowed = tolerance["iou_gt_class"] if name == "iou_gt_class" else 0
        case.compare(name, values, absolute=allowed)
    shares = wsol.summarise_verdicts(verdicts)
    case.compare("accuracy", [shares["Cls Top-1"], shares["Cls Top-5"]], relative=1e-5)


def _cuts(text: str) -> np.ndarray:
    """Thresholds of ``np.arange(0,1,STEP)``."""
    return wsol.list_thresholds(float(re.fullmatch(r"np\.arange\(0,1,([\d.]+)\)", text)[1]))


def check_wsol_maxboxacc(case: Any) -> None:
    """Score maps, boxes at every threshold, counts and the maxima of both forms."""
    given = case.meta["input"]
    side, taus = _grid_side(given["scoremaps"]), _cuts(given["thresholds"])
    scores = np.stack([wsol.resize_map(m.astype(np.float64), side, "bicubic") for m in case.input("maps14")])
    case.compare("scoremap", part(case, "scoremap", scores), absolute=1e-5)
    sizes = given["image_sizes [w,h]"]
    truths = [
        wsol.scaled_boxes(np.array(boxes), (height, width), side, clip=False)
        for (width, height), boxes in zip(sizes, given["ground_truth_boxes [x0,y0,x1,y1] in image pixels"], strict=True)
    ]
    case.compare("gt_resized", np.concatenate(truths))
    found = [[wsol.all_boxes(wsol.to_levels(m), float(tau)) for tau in taus] for m in scores]
    _compare_boxes(case, "boxes_single", np.array([[boxes[at] for boxes, at in row] for row in found]))
    counts = np.array([[len(boxes) for boxes, _ in row] for row in found])
    share = float(re.match(r"(\d+) % exact", case.meta["tolerance"]["counts"])[1]) / 100
    case.compare("box_counts_multi", counts, share=share)
    overlap = np.stack([wsol.best_overlaps(m, taus, truth) for m, truth in zip(scores, truths, strict=True)], 1)
    for name, best in zip(("single", "multi"), overlap, strict=True):
        curves = wsol.box_accuracy(best)
        case.compare(f"correct_{name}", np.rint(curves * len(scores) / 100), share=share)
        case.compare(f"max_box_acc_{name}", curves.max(1), relative=1e-6)
    single, multi = (wsol.box_accuracy(best).max(1) for best in overlap)
    np.testing.assert_allclose(wsol.max_box_acc(overlap[0], taus)[0], single[1])
    np.testing.assert_allclose(wsol.max_box_acc_v2(overlap[1]), multi.mean())


def check_wsol_pxap(case: Any) -> None:
    """Regions on the grid, histograms, and PxAP."""
    given = case.meta["input"]
    side, width = _grid_side(given["scoremaps"]), given["mask size (h,w)"][1]
    masks, ignore = (np.unpackbits(case.input(k), axis=-1)[..., :width] for k in ("masks", "ignore"))
    owner = np.array(given["mask_owner (image index of each stored mask)"])
    taus = _cuts(given["thresholds"])
    total: Any = 0
    regions = []
    for number, low in enumerate(case.input("maps14")):
        region = np.where(ignore[number] > 0, 255, 0).astype(np.uint8)
        region[(masks[owner == number] > 0).any(0)] = 1
        regions.append(wsol.region_on_grid(region, side))
        scores = wsol.resize_map(low.astype(np.float64), side, "bicubic")
        total = total + wsol.region_histograms(scores, regions[-1], taus)
    case.compare("gt_mask", part(case, "gt_mask", np.stack(regions)))
    allowed = float(re.search(r"within (\d+) counts", case.meta["tolerance"]["hist"])[1])
    for ours, name in zip(total, ("true_hist", "false_hist"), strict=True):
        case.compare(name, ours, absolute=allowed)
    case.compare("pxap", [wsol.pxap(total)], absolute=case.meta["tolerance"]["pxap"])
