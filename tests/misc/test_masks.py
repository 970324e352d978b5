"""misc/infer/masks.py: what the golden cases don't say about scales, mirrors, merging and the CRF."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from misc.config import SegInference, override
from misc.crf.dense import CRFSettings, DenseCRF
from misc.image.pixels import normalise_image, to_tensor
from misc.infer.masks import segment, segment_inputs, segment_together, with_crf

SCALES = (0.5, 1.0, 1.3)
MEAN = SegInference(scales=SCALES, flip=True, resize="cubic", merge="mean_logits", align_corners=True)
MAX = SegInference(scales=SCALES, resize="linear", merge="max_softmax", align_corners=False)
SUM = SegInference(scales=SCALES, flip=True, resize="bicubic", merge="sum_logits", align_corners=False)
SUM_MAX = SegInference(scales=SCALES, resize="bilinear", merge="sum_max_logits", align_corners=False)
MAX_SUM = SegInference(scales=SCALES, squash=24, resize="bilinear", merge="max_sum_logits", align_corners=False)


def picture(height: int = 21, width: int = 34) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def network(images: Tensor) -> Tensor:
    """Five labels at half resolution, not symmetric."""
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return F.conv2d(images, weight, stride=2, padding=1)


def plain(image: np.ndarray, infer: SegInference) -> np.ndarray:
    """All results kept, merged at the end, as published."""
    values = normalise_image(image, "imagenet")
    height, width = size = image.shape[:2]
    if infer.squash:
        height = width = infer.squash
        values = F.interpolate(to_tensor(values)[None], size=(height, width), mode="bilinear")[0]
        values = values.permute(1, 2, 0).numpy()
    results = []
    for factor in infer.scales:
        if infer.resize == "bicubic":
            inner = round(width * factor), round(height * factor)
            small = np.asarray(Image.fromarray(image).resize(inner, Image.Resampling.BICUBIC))
            scaled = to_tensor(normalise_image(small, "imagenet"))[None]
        elif infer.resize == "cubic":
            inner = round(width * factor), round(height * factor)
            scaled = to_tensor(cv2.resize(values, inner, interpolation=cv2.INTER_CUBIC))[None]
        else:
            inner, align = (int(height * factor), int(width * factor)), infer.resize == "linear"
            scaled = F.interpolate(to_tensor(values)[None], size=inner, mode="bilinear", align_corners=align)
        for mirrored in (False, True) if infer.flip else (False,):
            logits = network(scaled.flip(-1) if mirrored else scaled)
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=infer.align_corners)
            results.append(logits.flip(-1) if mirrored else logits)
    stacked = torch.cat(results)
    if infer.merge == "mean_logits":
        return stacked.mean(0).softmax(0).numpy()
    if infer.merge == "sum_logits":
        return stacked.sum(0).softmax(0).numpy()
    passes = stacked.unflatten(0, (len(infer.scales), -1))  # (scales, 1 or 2, n, H, W)
    if infer.merge == "sum_max_logits":
        return passes.sum(1).amax(0).softmax(0).numpy()
    if infer.merge == "max_sum_logits":
        return passes.amax(1).sum(0).softmax(0).numpy()
    return stacked.softmax(1).amax(0).numpy()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "infer",
    [MEAN, MAX, SUM, SUM_MAX, MAX_SUM, override(MEAN, {"resize": "linear"}), override(MAX, {"resize": "cubic"}),
     override(SUM_MAX, {"squash": 30})],
)  # fmt: skip
def test_running_merge_equals_keeping_everything(infer: SegInference, flip: bool) -> None:
    infer = override(infer, {"flip": flip})
    scores = segment(network, picture(), infer, "imagenet")
    assert scores.shape == (5, 21, 34)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, plain(picture(), infer), atol=1e-5)


def test_sizes_are_rounded_for_cubic_and_truncated_for_linear() -> None:
    seen = []

    def record(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return network(images)

    segment(record, picture(21, 34), SegInference(scales=(0.27, 0.55)), "imagenet")
    segment(record, picture(21, 34), SegInference(scales=(0.27, 0.55), resize="linear"), "imagenet")
    assert seen == [(1, 3, 6, 9), (1, 3, 12, 19), (1, 3, 5, 9), (1, 3, 11, 18)]


@pytest.mark.parametrize("resize, kind", [("linear", cv2.INTER_LINEAR), ("cubic", cv2.INTER_CUBIC)])
def test_squares_have_the_sides_that_the_scales_say(resize: str, kind: int) -> None:
    image, seen = picture(21, 34), []

    def record(images: Tensor) -> Tensor:
        seen.append(images[0])
        return network(images)

    infer = SegInference(scales=(16, 40), square=True, resize=resize)
    assert segment(record, image, infer, "imagenet").shape == (5, 21, 34)
    for images, side in zip(seen, (16, 40), strict=True):
        values = cv2.resize(normalise_image(image, "imagenet"), (side, side), interpolation=kind)
        assert torch.equal(images, to_tensor(values))
    with pytest.raises(ValueError, match="sides of 8 pixels or more"):
        SegInference(square=True)


def test_a_scale_never_gives_an_empty_image() -> None:
    for resize in ("cubic", "linear"):
        scores = segment(network, picture(3, 4), SegInference(scales=(0.1,), resize=resize), "imagenet")
        assert scores.shape == (5, 3, 4)


def test_image_and_mirror_go_through_the_network_together() -> None:
    seen = []

    def record(images: Tensor) -> Tensor:
        seen.append(images)
        return network(images)

    segment(record, picture(), MEAN, "imagenet")
    assert len(seen) == len(SCALES)
    for images in seen:
        assert torch.equal(images[0], images[1].flip(-1))


def test_mirrored_image_gives_mirrored_scores() -> None:
    for infer in (MEAN, override(MAX, {"flip": True})):
        scores = segment(network, picture(), infer, "imagenet")
        mirrored = segment(network, np.ascontiguousarray(picture()[:, ::-1]), infer, "imagenet")
        np.testing.assert_allclose(mirrored[..., ::-1], scores, atol=1e-4)


def test_the_network_gets_normalised_values_and_no_gradient() -> None:
    def check(images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        expected = normalise_image(picture(), "caffe_bgr")
        torch.testing.assert_close(images[0], to_tensor(expected), rtol=1e-5, atol=1e-4)
        return network(images)

    segment(check, picture(), SegInference(resize="linear"), "caffe_bgr")


def test_the_networks_output_is_left_alone() -> None:
    """A network may hand out a tensor that it keeps."""
    kept = torch.randn(1, 5, 21, 34)
    before = kept.clone()
    segment(lambda images: kept, picture(), SegInference(scales=(1.0, 1.0)), "imagenet")
    assert torch.equal(kept, before)


def test_half_precision_logits_are_merged_in_single_precision() -> None:
    scores = segment(lambda images: network(images).bfloat16(), picture(), MEAN, "imagenet")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("image", [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.float32)])
def test_other_images_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 RGB"):
        segment(network, image, MEAN, "imagenet")


def scores_and_image() -> tuple[np.ndarray, np.ndarray]:
    scores = np.random.default_rng(1).random((4, 21, 34)).astype(np.float32)
    return scores, picture()


def test_no_iterations_means_no_crf() -> None:
    scores, image = scores_and_image()
    infer = SegInference(crf=CRFSettings(iterations=0))
    assert with_crf(scores, image, infer, "imagenet") is scores


def test_crf_sees_the_image_or_the_truncated_one() -> None:
    scores, image = scores_and_image()
    settings = CRFSettings(iterations=2)
    np.testing.assert_array_equal(
        with_crf(scores, image, SegInference(crf=settings), "imagenet"), DenseCRF(image, settings)(scores)
    )
    truncated = with_crf(scores, image, SegInference(crf=settings, crf_truncates_image=True), "imagenet")
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    # published: normalised in double precision, kept and recovered in single precision
    values = ((image / 255 - mean) / std).astype(np.float32)
    recovered = ((values * np.float32(std) + np.float32(mean)) * np.float32(255)).clip(0, 255).astype(np.uint8)
    lower = image.astype(int) - recovered
    assert lower.min() == 0
    assert lower.max() == 1
    np.testing.assert_array_equal(truncated, DenseCRF(recovered, settings)(scores))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("infer", [MEAN, MAX, SUM, override(SUM_MAX, {"squash": 30})])
def test_images_at_once_have_the_scores_of_images_one_by_one(infer: SegInference, flip: bool) -> None:
    infer = override(infer, {"flip": flip})
    images = [np.roll(picture(), 5 * number, 1) for number in range(3)]
    counts: list[int] = []

    def counted(batch: Tensor) -> Tensor:
        counts.append(len(batch))
        return network(batch)

    inputs = [list(segment_inputs(image, infer, "imagenet")) for image in images]
    found = segment_together(counted, images, infer, "cpu", inputs)
    assert counts == [6 if flip else 3] * len(SCALES) and not np.allclose(found[0], found[1], atol=0.01)
    for image, scores in zip(images, found, strict=True):
        np.testing.assert_allclose(scores, segment(network, image, infer, "imagenet"), atol=1e-5)
