"""What the training loop asks of a network: the one declaration of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from misc.config import Fit

Batch = dict[str, Tensor]
"""What a network is trained on, by names: image (B, 3, S, S), tags (B, C) and so on (net.contract)."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate: ``lr_scale`` times the base rate, decayed or not.

    ``rule``: optimiser, rate, decay and schedule of these parameters where they are not the training's own.
    """

    params: list[nn.Parameter]
    lr_scale: float = 1.0
    decay: bool = True
    rule: Fit | None = None


class Trainable(nn.Module, ABC):
    """Anything that misc/loop/fit.py trains.

    ``forward(batch, progress)`` returns the named loss terms; their sum is minimised and each is logged.
    """

    finds_unused: bool = False
    """Whether some trainable parameters get no gradient in some steps (DistributedDataParallel must then search)."""

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss terms (scalars) of a batch; ``progress`` in [0, 1) is the fraction of the training that is done."""

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """Entries that are added to a batch before ``counts`` and ``forward`` see it: labels that the network makes
        itself while it trains. Called on the bare network in full precision, with gradients enabled; what it gives
        carries none, and no random number is drawn."""
        return {}

    def lr_scale(self, progress: float) -> float:
        """Factor of all learning rates at this fraction of the training, on top of the recipe's schedule."""
        return 1.0

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Denominators of loss terms that are means over more than images (valid pixels, pairs), from the batch alone.

        The loop averages each over all micro-batches and processes of the update and hands them back as
        ``batch["counts/NAME"]``, so that a term ``sum / count`` is the same number however the batch is divided.
        """
        return {}

    def param_groups(self) -> list[Group]:
        """Parameter groups; by default one of everything that is trained."""
        return [Group([p for p in self.parameters() if p.requires_grad])]
