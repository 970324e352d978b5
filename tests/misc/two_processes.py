"""What each of two processes does in test_distributed.py, started by torchrun: FOLDER gets what they found."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_fit import BATCH, RECIPE, Batch, Toy, micro_batches, train

from misc import commandline, distributed
from misc.config import Fit
from misc.files import store
from misc.loop.each import EachFailed, each


def own_share(start: int):
    """This process's half of every global batch, image by image."""
    half = BATCH // distributed.world()
    for number, batch in enumerate(micro_batches(1)(start)):
        if number % BATCH // half == distributed.rank():
            yield batch


class PartlyUsed(Toy):
    """Leaves some parameters without a gradient in every other update."""

    finds_unused = True

    def forward(self, batch: Batch, progress: float) -> dict[str, torch.Tensor]:
        terms = super().forward(batch, progress)
        return terms if progress * 8 % 2 else {"fit": self.last.bias.square().sum()}


def work(image_id: str, folder: Path) -> None:
    if image_id == "b":
        raise ValueError("b.jpg is no image.")
    store.write_bytes(folder / image_id, str(distributed.rank()).encode())


def main(folder: Path) -> None:
    distributed.start("cpu")
    train(folder / "fit", Fit(**{**vars(RECIPE), "micro_batch": 1}), Toy(dropout=0), batches=own_share)
    train(folder / "unused", Fit(**{**vars(RECIPE), "micro_batch": 2}), PartlyUsed(dropout=0.5), batches=pairs)
    images = folder / "images"
    try:
        each("step", list("abcde"), lambda i: work(i, images), done=lambda i: (images / i).exists())
    except EachFailed as error:
        store.write_bytes(folder / f"failed{distributed.rank()}.txt", str(error).encode())
    assert distributed.joined([distributed.rank()]) == [0, 1]
    distributed.stop()
    commandline.end(0)


def pairs(start: int):
    """This process's half of every global batch in one piece."""
    for number, batch in enumerate(micro_batches(2)(start)):
        if number % 2 == distributed.rank():
            yield batch


if __name__ == "__main__":
    main(Path(sys.argv[1]))
