"""Multi-scale testing of a segmentation network: scales, mirrors, merging, CRF (deeplab.md A.3, B.3, C.4).

Knows no network: it is given a function from normalised images to logits. One accumulator runs over the scales, so
memory doesn't grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from misc.config import SegInference
from misc.crf.dense import DenseCRF
from misc.image.picture import truncate_image
from misc.image.pixels import normalise_image, scaled_size, to_tensor

Logits = Callable[[Tensor], Tensor]
"""Images (B, 3, h, w), normalised -> logits (B, n, h', w') of any resolution."""


def segment(
    logits: Logits,
    image: np.ndarray,
    infer: SegInference,
    normalisation: str,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Merged scores of one image, before the CRF.

    The image is resized once for each of ``infer.scales`` (after it was normalised, but for ``bicubic``); an image and
    its mirror go through the network together. Logits are resized to the image and merged as ``infer.merge`` says: the
    softmax of their mean (deeplab.md A.3) or of their sum over scales and mirrors (deeplab.md D.3), or the maximum of
    their softmaxes, which does not sum to one (deeplab.md B.3).

    Args:
        logits: the network, on ``device`` and in evaluation mode; called with 1 image, or 2 with ``infer.flip``.
        image: (H, W, 3) uint8 RGB, any H and W.
        infer: scales, mirror, filters and merging.
        normalisation: name in misc.image.pixels.NORMALISATIONS.
        device: where the images go and the merging is computed.

    Returns:
        (n, H, W) float32 in [0, 1].

    Raises:
        ValueError: ``image`` is not (H, W, 3) uint8.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"Testing needs a (H, W, 3) uint8 RGB image, got {image.shape} {image.dtype}: convert it.")
    size = image.shape[:2]
    linear = infer.merge in ("mean_logits", "sum_logits")
    merged: Tensor | None = None
    with torch.inference_mode():
        for factor in infer.scales:
            images = _scaled(image, factor, infer, normalisation)  # (1, 3, h, w)
            if infer.flip:
                images = torch.cat([images, images.flip(-1)])  # (2, 3, h, w): the image and its mirror
            maps = logits(images.to(device)).float()  # (1 or 2, n, h', w')
            if infer.flip:
                maps = torch.cat([maps[:1], maps[1:].flip(-1)])
            if linear:
                # the mean may be taken before the resize, which is linear: half the work at full size
                maps = maps.mean(dim=0, keepdim=True)
            maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=infer.align_corners)
            if linear:
                merged = maps[0] if merged is None else merged.add_(maps[0])
            else:
                peak = maps.softmax(dim=1).amax(dim=0)  # (n, H, W)
                merged = peak if merged is None else torch.maximum(merged, peak, out=merged)
        assert merged is not None  # SegInference has at least one scale
        if linear:  # the sum over scales of the mean of image and mirror
            factor = 1 / len(infer.scales) if infer.merge == "mean_logits" else 1 + infer.flip
            merged = merged.mul_(factor).softmax(dim=0)
    return merged.cpu().numpy()


def with_crf(
    scores: np.ndarray,
    image: np.ndarray,
    infer: SegInference,
    normalisation: str,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Scores sharpened by ``infer.crf`` over all labels; returned as they are where it has no iterations.

    Args:
        scores: (n, H, W) float32, as ``segment`` gives them.
        image: (H, W, 3) uint8 RGB, the same H and W.
        infer: the CRF and which image it sees.
        normalisation: as for ``segment``; needed where ``infer.crf_truncates_image``.
        device: where the CRF is computed.

    Returns:
        (n, H, W) float32, summing to one where there was a CRF.

    Raises:
        ValueError: scores and image differ in size, or the scores contain NaN.
    """
    if infer.crf.iterations == 0:
        return scores
    if infer.crf_truncates_image:
        image = truncate_image(image, normalisation)
    return DenseCRF(image, infer.crf, device)(scores)


def _scaled(image: np.ndarray, factor: float, infer: SegInference, normalisation: str) -> Tensor:
    """The (H, W, 3) uint8 image resized by ``factor`` and normalised: (1, 3, h, w). The size is rounded, for linear
    truncated (deeplab.md A.3, B.3, D.3); of a square it is the factor itself (getam.md section 7)."""
    height, width = image.shape[:2]
    if infer.square or infer.resize != "linear":
        h, w = scaled_size((1, 1) if infer.square else (height, width), factor)
        if infer.resize == "bicubic":
            small = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
            return to_tensor(normalise_image(np.asarray(small), normalisation))[None]
        kind = {"cubic": cv2.INTER_CUBIC, "linear": cv2.INTER_LINEAR}[infer.resize]
        return to_tensor(cv2.resize(normalise_image(image, normalisation), (w, h), interpolation=kind))[None]
    truncated = max(1, int(height * factor)), max(1, int(width * factor))
    values = to_tensor(normalise_image(image, normalisation))[None]
    return F.interpolate(values, size=truncated, mode="bilinear", align_corners=True)
