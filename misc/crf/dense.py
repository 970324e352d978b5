"""The fully connected CRF with which the published systems sharpen their scores.

Same numbers as pydensecrf (psa.md section 3), on the lattice of misc/crf/lattice.py and without a compiler.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from misc.checked import Checked, Positive, Range, Weight, When
from misc.crf.lattice import Lattice
from misc.precision import full_precision

_LOWEST_SCORE = 1e-5
CRF = When("iterations")
_LARGEST_LOGIT = 80
"""Its exponential, times any number of labels, is a float32, and so is that of its negative."""
_LARGEST_KEPT = 500_000
"""Pixels of an image up to which the lattice of its smoothness kernel is kept: about 50 bytes each."""


@dataclass(frozen=True)
class CRFSettings(Checked):
    """Kernels and iterations of the mean-field inference. The defaults are those of PSA's affinity labels."""
    # psa.md section 3

    iterations: Annotated[int, Range(least=0)] = 10
    """Mean-field updates; 0 gives the clipped scores, normalised."""
    gauss_sxy: Annotated[Positive, CRF] = 3.0
    """Standard deviation of the smoothness kernel, in pixels."""
    gauss_weight: Annotated[Weight, CRF] = 3.0
    """Weight of the smoothness kernel; 0 leaves it out."""
    bilateral_sxy: Annotated[Positive, CRF] = 80.0
    """Standard deviation of the appearance kernel in the image plane, in pixels."""
    bilateral_srgb: Annotated[Positive, CRF] = 13.0
    """Standard deviation of the appearance kernel in each colour channel, in 8-bit grey levels."""
    bilateral_weight: Annotated[Weight, CRF] = 10.0
    """Weight of the appearance kernel; 0 leaves it out."""


class DenseCRF:
    """Mean-field inference on one image; the lattices are built once and reused for any number of score stacks.

    Unary energy of a score stack p: -ln clip(p, 1e-5, 1), so scores need not sum to one. Pairwise: Potts terms with a
    Gaussian kernel on (x, y) and one on (x, y, r, g, b), both symmetrically normalised, the pixel itself included.
    Source: psa.md section 3.

    Args:
        image: (H, W, 3) uint8, any strides. The order of the colour channels only changes the lattice's approximation.
        settings: kernels and number of iterations; None for PSA's.
        device: where to compute.

    Raises:
        ValueError: ``image`` is not (H, W, 3) uint8, or is empty.
    """

    def __init__(
        self, image: np.ndarray, settings: CRFSettings | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise ValueError(f"the CRF needs an (H, W, 3) uint8 image, got {image.shape} {image.dtype}: read it as RGB")
        s = settings or CRFSettings()
        self.size: tuple[int, int] = image.shape[:2]
        """Height and width of the image."""
        self._device = torch.device(device)
        self._kernels: list[tuple[float, Lattice]] = []
        if s.gauss_weight:  # depends on the image's size alone
            make = _plane_lattice if image.shape[0] * image.shape[1] <= _LARGEST_KEPT else _plane_lattice.__wrapped__
            self._kernels.append((s.gauss_weight, make(self.size, s.gauss_sxy, self._device)))
        if s.bilateral_weight:
            colours = torch.from_numpy(image.reshape(-1, 3).astype(np.float32)).to(self._device)  # (H*W, 3)
            plane = _plane(self.size, self._device) / s.bilateral_sxy
            appearance = torch.cat([plane, colours / s.bilateral_srgb], dim=1)
            self._kernels.append((s.bilateral_weight, Lattice(appearance, normalised=True)))
        self._iterations = s.iterations if self._kernels else 0  # without a kernel they change nothing

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Sharpen class scores by mean-field inference.

        Args:
            scores: (n, H, W), n >= 1 labels; clipped to [1e-5, 1]. Or (S, n, H, W), S independent stacks of scores,
                which takes less time than one after the other.

        Returns:
            float32 posteriors of the same shape, summing to one over the labels.

        Raises:
            ValueError: another height or width than the image's, or NaN.
        """
        if scores.ndim not in (3, 4) or 0 in scores.shape or scores.shape[-2:] != self.size:
            raise ValueError(f"scores {scores.shape} don't fit the image's (height, width) {self.size}")
        if np.isnan(scores).any():
            raise ValueError("scores contain NaN: check the weights of the network, or the file, they come from")
        rows = np.moveaxis(scores.reshape(*scores.shape[:-2], -1), -1, 0)  # (H*W, [S,] n)
        evidence = torch.from_numpy(np.array(rows, np.float32, order="C")).to(self._device)
        return self._infer(evidence.clamp_(_LOWEST_SCORE, 1).log_())

    def from_labels(self, labels: np.ndarray, n: int, confidence: float = 0.7) -> np.ndarray:
        """Posteriors from hard labels, all with the same confidence; there is no "unsure" label.

        Unary energy: -ln confidence for a pixel's own label, -ln((1 - confidence) / (n - 1)) for each of the others.
        Source: psa.md section 3, irnet.md section 7.

        Args:
            labels: (H, W) integers 0..n-1; or (S, H, W), S independent label maps.
            n: number of labels.
            confidence: in (0, 1).

        Returns:
            (n, H, W) or (S, n, H, W) float32 posteriors.

        Raises:
            ValueError: another height or width than the image's, a label outside 0..n-1, a confidence outside (0, 1).
        """
        if labels.ndim not in (2, 3) or labels.shape[-2:] != self.size:
            raise ValueError(f"labels {labels.shape} don't fit the image's (height, width) {self.size}")
        if labels.min() < 0 or labels.max() >= n:
            raise ValueError(f"labels {labels.min()}..{labels.max()} must lie in 0..{n - 1}: map ignored pixels first")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence {confidence} must lie between 0 and 1, both excluded")
        rows = np.moveaxis(labels.reshape(*labels.shape[:-2], -1), -1, 0)[..., None]  # (H*W, [S,] 1)
        own = torch.from_numpy(np.ascontiguousarray(rows, np.int64)).to(self._device)
        others = math.log((1 - confidence) / max(n - 1, 1))
        evidence = torch.full((*own.shape[:-1], n), others, device=self._device)
        return self._infer(evidence.scatter_(-1, own, math.log(confidence)))

    @torch.no_grad()
    def _infer(self, evidence: Tensor) -> np.ndarray:
        """Mean field from the negative unary energies, (H*W, [S,] n) -> ([S,] n, H, W)."""
        with full_precision(self._device.type):
            posterior = _softmax_(evidence.clone())
            for _ in range(self._iterations):
                logits = evidence
                for weight, lattice in self._kernels:  # in place, or it would take twice the memory
                    message = lattice.filter(posterior.flatten(1)).view_as(logits)
                    logits = torch.add(logits, message, alpha=weight, out=message)
                posterior = _softmax_(logits)
        return posterior.movedim(0, -1).unflatten(-1, self.size).cpu().numpy()


def _plane(size: tuple[int, int], device: torch.device) -> Tensor:
    """(x, y) of the pixels of an image: (H*W, 2) float32."""
    y, x = np.indices(size, dtype=np.float32).reshape(2, -1)
    return torch.from_numpy(np.stack([x, y], axis=1)).to(device)


@functools.lru_cache(maxsize=4)
def _plane_lattice(size: tuple[int, int], sxy: float, device: torch.device) -> Lattice:
    """The lattice of the smoothness kernel, kept for the next images of the same size."""
    return Lattice(_plane(size, device) / sxy, normalised=True)


def _softmax_(logits: Tensor) -> Tensor:
    """Softmax over the last axis, which may overwrite ``logits``; on a CPU many times as fast as torch.softmax on short
    rows."""
    if logits.device.type != "cpu":
        return torch.softmax(logits, dim=-1)
    low, high = logits.aminmax()
    if low < -_LARGEST_LOGIT or high > _LARGEST_LOGIT:  # else no exponential overflows, or all of a row vanish
        logits -= logits.amax(dim=-1, keepdim=True)
    labels = logits.shape[-1]
    values = logits.exp_()
    return values.div_(values @ values.new_ones(labels, labels))
