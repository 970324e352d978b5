"""What the training loop requires of a network; declared only here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from misc.config import Fit

Batch = dict[str, Tensor]
"""A training batch by names: image (B, 3, S, S), tags (B, C) and so on (net.contract)."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate: ``lr_scale`` times the base rate, decayed or not.

    ``rule``: optimiser, rate, decay and schedule of these parameters, if they differ from the training's.
    """

    params: list[nn.Parameter]
    lr_scale: float = 1.0
    decay: bool = True
    rule: Fit | None = None


@dataclass(frozen=True)
class MomentumCopy:
    """A module that follows another one of the same layers by a moving average of its parameters (an EMA)."""

    copy: nn.Module
    """Never trained by the optimiser; in the state dict like everything else, so that it is saved and resumed."""
    source: nn.Module
    """What it follows."""
    momentum: float
    """copy <- momentum x copy + (1 - momentum) x source, once an update."""


def sample_streams(batch: Batch) -> list[np.random.Generator]:
    """A random stream for each sample of a batch, from its ``seed`` (B,): the same for a sample of the training
    wherever and whenever it is made, in one process or in many, at once or after a resume."""
    return [np.random.default_rng(number) for number in batch["seed"].tolist()]


class Trainable(nn.Module, ABC):
    """Anything that misc/loop/fit.py trains.

    ``forward(batch, progress)`` returns the named loss terms; their sum is minimised and each is logged.
    """

    finds_unused: bool = False
    """Whether some trainable parameters get no gradient in some steps (find_unused_parameters of
    DistributedDataParallel)."""

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss terms (scalars) of a batch; ``progress`` in [0, 1) is the fraction of the training that is done."""

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """Entries to add to a batch before ``counts`` and ``forward``: labels that the network makes itself during
        training. Called on the network without DDP, in full precision, with gradients enabled; the entries carry no
        gradient. Random numbers come from ``sample_streams`` only."""
        return {}

    def momentum_copies(self) -> Sequence[MomentumCopy]:
        """Moving averages that the loop moves at the beginning of every update, before ``prepare``: equal in all
        processes, as what they follow is, and once an update however it is divided into micro-batches."""
        return ()

    def lr_scale(self, progress: float) -> float:
        """Factor of all learning rates at this fraction of the training, on top of the recipe's schedule."""
        return 1.0

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Denominators of loss terms that are not means over images (but over valid pixels or pairs), from the batch
        alone.

        The loop averages each over all micro-batches and processes of the update and adds it to the batch as
        ``batch["counts/NAME"]``, so that a term ``sum / count`` is the same number however the batch is divided.
        """
        return {}

    def param_groups(self) -> list[Group]:
        """Parameter groups; by default one with all trainable parameters."""
        return [Group([p for p in self.parameters() if p.requires_grad])]
