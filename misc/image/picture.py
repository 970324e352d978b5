"""A picture as people and as networks see it, and what is left of it where published code goes back from the one to the
other.

**The published truncation.** Several systems give their CRF (GETAM also its label refinement and its dense energy) not
the image that they read but one recovered from the network's values: times the deviation, plus the mean, times 255, cut
to 8 bits without rounding. Values that come out a hair below a whole number lose a grey level (psa.md section 6,
mctformer.md section 4, deeplab.md A.3, getam.md section 5). Published numbers rest on it, and it happens here alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from misc.image.pixels import NORMALISATIONS, normalise_image, to_tensor


@dataclass(frozen=True)
class Picture:
    """One image: rgb (H, W, 3) uint8, values (3, H, W) float32, the same as the network takes it."""

    rgb: np.ndarray
    values: Tensor

    @classmethod
    def of_rgb(cls, rgb: np.ndarray, normalisation: str) -> Picture:
        """The picture of an image (H, W, 3) uint8, for networks of this normalisation (``pixels.NORMALISATIONS``)."""
        return cls(rgb, to_tensor(normalise_image(rgb, normalisation)))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.rgb.shape[:2]

    def to(self, device: torch.device) -> Picture:
        """The same with its values on a device."""
        return replace(self, values=self.values.to(device))


def restore_values(values: Tensor, normalisation: str) -> Tensor:
    """Network values (..., 3, H, W), on any device -> RGB of about 0 to 255 as float32, nothing cut off."""
    norm = NORMALISATIONS[normalisation]
    mean, std = (values.new_tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (norm.mean, norm.std))
    grey = (values.float() * std + mean) * norm.scale
    return grey.flip(-3) if norm.bgr else grey


def truncate_values(values: Tensor, normalisation: str) -> Tensor:
    """Network values (..., 3, H, W), on any device -> RGB of whole numbers 0 .. 255 as float32 (see the text above)."""
    return restore_values(values, normalisation).clamp(0, 255).floor()


def truncate_values_to_image(values: Tensor, normalisation: str) -> np.ndarray:
    """``truncate_values`` of one picture (3, H, W) as an image: (H, W, 3) uint8."""
    grey = truncate_values(values, normalisation)
    return np.ascontiguousarray(grey.permute(1, 2, 0).to(torch.uint8).cpu().numpy())


def truncate_image(image: np.ndarray, normalisation: str, *, single: bool = False) -> np.ndarray:
    """An image (H, W, 3) uint8 RGB after normalisation and truncation: the same shape, some grey levels one lower.

    ``single``: normalised in single precision, as torchvision does (mctformer.md section 4), not in double and rounded.
    """
    if not single:
        return truncate_values_to_image(to_tensor(normalise_image(image, normalisation)), normalisation)
    norm = NORMALISATIONS[normalisation]
    grey = np.arange(256, dtype=np.float32)[:, None, None] / np.float32(norm.scale)
    values = to_tensor((grey - np.float32(norm.mean)) / np.float32(norm.std))  # (3, 256, 1), of all grey levels
    return cv2.LUT(np.ascontiguousarray(image), truncate_values_to_image(values, normalisation))
