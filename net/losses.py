"""Losses that several methods train with."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ClassLoss = Literal["soft_margin", "cross_entropy"]
"""How a classifier is trained: by each class for itself, or (one class an image) by all against each other."""


def multilabel_soft_margin(logits: Tensor, tags: Tensor) -> Tensor:
    """Mean over batch and classes of the binary cross entropy with logits: logits and tags (B, C) -> scalar."""
    return F.binary_cross_entropy_with_logits(logits.float(), tags.to(torch.float32))


def class_loss(logits: Tensor, tags: Tensor, kind: ClassLoss) -> Tensor:
    """Classification loss: logits and tags (B, C) -> scalar.

    soft_margin: ``multilabel_soft_margin``. cross_entropy: of the softmax, mean over the batch (wsol.md section 5); an
    image with several tags shares its weight among them, one without a tag adds nothing.
    """
    if kind == "soft_margin":
        return multilabel_soft_margin(logits, tags)
    tags = tags.to(torch.float32)
    return F.cross_entropy(logits.float(), tags / tags.sum(1, keepdim=True).clamp(min=1))
