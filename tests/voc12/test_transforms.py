"""Augmentation against plain expectations: image, mask, planes and box stay together."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from misc.config import Augment
from misc.image.pixels import normalise_image
from voc12 import transforms
from voc12.transforms import TrainSample, augment_sample, resize_long_side, scale_sample


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def located(height: int = 40, width: int = 60) -> TrainSample:
    """Colour (row + 50, column + 50, 100), mask and saliency the row, planes row and column as whole numbers."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    image = np.stack([rows + 50, columns + 50, np.full_like(rows, 100)], -1)
    return TrainSample(image, rows.copy(), np.stack([rows, columns]), rows.copy())


def aligned(sample: TrainSample, fill: int) -> None:
    """Wherever there is a photograph, colour, mask, saliency and planes tell of the same place; elsewhere there is
    filling."""
    top, bottom, left, right = sample.box
    inside = np.zeros(sample.image.shape[:2], bool)
    inside[top:bottom, left:right] = True
    assert sample.mask is not None and sample.planes is not None
    assert np.array_equal(sample.image[inside][:, 0].astype(int) - 50, sample.mask[inside])
    assert np.array_equal(sample.planes[0][inside], sample.mask[inside])
    assert np.array_equal(sample.image[inside][:, 1].astype(int) - 50, sample.planes[1][inside])
    assert sample.saliency is not None and np.array_equal(sample.saliency[inside], sample.mask[inside])
    assert not sample.image[~inside].any() and not sample.saliency[~inside].any()
    assert (sample.mask[~inside] == 255).all() and (sample.planes[:, ~inside] == fill).all()


@pytest.mark.parametrize("place", ["random", "corner", "top_left"])
@pytest.mark.parametrize("size", [24, 50, 80])
@pytest.mark.parametrize("mirror_first", [False, True])
def test_crop_and_flip_keep_everything_together(size: int, place: str, mirror_first: bool) -> None:
    for seed in range(8):
        sample = located()
        if mirror_first:
            transforms.flip_sample(sample)
        transforms.crop_sample(sample, size, rng(seed), place=place, plane_fill=77)
        assert sample.image.shape == (size, size, 3) and sample.planes is not None
        assert sample.planes.shape == (2, size, size)
        aligned(sample, 77)
        top, bottom, left, right = sample.box
        assert (bottom - top, right - left) == (min(40, size), min(60, size))
        if place != "random":
            assert (top, left) == (0, 0)
        transforms.flip_sample(sample)
        aligned(sample, 77)
        assert sample.box == (top, bottom, size - right, size - left)


def test_crop_places_are_uniform_over_all_that_are_possible() -> None:
    starts, places, fixed = set(), set(), {"corner": set(), "top_left": set()}
    for seed in range(300):
        sample = located(3, 9)
        transforms.crop_sample(sample, 6, rng(seed))
        starts.add(int(sample.planes[1][sample.box[0], 0]))  # type: ignore[index]
        places.add(sample.box[0])
        for place, found in fixed.items():
            sample = located(3, 9)
            transforms.crop_sample(sample, 6, rng(seed), place=place)
            found.add(int(sample.planes[1][0, 0]))  # type: ignore[index]
    assert starts == {0, 1, 2, 3} and places == {0, 1, 2, 3}
    # int(u * 3): the published form of LargeFOV never reaches the last offset
    assert fixed == {"corner": {0, 1, 2}, "top_left": {0, 1, 2, 3}}


def test_mask_fill() -> None:
    sample = located(4, 4)
    transforms.crop_sample(sample, 6, rng(), place="corner", mask_fill=0)
    assert sample.mask is not None and not sample.mask[4:].any() and not sample.mask[:, 4:].any()


def test_flip_is_a_mirror() -> None:
    sample = located()
    transforms.flip_sample(sample)
    assert sample.planes is not None and np.array_equal(sample.planes, located().planes[..., ::-1])  # type: ignore
    aligned(sample, 0)


@pytest.mark.parametrize(
    ("size", "length", "wanted"), [((30, 50), 33, (20, 33)), ((50, 30), 33, (33, 20)), ((1, 90), 20, (1, 20))]
)
def test_long_side(size: tuple[int, int], length: int, wanted: tuple[int, int]) -> None:
    sample = located(*size)
    before = sample.image
    transforms.resize_long_side(sample, length)
    assert sample.image.shape[:2] == wanted == sample.mask.shape == sample.planes.shape[1:]  # type: ignore[union-attr]
    assert sample.box == (0, wanted[0], 0, wanted[1])
    plain = Image.fromarray(before).resize(wanted[::-1], Image.Resampling.BICUBIC)
    assert np.array_equal(sample.image, np.asarray(plain)) and np.array_equal(sample.saliency, sample.mask)
    linear = located(*size)
    transforms.resize_long_side(linear, length, "linear")
    assert np.array_equal(linear.image, cv2.resize(before, wanted[::-1], interpolation=cv2.INTER_LINEAR))
    nearest = cv2.resize(located(*size).mask, wanted[::-1], interpolation=cv2.INTER_NEAREST)  # type: ignore[arg-type]
    assert np.array_equal(linear.mask, nearest)


@pytest.mark.parametrize(("factor", "wanted"), [(0.5, (20, 30)), (1.26, (50, 75)), (0.71, (28, 42))])
@pytest.mark.parametrize("image_filter", ["cubic", "linear", "bicubic"])
def test_scale_cuts_sizes_and_keeps_places(factor: float, wanted: tuple[int, int], image_filter: str) -> None:
    sample = located()
    transforms.scale_sample(sample, factor, image_filter)
    assert sample.image.shape[:2] == wanted == sample.mask.shape == sample.planes.shape[1:]  # type: ignore[union-attr]
    assert set(np.unique(sample.mask)) <= set(range(40)) and np.array_equal(sample.saliency, sample.mask)
    away = np.abs(sample.image[..., 0].astype(int) - 50 - sample.mask)  # type: ignore[operator]
    assert away.max() <= 1.5 / factor
    assert np.abs(sample.image[..., 1].astype(int) - 50 - sample.planes[1]).max() <= 1.5 / factor  # type: ignore[index]


def test_scale_by_pil() -> None:
    sample = TrainSample(np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    transforms.flip_sample(sample)
    plain = Image.fromarray(np.ascontiguousarray(sample.image)).resize((23, 15), Image.Resampling.BICUBIC)
    transforms.scale_sample(sample, 0.79, "bicubic")
    assert np.array_equal(sample.image, np.asarray(plain))


@pytest.mark.parametrize(("name", "inside"), [("opencv", 0), ("pil", 1)])
def test_the_nearest_pixel_of_a_mask_is_opencvs_or_pils(name: str, inside: int) -> None:
    """At half size OpenCV takes the first pixel of each pair, PIL (which rounds its centre up) the second."""
    sample = TrainSample(np.zeros((2, 12, 3), np.uint8), np.arange(12, dtype=np.uint8)[None].repeat(2, 0))
    transforms.scale_sample(sample, 0.5, "linear", name)
    assert sample.mask is not None and sample.mask[0].tolist() == [2 * i + inside for i in range(6)]


def test_factors_of_a_set() -> None:
    recipe = Augment(order=("normalize", "scale", "crop"), scale_set=(0.5, 1.5), crop=60, crop_place="top_left")
    sides = set()
    for seed in range(20):
        sample = transforms.augment_sample(located(20, 30), recipe, "imagenet", rng(seed), rng(seed))
        sides.add(sample.box)
    assert sides == {(0, 10, 0, 15), (0, 30, 0, 45)}


@pytest.mark.parametrize("way", ["long_side", "scale"])
def test_labels_are_never_mixed(way: str) -> None:
    labels = np.where(np.arange(60) % 7 < 3, 255, 1).astype(np.uint8)[None].repeat(40, 0)
    sample = TrainSample(np.zeros((40, 60, 3), np.uint8), labels, labels[None])
    if way == "scale":
        transforms.scale_sample(sample, 0.77, "cubic")
    else:
        transforms.resize_long_side(sample, 47)
    assert set(np.unique(sample.mask)) == set(np.unique(sample.planes)) == {1, 255}  # type: ignore[arg-type]


def test_scores_are_scaled_smoothly_in_half_precision() -> None:
    planes = np.linspace(0, 1, 60, dtype=np.float16)[None, None].repeat(40, 1)
    sample = TrainSample(np.zeros((40, 60, 3), np.uint8), planes=planes)
    transforms.scale_sample(sample, 0.5, "linear")
    assert sample.planes is not None and sample.planes.dtype == np.float16 and sample.planes.shape == (1, 20, 30)
    assert np.abs(np.diff(sample.planes[0, 0].astype(float)) - 2 / 59).max() < 2e-3


def test_jitter_does_what_torchvision_does() -> None:
    image = np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    strengths = (0.3, 0.4, 0.2, 0.1)
    orders = set()
    for seed in range(6):
        sample = TrainSample(image)
        transforms.jitter_colours(sample, strengths, rng(seed))
        numbers = rng(seed)
        plain = Image.fromarray(image)
        order = numbers.permutation(4).tolist()
        orders.add(tuple(order))
        for number in order:
            low, high = (-0.1, 0.1) if number == 3 else (1 - strengths[number], 1 + strengths[number])
            name = ("brightness", "contrast", "saturation", "hue")[number]
            plain = getattr(functional, f"adjust_{name}")(plain, numbers.uniform(low, high))
        assert np.array_equal(sample.image, np.asarray(plain))
    assert len(orders) > 1


def test_jitter_with_strength_0_is_nothing() -> None:
    sample = located()
    transforms.jitter_colours(sample, (0, 0, 0, 0), rng())
    assert np.array_equal(sample.image, located().image)


def test_jitter_is_applied_as_often_as_asked() -> None:
    """Where it always is, no number is drawn for it."""
    def jittered(probability: float, seed: int) -> np.ndarray:
        recipe = Augment(order=("jitter", "normalize", "crop"), jitter=(0.4, 0, 0, 0), jitter_probability=probability,
                         crop=40)  # fmt: skip
        return augment_sample(located(), recipe, "imagenet", rng(seed), rng(seed)).image

    plain = [np.array_equal(jittered(0.3, seed), jittered(0.0, seed)) for seed in range(40)]
    assert 20 <= sum(plain) <= 36
    sample, numbers = located(), rng(5)
    transforms.jitter_colours(sample, (0.4, 0, 0, 0), numbers)
    sample.image = normalise_image(sample.image, "imagenet")
    transforms.crop_sample(sample, 40, numbers)
    assert np.array_equal(jittered(1.0, 5), sample.image)
    with pytest.raises(ValueError, match="jitter_probability"):
        Augment(jitter_probability=1.5)


def test_hsv() -> None:
    red = TrainSample(np.full((2, 2, 3), (200, 20, 20), np.uint8))
    transforms.shift_hsv(red, (60, 0, 0))  # a third of OpenCV's half circle: green
    assert red.image[0, 0].tolist() == [20, 200, 20]
    red = TrainSample(np.full((2, 2, 3), (200, 20, 20), np.uint8))
    transforms.shift_hsv(red, (-60, 0, 100))  # backwards over zero: blue; the value is cut at 255
    assert red.image[0, 0, 2] == 255 and red.image[0, 0, 0] < 40 and red.image[0, 0, 1] < 40


def test_operations_come_in_the_order_of_the_recipe() -> None:
    image = np.full((4, 4, 3), 200, np.uint8)
    black = augment_sample(TrainSample(image), Augment(order=("crop", "normalize"), crop=6), "imagenet", rng(), rng())
    zero = augment_sample(TrainSample(image), Augment(order=("normalize", "crop"), crop=6), "imagenet", rng(), rng())
    assert black.image.dtype == zero.image.dtype == np.float32 and black.box == zero.box
    canvas = np.ones((6, 6), bool)
    canvas[zero.box[0] : zero.box[1], zero.box[2] : zero.box[3]] = False
    assert np.array_equal(black.image[~canvas], zero.image[~canvas])
    assert not zero.image[canvas].any()
    assert np.allclose(black.image[canvas], normalise_image(np.zeros((1, 1, 3), np.uint8), "imagenet")[0, 0])


def test_scale_of_a_batch_is_common_and_the_rest_is_not() -> None:
    recipe = Augment(order=("scale", "normalize"), scale_per_batch=True)
    shapes = {augment_sample(located(), recipe, "imagenet", rng(i), rng(7)).image.shape for i in range(5)}
    assert len(shapes) == 1
    shapes = {augment_sample(located(), recipe, "imagenet", rng(0), rng(i)).image.shape for i in range(5)}
    assert len(shapes) > 1


def test_no_global_random_state_is_touched() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    wanted = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    order = ("long_side", "hsv", "jitter", "scale", "flip", "normalize", "crop")
    augment_sample(located(), Augment(order=order, long_side=(30, 50), crop=32), "imagenet", rng(), rng())
    order = ("resized_crop", "rand_augment", "normalize", "erase")
    augment_sample(TrainSample(located().image), Augment(order=order, erase=1.0, crop=32), "imagenet", rng(), rng())
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted


def test_resized_crop_keeps_everything_together() -> None:
    """Where the crop only enlarges, colour, mask and planes of a place are of the same row and column, nearly."""
    shares = []
    for seed in range(12):
        sample = located(80, 120)
        transforms.crop_and_resize(sample, 128, (0.2, 0.5), rng(seed))
        assert sample.image.shape == (128, 128, 3) and sample.box == (0, 128, 0, 128)
        assert sample.mask is not None and sample.planes is not None
        assert sample.mask.shape == (128, 128) and sample.planes.shape == (2, 128, 128)
        assert np.abs(sample.image[..., 0].astype(int) - 50 - sample.mask).max() <= 1
        assert np.abs(sample.image[..., 1].astype(int) - 50 - sample.planes[1]).max() <= 1
        height, width = (int(np.ptp(plane)) + 1 for plane in sample.planes)
        shares.append(height * width / (80 * 120))
        assert 0.7 < width / height < 1.4
    assert 0.18 < min(shares) < 0.3 and 0.4 < max(shares) < 0.52


def seeded(seed: int) -> None:
    """The global streams as a sample with the generator ``rng(seed)`` lends them."""
    number = int(rng(seed).integers(2**32))
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def test_rand_augment_and_erase_are_those_of_timms_training_transform() -> None:
    from timm.data import create_transform

    policy = Augment().policy
    whole = create_transform(
        40, is_training=True, auto_augment=policy, interpolation="bicubic", re_prob=0.5, re_mode="pixel"
    )
    policy_op, final = (
        next(op for op in whole.transforms if type(op).__name__ == name) for name in ("RandAugment", "RandomErasing")
    )
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    values = normalise_image(image, "imagenet")
    changed = erased = 0
    for seed in range(30):
        seeded(seed)
        expected = np.asarray(policy_op(Image.fromarray(image)))
        sample = TrainSample(image)
        transforms.apply_rand_augment(sample, policy, "imagenet", rng(seed))
        assert np.array_equal(sample.image, expected)
        changed += not np.array_equal(expected, image)
        seeded(seed)
        expected = final(torch.from_numpy(values.transpose(2, 0, 1).copy())).permute(1, 2, 0).numpy()
        sample = TrainSample(values)
        transforms.erase_rectangle(sample, 0.5, rng(seed))
        assert np.array_equal(sample.image, expected)
        erased += not np.array_equal(expected, values)
    assert 10 < changed < 30 and 5 < erased < 25


def test_rand_augment_refuses_what_it_would_not_move() -> None:
    with pytest.raises(ValueError, match="rand_augment"):
        transforms.apply_rand_augment(located(), "rand-m9", "imagenet", rng())


def test_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="mask is 40 x 30 .* image 30 x 40"):
        TrainSample(np.zeros((30, 40, 3), np.uint8), np.zeros((40, 30), np.uint8))


@pytest.mark.parametrize(
    "order", [("normalize", "jitter", "crop"), ("crop", "scale", "normalize"), ("zoom", "normalize"), ("crop",),
              ("erase", "normalize"), ("normalize", "rand_augment"), ("normalize", "resized_crop")]
)
def test_impossible_orders(order: tuple) -> None:
    with pytest.raises(ValueError, match="order"):
        Augment(order=order)


def test_square_ignores_the_aspect_and_keeps_places() -> None:
    sample = located(40, 60)
    smooth = np.repeat(np.linspace(0, 200, 60).astype(np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    sample.image = smooth
    transforms.resize_square(sample, 30)
    assert sample.image.shape == (30, 30, 3) and sample.box == (0, 30, 0, 30)
    wanted = np.asarray(Image.fromarray(smooth).resize((30, 30), Image.Resampling.BILINEAR))
    assert np.array_equal(sample.image, wanted)
    assert sample.mask is not None and sample.planes is not None
    assert np.array_equal(sample.planes[0], sample.mask) and sample.mask[-1, 0] == 39 and sample.planes[1][0, -1] == 59
    with pytest.raises(ValueError, match="square before normalize"):
        Augment(order=("normalize", "square", "crop"))


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_pillow_s_filters_of_scale_and_resized_crop(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    sample = TrainSample(image.copy())
    transforms.scale_sample(sample, 1.5, name)
    kind = Image.Resampling[name.upper()]
    assert np.array_equal(sample.image, np.asarray(Image.fromarray(image).resize((90, 60), kind)))
    sample = TrainSample(image.copy())
    transforms.crop_and_resize(sample, 30, (1.0, 1.0), rng(0), name)
    other = TrainSample(image.copy())
    transforms.crop_and_resize(other, 30, (1.0, 1.0), rng(0), {"bicubic": "bilinear", "bilinear": "bicubic"}[name])
    assert sample.image.shape == (30, 30, 3) and not np.array_equal(sample.image, other.image)


def test_scale_by_factor_rounds_sizes_and_samples_by_the_factor() -> None:
    """deeplab.md A.2: OpenCV is called with the factor."""
    random = np.random.default_rng(0)
    image, mask = random.integers(0, 256, (23, 31, 3), np.uint8), random.integers(0, 5, (23, 31), np.uint8)
    factor = 1.37  # 31.51 x 42.47
    made = {}
    for by in ("factor", "size"):
        sample = TrainSample(image, mask)
        scale_sample(sample, factor, "cubic", by=by)
        made[by] = sample
    assert made["factor"].image.shape[:2] == made["factor"].mask.shape == (32, 42)
    assert made["size"].image.shape[:2] == (31, 42)
    expected = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    np.testing.assert_array_equal(made["factor"].image, expected)
    rows = np.minimum((np.arange(32) / factor).astype(int), 22)
    columns = np.minimum((np.arange(42) / factor).astype(int), 30)
    np.testing.assert_array_equal(made["factor"].mask, mask[rows][:, columns])
    assert made["factor"].box == (0, 32, 0, 42)


def test_saliency_is_resized_as_opencv_does_where_the_image_is() -> None:
    """getam.md section 6: the source index is rounded down; PIL takes the nearest centre."""
    saliency = np.arange(7, dtype=np.uint8)[None].repeat(5, 0)
    for image_filter, columns in (("linear", [0, 1, 3, 5]), ("bicubic", [0, 2, 4, 6])):
        sample = TrainSample(np.zeros((5, 7, 3), np.uint8), saliency=saliency)
        resize_long_side(sample, 4, image_filter)
        assert sample.saliency[0].tolist() == columns
