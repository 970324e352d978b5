"""Golden cases of MCTformer V1, V2 and MCTformer+ (mctformer.md).

Sizes come from a case's keys, whatever else differs between cases of a family from its texts.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_case import Case
from torch import Tensor

from misc.config import override
from misc.image.cam import Cam
from misc.infer import cams
from net.backbone.transformer import AttentionSums
from net.backbone.vit import ViTOptions
from net.losses import multilabel_soft_margin
from net.refine.psa import PSA
from net.seed import mctformer
from net.seed.mctformer import MCTformer, MCTformerOptions


def vit_options(keys: dict[str, list[int]], text: str) -> ViTOptions:
    """The transformer that has these keys; the heads, which no shape tells, are those of the text."""
    tokens, width = keys["cls_token"][1:]
    patch = keys["patch_embed.proj.weight"][2]
    patches = keys["pos_embed_pat"][1] if "pos_embed_pat" in keys else keys["pos_embed"][1] - tokens
    heads = re.search(r"(\d+) heads", text)
    return ViTOptions(
        image_size=round(patches**0.5) * patch,
        patch=patch,
        width=width,
        depth=1 + max(int(name.split(".")[1]) for name in keys if name.startswith("blocks.")),
        heads=int(heads[1]) if heads else width // 64,
        mlp_ratio=keys["blocks.0.mlp.fc1.weight"][0] / width,
    )


def _fill(case: Case, network: torch.nn.Module) -> None:
    """The case's weights; the state dict must be the official one."""
    assert case.fill.keys_of(network) == case.meta["keys"]
    case.fill.fill_(network)
    with torch.no_grad():
        for suffix, factor in case.meta["after_fill"]["multiply"]:
            for name, value in network.state_dict().items():
                if name.endswith(suffix):
                    value.mul_(factor)


def _network(case: Case, version: str, **changes: Any) -> MCTformer:
    """The case's network, in evaluation mode."""
    options = MCTformerOptions(version, vit_options(case.meta["keys"], case.meta["constructor"]), **changes)
    network = options.build(case.meta["keys"]["cls_token"][1], {})
    _fill(case, network)
    return network.eval()


def _image(case: Case) -> Tensor:
    made = case.meta["input"]["image"]
    return case.fill.image(made["name"], *made["shape"])


def _sampled(case: Case, name: str, value: Tensor, axes: tuple[str, ...]) -> Tensor:
    """What a text such as "layers 0, 5, 11; classes ::3" or "every third row" keeps of a value with these axes."""
    text = case.meta["outputs"][name].get("sampled", "").partition("(")[0]
    for axis, label in enumerate(axes):
        if match := re.search(rf"{label}s? (\d*::\d+|[\d, ]+)", text):
            start, _, step = match[1].partition("::")
            kept = range(int(start or 0), value.shape[axis], int(step)) if step else map(int, match[1].split(","))
        elif match := re.search(rf"every (second|third|fourth) {label}", text):
            kept = range(0, value.shape[axis], {"second": 2, "third": 3, "fourth": 4}[match[1]])
        else:
            continue
        value = value.index_select(axis, torch.tensor(list(kept)))
    return value


@torch.no_grad()
def _check_forward(case: Case, version: str) -> None:
    """Whatever outputs the case has, by their names, and the map that is inferred."""
    network = _network(case, version, map_layers=case.meta["input"]["n_layers"])
    depth, shown = len(network.blocks), _image(case)
    seen: dict[int, Tensor] = {}
    sums = AttentionSums(
        network.tokens, [float(layer >= depth - network.map_layers) for layer in range(depth)], [1.0] * depth
    )

    def visit(layer: int, attention: Any) -> None:
        sums(layer, attention)
        seen[layer] = attention.mean_weights()[:, network.tokens :, network.tokens :]

    x, grid = network.forward_features(shown, visit)
    scores = network.logits_by_loss(x, grid)
    attention = sums.to_patches / (network.map_layers if version == "plus" else 1)
    maps = attention.unflatten(2, grid)
    cam = network.cam(shown, torch.ones(len(shown), network.tokens))
    values = {
        "logits": scores["cls"],
        "class_logits": scores["cls"],
        "patch_logits": scores.get("patch"),
        "mean_logits": sum(scores.values()) / len(scores),
        "class_to_patch": attention,
        "cams_attention": maps,
        "cams_fused": network.fuse_maps(maps, x, grid),
        "patch_affinity_sum": sums.affinity,
        **{f"patch_affinity_layer{layer}": value for layer, value in seen.items()},
    }
    if version != "v1":
        values["cams_patch"] = network.patch_maps(x, grid).relu()
    if version == "plus":
        values["class_tokens"] = torch.stack(network.class_tokens(shown)[0])
    axes = {"class_tokens": ("layer", "image", "classe", "channel"), "patch_affinity_layer": ("image", "row")}
    for name in case.meta["outputs"]:
        labels = next((labels for start, labels in axes.items() if name.startswith(start)), ())
        case.check(name, _sampled(case, name, values[name], labels))
    expected = (values["cams_fused"].flatten(2) @ sums.affinity.transpose(1, 2)).view_as(cam)
    torch.testing.assert_close(cam, expected, rtol=1e-4, atol=1e-5)


def check_mctformer_v1_forward(case: Case) -> None:
    """Scores, class-to-patch attention and patch affinities."""
    _check_forward(case, "v1")


def check_mctformer_v2_forward(case: Case) -> None:
    """Both scores, all maps and patch affinities."""
    _check_forward(case, "v2")


def check_mctformer_plus_forward(case: Case) -> None:
    """Both scores, class tokens of the layers, maps and patch affinities."""
    _check_forward(case, "plus")


def _classifier(case: Case) -> dict[str, Tensor]:
    """DeiT's tensors; a case that refers to another one has its shapes."""
    listed = case.meta["input"]["checkpoint"]
    if isinstance(listed, str):
        listed = case.other(re.match(r"as in (\w+)", listed)[1]).meta["input"]["checkpoint"]
        listed.pop("made_by", None)
    return {name: case.fill.tensor_for(f"deit.{name}", torch.empty(shape)) for name, shape in listed.items()}


def _started(case: Case, version: str, classes: int, image_size: int | None) -> MCTformer:
    """A network after it started from DeiT's file; only the case's exceptions may have kept their values."""
    state = _classifier(case)
    backbone = vit_options({name: list(value.shape) for name, value in state.items()}, case.meta["constructor"])
    backbone = override(backbone, {"image_size": image_size or backbone.image_size})
    network = MCTformerOptions(version, backbone).build(classes, {})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "deit.pth"
        torch.save({"model": state}, file)
        network.load_weights(str(file))
    kept = [name for name, value in network.state_dict().items() if torch.equal(value, before[name])]
    exceptions = case.meta["keys_left_at_their_initial_value"]
    assert kept == (exceptions[version.upper()] if isinstance(exceptions, dict) else exceptions)
    return network


def check_mctformer_deit_load(case: Case) -> None:
    """Class tokens and positions of every version and number of classes."""
    for version, classes in re.findall(r"MCTformer-(V\d) with (\d+) classes", case.meta["constructor"]):
        network = _started(case, version.lower(), int(classes), None)
        for name in ("pos_embed", "cls_token"):
            case.check(f"{name}_{version}", network.get_parameter(name))


def check_mctformer_plus_deit_load(case: Case) -> None:
    """Class tokens and both position embeddings."""
    classes, image_size = re.search(r"(\d+) classes, input size (\d+)", case.meta["constructor"]).groups()
    network = _started(case, "plus", int(classes), int(image_size))
    for name in case.meta["outputs"]:
        value = network.get_parameter(name)
        if shape := re.match(r"as (\d+) x (\d+) x (\d+),", case.meta["outputs"][name]["sampled"]):
            value = value.reshape([int(side) for side in shape.groups()])
        case.check(name, value)


def check_mctformer_losses(case: Case) -> None:
    """Loss terms on given outputs, and gradients of their sums."""
    tags = torch.from_numpy(case.input("in_labels"))
    logits, patch = (torch.from_numpy(case.input(f"in_{n}_logits")).requires_grad_() for n in ("class", "patch"))
    name, shape, shift = re.match(
        r"fill\.stream\('(.+?)'\)\.standard_normal\(\((.+?)\)\) \+ ([\d.]+)", case.meta["input"]["class_tokens"]
    ).groups()
    drawn = case.fill.stream(name).standard_normal([int(side) for side in shape.split(",")]) + float(shift)
    tokens = torch.from_numpy(drawn).float().requires_grad_()  # (L, B, C, D)
    cls, pat = (multilabel_soft_margin(z, tags) for z in (logits, patch))
    contrast = mctformer.contrast_loss(list(tokens), tags)
    (gradient,) = torch.autograd.grad(cls + pat, logits, retain_graph=True)
    (cls + pat + contrast).backward()
    case.check("cls_loss", cls)
    case.check("pat_loss", pat)
    case.check("total_v2", cls + pat)
    case.check("cct_loss", contrast)
    case.check("total_plus", cls + pat + contrast)
    case.check("grad_class_logits", gradient)
    case.check("grad_tokens_plus", tokens.grad)


def check_mctformer_plus_cam_merge(case: Case) -> None:
    """As those of the other versions."""
    check_mctformer_cam_merge(case)


def check_mctformer_cam_merge(case: Case) -> None:
    """Whatever the case has of: maps of every pass before they are spread, affinities, merged maps, and the posteriors
    that PSA is trained on."""
    layers = int(re.search(r"\d+", case.meta["input"]["class_to_patch_layers"])[0])
    version = re.search(r"MCTformer(?:-(V\d)|\+)", case.meta["constructor"])[1]
    network = _network(case, version.lower() if version else "plus", map_layers=layers)
    recipe = network.recipes["published"]
    infer = override(recipe.cam.infer, {"scales": tuple(case.meta["input"]["scales"])})
    label = override(PSA.recipes["published"], recipe.refine).label
    depth, (map_tolerance, *crf_tolerance) = len(network.blocks), _numbers(case, r"([\d.]+e-\d+) absolute")
    weights = [(layer >= depth - layers) / (layers if network.mean_layers else 1) for layer in range(depth)]
    for number, entry in enumerate(case.meta["input"]["images"]):
        image, keys = case.input(entry["image"]), entry["present_classes"]
        tags = np.zeros(network.tokens, np.float32)
        tags[keys] = 1
        with torch.inference_mode():
            for scale, pair in enumerate(cams.scaled_inputs(image, infer, network.normalisation)):
                sums = AttentionSums(network.tokens, weights, [1.0] * depth)
                x, grid = network.forward_features(pair, sums)
                fused = network.fuse_maps(sums.to_patches.unflatten(2, grid), x, grid)
                for flipped in range(len(pair)):
                    name = f"{number}_{2 * scale + flipped}"
                    _close(case, f"in_cams{name}", fused[flipped, keys], map_tolerance)
                    _close(case, f"in_aff{name}", sums.affinity[flipped], map_tolerance)
            maps = cams.infer_cam(network.cam, image, tags, infer, network.normalisation).maps
        _close(case, f"cam{number}", maps, map_tolerance)
        names = [name for name in case.names if name.startswith(f"crf{number}_alpha")]
        for name in names:
            alpha = name.partition("alpha")[2]
            chosen = override(label, {"alpha_low": float(alpha), "alpha_high": float(alpha)})
            _, planes = PSA.make_label(image, Cam.of_maps(np.array(keys), maps), chosen)
            posterior = planes[: len(keys) + 1].astype(np.float32)
            (share,) = (percent / 100 for percent in _numbers(case, r"([\d.]+)% of the pixels"))
            case.compare(name, case.sample(name, posterior), absolute=crf_tolerance[0], share=share, joint=True)
            case.compare(f"crflabel{number}_alpha{alpha}", posterior.argmax(0), share=share)


def _numbers(case: Case, pattern: str) -> list[float]:
    """What the stated tolerance says."""
    return [float(number) for number in re.findall(pattern, case.meta["tolerance"])]


def _close(case: Case, name: str, value: Any, tolerance: float) -> None:
    """Compare with an array of the case, where it has it, absolutely."""
    if name in case.names:
        case.compare(name, value, absolute=tolerance)
