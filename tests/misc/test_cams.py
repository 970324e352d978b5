"""misc/infer/cams.py: multi-scale inference against the plain form, image by image and class by class."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from misc.config import CamInference
from misc.image import pixels
from misc.infer import cams

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def picture(height: int = 41, width: int = 58) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Toy:
    """A network of one strided convolution, C maps; it notes what it was called with."""

    def __init__(self, classes: int):
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn((classes, 3, 8, 8), generator=generator) / 14
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor, tags: Tensor) -> Tensor:
        assert tags.shape == (len(images), len(self.weight))
        self.calls.append(tuple(images.shape))
        return F.relu(F.conv2d(images, self.weight, stride=8, padding=4))


def plain_form(network: Toy, image: np.ndarray, tags: np.ndarray, scales: tuple[float, ...]) -> np.ndarray:
    """The published loop: every pass alone, all classes resized, times the tags, un-flipped, summed; by the maximum."""
    height, width = image.shape[:2]
    total = 0
    for scale in scales:
        resized = Image.fromarray(image).resize((round(width * scale), round(height * scale)), Image.BICUBIC)
        values = (np.asarray(resized) / 255 - MEAN) / STD
        for flip in (False, True):
            values_now = np.flip(values, 1) if flip else values
            batch = torch.tensor(values_now.transpose(2, 0, 1).copy(), dtype=torch.float32)[None]
            maps = network(batch, torch.ones(1, len(tags)))
            maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)[0].numpy()
            maps = maps * tags[:, None, None]
            total = total + (np.flip(maps, 2) if flip else maps)
    return np.stack([total[c] / (total[c].max() + 1e-5) for c in np.flatnonzero(tags)])


def test_equals_the_plain_form() -> None:
    network, image, scales = Toy(80), picture(), (0.5, 1.0, 1.5)
    tags = np.zeros(80, np.float32)
    tags[[3, 79, 40]] = 1
    got = cams.infer_cam(network, image, tags, CamInference(scales=scales), "imagenet").maps
    assert got.dtype == np.float32 and got.shape == (3, 41, 58)
    assert network.calls == [(2, 3, 20, 29), (2, 3, 41, 58), (2, 3, 62, 87)]  # 20.5 and 61.5: half to even
    np.testing.assert_allclose(got, plain_form(network, image, tags, scales), atol=2e-6)


def test_without_flip_the_image_is_alone() -> None:
    network, tags = Toy(2), np.float32([0, 1])
    got = cams.infer_cam(network, picture(), tags, CamInference(scales=(1.0,), flip=False), "imagenet").maps
    assert network.calls == [(1, 3, 41, 58)]
    assert not np.allclose(got, cams.infer_cam(network, picture(), tags, CamInference(scales=(1.0,)), "imagenet").maps)


def test_mirrored_image_gives_mirrored_maps() -> None:
    network, tags, infer = Toy(2), np.float32([1, 1]), CamInference(scales=(1.0,))
    maps = cams.infer_cam(network, picture(), tags, infer, "imagenet").maps
    mirrored = cams.infer_cam(network, np.ascontiguousarray(picture()[:, ::-1]), tags, infer, "imagenet").maps
    np.testing.assert_allclose(mirrored, maps[:, :, ::-1], atol=1e-6)


def test_no_tag_no_run() -> None:
    network = Toy(4)
    maps = cams.infer_cam(network, picture(), np.zeros(4, np.float32), CamInference(), "imagenet").maps
    assert maps.shape == (0, 41, 58) and not network.calls


def test_gradients_are_the_callers_choice() -> None:
    """A map that needs a backward pass gets one, and what it returns carries no graph."""
    weight = torch.ones(2, 3, 1, 1, requires_grad=True)

    def network(images: Tensor, tags: Tensor) -> Tensor:
        score = F.conv2d(images, weight)
        return score * torch.autograd.grad(score.sum(), weight)[0].abs().sum()

    maps = cams.infer_cam(network, picture(), np.float32([1, 0]), CamInference(scales=(1.0,)), "imagenet").maps
    assert maps.shape == (1, 41, 58)


def test_inputs_follow_the_network_s_normalisation() -> None:
    (pair,) = cams.scaled_inputs(picture(), CamInference(scales=(1.0,)), "caffe_bgr")
    assert pair.shape == (2, 3, 41, 58) and pair.dtype == torch.float32
    np.testing.assert_allclose(pair[0, 0], picture()[..., 2] - np.float32(104.008), atol=1e-4)
    assert torch.equal(pair[1], pair[0].flip(-1))


@pytest.mark.parametrize(
    ("rule", "merged"), [("sum", [[4.0, -3.0]]), ("max", [[3.0, -1.0]]), ("max_relu", [[3.0, 0.0]])]
)
def test_an_image_and_its_mirror_become_one_by_the_rule(rule: str, merged: list[list[float]]) -> None:
    maps = torch.tensor([[[[1.0, -1.0]]], [[[-2.0, 3.0]]]])  # the second is mirrored: 3, -2 turned back
    once = cams.merge_maps([maps], (1, 2), rule=rule)
    torch.testing.assert_close(once, torch.tensor(merged)[None])
    torch.testing.assert_close(cams.merge_maps([maps, maps], (1, 2), rule=rule), 2 * once)
    alone = {"max_relu": maps[:1].relu()}.get(rule, maps[:1])
    torch.testing.assert_close(cams.merge_maps([maps[:1]], (1, 2), rule=rule), alone[0])


def test_rule_span() -> None:
    total = torch.tensor([[[-2.0, 0.0, 2.0]], [[3.0, 3.0, 3.0]]])
    expected = torch.tensor([[[0.0, 2.0, 4.0]], [[0.0, 0.0, 0.0]]]) / torch.tensor([4 + 1e-5, 1.0]).view(2, 1, 1)
    torch.testing.assert_close(cams.normalise_maps(total, "span"), expected)


def test_a_squashed_image_is_stretched_once_and_then_scaled() -> None:
    infer = CamInference(scales=(1.0, 0.5), squash=32, resize="linear", truncate=True, flip=False)
    image = picture()
    whole, half = cams.scaled_inputs(image, infer, "imagenet")
    values = pixels.to_tensor(pixels.normalise_image(image, "imagenet"))[None]
    square = F.interpolate(values, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(whole, square)
    torch.testing.assert_close(half, F.interpolate(square, size=(16, 16), mode="bilinear", align_corners=False))
    cam = cams.infer_cam(Toy(3), image, np.array([0.0, 1, 1], np.float32), infer, "imagenet")
    assert cam.maps.shape == (2, 41, 58)


def test_merge_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no map"):
        cams.merge_maps([], (4, 4))


def test_rule_max() -> None:
    total = torch.tensor([[[0.0, 2.0], [4.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    scores = cams.normalise_maps(total, "max")
    np.testing.assert_allclose(scores[0], [[0, 0.5], [1, 0.25]], atol=1e-5)
    assert scores.max() < 1 and torch.equal(scores[1], torch.zeros(2, 2))


def test_rule_shifted_puts_the_lowest_below_zero() -> None:
    total = torch.tensor([[[-3.0, 2.0], [4.0, 1.0]], [[1.0, 3.0], [2.0, 5.0]]])
    scores = cams.normalise_maps(total, "shifted")
    np.testing.assert_allclose(scores[0], [[0, 0.5], [1, 0.25]], atol=1e-5)
    np.testing.assert_allclose(scores[1], [[-0.25, 0.5], [0.25, 1]], atol=1e-5)  # its minimum is 1: (0 - 1) / 4


def test_rule_rectified() -> None:
    total = torch.tensor([[[-3.0, 2.0], [4.0, 1.0]], [[1.0, 3.0], [2.0, 5.0]], [[0.0, 0.0], [0.0, 1e-6]]])
    scores = cams.normalise_maps(total, "rectified")
    np.testing.assert_allclose(scores[0], [[0, 0.5], [1, 0.25]], atol=1e-5)
    np.testing.assert_allclose(scores[1], [[0, 0.5], [0.25, 1]], atol=1e-5)
    np.testing.assert_allclose(scores[2], [[0, 0], [0, 0.5]], atol=1e-5)
    assert torch.equal(cams.scale_rectified(total[None])[0], scores)


def test_sizes_are_truncated_where_asked() -> None:
    infer = CamInference(scales=(0.5, 1.0, 1.5), truncate=True)
    assert cams.input_sizes((75, 101), infer) == [(37, 50), (75, 101), (112, 151)]
    assert cams.input_sizes((75, 101), CamInference(scales=(0.5, 1.5))) == [(38, 50), (112, 152)]


def test_sizes_are_stretched_to_multiples() -> None:
    infer = CamInference(scales=(0.5, 1.0), stretch=16)
    assert cams.input_sizes((75, 101), infer) == [(48, 64), (80, 112)]
    (x,) = cams.scaled_inputs(picture(), CamInference(scales=(1.0,), stretch=16, flip=False), "imagenet")
    resized = pixels.resize_image(picture(), (48, 64))
    assert torch.equal(x[0], pixels.to_tensor(pixels.normalise_image(resized, "imagenet")))
    with pytest.raises(ValueError, match="stretch"):
        CamInference(stretch=0)


@pytest.mark.parametrize("pad_first", [False, True])
def test_padding(pad_first: bool) -> None:
    """Zeros at the bottom and on one side; of a network that copies its input the maps fit the image again."""
    infer = CamInference(scales=(1.0,), multiple=16, pad_first=pad_first, normalise="minmax")
    (pair,) = cams.scaled_inputs(picture(), infer, "imagenet")
    assert pair.shape == (2, 3, 48, 64)
    (plain,) = cams.scaled_inputs(picture(), CamInference(scales=(1.0,)), "imagenet")
    assert torch.equal(pair[0, :, :41, :58], plain[0]) and not pair[:, :, 41:].any() and not pair[0, :, :, 58:].any()
    assert torch.equal(pair[1, :, :41, 6:] if pad_first else pair[1, :, :41, :58], plain[1])
    assert not (pair[1, :, :, :6] if pad_first else pair[1, :, :, 58:]).any()
    cut = cams.unpad_maps(pair, (41, 58), infer)
    assert torch.equal(cut, plain)
    assert torch.equal(cams.unpad_maps(pair[:1], (41, 58), infer), plain[:1])

    def network(images: Tensor, tags: Tensor) -> Tensor:
        return images[:, :2] - images.amin()

    got = cams.infer_cam(network, picture(), np.float32([1, 1]), infer, "imagenet").maps
    expected = cams.infer_cam(network, picture(), np.float32([1, 1]), CamInference(
        scales=(1.0,), normalise="minmax"), "imagenet").maps  # fmt: skip
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_padding_of_nothing() -> None:
    with pytest.raises(ValueError, match="multiple"):
        CamInference(multiple=0)


def test_class_scores_are_the_mean_over_all_passes_and_see_no_tag() -> None:
    seen: list[tuple[int, ...]] = []

    def classify(images: Tensor, num_classes: int) -> Tensor:
        seen.append(tuple(images.shape))
        return images.mean((2, 3))[:, :1] + torch.arange(num_classes) * len(seen)

    image = picture()
    scores = cams.infer_logits(classify, image, 4, CamInference(scales=(1.0, 0.5)), "imagenet")
    assert seen == [(2, 3, 41, 58), (2, 3, 20, 29)]
    np.testing.assert_allclose(np.diff(scores), 1.5, rtol=1e-5)
    inputs = cams.scaled_inputs(image, CamInference(scales=(1.0, 0.5)), "imagenet")
    assert scores[0] == pytest.approx(float(torch.stack([x[:, 0].mean() for x in inputs]).mean()), rel=1e-4)


def test_maps_can_be_merged_on_any_grid_by_either_filter() -> None:
    maps = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    for mode in ("bilinear", "bicubic"):
        high = F.interpolate(maps, size=(16, 16), mode=mode, align_corners=False)
        torch.testing.assert_close(cams.merge_maps([maps], (16, 16), mode=mode), high[0] + high[1].flip(-1))


def test_the_image_is_resized_by_the_filter_of_the_recipe() -> None:
    image = picture()
    one, other = (
        next(cams.scaled_inputs(image, CamInference(scales=(32,), square=True, resize=kind), "imagenet"))
        for kind in ("bicubic", "bilinear")
    )
    wanted = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR))
    assert not torch.equal(one, other)
    torch.testing.assert_close(other[0], pixels.to_tensor(pixels.normalise_image(wanted, "imagenet")))


@pytest.mark.parametrize("changes", [{}, {"scales": (1.0,), "flip": False, "stretch": 16, "normalise": "none"}])
def test_images_at_once_have_the_maps_of_images_one_by_one(changes: dict) -> None:
    infer = dataclasses.replace(CamInference(scales=(1.0, 0.5)), **changes)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (40, 56, 3), dtype=np.uint8) for _ in range(3)]
    tags = [np.array(row, np.float32) for row in ((1, 0, 1), (0, 1, 0), (1, 1, 1))]
    weight = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0))

    def cam(images: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        assert len(images) == len(present)
        return torch.nn.functional.conv2d(images, weight, stride=4).relu() * present[:, :, None, None]

    inputs = [list(cams.scaled_inputs(picture, infer, "imagenet")) for picture in pictures]
    found = cams.infer_cams(cam, tags, (40, 56), infer, "cpu", inputs)
    for picture, row, several in zip(pictures, tags, found, strict=True):
        one = cams.infer_cam(cam, picture, row, infer, "imagenet")
        assert np.array_equal(one.keys, several.keys) and one.size == several.size
        np.testing.assert_allclose(several.maps, one.maps, atol=1e-5)
