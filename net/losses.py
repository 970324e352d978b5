"""Losses that several methods train with."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.image.labels import IGNORE

ClassLoss = Literal["soft_margin", "cross_entropy"]
"""Loss of a classifier: per class, or (one class per image) softmax over all classes."""


def multilabel_soft_margin(logits: Tensor, tags: Tensor) -> Tensor:
    """Mean over batch and classes of the binary cross entropy with logits: logits and tags (B, C) -> scalar."""
    return F.binary_cross_entropy_with_logits(logits.float(), tags.to(torch.float32))


def class_loss(logits: Tensor, tags: Tensor, kind: ClassLoss) -> Tensor:
    """Classification loss: logits and tags (B, C) -> scalar.

    soft_margin: ``multilabel_soft_margin``. cross_entropy: of the softmax, mean over the batch (wsol.md section 5); an
        image with several tags has the target divided evenly among them; one without a tag contributes nothing.
    """
    if kind == "soft_margin":
        return multilabel_soft_margin(logits, tags)
    tags = tags.to(torch.float32)
    return F.cross_entropy(logits.float(), tags / tags.sum(1, keepdim=True).clamp(min=1))


def count_label_kinds(label: Tensor) -> dict[str, Tensor]:
    """Numbers of background pixels and of pixels of a class in labels (B, H, W)."""
    background = label == 0
    return {"background": background.sum(), "foreground": (~background & (label != IGNORE)).sum()}


def balanced_cross_entropy(logits: Tensor, label: Tensor, background: Tensor, foreground: Tensor) -> Tensor:
    """Half the mean cross entropy of the background pixels plus half that of the others.

    ToCo's code gives 0 / 0 for a half without pixels (toco.md section 9, trap 5); here it is 0, as in MoRe.

    Args:
        logits: (B, C + 1, H, W) float32.
        label: (B, H, W) int64, 255 ignored.
        background, foreground: counts over the batch (``Network.counts``).
    """
    errors = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # (B, H, W), 0 where unknown
    is_background = label == 0
    halves = (
        errors[is_background].sum() / background.clamp(min=1e-6),
        errors[~is_background].sum() / foreground.clamp(min=1e-6),
    )
    return sum(halves) / 2
