"""net/shared/aream.py and step/lib/entropy.py: what the golden cases don't cover."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from plain import resize
from running import make_set, start
from torch import Tensor, nn

import run_sample
from misc.config import override
from misc.files import store
from misc.files.images import read_image
from misc.image.pixels import box_mask, normalise_image, resize_image, to_tensor
from misc.propagate.par import PixelAdaptive
from net.backbone.conformer import ConformerOptions
from net.backbone.transformer import QueryKey
from net.backbone.vit import ViTOptions
from net.refine.psa import PSA
from net.seed.aream_conformer import AreamConformer, AreamConformerOptions
from net.seed.aream_mctformer import AreamMCTformer, AreamMCTformerOptions
from net.segment.deeplabv1_largefov import LargeFOV
from net.shared import aream
from net.shared.aream import (
    Aream,
    map_entropy,
    merge_score_labels,
    patch_logits,
    patch_pair_labels,
    patch_pair_losses,
    pseudo_labels,
    scale_entropy,
)
from step.lib import entropy, parsing
from step.lib.config import open_job
from step.lib.networks import load_cam_network

CLASSES = 3
VIT = ViTOptions(image_size=32, patch=8, width=24, depth=4, heads=3, drop_path=0.0)
CONFORMER = ConformerOptions(
    patch=8, base=8, ratio=2, width=24, depth=3, heads=2, drop_path=0.0, double_class_token=False
)
KINDS = ("mctformer", "conformer")


def options(kind: str, **changes: Any) -> aream.AreamOptions:
    if kind == "mctformer":
        return override(AreamMCTformerOptions(split=2, backbone=VIT), changes)
    return override(AreamConformerOptions(split=2, scales=(0.5, 1.0, 1.5), backbone=CONFORMER), changes)


def network(kind: str, **changes: Any) -> Aream:
    """With weights that are large enough for attention and maps to be far from flat."""
    torch.manual_seed(0)
    model = options(kind, **changes).build(CLASSES, {})
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("qkv.weight"):
                value.mul_(15)
            elif "head" in name or name == "cls_token":
                value.copy_(torch.randn_like(value))
    return model


def batch(size: tuple[int, int] = (32, 32)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "image": F.interpolate(torch.randn(2, 3, 5, 6), size=size, mode="bilinear"),
        "tags": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
        "box": torch.tensor([[0, size[0], 0, size[1]], [4, size[0], 0, size[1] - 9]]),
    }


# ------------------------------------------------------------------------------------------------ labels and pairs


def plain_label(colours: Tensor, cams: Tensor, keys: list[int], background: float) -> Tensor:
    """aream.md section 6 for one image: (3, H, W), (C, H, W) -> (H, W)."""
    size = cams.shape[-2:]
    half = (size[0] // 2, size[1] // 2)
    planes = resize(torch.cat([torch.full((1, *size), background), cams[keys]])[None], half).softmax(1)
    refined = resize(PixelAdaptive(resize(colours[None], half))(planes), size)[0]
    return torch.tensor([0, *(k + 1 for k in keys)])[refined.argmax(0)]


def test_labels_of_a_batch_are_those_of_its_images() -> None:
    """Whatever the number of classes of the others; without a tag all is background."""
    torch.manual_seed(2)
    listed = [[0, 2, 4], [3], [], [1, 4]]
    colours, cams = torch.rand(4, 3, 21, 30), resize(torch.rand(4, 5, 4, 5), (21, 30))
    tags = torch.stack([torch.zeros(5).index_fill_(0, torch.tensor(k, dtype=torch.int64), 1.0) for k in listed])
    found = pseudo_labels(colours, cams, tags, (0.35, 0.55))
    assert found.shape == (4, 2, 21, 30) and found.dtype == torch.uint8
    for number, keys in enumerate(listed):
        for index, background in enumerate((0.35, 0.55)):
            expected = plain_label(colours[number], cams[number], keys, background)
            assert torch.equal(found[number, index].long(), expected), (keys, background)
    assert len(found[0].unique()) == 4 and not found[2].any()
    assert (found[:, 0] == 0).sum() < (found[:, 1] == 0).sum()
    torch.testing.assert_close(pseudo_labels(colours, cams, torch.zeros(4, 5), (0.35,)), torch.zeros_like(found[:, :1]))


def test_outside_the_box_is_unknown() -> None:
    sample = batch()
    inside = box_mask(sample["box"], (32, 32))
    assert inside[0].all() and inside[1].sum() == 28 * 23 and inside[1, 4:, :23].all()
    cams = torch.rand(2, CLASSES, 32, 32)
    boxed = pseudo_labels(sample["image"], cams, sample["tags"], (0.35, 0.55), sample["box"])
    free = pseudo_labels(sample["image"], cams, sample["tags"], (0.35, 0.55))
    assert torch.equal(boxed == 255, ~inside[:, None].expand_as(boxed))
    assert torch.equal(boxed.masked_fill(boxed == 255, 0), free.masked_fill(~inside[:, None], 0))


def test_merging_of_two_labels() -> None:
    low = torch.tensor([0, 2, 2, 3, 255], dtype=torch.uint8)
    high = torch.tensor([0, 0, 2, 1, 255], dtype=torch.uint8)
    assert merge_score_labels(low, high).tolist() == [0, 255, 2, 1, 255]


def test_pairs_of_patches() -> None:
    """The top left pixel speaks for a patch; two backgrounds are alike."""
    label = torch.full((1, 8, 12), 9, dtype=torch.uint8)
    label[0, ::4, ::4] = torch.tensor([[0, 2, 255], [0, 0, 2]], dtype=torch.uint8)
    flat = [0, 2, 255, 0, 0, 2]
    expected = [[255 if 255 in (a, b) else int(a == b) for b in flat] for a in flat]
    assert patch_pair_labels(label, (2, 3)).tolist() == [expected]


def test_pair_losses_equal_the_plain_form_and_pull_the_right_way() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 6, 6, requires_grad=True)
    target = torch.tensor([0, 1, 255], dtype=torch.uint8)[torch.randint(3, (2, 6, 6))]
    g, same, different = logits.sigmoid(), target == 1, target == 0
    expected = torch.stack([
        0.5 * (1 - x[same]).sum() / (same.sum() + 1) + 0.5 * x[different].sum() / (different.sum() + 1) for x in g
    ])  # fmt: skip
    found = patch_pair_losses(list(logits), target)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert (gradient[:, same] < 0).all() and (gradient[:, different] > 0).all() and not gradient[:, target == 255].any()


def test_patch_logits_are_the_mean_of_the_heads() -> None:
    torch.manual_seed(0)
    seen = QueryKey(*torch.randn(2, 2, 3, 9, 5))
    torch.testing.assert_close(patch_logits(seen, 4), seen.products().mean(1)[:, 4:, 4:], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ layers


def test_weights_of_layers() -> None:
    plain = options("mctformer")
    assert plain.shallow_weights() == [0.5, 0.5, 0, 0] and plain.deep_weights() == [1.0, 1.0]
    weighted = options("mctformer", entropy=(2.0, 3.0, 4.0, 6.0))
    assert weighted.shallow_weights() == pytest.approx([0.5, 0.375, 0, 0])  # over 2, not over their sum
    assert weighted.deep_weights() == pytest.approx([0.5, 1.0])
    assert scale_entropy((3.0, 1.0, 2.0)) == [1.0, 0.0, 0.5]


def test_entropy_of_maps() -> None:
    """A constant map has log2 N bits, a single tall peak none; what is absent plays no part."""
    maps = torch.zeros(2, 3, 2, 4)
    maps[1, 1, 0, 2] = 100
    torch.testing.assert_close(map_entropy(torch.eye(8).expand(2, 8, 8), maps), torch.tensor([3.0, 0.0]))
    even = torch.full((2, 8, 8), 1 / 8)
    torch.testing.assert_close(map_entropy(even, maps, 1e-6), torch.tensor([3.0, 3.0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_of_layers(kind: str) -> None:
    model, sample = network(kind).eval(), batch()
    seen: list[Tensor] = []
    with torch.no_grad():
        found = model.layer_entropy(sample["image"], sample["tags"])
        _, maps = model.forward_maps(sample["image"], lambda _, a: seen.append(a.products().softmax(-1).mean(1)))
    depth, c = model.options.backbone.depth, model.tokens
    assert found.shape == (2, depth) and len(seen) == depth
    for number in range(2):
        present = maps[number] * sample["tags"][number, :, None, None]
        for layer in range(depth):
            refined = torch.einsum("ij,cj->ci", seen[layer][number, c:, c:], present.flatten(1)).sum(0)
            share = refined.softmax(0).double()
            expected = -(share * share.clamp(min=1e-30).log2()).sum()
            assert found[number, layer].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entropic", [False, True])
def test_training_maps_equal_the_plain_form(kind: str, entropic: bool) -> None:
    depth = options(kind).backbone.depth
    model = network(kind, entropy=tuple(float(n) for n in range(depth)) if entropic else ()).eval()
    images = batch((32, 48))["image"]
    weights = [1 / 2, (1 - 1 / (depth - 1)) / 2 if entropic else 1 / 2] + [0.0] * (depth - 2)
    with torch.no_grad():
        found, expected = model.training_cam(images), plain.aream_training_cam(model, images, weights)
    assert found.shape == (2, CLASSES, 32, 48) and 0 <= found.min() < 0.01 and 0.9 < found.max() < 1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("kind", KINDS)
def test_no_pass_makes_a_matrix_of_all_heads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: QueryKey) -> Tensor:
        raise AssertionError("all heads at once")

    monkeypatch.setattr(QueryKey, "products", refuse)
    model, sample = network(kind), batch()
    model.train()(sample, 0.9)
    model.eval().cam(sample["image"], sample["tags"])
    monkeypatch.setattr(QueryKey, "mean_weights", refuse)
    network(kind).train()(sample, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_trained_on_after_the_warm_up(kind: str) -> None:
    """From the very first update of epoch 10 of 60 on, however many updates an epoch has."""
    model, sample = network(kind).train(), batch()
    assert list(model(sample, 0.0)) == list(model.names)
    for updates in (1, 7, 165):
        assert "pair" not in model(sample, (10 * updates - 1) / (60 * updates))
        assert "pair" in model(sample, 10 * updates / (60 * updates))
    assert "pair" not in network(kind, pair_weight=0.0)(sample, 0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_pairs_pull_at(kind: str) -> None:
    """Queries and keys of the deep layers and what is below them; no head, and no value of the last layer."""
    model, sample = network(kind).train(), batch()
    model(sample, 0.9)["pair"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    layers = [name for name in gradients if name.endswith("attn.qkv.weight")]
    query, key, value = gradients[layers[-1]].chunk(3)
    assert query.any() and key.any() and not value.any()
    assert all(gradients[name].chunk(3)[2].any() for name in layers[:-1])
    assert all(gradients[name] is None for name in gradients if "head" in name)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_loses_no_gradient(kind: str) -> None:
    """Autocast keeps cast weights: those cast while labels are made without gradient must not be used again."""
    model, sample = network(kind).train(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(sample, 0.9)
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(v.dtype == torch.float32 for v in terms.values())
    exact = network(kind).train()(sample, 0.9)
    for name, value in terms.items():
        assert value.item() == pytest.approx(exact[name].item(), rel=0.1)


def test_labels_are_made_in_training_mode() -> None:
    """Published: drop path acts, statistics of the batch are used, and the running ones move once a scale."""
    model, sample = network("conformer").train(), batch()
    before = model.bn1.running_mean.clone()
    model.make_labels(sample)
    assert model.bn1.num_batches_tracked == 3 and not torch.equal(model.bn1.running_mean, before)
    assert model.training and all(p.grad is None for p in model.parameters())
    dropping = network("mctformer", **{"backbone.drop_path": 0.5})
    assert not torch.equal(dropping.train().training_cam(sample["image"]), dropping.training_cam(sample["image"]))
    assert torch.equal(dropping.eval().training_cam(sample["image"]), dropping.training_cam(sample["image"]))


def test_box_is_heeded_in_training() -> None:
    model, sample = network("conformer").eval(), batch()
    label = model.make_labels(sample)
    assert (label[1, :4] == 255).all() and (label[1, :, 23:] == 255).all() and (label != 255).any()
    del sample["box"]
    assert (model.make_labels(sample)[1, :4] != 255).any()


def test_groups() -> None:
    model = network("mctformer")
    names = {parameter: name for name, parameter in model.named_parameters()}
    plain, decayed = ([names[p] for p in group.params] for group in model.param_groups())
    assert "cls_token" in decayed and "pos_embed" in plain and "head.weight" in decayed  # unlike MCTformer's
    model = network("conformer")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {(g.lr_scale, g.decay): {names[p] for p in g.params} for g in model.param_groups()}
    assert groups[10.0, True] == {"cnn_head.weight", "att_head.weight"}
    assert groups[10.0, False] == {"cnn_head.bias", "att_head.bias"}
    assert "cls_token" in groups[1.0, False] and "conv1.weight" in groups[1.0, True] and len(groups) == 4


# ------------------------------------------------------------------------------------------------ maps


def test_a_conformers_map_stays_signed() -> None:
    model, sample = network("conformer").eval(), batch()
    with torch.inference_mode():
        maps = model.cam(sample["image"], sample["tags"])
    assert maps.min() < 0 < maps.max() and maps.shape == (2, CLASSES, 4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_uses_all_layers(kind: str) -> None:
    model, images = network(kind, scales=(1.0,)).eval(), batch()["image"]
    depth = model.options.backbone.depth
    with torch.inference_mode():
        pairs = torch.cat([images, images.flip(-1)])
        ahead, mirrored = resize(model.cam(pairs, torch.ones(4, CLASSES)), (32, 32)).chunk(2)
        total = (ahead + mirrored.flip(-1)).relu()
        total = total - total.amin((2, 3), keepdim=True)
        expected = plain.aream_training_cam(model, images, [1 / depth] * depth)
    torch.testing.assert_close(total / (total.amax((2, 3), keepdim=True) + 1e-6), expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ weights, recipes


def save(folder: Path, state: dict[str, Tensor]) -> str:
    path = folder / "weights.pth"
    torch.save(state, path)
    return str(path)


def test_conformer_starts_from_imagenet_without_its_heads(tmp_path: Path) -> None:
    model = network("conformer")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.randn_like(v.float()) for name, v in before.items() if "head" not in name}
    state |= {"conv_cls_head.weight": torch.randn(10, 64), "trans_cls_head.weight": torch.randn(10, 24)}
    model.load_weights(save(tmp_path, state))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, before[name] if "head" in name else state[name]), name
    del state["conv_1.conv1.weight"]
    with pytest.raises(ValueError, match="conv_1.conv1.weight"):
        network("conformer").load_weights(save(tmp_path, state))


def test_own_checkpoints_load_strictly(tmp_path: Path) -> None:
    for kind, head in (("conformer", "cnn_head.bias"), ("mctformer", "head.bias")):
        state = {n: v + 1 if v.is_floating_point() else v for n, v in network(kind).state_dict().items()}
        model = network(kind)
        model.load_weights(save(tmp_path, state))
        assert torch.equal(model.state_dict()[head], state[head])
        del state[head]
        with pytest.raises(ValueError, match=head):
            network(kind).load_weights(save(tmp_path, state))


@pytest.mark.parametrize("cls", [AreamMCTformer, AreamConformer])
@pytest.mark.parametrize("preset", ["published", "sample"])
def test_recipes_fit_their_refiner_and_segmenter_and_build(cls: type[Aream], preset: str) -> None:
    recipe = cls.recipes[preset]
    refine = override(PSA.recipes[preset], recipe.refine)
    assert recipe.segmenter == LargeFOV.name
    cam = recipe.cam
    assert cam.infer.multiple == cam.network.backbone.patch and cam.augment.crop % cam.infer.multiple == 0
    assert all(cam.augment.crop * scale % cam.infer.multiple == 0 for scale in cam.network.scales)
    if preset == "published":
        assert (refine.label.alpha_low, refine.label.alpha_high, refine.walk.threshold) == (1, 12, None)
        with torch.device("meta"):
            model = cam.network.build(20, {})
        entries, millions, split = {AreamMCTformer: (152, 21.75, 7), AreamConformer: (718, 36.29, 9)}[cls]
        assert (len(model.state_dict()), cam.network.split) == (entries, split)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
        assert all(m.drop_path.p == pytest.approx(0.1) for n, m in model.named_modules() if n.endswith("blocks.11"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"split": 0}, "split"), ({"split": 4}, "split"), ({"low": 0.6}, "low"), ({"pair_weight": -1.0}, "pair_weight"),
     ({"warmup": 1.5}, "warmup"), ({"entropy": (1.0, 2.0)}, "4 numbers"), ({"entropy": (1.0,) * 4}, "the same"),
     ({"entropy": (2.0, 2.0, 1.0, 1.0)}, "no layer"), ({"scales": ()}, "scales")],
)  # fmt: skip
def test_impossible_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options("mctformer", **changes)


def test_conformer_needs_a_map_on_the_tokens_grid() -> None:
    with pytest.raises(ValueError, match="last_stride"):
        options("conformer", **{"backbone.last_stride": 2})


# ------------------------------------------------------------------------------------------------ the extra step


@pytest.mark.slow
def test_measuring_the_entropy_of_a_trained_network(tmp_path: Path) -> None:
    """Train, measure, and train with what is printed."""
    data, out = make_set(tmp_path / "data", images=4, val=1), tmp_path / "run"
    flags = [
        "aream_mctformer", "--root", str(data), "--machine.workers", "0", "--machine.device", "cpu",
        "--cam.network.backbone.width", "12", "--cam.network.backbone.image-size", "32", "--cam.augment.crop", "32",
        "--cam.fit.steps", "2", "--cam.fit.batch-size", "2",
    ]  # fmt: skip
    first = [*flags, "--run", str(out), "--steps", "train_cam", "--cam.network.pair-weight", "0"]
    assert run_sample.main(first) == 0
    job = open_job(parsing.parse(first))
    state, description = store.read_model(job.run.weights("cam"))  # so short a training leaves all flat
    state = {n: v * 20 if "qkv" in n or n.startswith("head") else v for n, v in state.items()}
    store.write_model(job.run.weights("cam"), state, description)
    measured = start(["-m", "scripts.layer_entropy", *flags, "--run", str(out)])
    assert measured.returncode == 0, measured.stderr
    name, *printed = measured.stdout.split()
    assert name == "--cam.network.entropy"

    network, expected = load_cam_network(job, torch.device("cpu")), []
    for image_id in job.train_ids():
        pixels = resize_image(read_image(job.catalog.image_path(image_id)), (32, 32))
        image = to_tensor(normalise_image(pixels, "imagenet"))[None]
        tags = torch.tensor(job.catalog.tags(image_id))[None]
        if tags.any():
            expected.append(network.layer_entropy(image, tags)[0])
    mean = torch.stack(expected).mean(0)
    assert mean.max() - mean.min() > 1e-3 and mean.max() < 4  # of 16 patches
    np.testing.assert_allclose([float(value) for value in printed], mean, rtol=1e-5)
    np.testing.assert_allclose(json.loads((out / "layer_entropy.json").read_text()), mean, rtol=1e-5)
    again = [*flags, "--run", str(tmp_path / "again"), "--steps", "train_cam", "--cam.network.warmup", "0"]
    assert run_sample.main([*again, name, *printed]) == 0


def test_other_methods_have_no_entropy(tmp_path: Path) -> None:
    class Plain(nn.Module):
        pass

    job = open_job(parsing.parse(["seam", "--root", str(make_set(tmp_path / "data", images=2, val=1))]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="seam has no layer entropy"):
        patch.setattr(entropy, "load_cam_network", lambda *_: Plain())
        entropy.measure_entropy(job, torch.device("cpu"))
