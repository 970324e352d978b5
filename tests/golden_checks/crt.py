"""Golden cases of CRT: tiles, both branches, losses, merging, and its form on CUB (crt.md, wsol.md section 3)."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_checks.mctformer import vit_options
from golden_checks.wsol import fill, made, one_hot, part, sampled
from torch import nn

from misc.config import override
from misc.infer import cams
from net.backbone.resnet import ResNetOptions
from net.backbone.transformer import AttentionSums
from net.seed import crt
from net.seed.crt import Crt, CrtOptions

PUBLISHED = Crt.recipes["published"].cam
CUB = Crt.recipes["published_cub"].cam
SMALL_CNN = {"cnn.width": 0.125, "cnn.depth": (1, 1, 1, 1)}
"""Where only the other branch counts."""


def transformer_options(case: Any, **changes: Any) -> CrtOptions:
    """The published options with the transformer that the case's keys and texts describe."""
    size = vit_options(case.meta["keys"], case.meta["constructor"])
    rounds = re.search(r"(one|two|three|four) rounds?", case.meta["description"])
    if rounds:
        changes["rounds"] = ("one", "two", "three", "four").index(rounds[1]) + 1
    return replace(PUBLISHED.network, transformer=replace(size, drop_path=0.0), **changes)


def cnn_options(keys: dict[str, list[int]], options: ResNetOptions) -> ResNetOptions:
    """The published options with the size that a CNN's keys describe."""
    blocks = [re.match(r"resnet50\.layer(\d)\.(\d+)\.", name) for name in keys]
    depth = tuple(1 + max(int(b[2]) for b in blocks if b and int(b[1]) == stage) for stage in (1, 2, 3, 4))
    return replace(options, depth=depth, width=keys["resnet50.conv1.weight"][0] / 64)


def fill_cnn(case: Any, cnn: nn.Module, factor: float, keys: dict[str, list[int]]) -> None:
    """The case's weights, read back from a file in the official form, in which most names are aliases."""
    own = {k: v for k, v in keys.items() if k.startswith(("resnet50.", "classifier."))}
    assert case.fill.keys_of(cnn) == own
    filled = {}
    for name, value in cnn.state_dict().items():
        filled[name] = case.fill.tensor_for(name, value)
        if name.startswith("resnet50.") and value.ndim == 4:
            filled[name] = filled[name] * factor
    official = {name: filled[case.meta.get("aliases", {}).get(name, name)] for name in keys}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "res_cam.pth"
        torch.save(official, path)
        crt.load_resnet(cnn, str(path), heads=["classifier"])
    for name, value in cnn.state_dict().items():
        torch.testing.assert_close(value, filled[name], rtol=0, atol=0)
    cnn.eval()


def factor(case: Any) -> float:
    """What the CNN's convolutions are multiplied by."""
    patterns = (r"under 'resnet50\.' times ([\d.]+\d)", r"starts with 'resnet50\.' is multiplied by ([\d.]+\d)")
    return float(next(m[1] for p in patterns if (m := re.search(p, case.meta["fill"]))))


def check_crt_tiles(case: Any) -> None:
    """Padded sides, cutting, merging."""
    given, tile = case.meta["input"], int(re.search(r"3, (\d+), \d+\)", case.meta["outputs"]["tiles"]["meaning"])[1])
    case.expect_published(tile, PUBLISHED.network.transformer.image_size)
    for side, padded in given["padding_table (side -> padded side)"]:
        assert crt.padded_side(side, tile) == padded
    images = made(case, given["image"])
    height, width = given["padded_size"]
    padded = nn.functional.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
    tiles, grid = crt.cut_tiles(padded, tile)
    assert grid == (given["tiles_vertical"], given["tiles_horizontal"])
    # float32 rounding: the filled image itself depends on how many threads made it
    case.compare("tiles", part(case, "tiles", tiles), absolute=1e-6, relative=1e-6)
    merged = crt.merge_tiles(torch.from_numpy(case.input("tile_maps")), grid)
    case.compare("merged", merged, absolute=1e-6, relative=1e-6)


def check_crt_deit_forward(case: Any) -> None:
    """The training forward, and the maps of an image with its mirror, down to the tokens and the attention of tiles."""
    classes = case.meta["keys"]["head.bias"][0]
    network = crt.TransformerBranch(transformer_options(case), classes)
    fill(case, network, case.meta["keys"])
    seen: list[torch.Tensor] = []
    network.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        maps = network.train()(made(case, case.meta["input"]["train_image"]))
        network.eval()
        sampled(case, "train_cam", maps)
        sampled(case, "train_logits", maps.mean((2, 3)))
        for number in range(sum(name.startswith("cam_image") for name in case.meta["input"])):
            image = made(case, case.meta["input"][f"cam_image{number}"])
            pair = network.forward_any_size(torch.cat([image, image.flip(-1)]), coupled=True).relu()
            sampled(case, f"cam{number}", pair[0] + pair[1].flip(-1))
        sides = [crt.padded_side(side, network.tile) for side in image.shape[-2:]]
        pair = torch.cat([image, image.flip(-1)])
        pair = nn.functional.pad(pair, (0, sides[1] - image.shape[3], 0, sides[0] - image.shape[2]))
        tiles, _ = crt.cut_tiles(pair, network.tile)
        sums = AttentionSums(1, [1.0] * len(network.blocks), [0.0] * len(network.blocks))
        tokens = network.norm(network.forward_features(tiles, sums)[0])
    sampled(case, "tile_cls", tokens[:, 0])
    sampled(case, "tile_patch", tokens[:, 1:])
    sampled(case, "tile_attention", sums.to_patches[:, 0])
    torch.testing.assert_close(seen[-2], tokens[:, 1:])  # the maps came from the very tokens that were compared


def check_crt_cnn_forward(case: Any) -> None:
    """Raw maps, scores, and the rectified maps of a pair, of weights in the official form."""
    keys = case.meta["keys"]
    classes = keys["classifier.weight"][0]
    cnn = crt.CnnBranch(cnn_options(keys, PUBLISHED.network.cnn), classes)
    fill_cnn(case, cnn, factor(case), keys)
    image = made(case, case.meta["input"]["image"])
    with torch.inference_mode():
        maps = cnn.train()(image)
        sampled(case, "train_cam", maps)
        sampled(case, "train_logits", maps.mean((2, 3)))
        pair = cnn(torch.stack([image[1], image[1].flip(-1)])).relu()
        sampled(case, "cam", pair[0] + pair[1].flip(-1))


def check_crt_losses(case: Any) -> None:
    """Terms and gradients of given maps, in the first epoch and later."""
    given = case.meta["input"]
    options = override(PUBLISHED.network, {"agreement": float(given["cam_lambda"])})
    case.expect_published(options.agreement, PUBLISHED.network.agreement)
    case.expect_published(given["upsampled_size"], PUBLISHED.augment.crop)
    leaves = [torch.from_numpy(case.input(name)).requires_grad_() for name in ("cam_cnn", "cam_transformer")]
    tags = torch.tensor(given["labels"], dtype=torch.float32)
    assert options.agreement_size == "image" and options.agreement_from == 1 / PUBLISHED.fit.epochs
    network = _with_maps(options, leaves)
    batch = {"image": torch.zeros(len(tags), 3, *[given["upsampled_size"]] * 2), "tags": tags}
    first, later = (network(batch, share * options.agreement_from) for share in (0.99, 1))
    assert list(first) == ["cnn", "transformer"]
    sum(later.values()).backward()
    terms = [later["cnn"], later["transformer"], later["agreement"] / options.agreement]
    sampled(case, "terms", torch.stack([*terms, sum(first.values()), sum(later.values())]))
    for name, leaf in zip(("grad_cam_cnn", "grad_cam_transformer"), leaves, strict=True):
        sampled(case, name, leaf.grad)


class _Given(nn.Module):
    """Stands for a branch: gives back maps that are there."""

    def __init__(self, maps: torch.Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.maps


def _with_maps(options: CrtOptions, maps: list[torch.Tensor]) -> Crt:
    """CRT whose branches give these maps."""
    network = override(options, {**SMALL_CNN, "transformer.depth": 1}).build(maps[0].shape[1], {})
    network.cnn, network.transformer = _Given(maps[0]), _Given(maps[1])
    return network


def check_crt_cam_merge(case: Any) -> None:
    """Merging of the summed pairs of all scales, at a quarter of the size and at the size rounded up and cut."""
    given = case.meta["input"]
    infer = override(PUBLISHED.infer, {"scales": tuple(given["scales"])})
    case.expect_published(infer, PUBLISHED.infer)
    stored = [int(v) for v in re.search(r"\[(.+)\]", given["stored_channels"])[1].split(",")]
    keys = sorted(given["label_indices"])
    case.compare("keys", keys)
    at = [stored.index(key) for key in keys]
    passes = [torch.from_numpy(case.input(f"cam_scale{i}"))[at] for i in range(len(infer.scales))]  # (K, h, w) each
    height, width = given["image_size"]
    sums = iter(passes)

    def cam(images: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        """The stored sum as the image's map, nothing as the mirrored one's."""
        found = torch.zeros(2, tags.shape[1], *(total := next(sums)).shape[1:])
        found[0, keys] = total
        return found

    tags = np.zeros(max(stored) + 1, np.float32)
    tags[keys] = 1
    found = cams.infer_cam(cam, np.zeros((height, width, 3), np.uint8), tags, infer, Crt.normalisation)
    sampled(case, "high_res", found.maps)
    sampled(case, "cam", found.coarse)


def check_crt_make_cam_end_to_end(case: Any) -> None:
    """Network inputs and merged maps of a whole image, of the transformer alone."""
    given, classes = case.meta["input"], case.meta["keys"]["head.bias"][0]
    network = override(transformer_options(case), SMALL_CNN).build(classes, {}).eval()
    fill(case, network.transformer, case.meta["keys"])
    infer = override(PUBLISHED.infer, {"scales": tuple(given["scales"])})
    image, keys = case.input("image"), given["label_indices"]
    inputs = dict(zip(infer.scales, cams.scaled_inputs(image, infer, Crt.normalisation), strict=True))
    for name in case.meta["outputs"]:
        if found := re.fullmatch(r"input_x([\d.]+)", name):
            sampled(case, name, inputs[float(found[1])])
    tags = one_hot(keys, classes).amax(0).numpy()
    with torch.inference_mode():
        found = cams.infer_cam(network.cam, image, tags, infer, Crt.normalisation)
    sampled(case, "high_res", found.maps)
    sampled(case, "cam", found.coarse)


def check_crt_wsol_forward(case: Any) -> None:
    """CRT on CUB: both branches, the coupled maps, the loss with its gradients, and the epochs of the L1 term."""
    classes, used = case.meta["keys"]["head.bias"][0], case.stored("l1_term_used")
    weight = re.search(r"weight ([\d.]+)", case.meta["outputs"]["l1_term_used"]["meaning"])[1]
    case.expect_published(len(used), CUB.fit.epochs)
    options = replace(
        CUB.network, cnn=cnn_options(case.meta["keys_cnn"], CUB.network.cnn),
        transformer=transformer_options(case).transformer, agreement=float(weight), agreement_from=4 / len(used),
        agreement_period=10 / len(used),
    )  # fmt: skip
    case.expect_published(override(options, {"transformer.drop_path": 0.1}).transformer, CUB.network.transformer)
    case.expect_published((options.agreement_from, options.agreement_period),
                          (CUB.network.agreement_from, CUB.network.agreement_period))  # fmt: skip
    network = options.build(classes, {})
    fill(case, network.transformer, case.meta["keys"])
    fill_cnn(case, network.cnn, factor(case), case.meta["keys_cnn"])
    network.train()
    x = made(case, case.meta["input"]["image"])
    tags = one_hot(case.meta["input"]["targets"], classes)
    begins = np.arange(len(used)) / len(used)
    for share in (0, 0.5, 0.999):  # of each epoch
        case.compare("l1_term_used", [options.agrees(p + share / len(used)) for p in begins])
    terms = network({"image": x, "tags": tags}, begins[used.argmax()])
    sampled(case, "terms", torch.stack([terms["transformer"], terms["cnn"], terms["agreement"]]))
    sum(terms.values()).backward()
    sampled(case, "grad_head", network.transformer.head.weight.grad)
    sampled(case, "grad_classifier", network.cnn.classifier.weight.grad)
    network.eval()
    with torch.inference_mode():
        sampled(case, "logits_transformer", network.classify(x, classes))
        sampled(case, "maps_transformer", network.transformer(x))
        sampled(case, "maps_cnn", network.cnn(x))
        sampled(case, "logits_cnn", network.cnn(x).mean((2, 3)))
        sampled(case, "eval_cams", network.cam(x, tags))
