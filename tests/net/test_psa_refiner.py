"""AffinityNet: labels, pairs, losses, both backbones, the random walk, weights, recipes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from torch import Tensor, nn

from misc.config import override
from misc.crf.dense import CRFSettings
from misc.image.cam import Cam
from misc.propagate.walk import half_circle, pair_cells
from net.backbone.resnet38 import ResNet38, ResNet38Options
from net.backbone.vgg16 import VGG16Options
from net.refine.psa import (
    PSA,
    PSALabel,
    PSAOptions,
    PSAWalk,
    affinity_losses,
    pad_to_stride,
    pair_affinity,
    pair_labels,
    pool_to_cells,
)
from net.registry import REFINERS
from net.seed.seam import Seam
from net.shared.background import stack_background

TINY = PSAOptions(
    resnet38=ResNet38Options(width=0.125, depth=(1, 1, 1, 1), dropout=(0.0, 0.0), freeze_bn=False, frozen="none"),
    vgg16=VGG16Options(width=0.125, fc6_dilation=4),
    widths=(8, 8, 16),
)
QUICK = CRFSettings(iterations=1)


def tiny(backbone: str = "resnet38") -> PSA:
    torch.manual_seed(0)
    return replace(TINY, backbone=backbone).build(3, {})


def soft_cam(keys: list[int], height: int, width: int, seed: int = 0) -> Cam:
    maps = np.random.default_rng(seed).random((len(keys), height, width)).astype(np.float32)
    return Cam.of_maps(np.array(keys, np.int64), maps)


def with_counts(network: PSA, *batches: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The batches with the mean of their counts, as the training loop adds them."""
    counts = [network.counts(batch) for batch in batches]
    mean = {f"counts/{name}": sum(c[name] for c in counts) / len(counts) for name in counts[0]}
    return [{**batch, **mean} for batch in batches]


def random_batch(size: int = 96, images: int = 2) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(1)
    target = torch.randint(0, 4, (images, size // 8, size // 8), generator=seeded)
    target[target == 3] = 255
    return {"image": torch.randn(images, 3, size, size, generator=seeded), "target": target.to(torch.uint8)}


# ------------------------------------------------------------------------------------------------ labels


def test_target_follows_the_rule_cell_by_cell() -> None:
    """Two classes; the cells: background sure, class sure, only low says class, only low says background, both
    disagree on the class, padding."""
    low = {"bg": (0.8, 0.1, 0.1), "one": (0.1, 0.8, 0.1), "two": (0.1, 0.1, 0.8), "none": (0.0, 0.0, 0.0)}
    cells = [("bg", "bg", 0), ("one", "one", 1), ("two", "two", 2), ("bg", "two", 255), ("one", "bg", 0),
             ("one", "two", 1), ("none", "none", 255)]  # fmt: skip
    planes = np.zeros((6, 8, 8 * len(cells)), np.float16)
    for index, (strong, weak, _) in enumerate(cells):
        planes[:, :, 8 * index : 8 * index + 8] = np.array(low[strong] + low[weak])[:, None, None]
    assert PSA.make_target(planes).tolist() == [[label for *_, label in cells]]


def test_target_is_made_from_averaged_scores_not_labels() -> None:
    planes = np.zeros((4, 8, 8), np.float16)
    planes[0::2], planes[1::2] = 0.55, 0.45  # background narrowly, everywhere
    planes[1::2, :, :3], planes[0::2, :, :3] = 1.0, 0.0  # the class clearly, on a minority of the pixels
    assert PSA.make_target(planes).tolist() == [[1]]


def test_target_takes_any_multiple_of_8_and_no_other_crop() -> None:
    planes = np.ones((2, 40, 40), np.float16)
    assert PSA.make_target(planes).shape == (5, 5) and not PSA.make_target(planes).any()
    with pytest.raises(ValueError, match="multiple of 8"):
        PSA.make_target(np.ones((2, 40, 44), np.float16))


def test_target_of_label_maps_is_transcams() -> None:
    low = np.array([0, 1, 0, 2, 0], np.uint8)
    high = np.array([0, 1, 2, 0, 0], np.uint8)
    planes = np.stack([low, high]).repeat(8, axis=1)[:, None].repeat(8, axis=1)  # (2, 8, 40)
    assert PSA.make_target(planes).tolist() == [[0, 1, 255, 2, 0]]


def test_label_of_two_squares() -> None:
    """Bright squares on a dark image: low's classes inside, background far off, class ids in the picture."""
    image = np.zeros((48, 56, 3), np.uint8)
    maps = np.zeros((2, 48, 56), np.float32)
    image[8:20, 8:20], maps[0, 8:20, 8:20] = 250, 0.9
    image[28:40, 30:44], maps[1, 28:40, 30:44] = (0, 250, 0), 0.9
    picture, planes = PSA.make_label(image, Cam.of_maps(np.array([4, 17]), maps), PSALabel(crf=QUICK))
    assert picture.dtype == np.uint8 and picture.shape == (48, 56)
    assert picture[14, 14] == 5 and picture[34, 37] == 18 and picture[2, 50] == 0
    assert planes.shape == (6, 48, 56) and planes.dtype == np.float16
    np.testing.assert_allclose(planes.astype(np.float32).reshape(2, 3, 48, 56).sum(axis=1), 1, atol=2e-3)
    assert set(np.unique(PSA.make_target(planes))) <= {0, 1, 2, 255}


def test_low_alpha_gives_less_foreground_than_high() -> None:
    image = np.random.default_rng(0).integers(0, 255, (24, 32, 3)).astype(np.uint8)
    _, planes = PSA.make_label(image, soft_cam([2], 24, 32), PSALabel(alpha_low=1.0, alpha_high=16.0, crf=QUICK))
    assert planes[0].mean() > planes[2].mean() + 0.1


def test_constant_backgrounds_and_label_maps() -> None:
    image = np.zeros((16, 24, 3), np.uint8)
    maps = np.tile(np.repeat(np.float32([0.1, 0.4, 0.9]), 8), (1, 16, 1))
    options = PSALabel(background="constant", crf_unary="labels", crf=CRFSettings(iterations=0), crf_labels=21)
    picture, planes = PSA.make_label(image, Cam.of_maps(np.array([6]), maps), options)
    assert planes.dtype == np.uint8 and planes[:, 0, ::8].tolist() == [[0, 0, 1], [0, 1, 1]]
    assert picture[0, ::8].tolist() == [0, 255, 7]


@pytest.mark.parametrize("unary", ["scores", "labels"])
def test_image_without_a_tag_is_background(unary: str) -> None:
    image = np.zeros((16, 24, 3), np.uint8)
    picture, planes = PSA.make_label(image, soft_cam([], 16, 24), PSALabel(crf_unary=unary))
    assert not picture.any() and not PSA.make_target(planes).any() and planes.shape == (2, 16, 24)


# ------------------------------------------------------------------------------------------------ pairs and losses


def test_pair_labels_by_hand() -> None:
    """A 3 x 5 grid and radius 2: sources are rows 0..1, columns 1..3; displacements right, down left, down, down
    right."""
    target = torch.tensor([[[0, 0, 1, 1, 2], [0, 255, 1, 0, 0], [1, 1, 1, 255, 0]]])
    labels = pair_labels(target, 2)
    assert labels["bg"].shape == (1, 4, 6)
    right = {name: pairs[0, 0].tolist() for name, pairs in labels.items()}
    assert right["bg"] == [False, False, False, False, False, True]
    assert right["fg"] == [False, True, False, False, False, False]
    assert right["neg"] == [True, False, True, False, True, False]


def test_affinities_and_their_gradient_are_the_plain_ones() -> None:
    features = torch.randn(2, 6, 10, 13, dtype=torch.float32, requires_grad=True)
    source, target = (cells.view(34, -1) for cells in pair_cells(half_circle(5), 10, 13, radius=5))
    ours, expected = pair_affinity(features, 5), plain.pair_affinity(features, source, target)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    gradient = torch.autograd.grad((ours * weight).sum(), features)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weight).sum(), features)[0])


def test_loss_is_the_same_however_the_batch_is_divided() -> None:
    """Four images at once, or two and two with unequal pair counts: same terms, same gradients."""
    network = tiny().eval()
    batch = random_batch(size=72, images=4)
    batch["target"][2:, :5] = 255
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    assert network.counts(halves[0])["bg"] != network.counts(halves[1])["bg"]

    def run(*batches: dict[str, Tensor]) -> tuple[dict[str, float], Tensor]:
        network.zero_grad()
        means = {"bg": 0.0, "fg": 0.0, "neg": 0.0}
        for part in with_counts(network, *batches):
            terms = network(part, 0.0)
            (sum(terms.values()) / len(batches)).backward()
            means = {name: means[name] + terms[name].item() / len(batches) for name in means}
        return means, network.f9.weight.grad.clone()

    (whole, gradient), (divided, added) = run(batch), run(*halves)
    assert divided == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(added, gradient, rtol=1e-3, atol=1e-7)


def test_losses_weigh_the_kinds_and_stay_finite_at_the_ends() -> None:
    affinity = torch.tensor([0.0, 1.0, 0.5, 1.0]).view(1, 1, 4).requires_grad_()
    kinds = {"bg": [1, 0, 0, 0], "fg": [0, 0, 1, 0], "neg": [0, 1, 0, 0]}
    labels = {name: torch.tensor(row).bool().view(1, 1, 4) for name, row in kinds.items()}
    losses = affinity_losses(affinity, labels, {name: pairs.sum() for name, pairs in labels.items()})
    assert losses["bg"].item() == pytest.approx(-0.25 * np.log(1e-5), rel=1e-3)
    assert losses["fg"].item() == pytest.approx(-0.25 * np.log(0.5), rel=1e-3)
    assert losses["neg"].item() == pytest.approx(-0.5 * np.log(1e-5), rel=1e-2)
    sum(losses.values()).backward()
    assert affinity.grad.isfinite().all() and affinity.grad[0, 0, 3] == 0


@pytest.mark.parametrize("backbone", ["resnet38", "vgg16"])
def test_training_step(backbone: str) -> None:
    network = tiny(backbone).train()
    (batch,) = with_counts(network, random_batch())
    losses = network(batch, 0.0)
    assert set(losses) == {"bg", "fg", "neg"}
    sum(losses.values()).backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert network.f8_3.weight.grad.abs().sum() > 0 and network.f9.weight.grad.abs().sum() > 0


def test_batch_without_a_known_pair_has_a_zero_loss_with_gradients() -> None:
    network = tiny().train()
    batch = random_batch(size=40)
    batch["target"][:] = 255
    loss = sum(network(with_counts(network, batch)[0], 0.0).values())
    loss.backward()
    assert loss == 0 and not network.f9.weight.grad.any()


def test_affinities_are_float32_under_autocast() -> None:
    network = tiny().eval()
    (batch,) = with_counts(network, random_batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(batch, 0.0)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


# ------------------------------------------------------------------------------------------------ walk


def dense_refine(network: PSA, image: Tensor, cam: Cam, options: PSAWalk) -> Tensor:
    """Section 6 with dense matrices."""
    features = network.forward_features(pad_to_stride(image)[None])
    height, width = features.shape[-2:]
    source, target = pair_cells(half_circle(5), height, width, radius=5)
    affinity = plain.pair_affinity(features, source, target)[0]
    dense = plain.dense_affinity(source, target, affinity, height * width)
    scores = torch.from_numpy(stack_background(cam.maps, options.background, options.alpha, options.threshold))
    walked = pool_to_cells(scores).flatten(1) @ plain.dense_transition(dense, options.beta, options.logt)
    walked = walked.view(1, -1, height, width)
    return nn.functional.interpolate(walked, scale_factor=8, mode="bilinear")[0, :, : image.shape[1], : image.shape[2]]


@pytest.mark.parametrize("options", [PSAWalk(), PSAWalk(background="constant", logt=6)])
@torch.no_grad()
def test_refine_is_the_dense_walk_at_sizes_that_are_no_multiple_of_8(options: PSAWalk) -> None:
    network = tiny().eval()
    image, cam = torch.randn(3, 75, 90), soft_cam([0, 2], 75, 90)
    scores = network.refine(plain.picture_of(image), cam, options)
    assert scores.shape == (3, 75, 90) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, dense_refine(network, image, cam, options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 20), (1, 1), (33, 70)])
@pytest.mark.parametrize("backbone", ["resnet38", "vgg16"])
def test_refine_of_small_images(size: tuple[int, int], backbone: str) -> None:
    network = tiny(backbone).eval()
    scores = network.refine(plain.picture_of(torch.randn(3, *size)), soft_cam([1], *size), PSAWalk())
    assert scores.shape == (2, *size) and np.isfinite(scores).all() and scores.max() <= 1


def test_refine_without_a_tag_and_with_a_wrong_size() -> None:
    network = tiny().eval()
    alone = network.refine(plain.picture_of(torch.randn(3, 16, 20)), soft_cam([], 16, 20), PSAWalk(crf=QUICK))
    assert alone.shape == (1, 16, 20) and not alone.argmax(axis=0).any()
    with pytest.raises(ValueError, match="make the CAM again"):
        network.refine(plain.picture_of(torch.randn(3, 16, 20)), soft_cam([0], 20, 16), PSAWalk())


def test_crf_after_the_walk() -> None:
    """Sharpens the scores; hard labels are held the harder the more classes the network knows (absent ones count)."""
    network = tiny().eval()
    image, cam = torch.randn(3, 40, 44), soft_cam([1], 40, 44)
    plainly = network.refine(plain.picture_of(image), cam, PSAWalk(alpha=1.0))
    sharpened = network.refine(plain.picture_of(image), cam, PSAWalk(alpha=1.0, crf=QUICK))
    assert sharpened.shape == (2, 40, 44) and np.abs(sharpened - plainly).max() > 0.05
    np.testing.assert_allclose(sharpened.sum(axis=0), 1, atol=1e-3)

    weak = CRFSettings(iterations=1, gauss_weight=0.01, bilateral_weight=0.01)
    hard = PSAWalk(alpha=1.0, crf=weak, crf_unary="labels")
    few = network.refine(plain.picture_of(image), cam, hard)
    network.num_classes = 20
    many = network.refine(plain.picture_of(image), cam, hard)
    assert few.shape == many.shape == (2, 40, 44)
    np.testing.assert_allclose(few.min(axis=0), 0.3 / 3, atol=0.01)
    np.testing.assert_allclose(many.min(axis=0), 0.3 / 20, atol=0.01)


# ------------------------------------------------------------------------------------------------ parameters, weights


def test_parameter_groups() -> None:
    """Biases at twice the rate and undecayed, new layers at ten times; everything trained in one group, once."""
    network = PSAOptions(backbone="vgg16", vgg16=TINY.vgg16, widths=TINY.widths).build(3, {})
    groups = {(group.lr_scale, group.decay): group.params for group in network.param_groups() if group.params}
    assert set(groups) == {(1, True), (2, False), (10, True)}
    names = {id(p): name for name, p in network.named_parameters()}
    # published: the group norms count as old layers (psa.md section 5.1)
    assert {names[id(p)] for p in groups[10, True]} == {"f8_3.weight", "f8_4.weight", "f8_5.weight", "f9.weight"}
    assert {"fc6.weight", "gn8_3.weight", "gn8_4.weight", "gn8_5.weight"} <= {names[id(p)] for p in groups[1, True]}
    assert {"fc6.bias", "gn8_3.bias", "gn8_4.bias", "gn8_5.bias"} <= {names[id(p)] for p in groups[2, False]}
    grouped = [id(p) for params in groups.values() for p in params]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)

    resnet = replace(TINY, resnet38=replace(TINY.resnet38, freeze_bn=True, frozen="b2")).build(3, {})
    assert {(g.lr_scale, g.decay) for g in resnet.param_groups() if g.params} == {(1, True), (10, True)}
    assert not any(p is resnet.conv1a.weight or p is resnet.bn7.weight for g in resnet.param_groups() for p in g.params)


def test_official_checkpoint_loads_strictly_and_a_backbone_without_the_new_layers(tmp_path: Path) -> None:
    network, other = tiny(), replace(TINY).build(3, {})
    path = tmp_path / "aff.pth"
    torch.save(network.state_dict(), path)
    other.load_weights(str(path))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in network.state_dict().items())

    partial = {name: value for name, value in network.state_dict().items() if not name.startswith("f9")}
    torch.save(partial, path)
    with pytest.raises(ValueError, match="f9.weight"):
        other.load_weights(str(path))

    torch.manual_seed(5)
    backbone = ResNet38(TINY.resnet38)
    torch.save({**backbone.state_dict(), "fc8.weight": torch.zeros(20, 512, 1, 1)}, path)
    before = other.f9.weight.clone()
    assert "f9.weight" in other.load_weights(str(path))
    assert torch.equal(other.conv1a.weight, backbone.conv1a.weight) and torch.equal(other.f9.weight, before)


def test_official_keys() -> None:
    for case, backbone in (("psa_aff_forward", "resnet38"), ("psa_aff_vgg16", "vgg16")):
        with torch.device("meta"):
            network = PSAOptions(backbone=backbone).build(20, {})
        keys = json.loads((Path(__file__).parents[1] / "golden" / f"{case}.json").read_text())["keys"]
        assert {name: list(value.shape) for name, value in network.state_dict().items()} == keys
        if backbone == "resnet38":
            assert sum(p.numel() for p in network.parameters()) == 106_484_032
        assert network.normalisation == ("imagenet" if backbone == "resnet38" else "caffe_bgr")


@pytest.mark.parametrize("preset", ["published", "sample"])
def test_recipes(preset: str) -> None:
    assert REFINERS["psa"] is PSA
    recipe = PSA.recipes[preset]
    network = replace(recipe.network, resnet38=replace(recipe.network.resnet38, width=0.125)).build(5, {})
    (batch,) = with_counts(network.train(), random_batch(size=80))
    assert all(loss.isfinite() for loss in network(batch, 0.0).values())
    assert recipe.augment.crop % 8 == 0 and recipe.augment.order.index("crop") < recipe.augment.order.index("flip")


def test_published_numbers() -> None:
    recipe = PSA.recipes["published"]
    assert (recipe.label.alpha_low, recipe.label.alpha_high) == (4, 32)
    assert (recipe.walk.alpha, recipe.walk.beta, recipe.walk.logt, recipe.walk.radius) == (16, 8, 8, 5)
    assert (recipe.fit.lr, recipe.fit.momentum, recipe.fit.epochs, recipe.augment.crop) == (0.01, 5e-4, 8, 448)
    seam = override(recipe, Seam.recipes["published"].refine)
    assert (seam.label.alpha_low, seam.label.alpha_high) == (4, 24)
    assert (seam.walk.alpha, seam.walk.beta, seam.walk.logt, seam.walk.radius) == (6, 8, 6, 5)
    assert (seam.walk.shrink_early, recipe.walk.shrink_early, seam.walk.crf.iterations) == (True, False, 0)


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (PSAOptions, "widths", (8, 12, 8)), (PSAOptions, "widths", (8, 8, 0)), (PSAOptions, "radius", 1),
        (PSAWalk, "logt", 40), (PSAWalk, "beta", 0),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(options: type, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} = .*not possible"):
        options(**{name: value})
