"""Training batches: order of the samples, reading and augmentation, and worker processes.

The sample at position p of a training (p = update x batch size + place in the batch) depends on the seed and p alone:
not on the number of processes, workers or micro-batches, nor on where a training was resumed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from misc.commandline import holding_interrupts
from misc.config import Augment, View
from misc.distributed import quiet_threads
from misc.files.images import read_image
from misc.image.labels import IGNORE
from misc.image.pixels import to_tensor
from misc.loop.each import WorkerDied
from misc.loop.pool import end_with_parent
from voc12.catalog import Catalog
from voc12.tags import DataError
from voc12.transforms import TrainSample, augment_sample

Draw = tuple[int, int, int]
"""One sample to make: (index into the list of ids, position in the training, number of the update)."""

_SHUFFLE, _SAMPLE, _BATCH, _VIEW, _SEED = range(5)


def _stream(seed: int, kind: int, *numbers: int) -> np.random.Generator:
    """Independent random stream for each (seed, kind, numbers)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(kind, *numbers)))


class Draws:
    """Order of the samples of a training, without state: any position can be computed at any time.

    Args:
        images: length of the list.
        batch_size: global batch.
        order: Fit.sample_order. epochs: each epoch a permutation of its own, the incomplete last batch dropped or kept;
            a list shorter than a batch is streamed. stream: permutations joined end to end (deeplab.md B.2).
        seed: of the permutations.
        last: Fit.last_batch.
    """

    def __init__(
        self, images: int, batch_size: int, order: Literal["epochs", "stream"], seed: int,
        last: Literal["drop", "keep"] = "drop",
    ) -> None:
        if images < 1 or batch_size < 1:
            raise ValueError(f"{images} images in batches of {batch_size}: both must be at least 1.")
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        rest = images % batch_size if order == "epochs" and images >= batch_size else 0
        self._pass_length = images - (rest if last == "drop" else 0)
        self._keeps_last = last == "keep" and rest > 0
        self._kept: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Updates that count as an epoch: floor(images / batch size), ceil where the last batch is kept; at least 1."""
        return max(1, self.images // self.batch_size + self._keeps_last)

    def span(self, step: int) -> tuple[int, int]:
        """First position of an update's batch, and the number of its images."""
        if not self._keeps_last:
            return step * self.batch_size, self.batch_size
        number, batch = divmod(step, self.steps_per_epoch)
        first = batch * self.batch_size
        return number * self.images + first, min(self.batch_size, self.images - first)

    def draw(self, position: int) -> Draw:
        """(index, position, update) at a position from 0 on."""
        number, place = divmod(position, self._pass_length)
        if self._kept[0] != number:  # cached only for speed
            self._kept = (number, _stream(self.seed, _SHUFFLE, number).permutation(self.images))
        step = position // self.batch_size
        if self._keeps_last:
            step = number * self.steps_per_epoch + place // self.batch_size
        return int(self._kept[1][place]), position, step

    def micro_batches(
        self, rank: int, world: int, micro_batch: int, start_step: int, total_steps: int
    ) -> Iterator[list[Draw]]:
        """What one process makes: the micro-batches of updates ``start_step`` to ``total_steps`` - 1.

        Each process takes an equal, connected part of every global batch, in micro-batches of ``micro_batch``. A
        smaller last batch is divided over all micro-batches as evenly as possible; if it has too few images, the first
        ones are used twice. Raises ValueError if that cannot be divided evenly.
        """
        share = self.batch_size // world
        if self.batch_size % world or share % micro_batch:
            raise ValueError(
                f"A global batch of {self.batch_size} cannot be shared by {world} processes in micro-batches of "
                f"{micro_batch} evenly: change one of them."
            )
        per_process = share // micro_batch
        for step in range(start_step, total_steps):
            first, images = self.span(step)
            positions = first + np.arange(max(images, world * per_process)) % images
            for part in np.array_split(positions, world * per_process)[rank * per_process : (rank + 1) * per_process]:
                yield [self.draw(int(position)) for position in part]


class TrainSet(Dataset[dict[str, Tensor]]):
    """Training samples by Draw.

    Args:
        catalog: the data set.
        ids: its list.
        recipe: augmentation; must contain ``crop`` or ``resized_crop``, which give all samples one size S.
        normalisation: a name for misc.image.pixels.find_normalisation.
        seed: of the augmentation.
        with_mask: reads the (pseudo or true) mask of an id, (H, W) uint8; None: samples have no mask.
        planes: reads the label planes of an id, (P, H, W); None: samples have no target.
        plane_fill: value of the planes where a crop lies outside the image.
        target: makes the target of a sample from its augmented planes (P, S, S); needed with ``planes``.
        saliency: reads the saliency map of an id, (H, W) uint8; None: samples have none.
        views: further pictures of every sample, by name.
    """

    def __init__(
        self,
        catalog: Catalog,
        ids: Sequence[str],
        recipe: Augment,
        normalisation: str,
        seed: int,
        *,
        with_mask: Callable[[str], np.ndarray] | None = None,
        planes: Callable[[str], np.ndarray] | None = None,
        plane_fill: float = 0.0,
        target: Callable[[np.ndarray], np.ndarray] | None = None,
        saliency: Callable[[str], np.ndarray] | None = None,
        views: Mapping[str, View] | None = None,
    ) -> None:
        if not {"crop", "resized_crop"} & set(recipe.order):
            raise ValueError(
                f"The augmentation {', '.join(recipe.order)} lacks crop or resized_crop, so images have no common size."
            )
        if (planes is None) != (target is None):
            raise ValueError("planes and target belong together: give both or neither.")
        self.catalog = catalog
        self.ids = list(ids)
        self.recipe = recipe
        self.normalisation = normalisation
        self.seed = seed
        self.with_mask = with_mask
        self.planes = planes
        self.plane_fill = plane_fill
        self.target = target
        self.saliency = saliency
        self.views = dict(views or {})
        if self.views and any((with_mask, planes, saliency)):
            raise ValueError("Views are pictures only: a training with masks, label planes or saliency has none.")
        shared = [name for name, view in self.views.items() if view.start == "shared"]
        if shared and list(recipe.order).index("normalize") < len(recipe.order) - 1:
            raise ValueError(
                f"The views {', '.join(shared)} start from the crop that the augmentation makes before it normalises "
                f"it, so normalize must come last in its order, which is {', '.join(recipe.order)}."
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        """One sample: image (3, S, S) float32 normalised; tags (C,) float32; box (4,) int64, the part of the crop that
        shows the image (top, bottom, left, right); seed () int64, of what a network draws for it
        (misc.loop.trainable.sample_streams); mask (S, S) int64, target and saliency (S, S) uint8, where asked for.

        For every view NAME: view/NAME (3, S', S') normalised, box/NAME (4,) and mirrored/NAME () bool, whether it was
        mirrored. A view ``image`` is the image itself: ``box`` stays that of the crop it started from.

        Raises DataError with the id and the file where anything goes wrong.
        """
        index, position, batch = draw
        image_id = self.ids[index]
        path = self.catalog.image_path(image_id)
        try:
            return self._make(image_id, read_image(path), position, batch)
        except Exception as error:
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            file = "" if str(path) in str(error) else f" ({path})"
            raise DataError(f"Image {image_id!r}{file}: {kind}{error}") from error

    def _make(self, image_id: str, image: np.ndarray, position: int, batch: int) -> dict[str, Tensor]:
        sample = TrainSample(
            image,
            self.with_mask(image_id) if self.with_mask else None,
            self.planes(image_id) if self.planes else None,
            self.saliency(image_id) if self.saliency else None,
        )
        rngs = _stream(self.seed, _SAMPLE, position), _stream(self.seed, _BATCH, batch)
        *before, last = self.recipe.order
        views: dict[str, Tensor] = {}
        if self.views:  # they start before the last operation, which is normalize
            sample = augment_sample(sample, self.recipe, self.normalisation, *rngs, operations=before)
            views = self._make_views(image, sample, position)
            before = []
        sample = augment_sample(
            sample, self.recipe, self.normalisation, *rngs, plane_fill=self.plane_fill, operations=[*before, last]
        )
        made = {
            "image": to_tensor(sample.image),  # (3, S, S)
            "tags": torch.tensor(self.catalog.tags(image_id)),
            "box": torch.tensor(sample.box),
            "seed": torch.tensor(int(_stream(self.seed, _SEED, position).integers(2**62))),
            **views,
        }
        made["image"] = views.get("view/image", made["image"])
        if sample.mask is not None:
            strange = sample.mask[(sample.mask > self.catalog.num_classes) & (sample.mask != IGNORE)]
            if len(strange):
                raise DataError(
                    f"its mask holds the value {strange[0]}, but there are {self.catalog.num_classes} classes. Make "
                    "the mask again, or correct the class list."
                )
            made["mask"] = torch.from_numpy(sample.mask.astype(np.int64))
        if sample.planes is not None and self.target is not None:
            made["target"] = torch.from_numpy(np.ascontiguousarray(self.target(sample.planes)))
        if sample.saliency is not None:
            made["saliency"] = torch.from_numpy(np.ascontiguousarray(sample.saliency))
        return made


    def _make_views(self, image: np.ndarray, shared: TrainSample, position: int) -> dict[str, Tensor]:
        """The views of a sample, each from a random stream of its own."""
        made = {}
        for number, (name, view) in enumerate(self.views.items()):
            sample = TrainSample(image if view.start == "file" else shared.image)
            if view.start == "shared":
                sample.box = shared.box
            rng = _stream(self.seed, _VIEW, position, number)
            augment_sample(sample, view, self.normalisation, rng, rng)
            made[f"view/{name}"] = to_tensor(sample.image)
            made[f"box/{name}"] = torch.tensor(sample.box)
            made[f"mirrored/{name}"] = torch.tensor(sample.mirrored)
        return made


class _MicroBatches(Sampler[list[Draw]]):
    """``Draws.micro_batches`` in the form that DataLoader asks for."""

    def __init__(self, draws: Draws, *share: int) -> None:
        self.draws = draws
        self.share = share

    def __iter__(self) -> Iterator[list[Draw]]:
        return self.draws.micro_batches(*self.share)


class _Loader(DataLoader[dict[str, Tensor]]):
    """A DataLoader whose errors say what to do."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        batches: Iterator[dict[str, Tensor]] | None = None
        try:
            with holding_interrupts():
                batches = super().__iter__()
            yield from batches
        except DataError as error:  # errors from a worker contain the worker's traceback
            raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise WorkerDied(
                f"A process that reads training images was killed or crashed ({str(error).strip()}). Most often the "
                "memory, or the shared memory of a container, is too small: use fewer workers, or 0."
            ) from error
        finally:
            with holding_interrupts():  # it waits for its processes in its __del__
                del batches


def _start_worker(_: int) -> None:
    end_with_parent()
    quiet_threads()
    parent, told = os.getppid(), sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, *more: Any) -> None:
        """Errors of this process, but for those of a thread that hands over a batch when the main process is gone or
        does not wait for it any more."""
        hung_up = isinstance(error, (EOFError, ConnectionError)) and threading.current_thread().daemon
        if os.getppid() == parent and not hung_up:
            told(kind, error, *more)

    sys.excepthook = tell


def make_loader(
    dataset: TrainSet,
    draws: Draws,
    rank: int,
    world: int,
    micro_batch: int,
    start_step: int,
    total_steps: int,
    workers: int,
) -> DataLoader[dict[str, Tensor]]:
    """The micro-batches of one process, for updates ``start_step`` to ``total_steps`` - 1, in one pass.

    Args:
        dataset: makes the samples.
        draws: their order.
        rank, world: this process, and how many there are.
        micro_batch: images in each batch that comes; divides ``draws.batch_size / world``.
        start_step, total_steps: updates.
        workers: processes that make samples (they live as long as the pass, which is the whole training); 0: none.

    Returns:
        Iterable of TrainSet's samples, stacked: image (b, 3, S, S), tags (b, C), box (b, 4) ...

    Raises (while iterating):
        ValueError: the batch cannot be divided evenly. DataError: a sample cannot be made. WorkerDied.
    """
    return _Loader(
        dataset,
        batch_sampler=_MicroBatches(draws, rank, world, micro_batch, start_step, total_steps),
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        # its own generator: the default one would take a number from the global stream, which networks draw from
        generator=torch.Generator().manual_seed(draws.seed),
    )
