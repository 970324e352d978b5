"""Multi-scale testing of a segmentation network: scales, mirrors, merging, CRF (deeplab.md A.3, B.3, C.4).

The network is given as a function from normalised images to logits. Results are accumulated over the scales, so memory
does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from misc.config import SegInference
from misc.crf.dense import DenseCRF
from misc.image.picture import truncate_image
from misc.image.pixels import normalise_image, scaled_size, squash_values, stretch_values, to_tensor, truncated_size

Logits = Callable[[Tensor], Tensor]
"""Images (B, 3, h, w), normalised -> logits (B, n, h', w') of any resolution."""


@dataclass(frozen=True)
class MaskMerge:
    """How the logits of an image's passes become scores."""

    mirror: Callable[[Tensor], Tensor]
    """Of one scale: (1 or 2, n, h, w), the image's and those of its mirror turned back -> (n, h, w)."""
    scales: Callable[[Tensor, Tensor], Tensor]
    """What the scales have been merged to so far, and the next one."""
    end: Callable[[Tensor, int], Tensor]
    """What all scales were merged to, (n, H, W), and their number -> scores."""
    linear: bool
    """Whether ``mirror`` commutes with the resize."""
    on_grid: bool = False
    """Whether scales are merged on the grid of the first one's logits, and resized to the image then."""


MASK_MERGES = {
    "mean_logits": MaskMerge(lambda maps: maps.mean(0), Tensor.add_, lambda x, n: x.div_(n).softmax(0), True),
    "sum_logits": MaskMerge(lambda maps: maps.sum(0), Tensor.add_, lambda x, n: x.softmax(0), True),
    "max_softmax": MaskMerge(lambda maps: maps.softmax(1).amax(0), torch.maximum, lambda x, n: x, False),
    "sum_max_logits": MaskMerge(lambda maps: maps.sum(0), torch.maximum, lambda x, n: x.softmax(0), True),
    "max_sum_logits": MaskMerge(lambda maps: maps.amax(0), Tensor.add_, lambda x, n: x.softmax(0), False),
    "mean_grid_logits": MaskMerge(
        lambda maps: maps.mean(0), Tensor.add_, lambda x, n: x.div_(n).softmax(0), True, on_grid=True
    ),
}
"""By the name in ``SegInference.merge`` (deeplab.md A.3, B.3 and D.3, toco.md section 8, weclip.md section 6)."""


def segment(
    logits: Logits,
    image: np.ndarray,
    infer: SegInference,
    normalisation: str,
    device: torch.device | str = "cpu",
    inputs: Iterable[Tensor] | None = None,
) -> np.ndarray:
    """Merged scores of one image, before the CRF.

    The image is resized for each of ``infer.scales`` (after normalisation, except for ``bicubic``). An image and its
    mirror image are one batch. Logits are resized to the image and merged by the rule ``infer.merge`` of
    ``MASK_MERGES``; the scores of max_softmax don't sum to one (deeplab.md B.3).

    Args:
        logits: the network, on ``device`` and in evaluation mode; called with 1 image, or 2 with ``infer.flip``.
        image: (H, W, 3) uint8 RGB, any H and W.
        infer: scales, mirror, filters and merging.
        normalisation: a name for misc.image.pixels.find_normalisation.
        device: where the network runs and results are merged.
        inputs: what ``segment_inputs`` gives for this image, if it is there already.

    Returns:
        (n, H, W) float32 in [0, 1].

    Raises:
        ValueError: ``image`` is not (H, W, 3) uint8.
    """
    inputs = segment_inputs(image, infer, normalisation) if inputs is None else inputs
    return merge_passes(logits, inputs, image.shape[:2], infer, device)


def segment_together(
    logits: Logits,
    images: Sequence[np.ndarray],
    infer: SegInference,
    device: torch.device | str,
    inputs: Sequence[Sequence[Tensor]],
) -> list[np.ndarray]:
    """``segment`` of several images of one size, which go through the network as one batch a scale.

    Args:
        logits: the network, as for ``segment``; it treats the images of a batch apart.
        images: (H, W, 3) uint8 RGB each.
        infer, device: as for ``segment``.
        inputs: what ``segment_inputs`` gives for each image.
    """
    with torch.inference_mode():
        passes = [compute_logits(logits, scaled, infer, device) for scaled in zip(*inputs, strict=True)]
    return [
        merge_logits((maps[number] for maps in passes), image.shape[:2], infer) for number, image in enumerate(images)
    ]


def segment_inputs(image: np.ndarray, infer: SegInference, normalisation: str) -> Iterator[Tensor]:
    """Network inputs of one image, (1, 3, h, w) one a scale; arguments and errors as for ``segment``."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"Testing needs a (H, W, 3) uint8 RGB image, got {image.shape} {image.dtype}: convert it.")
    if infer.resize == "bicubic":
        return (_resized_first(image, factor, infer, normalisation) for factor in infer.scales)
    return scale_values(normalise_image(image, normalisation), infer)


def merge_passes(
    logits: Logits, inputs: Iterable[Tensor], size: tuple[int, int], infer: SegInference, device: torch.device | str
) -> np.ndarray:
    """Scores (n, H, W) float32 at ``size`` from the network inputs of an image, (1, 3, h, w) one a scale; see
    ``segment``."""
    with torch.inference_mode():
        return merge_logits((compute_logits(logits, [scaled], infer, device)[0] for scaled in inputs), size, infer)


def compute_logits(
    logits: Logits, images: Sequence[Tensor], infer: SegInference, device: torch.device | str
) -> list[Tensor]:
    """Logits of images (1, 3, h, w) of one size, computed as one batch: of each image (1, n, h', w') float32, or with
    those of its mirror image, turned back, (2, n, h', w')."""
    if infer.flip:
        images = [torch.cat([image, image.flip(-1)]) for image in images]  # (2, 3, h, w): the image and its mirror
    maps = logits(torch.cat(list(images)).to(device)).float()  # (B or 2B, n, h', w')
    if not infer.flip:
        return list(maps.split(1))
    return [torch.cat([pair[:1], pair[1:].flip(-1)]) for pair in maps.split(2)]


def merge_logits(passes: Iterable[Tensor], size: tuple[int, int], infer: SegInference) -> np.ndarray:
    """Scores (n, H, W) float32 at ``size`` from an image's logits, one entry a scale, as of ``compute_logits``."""
    rule = MASK_MERGES[infer.merge]
    merged: Tensor | None = None
    with torch.inference_mode():
        for maps in passes:
            if rule.linear:  # then the resize, linear too, may come last: half the work at full size
                maps = rule.mirror(maps)[None]
            at = size if not rule.on_grid else maps.shape[2:] if merged is None else merged.shape[1:]
            maps = F.interpolate(maps, size=tuple(at), mode="bilinear", align_corners=infer.align_corners)
            one = maps[0] if rule.linear else rule.mirror(maps)  # (n, H, W)
            merged = one if merged is None else rule.scales(merged, one)
        assert merged is not None  # SegInference has at least one scale
        if merged.shape[1:] != tuple(size):
            merged = F.interpolate(merged[None], size=size, mode="bilinear", align_corners=infer.align_corners)[0]
        merged = rule.end(merged, len(infer.scales))
    return merged.cpu().numpy()


def with_crf(
    scores: np.ndarray,
    image: np.ndarray,
    infer: SegInference,
    normalisation: str,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Sharpen scores by ``infer.crf`` over all labels; unchanged if it has 0 iterations.

    Args:
        scores: (n, H, W) float32, as ``segment`` gives them.
        image: (H, W, 3) uint8 RGB, the same H and W.
        infer: settings of the CRF, and which image it gets.
        normalisation: as for ``segment``; needed where ``infer.crf_truncates_image``.
        device: where the CRF is computed.

    Returns:
        (n, H, W) float32, summing to one if the CRF was applied.

    Raises:
        ValueError: scores and image differ in size, or the scores contain NaN.
    """
    if infer.crf.iterations == 0:
        return scores
    if infer.crf_truncates_image:
        image = truncate_image(image, normalisation)
    return DenseCRF(image, infer.crf, device)(scores)


def _resized_first(image: np.ndarray, factor: float, infer: SegInference, normalisation: str) -> Tensor:
    """The (H, W, 3) uint8 image resized by PIL and normalised then: (1, 3, h, w), sizes rounded (deeplab.md D.3)."""
    h, w = scaled_size((1, 1) if infer.square else image.shape[:2], factor)
    small = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
    return to_tensor(normalise_image(np.asarray(small), normalisation))[None]


def scale_values(values: np.ndarray, infer: SegInference) -> Iterator[Tensor]:
    """A normalised image (H, W, 3) at every scale: (1, 3, h, w). The size is rounded for cubic, truncated for linear
    and bilinear (deeplab.md A.3, B.3); of a square it is the scale itself (getam.md section 7). A long side is
    truncated too, so that it may come out a pixel shorter (weclip.md section 6)."""
    if infer.squash:
        values = squash_values(values, infer.squash)
    if infer.long_side:
        ratio = infer.long_side / max(values.shape[:2])
        values = stretch_values(values, truncated_size(values.shape[:2], ratio))
    for factor in infer.scales:
        if infer.square:
            size = scaled_size((1, 1), factor)
        else:
            size = (scaled_size if infer.resize == "cubic" else truncated_size)(values.shape[:2], factor)
        if infer.resize == "cubic" or (infer.square and infer.resize == "linear"):
            kind = {"cubic": cv2.INTER_CUBIC, "linear": cv2.INTER_LINEAR}[infer.resize]
            yield to_tensor(cv2.resize(values, size[::-1], interpolation=kind))[None]
        elif infer.resize == "bilinear_factor" and factor != 1:
            yield F.interpolate(to_tensor(values)[None], scale_factor=factor, mode="bilinear", align_corners=False)
        else:
            align = infer.resize == "linear"
            yield F.interpolate(to_tensor(values)[None], size=size, mode="bilinear", align_corners=align)
