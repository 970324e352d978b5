"""The refiner sam against its rule, written anew pixel by pixel, and what the rule is for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from misc.crf.dense import CRFSettings
from misc.image.cam import Cam
from misc.image.picture import Picture
from misc.image.segments import Segments
from net.refine.sam import SamOptions, SamRefiner, vote


def plain_vote(label: np.ndarray, masks: np.ndarray, labels: int, options: SamOptions) -> np.ndarray:
    """The rule as it is stated, in sets of pixels."""
    pixels = {c: set(map(tuple, np.argwhere(label == c))) for c in range(labels)}
    winners = []
    for number, mask in enumerate(masks):
        segment = set(map(tuple, np.argwhere(mask)))
        shared = [len(segment & pixels[c]) for c in range(1, labels)]
        if not any(shared):
            continue
        c = 1 + shared.index(max(shared))
        inside = max(shared)
        by_segment = inside / len(segment) > options.segment_share
        by_class = inside / len(pixels[c]) > options.class_share and inside / len(segment) >= options.least
        if by_segment or by_class:
            winners.append((len(segment), -number, c, segment))
    result = np.zeros(label.shape, int)
    for _, _, c, segment in sorted(winners, key=lambda w: (-w[0], -w[1])):
        for row, column in segment:
            result[row, column] = c
    return result


@pytest.mark.parametrize("seed", range(20))
def test_votes_are_those_of_the_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = np.repeat(np.repeat(rng.integers(0, 4, (4, 5)), 3, 0), 3, 1)
    masks = np.zeros((12, 12, 15), bool)
    for mask in masks:
        y, x = rng.integers(0, 9), rng.integers(0, 12)
        mask[y : y + rng.integers(1, 12), x : x + rng.integers(1, 12)] = True
    options = SamOptions(class_share=0.6, least=0.15)
    found = vote(label, Segments.of_masks(masks, label.shape), 4, options)
    assert np.array_equal(found, plain_vote(label, masks, 4, options))
    assert (found > 0).any()


def refined(maps: np.ndarray, masks: list[np.ndarray], **settings: object) -> np.ndarray:
    """(H, W): arg-max of the refined scores."""
    size = maps.shape[1:]
    rgb = np.zeros((*size, 3), np.uint8)
    picture = replace(Picture.of_rgb(rgb, "imagenet"), segments=Segments.of_masks(masks, size))
    scores = SamRefiner().refine(picture, Cam.of_maps(np.arange(len(maps)), maps), SamOptions("constant", **settings))
    assert scores.shape == (len(maps) + 1, *size) and scores.dtype == np.float32
    return scores.argmax(0)


def square(size: tuple[int, int], top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_a_map_of_an_objects_head_becomes_the_object() -> None:
    size = (20, 20)
    whole, head = square(size, 4, 4, 12), square(size, 4, 4, 5)
    maps = head[None].astype(np.float32)
    everything = np.ones(size, bool)
    assert np.array_equal(refined(maps, [everything, whole]) == 1, whole)
    # the whole picture as a segment takes nothing of an object of 6 % of it
    assert np.array_equal(refined(maps, [everything]) == 1, head)
    assert refined(maps, [everything], least=0.05).all()
    # a segment with less than half of it in the class, and less than most of the class in it
    assert np.array_equal(refined(maps, [square(size, 7, 7, 12)]) == 1, head)


def test_most_of_a_class_is_85_percent_unless_it_is_set() -> None:
    size = (20, 20)
    strip = np.zeros(size, bool)
    strip[4:7] = True  # 60 pixels, of which a segment of 280 holds 70 %: 15 % of it
    segment = np.zeros(size, bool)
    segment[:, :14] = True
    maps = strip[None].astype(np.float32)
    assert np.array_equal(refined(maps, [segment]) == 1, strip)
    assert np.array_equal(refined(maps, [segment], class_share=0.5) == 1, strip | segment)
    segment[:, :18] = True  # 90 %
    assert np.array_equal(refined(maps, [segment]) == 1, strip | segment)
    assert np.array_equal(refined(maps, [segment], class_share=1.0) == 1, strip)


def test_nested_segments_the_smallest_counts_and_the_rest_keeps_its_scores() -> None:
    size = (20, 20)
    rider, horse = square(size, 6, 6, 4), square(size, 3, 3, 14)
    maps = np.stack([square(size, 3, 3, 10) & ~rider, rider]).astype(np.float32) * 0.9
    maps[0, 19, 19] = 0.8  # far from any segment
    for order in ([rider, horse], [horse, rider]):
        found = refined(maps, order)
        assert np.array_equal(found == 2, rider) and found[19, 19] == 1
        assert np.array_equal(found == 1, (horse & ~rider) | (np.indices(size).sum(0) == 38))


def test_without_segments_the_label_stays_and_without_their_file_it_is_said() -> None:
    maps = square((9, 9), 2, 2, 4)[None].astype(np.float32)
    assert np.array_equal(refined(maps, []), square((9, 9), 2, 2, 4))
    with pytest.raises(ValueError, match="--segments DIR"):
        picture = Picture(np.zeros((9, 9, 3), np.uint8), torch.zeros(3, 9, 9))
        SamRefiner().refine(picture, Cam.of_maps(np.arange(1), maps), SamOptions())


def test_a_crf_before_the_vote() -> None:
    maps = np.full((1, 12, 12), 0.45, np.float32)
    maps[:, :, :6] = 0.2
    settings = CRFSettings(iterations=3, bilateral_sxy=5)
    assert refined(maps, [], crf=settings)[:, :4].max() == 0
