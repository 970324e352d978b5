"""Images as arrays: normalisation, resizing as the published code does it.

Images are (H, W, 3) uint8 RGB arrays, masks (H, W) uint8 index arrays, network inputs (3, H, W) float32 tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """value = (x / scale - mean) / std, per channel, in RGB order unless ``bgr``."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float = 255.0
    bgr: bool = False


NORMALISATIONS: dict[str, Normalisation] = {
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "caffe_bgr": Normalisation((104.008, 116.669, 122.675), (1.0, 1.0, 1.0), scale=1.0, bgr=True),
    "half": Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Normalisations by name; each network names its own, or any other one as ``name_normalisation`` does. caffe_bgr:
psa.md 2.2, deeplab.md C.3. half: TensorFlow's networks."""


def find_normalisation(name: str) -> Normalisation:
    """The normalisation of a name, one of ``NORMALISATIONS`` or a text of ``name_normalisation``. Raises ValueError for
    any other."""
    if name in NORMALISATIONS:
        return NORMALISATIONS[name]
    try:
        mean, std = (tuple(map(float, part.split())) for part in name.removeprefix("mean ").split(" std "))
    except ValueError:
        mean, std = (), ()
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        names = ", ".join(NORMALISATIONS)
        raise ValueError(f"normalisation {name!r} is not one of {names}, nor 'mean R G B std R G B'.")
    return Normalisation(mean, std)


def name_normalisation(mean: Sequence[float], std: Sequence[float]) -> str:
    """The name by which ``find_normalisation`` finds mean and standard deviation of RGB values in [0, 1]."""
    wanted = Normalisation(tuple(mean), tuple(std))  # type: ignore[arg-type]
    known = next((name for name, one in NORMALISATIONS.items() if one == wanted), None)
    return known or f"mean {' '.join(f'{x:g}' for x in mean)} std {' '.join(f'{x:g}' for x in std)}"


def normalise_image(image: np.ndarray, name: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W, 3) float32 network values; zero is the mean colour."""
    norm = find_normalisation(name)
    # in double precision, then rounded to single, as published: the truncation in picture.py depends on the last bit
    table = (np.arange(256)[:, None] / norm.scale - np.array(norm.mean)) / np.array(norm.std)  # (256, 3)
    values = np.ascontiguousarray(image[..., ::-1] if norm.bgr else image)
    return cv2.LUT(values, table.astype(np.float32)[:, None])


def mean_colour(name: str) -> tuple[int, int, int]:
    """The RGB colour, 0 .. 255, whose network values are nearest to zero; used for padding."""
    norm = find_normalisation(name)
    red, green, blue = (round(value * norm.scale) for value in (norm.mean[::-1] if norm.bgr else norm.mean))
    return red, green, blue


def to_tensor(values: np.ndarray) -> Tensor:
    """(H, W, 3) float32 -> (3, H, W) float32 tensor, contiguous."""
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def stretch_values(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32 -> (h, w, 3), bilinear, align_corners False, without antialiasing; ``size`` is (h, w)."""
    resized = F.interpolate(to_tensor(values)[None], size=size, mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def squash_values(values: np.ndarray, side: int) -> np.ndarray:
    """``stretch_values`` to a square of this side."""
    return stretch_values(values, (side, side))


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(H, W) times a factor, rounded half to even as in Python (seam.md 5), at least 1."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def truncated_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(H, W) times a factor, truncated (aream.md 9), at least 1."""
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def resize_image(
    image: np.ndarray, size: tuple[int, int], kind: Literal["bicubic", "bilinear"] = "bicubic"
) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) uint8 by PIL's filter ``kind`` (antialiased when shrinking); ``size`` is (h, w)."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling[kind.upper()]))


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 -> (h, w) uint8, PIL nearest (pixel centres); ``size`` is (h, w)."""
    return np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))


def resize_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """``resize_mask`` of a batch on any device: (B, H, W) integers -> (B, h, w); ``size`` is (h, w)."""

    def centres(old: int, new: int) -> Tensor:
        # floor((i + 1 / 2) old / new), summed up as in PIL: rounding decides the cases where a centre lies on a border
        steps = np.full(new, old / new)
        steps[0] /= 2
        return torch.from_numpy(np.cumsum(steps).astype(np.int64)).to(masks.device)

    rows, columns = (centres(old, new) for old, new in zip(masks.shape[-2:], size, strict=True))
    return masks[:, rows[:, None], columns]


def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Class maps or logits, bilinear with align_corners False and without antialiasing: (B, K, h, w) or (K, h, w), K
    may be 0 -> (..., K, H, W) float32; ``size`` is (H, W)."""
    if maps.ndim == 3:
        return resize_maps(maps[None], size)[0]
    if maps.shape[1] == 0:
        return maps.new_zeros((*maps.shape[:2], *size), dtype=torch.float32)
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False)


def box_mask(box: Tensor, size: Sequence[int]) -> Tensor:
    """(B, 4) integers top, bottom, left, right, half-open -> (B, H, W) bool, true inside; ``size`` is (H, W)."""
    top, bottom, left, right = box[:, :, None, None].unbind(1)  # (B, 1, 1) each
    rows, columns = (torch.arange(side, device=box.device) for side in size)
    return (rows[:, None] >= top) & (rows[:, None] < bottom) & (columns >= left) & (columns < right)
