"""Golden cases of Conformer and TransCAM, and of TransCAM's settings of PSA (transcam.md).

Whatever differs between cases of a family is read from the case: image names, shapes, labels, sizes, settings.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from misc.config import override
from misc.image.cam import Cam
from misc.image.picture import Picture
from misc.infer import cams
from misc.propagate.walk import transition
from net.backbone.conformer import Conformer, ConformerOptions
from net.refine.psa import PSA, PSARecipe, pair_labels
from net.seed.transcam import Method, TransCam, TransCamOptions

PUBLISHED = TransCam.recipes["published"]
_NUMBER = r"(\d+(?:\.\d+)?)"


def body(case: Any) -> ConformerOptions:
    """The options that a case's constructor and keys describe; the published ones where it refers to another case."""
    text, keys = case.meta["constructor"], case.meta.get("keys")
    stride = re.search(r"last fusion (?:block has )?stride (\d)", text)
    options = {
        "double_class_token": "NOT doubled" not in text,
        "last_stride": int(stride[1]) if stride else 1,
        "heads": int(h[1]) if (h := re.search(r"(\d+) heads", text)) else 6,
    }
    if keys:
        width, base = keys["cls_token"][2], keys["conv1.weight"][0]
        options |= {
            "width": width,
            "base": base,
            "ratio": keys["conv_1.conv3.weight"][0] // base,
            "patch": keys["trans_patch_conv.weight"][2] * 4,
            "mlp_ratio": keys["trans_1.mlp.fc1.weight"][0] / width,
            "depth": max(int(m[1]) for k in keys if (m := re.match(r"conv_trans_(\d+)\.", k))),
        }
    return ConformerOptions(**options)


def fill(case: Any, network: nn.Module) -> None:
    """Give a network the case's weights, in evaluation mode; its state dict must be the official one."""
    if case.meta.get("keys"):
        assert case.fill.keys_of(network) == case.meta["keys"]
    case.fill.fill_(network)
    for suffix, factor in case.meta.get("after_fill", {}).get("multiply", []):
        touched = [value.mul_(factor) for name, value in network.state_dict().items() if name.endswith(suffix)]
        assert touched, suffix


def image(case: Any) -> Tensor:
    """The network input, (B, 3, H, W)."""
    made = case.meta["input"]["image"]
    assert made["made_by"] == "fill.image"
    return case.fill.image(made["name"], *made["shape"])


def tags(labels: list[list[int]], classes: int) -> Tensor:
    """Lists of class indices -> (B, C)."""
    return torch.stack([torch.zeros(classes).index_fill_(0, torch.tensor(row), 1.0) for row in labels])


def shares(case: Any) -> list[float]:
    """Percentages in the stated tolerance, as shares."""
    return [float(p) / 100 for p in re.findall(rf"{_NUMBER}%", case.meta["tolerance"])]


def check_conformer_forward(case: Any) -> None:
    """The ImageNet classifier: logits of both heads, and map, class token and patch tokens after the blocks."""
    network = Conformer(body(case))
    classes = case.meta["keys"]["conv_cls_head.weight"][0]
    network.conv_cls_head = nn.Linear(network.channels, classes)
    network.trans_cls_head = nn.Linear(network.width, classes)
    fill(case, network)
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: (inputs, output)})

    for name, module in network.named_children():
        module.register_forward_hook(note(name))
    with torch.inference_mode():
        features, token = network.forward_features(image(case))
        values = {
            "conv_logits": network.conv_cls_head(features.mean((2, 3))),
            "trans_logits": network.trans_cls_head(token),
            "stem": seen["conv_1"][0][0],
        }
    outputs = {"stage1": (seen["conv_1"][1][0], seen["trans_1"][1])}
    outputs |= {f"block{i}": seen[f"conv_trans_{i}"][1] for i in range(2, network.depth + 1)}
    for stage, (convolution, tokens) in outputs.items():
        values |= {f"{stage}_conv": convolution, f"{stage}_class": tokens, f"{stage}_tokens": tokens}
    for name in case.meta["outputs"]:
        case.check(name, values[name])


def _transcam(case: Any, classes: int) -> TransCam:
    network = TransCamOptions(backbone=body(case)).build(classes, {})
    fill(case, network)
    return network


def check_transcam_forward(case: Any) -> None:
    """Logits with their background, and all four maps; the background map is cut here and not compared."""
    network = _transcam(case, case.meta["keys"]["conv_cls_head.weight"][0] - 1)
    x = image(case)
    present = torch.ones(len(x), network.conv_cls_head.out_channels - 1)
    methods: dict[str, Method] = {"raw": "convcam"}
    with torch.inference_mode():
        for name, value in zip(("conv_logits", "trans_logits"), network.class_logits(x), strict=True):
            case.check(name, value)
        for name in case.meta["outputs"]:
            if name.startswith("cam_"):
                kind = name.removeprefix("cam_")
                network.method = methods.get(kind, kind)
                expected = case.stored(name)[:, 1:]
                case.compare(name, network.cam(x, present), expected, of_largest=case.tolerance)


def check_transcam_train_loss(case: Any) -> None:
    """Loss, norms of some gradients, and the gradient of the convolution head's bias: none for the background."""
    classes = case.meta["outputs"]["grad_conv_bias"]["shape"][0] - 1
    network = _transcam(case, classes)
    losses = network({"image": image(case), "tags": tags(case.meta["input"]["labels"], classes)}, 0.0)
    assert list(losses) == ["cls"]
    losses["cls"].backward()
    case.check("loss", losses["cls"])
    norms = [network.get_parameter(n).grad.norm() for n in case.meta["outputs"]["grad_norms"]["parameters"]]
    case.compare("grad_norms", torch.stack(norms), relative=case.tolerance)
    case.check("grad_conv_bias", network.conv_cls_head.bias.grad)
    assert network.conv_cls_head.bias.grad[0] == 0


def _psa() -> PSARecipe:
    """PSA's recipe as TransCAM's overrides it."""
    return override(PSA.recipes["published"], PUBLISHED.refine)


def check_transcam_cam_merge(case: Any) -> None:
    """Network inputs, merged maps, and the label images for PSA, of each image."""
    infer = PUBLISHED.cam.infer
    passes = re.search(r"passes: (.+)", case.meta["input"]["maps"])[1].split(", ")
    assert passes == [f"{int(side)}{mirror}" for side in infer.scales for mirror in ("", " flipped")]
    for number, described in enumerate(case.meta["input"]["images"]):
        picture, keys = case.input(described["image"]), np.array(described["present_classes"])
        for index, x in enumerate(cams.scaled_inputs(picture, infer, TransCam.normalisation)):
            for mirror in (0, 1):
                case.check(f"net_input{number}_{2 * index + mirror}", x[mirror])
        maps = [
            torch.from_numpy(np.stack([case.input(f"in_cam{number}_{2 * i + f}") for f in (0, 1)]))
            for i in range(len(infer.scales))
        ]  # (2, K, h, w) each
        merged = cams.normalise_maps(cams.merge_maps(maps, picture.shape[:2]), infer.normalise).numpy()
        case.check(f"cam{number}", merged)
        names = [name for name in case.meta["outputs"] if name.startswith(f"crf{number}_")]
        low, high = sorted((float(name.partition("_")[2]) for name in names), reverse=True)
        label = override(_psa(), {"label.threshold_low": low, "label.threshold_high": high}).label
        _, planes = PSA.make_label(picture, Cam.of_maps(keys, merged), label)
        for name, plane in zip((f"crf{number}_{low:.2f}", f"crf{number}_{high:.2f}"), planes, strict=True):
            case.compare(name, np.array([0, *(keys + 1)])[plane], share=shares(case)[0])


def check_transcam_aff_label(case: Any) -> None:
    """Merged label of the two label images, and the pairs that are trained on."""
    label = PSA.make_target(np.stack([case.input("in_la"), case.input("in_ha")]))
    case.compare("label", label)
    radius = int(re.search(r"radius (\d+)", case.meta["description"])[1])
    pairs = pair_labels(torch.from_numpy(label)[None], radius)
    for ours, theirs in (("bg", "bg_pos"), ("fg", "fg_pos"), ("neg", "neg")):
        case.compare(theirs, pairs[ours][0])


def check_transcam_random_walk(case: Any) -> None:
    """The recipe's walk over a given affinity matrix, and its CRF."""
    text = case.meta["description"]
    patterns = {"threshold": "background score ", "beta": "to the power ", "logt": "squared "}
    stated = {f"walk.{name}": float(re.search(pattern + _NUMBER, text)[1]) for name, pattern in patterns.items()}
    options = override(_psa(), {**stated, "walk.logt": int(stated["walk.logt"])}).walk
    affinity = torch.from_numpy(case.input("in_aff"))  # (N, N)
    source, target = torch.triu(affinity, 1).nonzero().T
    step = transition(source, target, affinity[source, target], len(affinity), options.beta)
    labels = _psa().label.crf_labels  # of the published CRF, absent ones too; the case does not state it
    network = PSA.recipes["sample"].network.build(labels - 1, {})
    network.make_transition = lambda image, options: step
    keys = np.array(case.meta["input"]["present_classes"])
    x = Picture.of_rgb(case.input("in_image"), network.normalisation)
    for name, walk, share in zip(
        ("label", "label_crf"), (override(options, {"crf.iterations": 0}), options), shares(case), strict=True
    ):
        scores = network.refine(x, Cam.of_maps(keys, case.input("in_cam")), walk)
        case.compare(name, np.array([0, *(keys + 1)])[scores.argmax(axis=0)], share=share)
