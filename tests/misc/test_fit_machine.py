"""The training loop and the machine: memory, precision, memory layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_fit import BATCH, TOTAL, Toy, train
from torch import Tensor, nn

from misc.config import Fit, Machine
from misc.loop.each import WorkerDied
from misc.loop.fit import NonFiniteLoss, OutOfMemory
from misc.loop.trainable import Batch


def test_out_of_memory_says_which_setting_helps(tmp_path: Path) -> None:
    class Large(Toy):
        def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(OutOfMemory, match=r"--cam.toy.fit.micro-batch 2; .* Tried to allocate"):
        train(tmp_path, network=Large())
    with pytest.raises(OutOfMemory, match=r"--seg.fit.micro-batch 1; "):
        train(tmp_path, Fit(steps=TOTAL, batch_size=BATCH, micro_batch=2), network=Large(), name="seg")


def test_a_statistic_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    class Spoilt(Toy):
        def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
            self.seen += torch.inf
            return super().forward(batch, progress)

    with pytest.raises(NonFiniteLoss, match="weights are not finite"):
        train(tmp_path, network=Spoilt())
    assert not (tmp_path / "weights" / "toy.pt").exists()


def test_prepare_runs_in_full_precision(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watching(Toy):
        def prepare(self, batch: Batch, progress: float) -> Batch:
            seen.append(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
            return {}

    train(tmp_path, network=Watching(), machine=Machine(device="cpu", workers=0, amp="fast"))
    assert seen == [False] * TOTAL


def test_weights_are_written_in_the_usual_layout(tmp_path: Path) -> None:
    class Convolution(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(2, 3, 3)

    weights = train(tmp_path, network=Convolution(), machine=Machine(device="cpu", workers=0, channels_last=True))
    assert weights["convolution.weight"].is_contiguous()


def test_a_reader_that_was_killed_is_named_wherever_its_signal_arrives(tmp_path: Path) -> None:
    """PyTorch raises it in the middle of whatever the main process is at."""

    class Struck(Toy):
        def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(WorkerDied, match="fewer --machine.workers"):
        train(tmp_path, network=Struck())
