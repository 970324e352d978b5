"""An image in two forms, RGB and network values, and the published conversion from the latter back to the former.

**The published truncation.** In several systems the CRF (in GETAM also the label refinement and the dense energy) does
not get the image that was read but one recovered from network values: times the standard deviation, plus the mean,
times 255, truncated to 8 bits without rounding. Values slightly below a whole number lose a grey level (psa.md
section 6, mctformer.md section 4, deeplab.md A.3, getam.md section 5). Published numbers depend on it. Only this file
does it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from misc.image.pixels import find_normalisation, normalise_image, to_tensor
from misc.image.segments import Segments


@dataclass(frozen=True)
class Picture:
    """One image: rgb (H, W, 3) uint8, values (3, H, W) float32, the same image normalised for the network; its
    class-agnostic segments for refiners that want them (``Refiner.wants_segments``), else None."""

    rgb: np.ndarray
    values: Tensor
    segments: Segments | None = None

    @classmethod
    def of_rgb(cls, rgb: np.ndarray, normalisation: str) -> Picture:
        """Make it from an image (H, W, 3) uint8, for networks with this normalisation (a name of pixels)."""
        return cls(rgb, to_tensor(normalise_image(rgb, normalisation)))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.rgb.shape[:2]

    def to(self, device: torch.device) -> Picture:
        """The same picture with its values on a device."""
        return replace(self, values=self.values.to(device))


def restore_values(values: Tensor, normalisation: str) -> Tensor:
    """Network values (..., 3, H, W), on any device -> RGB of about 0 to 255 as float32, not truncated."""
    norm = find_normalisation(normalisation)
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

    ``single``: normalise in single precision, as torchvision does (mctformer.md section 4), instead of double
    precision.
    """
    if not single:
        return truncate_values_to_image(to_tensor(normalise_image(image, normalisation)), normalisation)
    norm = find_normalisation(normalisation)
    grey = np.arange(256, dtype=np.float32)[:, None, None] / np.float32(norm.scale)
    values = to_tensor((grey - np.float32(norm.mean)) / np.float32(norm.std))  # (3, 256, 1), of all grey levels
    return cv2.LUT(np.ascontiguousarray(image), truncate_values_to_image(values, normalisation))
