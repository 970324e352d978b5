"""Golden cases of CLIP and CLIP-ES (clipes.md): towers, texts, class maps, CAA.

Whatever differs between cases of a family is read from the case: sizes, names of inputs, texts, cuts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.config import override
from misc.crf.dense import CRFSettings, DenseCRF
from misc.image.cam import Cam
from misc.image.picture import Picture
from misc.infer.cams import infer_cam, scaled_inputs
from misc.propagate.caa import (
    doubly_stochastic,
    rectangle_mask,
    rectangles,
    refine_by_attention,
    scale_to_unit,
)
from misc.score.metrics import Confusion, ThresholdCurve
from net.backbone.clip import ClipOptions, TextTower
from net.backbone.clip_maps import FrozenClip
from net.backbone.clip_text import text_features, tokenise
from net.foreign.openai import read_clip
from net.refine.crf import CrfOptions, CrfRefiner
from net.seed.clipes import Clipes, ClipesOptions
from net.shared.background import BackgroundOptions
from step.lib.inference import pseudo_mask


def sampled(case: Any, name: str, value: Any) -> Any:
    """The stored part of a value: all of it, or the strided sample that its meaning names."""
    text = re.search(r"sampled \[(.+?)\]", case.meta["outputs"][name]["meaning"])
    if not text:
        return value
    return value[tuple(slice(*(int(v) if v.strip() else None for v in part.split(":"))) for part in text[1].split(","))]


def close(case: Any, name: str, value: Any, scale: float = 1.0) -> None:
    """Compare (the sample of) a value at the case's tolerance, ``scale`` times as wide."""
    tolerance = case.meta["tolerance"]
    case.compare(
        name, sampled(case, name, value).reshape(case.stored(name).shape),
        relative=scale * tolerance["rtol"], of_largest=scale * tolerance["atol_relative_to_max_abs"],
    )  # fmt: skip


def texts(case: Any, described: dict[str, Any]) -> Tensor:
    """Unit rows by the rule of the cases: (n, dim)."""
    name, dim = described["name"], described["dim"]
    common = torch.from_numpy(case.fill.stream(f"{name}/common").standard_normal(dim))
    each = torch.from_numpy(case.fill.stream(f"{name}/each").standard_normal((described["n"], dim)))
    return F.normalize((common / common.norm() + described["spread"] * each).float(), dim=1)


class Official(nn.Module):
    """Both towers under the names of the official file."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.clip = FrozenClip(options(sizes), 0)
        self.text = None
        if "text width" in sizes:
            shape = (sizes["text width"], sizes["text layers"], sizes["context length"], sizes["vocabulary"])
            self.text = TextTower(*shape, sizes["embed dim"])

    def official(self) -> dict[str, Tensor]:
        state = {k: v for k, v in self.clip.state_dict().items() if "features" not in k}
        return {**({} if self.text is None else self.text.state_dict()), **state}


def options(sizes: dict[str, Any]) -> ClipOptions:
    """Size of the image tower as a case states it."""
    patch, grid = sizes["patch"], sizes["visual position grid"]
    clip = ClipOptions(
        grid[0] * patch, patch, sizes["visual width"], sizes["visual layers"], sizes["embed dim"]
    )
    assert clip.grid == tuple(grid) and sizes["visual heads"] == clip.width // 64
    return clip


def fill(case: Any, state: dict[str, Tensor]) -> None:
    """Give tensors their golden values: by rule, then multiplied and set as the case says."""
    changes = case.meta["after_fill"]
    for name, value in state.items():
        new = case.fill.tensor_for(name, value)
        for suffix, factor in changes["multiply"]:
            new = new * factor if name.endswith(suffix) else new
        value.copy_(new.fill_(changes["set"][name]) if name in changes.get("set", {}) else new)


@torch.no_grad()
def network(case: Any) -> Official:
    """The case's CLIP with its weights; all names and shapes that the case lists and that its sizes have."""
    net = Official(case.meta["network"]).eval()
    state = net.official()
    # positional_embedding_new: the published code keeps the last resized positions as a parameter
    keys = {k: v for k, v in case.meta["keys"].items() if not k.endswith("_new") and (net.text or k in state)}
    assert keys == {name: list(state[name].shape) for name in keys}
    fill(case, state)
    return net


def image(case: Any, described: dict[str, Any]) -> Tensor:
    """An input made by ``fill.image``."""
    return case.fill.image(described["name"], *described["shape"])


def picture(case: Any, described: dict[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8 RGB by the rule of the cases."""
    values = case.fill.image(described["name"], 1, 3, *described["size"])[0].permute(1, 2, 0).numpy()
    return np.clip(np.round(55 * values + 120), 0, 255).astype(np.uint8)


def head_means(clip: FrozenClip, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor], tuple[int, int]]:
    """Tokens before and after the last block, the head means (T, T) of every block, and the grid."""
    seen: list[Tensor] = []
    tokens, grid = clip.visual.forward_features(images, lambda _, a: seen.append(a.mean_weights()[0]))
    last = clip.visual.transformer.resblocks[-1](tokens, lambda a: seen.append(a.mean_weights()[0]))
    return tokens, last, seen, grid


@torch.no_grad()
def check_clipes_vitb16_forward(case: Any) -> None:
    """The image tower at real size, and the official key list of both towers."""
    net = network(case)
    keys = case.meta["keys"]
    assert set(net.official()) == {k for k in keys if k.startswith("visual.") or k == "logit_scale"}
    assert len(TextTower.like({k: torch.zeros(v) for k, v in keys.items()}).state_dict()) == len(keys) - len(
        [k for k in keys if k.startswith("visual.")]
    )
    visual = net.clip.visual
    images = image(case, case.meta["input"]["image"])
    tokens, last, seen, grid = head_means(net.clip, images)
    close(case, "positions", visual.positions(grid))
    close(case, "tokens", tokens[0])
    close(case, "last_tokens", last[0])
    for name, matrix in (("first", seen[0]), ("eleventh", seen[-2]), ("last", seen[-1])):
        close(case, f"attention_{name}", matrix)
    close(case, "feature_class_token", visual(images)[0])
    close(case, "feature_mean", visual.ln_post(last[0, 1:]).mean(0) @ visual.proj)
    net.clip.set_texts(torch.zeros(0, visual.proj.shape[1]), texts(case, case.meta["input"]["texts"]))
    close(case, "probabilities", net.clip.text_logits(images).softmax(1)[0])


def check_clipes_gradcam(case: Any) -> None:
    """Logits, probabilities, weights, activation and maps of every image; a copy with other tags in its batch."""
    clip = network(case).clip
    for number, item in enumerate(case.meta["input"]["items"]):
        present, features = item["present"], texts(case, item["texts"])
        # an absent class between the present ones changes nothing
        absent = F.normalize(torch.randn(1, features.shape[1]), dim=1)
        clip.set_texts(torch.cat([features[:1], absent, features[1:present]]), features[present:])
        order = [0, *range(2, present + 1)]
        tags = torch.ones(1, present + 1)
        tags[0, 1] = 0
        images = image(case, item["image"])
        with torch.no_grad():
            tokens, grid = clip.visual.forward_features(images.repeat(2, 1, 1, 1))
        found = clip.class_gradients(tokens, torch.cat([tags, 1 - tags]))
        keep = [*order, *range(present + 1, present + 1 + item["background"])]
        close(case, f"logits_{number}", found.logits[0, keep])
        close(case, f"probabilities_{number}", found.probabilities[0, keep])
        close(case, f"weights_{number}", found.weights[0, order])
        step = found.patches.shape[2] // len(case.stored(f"activation_{number}"))
        case.compare(
            f"activation_{number}", found.patches[0].T.unflatten(1, grid)[::step],
            relative=case.meta["tolerance"]["rtol"], of_largest=case.meta["tolerance"]["atol_relative_to_max_abs"],
        )  # fmt: skip
        close(case, f"raw_{number}", found.raw_maps(grid)[0, order])
        close(case, f"cam_{number}", found.maps(grid)[0, order])
        assert not found.maps(grid)[0, 1].any() and not found.probabilities[0, 1]


@torch.no_grad()
def check_clipes_attention_average(case: Any) -> None:
    """Mean of the last eight blocks' attention between patches, and what is made of it."""
    clip = network(case).clip
    _, _, seen, _ = head_means(clip, image(case, case.meta["input"]["image"]))
    patches = torch.stack(seen)[:, 1:, 1:]
    close(case, "layers", patches)
    average = patches[-8:].mean(0)
    close(case, "average", average)
    close(case, "row_sums", average.sum(1))
    symmetric = doubly_stochastic(average)
    close(case, "symmetric", symmetric)
    close(case, "transition", symmetric @ symmetric)


def check_clipes_box_mask(case: Any) -> None:
    """Rectangles and their union, exactly."""
    maps = case.input("maps")
    for name, output in case.meta["outputs"].items():
        if not name.startswith("mask_"):
            continue
        cut = output["cut"]
        case.compare(name, np.stack([rectangle_mask(scores, cut) for scores in maps]))
        nothing = [(0, 0, 0, 0)]  # what the published code has where no part is above the cut
        found = sorted((n, *box) for n, scores in enumerate(maps) for box in rectangles(scores, cut) or nothing)
        case.compare(name.replace("mask", "boxes"), np.array(found))


def check_clipes_caa(case: Any) -> None:
    """Given attention and maps, refined, scaled and resized; by the dense product the same."""
    given = case.meta["input"]
    described, maps = given["attention"], torch.from_numpy(case.input("cams"))
    cells = described["N"]
    noise = case.fill.stream(described["name"]).standard_normal((cells, cells + 1)).astype(np.float32)
    attention = (described["sharpness"] * torch.from_numpy(noise)).softmax(-1)[:, 1:]
    matrix = doubly_stochastic(attention)
    dense = matrix @ matrix
    close(case, "transition", dense)
    masks = np.stack([rectangle_mask(m, cut) for m, cut in zip(maps.numpy(), given["cuts"], strict=True)])
    case.compare("masks", masks)
    pairs = zip(maps, given["cuts"], strict=True)
    refined = torch.cat([refine_by_attention(m[None], attention, cut) for m, cut in pairs])
    close(case, "refined", refined)
    close(case, "refined_without_mask", (dense @ maps.flatten(1).T).T.reshape(maps.shape))
    final = F.interpolate(scale_to_unit(refined)[None], size=given["image size"], mode="bilinear", align_corners=False)
    close(case, "final", final[0])


def check_clipes_prompts(case: Any) -> None:
    """Token ids of the published prompts, exactly."""
    pytest.importorskip("open_clip", reason="the tokeniser is open_clip's: pip install -r requirements-clip.txt")
    context = int(re.search(r"context (\d+)", case.meta["tokeniser"])[1])
    for kind, names in case.meta["input"]["names"].items():
        ids = tokenise([case.meta["template"].format(name) for name in names], context)
        width = case.stored(kind).shape[1]
        case.compare(kind, ids[:, :width])
        assert not ids[:, width:].any()


@torch.no_grad()
def check_clipes_text_features(case: Any) -> None:
    """Tokens, raw and unit features, and of two templates."""
    pytest.importorskip("open_clip", reason="the tokeniser is open_clip's: pip install -r requirements-clip.txt")
    net, given = network(case), case.meta["input"]
    tower = TextTower.like(net.official())
    ids = tokenise([given["template"].format(name) for name in given["names"]], len(tower.positional_embedding))
    case.compare("tokens", ids[:, : case.stored("tokens").shape[1]])
    close(case, "raw", tower(ids))
    close(case, "features", text_features(tower, given["names"], (given["template"],)))
    first = given["names"][: len(case.stored("features_two_templates"))]
    close(case, "features_two_templates", text_features(tower, first, given["templates_of_two"]))


def check_clipes_openai_file(case: Any) -> None:
    """What is read of the official container."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ViT-B-16.pt"
        path.write_bytes(case.input("archive").tobytes())
        state = read_clip(str(path))
    assert sorted(state) == case.meta["names"] and all(v.dtype == torch.float32 for v in state.values())
    assert {k: list(v.shape) for k, v in state.items()} == case.meta["keys"]
    sums = [state[name].double().sum() for name in case.meta["names"]]
    case.compare("sums", torch.stack(sums), relative=1e-5)


def check_clipes_cam(case: Any) -> None:
    """Picture and objects to maps by the published recipe; classes are named in the file's order."""
    given, names = case.meta["input"], case.meta["class_names"]
    net = Clipes(ClipesOptions(clip=options(case.meta["network"]), cut=case.meta["cut"]), len(names)).eval()
    state = {k.removeprefix("encoder."): v for k, v in net.state_dict().items() if "_features" not in k}
    assert {k: list(v.shape) for k, v in state.items()} == {
        k: v for k, v in case.meta["keys"].items() if not k.endswith("_new")
    }
    fill(case, state)
    features = texts(case, given["texts"])
    net.encoder.set_texts(features[: len(names)], features[len(names) :])
    infer = Clipes.recipes["published"].cam.infer
    for number, item in enumerate(given["items"]):
        image_ = picture(case, item["picture"])
        keys = list(dict.fromkeys(names.index(name) for name in item["objects"]))
        case.compare(f"keys_{number}", keys)
        (values,) = scaled_inputs(image_, infer, net.normalisation)
        assert list(values.shape[1:]) == case.meta["outputs"][f"network_input_{number}"]["full_shape"]
        case.compare(f"network_input_{number}", sampled(case, f"network_input_{number}", values[0]), absolute=1e-5)
        present = np.isin(np.arange(len(names)), keys).astype(np.float32)
        maps = infer_cam(net.cam, image_, present, infer, net.normalisation).maps
        order = np.argsort(np.argsort(keys))  # the file has the classes as they are named first
        case.compare(f"maps_{number}", maps[order], absolute=case.meta["tolerance"]["atol"])


def check_clipes_confidence_label(case: Any) -> None:
    """Scores, CRF posterior and mask of the refiner crf; the published picture that wraps around is made here only."""
    settings, tolerance = case.meta["crf"], case.meta["tolerance"]
    crf = CRFSettings(
        settings["iterations"], settings["gaussian sxy"], settings["gaussian weight"], settings["bilateral sxy"],
        settings["bilateral srgb"], settings["bilateral weight"],
    )  # fmt: skip
    recipe = CrfRefiner.recipes["published"]
    made = override(recipe, Clipes.recipes["published"].refine)
    case.expect_published(
        [crf, case.meta["confidence"], case.meta["background power"]],
        [made.walk.crf, made.ignore_below, made.walk.alpha],
    )
    keys, maps = case.meta["input"]["keys"], case.input("maps").astype(np.float32)
    order = np.argsort(keys)
    back = np.r_[0, 1 + np.argsort(order)]
    options_ = CrfOptions(alpha=case.meta["background power"], crf=crf)
    cam = Cam.of_maps(np.sort(keys), maps[order])
    background = BackgroundOptions(alpha=case.meta["background power"])
    scores = background.stack(cam.maps)[back].astype(np.float16)
    case.compare("scores", scores)
    rgb = picture(case, case.meta["input"]["picture"])
    wrapped = (rgb[..., ::-1] - np.float32((104.008, 116.669, 122.675))).astype(np.int64).astype(np.uint8)
    case.compare("wrapped_picture", wrapped)
    share = 1 - float(re.search(r"at most ([\d.]+) %", tolerance["labels"])[1]) / 100
    for kind, image_ in (("published", wrapped), ("plain", rgb)):
        seen = Picture.of_rgb(image_, CrfRefiner.normalisation)
        # of float16 scores, as published: without that rounding 0.04 % of the entries are up to 0.023 away
        posterior = DenseCRF(image_, crf)(scores.astype(np.float32))
        case.compare(f"posterior_{kind}", posterior[:, ::2, ::2], absolute=tolerance["posterior"]["atol"])
        found = CrfRefiner().refine(seen, cam, options_)[back]
        values = np.array([0, *(key + 1 for key in keys)])
        case.compare(f"argmax_{kind}", values[found.argmax(0)], share=share)
        labels = pseudo_mask(found, np.array(keys), case.meta["confidence"])
        case.compare(f"mask_{kind}", labels, share=share)


def check_clipes_evaluate(case: Any) -> None:
    """mIoU of float16 maps for powers of the background score, and for constants."""
    given, classes = case.meta["input"], case.meta["input"]["classes"]
    stacks = [case.input(f"maps_{n}") for n in range(len(given["keys"]))]
    truths = [case.input(f"truth_{n}") for n in range(len(given["keys"]))]

    def miou(background: Callable[[np.ndarray], np.ndarray]) -> float:
        matrix = Confusion(classes)
        for keys, maps, truth in zip(given["keys"], stacks, truths, strict=True):
            scores = np.concatenate([background(maps.max(0))[None], maps])
            matrix.add(truth, np.array([0, *(key + 1 for key in keys)])[scores.argmax(0)])
        return matrix.miou("ground-truth")

    atol = case.meta["tolerance"]["atol"]
    powers = [miou(lambda top, a=power: (1 - top) ** a) for power in given["powers"]]
    case.compare("miou_powers", powers, absolute=atol)
    curve = ThresholdCurve(classes, given["constants"])
    for keys, maps, truth in zip(given["keys"], stacks, truths, strict=True):
        curve.add(truth, np.array(keys), maps)
    constants = curve.mious("ground-truth")
    case.compare("miou_constants", constants, absolute=atol)
