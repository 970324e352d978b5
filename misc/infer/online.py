"""Maps and labels of a training batch, made by a network while it trains (toco.md sections 3 and 4, more.md section 3).

Knows no network: it is given a function from images to raw maps. Only the maps of classes that are present are merged;
labels are 0 background, class + 1, 255 (IGNORE) unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from misc.image.labels import IGNORE
from misc.image.pixels import resize_maps
from misc.infer.cams import MAP_MERGES, scale_by_span
from misc.propagate.par import PAR, PixelAdaptive


def present_classes(tags: Tensor) -> tuple[Tensor, Tensor]:
    """The classes of each image in ascending order: (B, C) in {0, 1} -> keys (B, K) int64 and real (B, K) bool, K the
    largest number of classes of an image (at least 1); where ``real`` is false an image has fewer."""
    count = max(1, int(tags.sum(1).max()))
    real, keys = tags.sort(dim=1, descending=True, stable=True)
    return keys[:, :count], real[:, :count] > 0


def merge_batch_maps(
    raw: Callable[[Tensor], Sequence[Tensor]],
    images: Tensor,
    keys: Tensor,
    scales: Sequence[float],
    merges: Sequence[str],
) -> list[Tensor]:
    """Maps of several scales and the mirror, merged at image size, each class from its minimum to its maximum.

    Args:
        raw: images (2 B, 3, h, w) -> one or more kinds of raw maps (2 B, C, h', w').
        images: (B, 3, H, W) normalised.
        keys: (B, K) int64, the classes that are merged of each image.
        scales: factors of the sides, whose fraction is cut off; bilinear.
        merges: a rule of ``misc.infer.cams.MAP_MERGES`` for each kind.

    Returns:
        For each kind (B, K, H, W) float32 in [0, 1].
    """
    size = images.shape[-2:]
    sums: list[Tensor] = []
    for scale in scales:
        scaled = images if scale == 1 else resize_maps(images, [int(scale * side) for side in size])
        kinds = raw(torch.cat([scaled, scaled.flip(-1)]))
        merged = []
        for maps, rule in zip(kinds, merges, strict=True):
            index = keys.repeat(2, 1)[:, :, None, None].expand(-1, -1, *maps.shape[-2:])
            plain, mirrored = resize_maps(maps.gather(1, index), size).chunk(2)
            merged.append(MAP_MERGES[rule](torch.stack([plain, mirrored.flip(-1)])))
        sums = [total.add_(maps) for total, maps in zip(sums, merged, strict=True)] if sums else merged
    return [scale_by_span(total) for total in sums]


def threshold_label(maps: Tensor, keys: Tensor, high: float, low: float) -> Tensor:
    """Label from the largest map v of a pixel: maps (B, K, H, W), 0 for classes that are absent, keys (B, K) ->
    (B, H, W) int64: 0 where v <= low, class + 1 where v > high, 255 between (toco.md section 4)."""
    value, place = maps.max(1)  # (B, H, W)
    label = keys.gather(1, place.flatten(1)).view_as(place) + 1
    label = torch.where(value > high, label, IGNORE)
    return torch.where(value <= low, 0, label)


def region_of_interest(maps: Tensor, high: float, low: float) -> Tensor:
    """(B, K, H, W) -> (B, H, W) int64: 0 where no map is above ``low``, 2 where one is ``high`` or above, else 1."""
    value = maps.amax(1)
    return (value > low).long() + (value >= high).long()


def score_planes(maps: Tensor, threshold: float, size: Sequence[int]) -> Tensor:
    """Probabilities of the background and the classes of one image: maps (K, H, W) -> (K + 1, h, w), the softmax over
    [threshold, maps] resized to ``size``."""
    background = maps.new_full((1, *maps.shape[1:]), threshold)
    return resize_maps(torch.cat([background, maps])[None], size)[0].softmax(0)


def refined_label(
    colours: Tensor, maps: Tensor, keys: Tensor, high: float, low: float, iterations: int
) -> Tensor:
    """Label of one image that follows its colours: two constant background scores, each refined by PAR at half size,
    combined (toco.md section 4).

    Args:
        colours: (3, H, W) RGB in [0, 1].
        maps: (K, H, W) of the present classes; K may be 0.
        keys: (K,) int64.
        high, low: background scores.
        iterations: of PAR.

    Returns:
        (H, W) int64: the label against the high score where it is a class, 0 where both are 0, 255 where only the low
        one is a class.
    """
    size = colours.shape[-2:]
    half = [side // 2 for side in size]
    refine = PixelAdaptive(resize_maps(colours[None], half), PAR)
    values = torch.cat([keys.new_zeros(1), keys + 1])
    planes = torch.cat([score_planes(maps, score, half) for score in (high, low)])[None]  # (1, 2 (K + 1), h, w)
    refined = resize_maps(refine(planes, iterations), size)[0]
    sure, any_class = (values[part.argmax(0)] for part in refined.chunk(2))
    return torch.where((sure == 0) & (any_class != 0), IGNORE, sure)
