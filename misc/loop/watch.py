"""What a training shows while it runs: curves and pictures for TensorBoard, the text of the progress bar."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from misc import distributed
from misc.files.atomic import naming_full_disk
from misc.loop.terms import IMAGES_PER_SECOND, LEARNING_RATE, RATING

PICTURES = 10
"""How many times a training draws pictures for TensorBoard."""
DrawPictures = Callable[[], Mapping[str, np.ndarray]]
"""() -> pictures (H, W, 3) uint8 by title, of a network in evaluation mode."""


def falls_due(step: int, total: int, times: int) -> bool:
    """Whether what is done ``times`` times in a training, evenly and at its end, is done after this update."""
    return (step + 1) * times // total > step * times // total


class Speed:
    """Images per second, as a moving average over the last updates."""

    _SHARE = 0.1

    def __init__(self) -> None:
        self.mean = 0.0
        self._since = time.perf_counter()

    def count(self, images: int) -> float:
        """Count images that were processed since the last call; returns their images per second."""
        now = time.perf_counter()
        speed = images / max(now - self._since, 1e-9)
        self._since = now
        self.mean = self.mean + self._SHARE * (speed - self.mean) if self.mean else speed
        return speed

    def restart(self) -> None:
        """Leave out the time since the last call, which went into something else."""
        self._since = time.perf_counter()


@functools.cache
def _leave_errors_to_callers() -> None:
    """TensorBoard writes in a thread of its own and raises what stops it at the next call too: no traceback of it."""
    told = threading.excepthook

    def tell(args: threading.ExceptHookArgs) -> None:
        written = type(args.thread).__module__.startswith("tensorboard.")
        if not (written and isinstance(args.exc_value, OSError)):
            told(args)

    threading.excepthook = tell


class Watch:
    """Writes the curves of one training to TensorBoard, in the main process alone; a context manager.

    Args:
        log: TensorBoard folder; the training's sub-folder is called ``name``, as one purges the events of an
            interrupted training from the whole folder.
        name: of the training, the beginning of all tags.
        start: first update; events from it on, of an interrupted training, are removed.
        pictures: what ``add_pictures`` draws; None: nothing.
    """

    def __init__(self, log: Path, name: str, start: int, pictures: DrawPictures | None) -> None:
        self.name, self.speed, self._pictures, self._folder = name, Speed(), pictures, log / name
        self._writer: SummaryWriter | None = None
        if distributed.is_main():
            _leave_errors_to_callers()
            with naming_full_disk(self._folder):
                self._writer = SummaryWriter(str(self._folder), purge_step=start)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            with naming_full_disk(self._folder):
                self._writer.close()

    def add_update(self, step: int, terms: Mapping[str, float], lr: float, images: int) -> None:
        """The loss terms of an update, its learning rate, and the speed at which its images were processed."""
        values = {**terms, LEARNING_RATE: lr, IMAGES_PER_SECOND: self.speed.count(images)}
        self._add(step, values)

    def add_ratings(self, step: int, ratings: Mapping[str, float]) -> None:
        """What epochs are selected by, under NAME/rating."""
        self._add(step, {f"{RATING}{rating}": value for rating, value in ratings.items()})
        self.speed.restart()

    def add_pictures(self, step: int, network: nn.Module) -> None:
        """Pictures of the network in evaluation mode; it is in training mode again afterwards."""
        if self._writer is not None and self._pictures is not None:
            network.eval()
            for title, picture in self._pictures().items():
                with naming_full_disk(self._folder):
                    self._writer.add_image(f"{self.name}/{title}", picture, step, dataformats="HWC")
            network.train()
            self.speed.restart()

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            with naming_full_disk(self._folder):
                for name, value in values.items():
                    self._writer.add_scalar(f"{self.name}/{name}", value, step)

    def tell(self, terms: Mapping[str, float]) -> dict[str, str]:
        """What the progress bar says besides the time: the loss, its terms if there are several, images per second."""
        told = {"loss": f"{sum(terms.values()):.4f}"}
        if len(terms) > 1:
            told |= {term: f"{value:.4f}" for term, value in terms.items()}
        return {**told, "images/s": f"{self.speed.mean:.3g}"}
