"""Code of the three training steps: makes a network's training samples and calls the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from misc import distributed
from misc.config import flatten
from misc.files.ids import checked_id
from misc.files.images import read_image, read_mask
from misc.files.store import write_model
from misc.image.pixels import normalise_image, to_tensor
from misc.loop.fit import divide, fit
from misc.loop.kept import keep, remove_points
from misc.loop.trainable import Batch
from misc.loop.watch import DrawPictures
from net.contract import Network, Phase
from net.model import Part, describe_network
from net.released import load_released
from step.lib.config import Job, identity
from voc12.loader import Draws, TrainSet, make_loader


@dataclass(frozen=True)
class _Saliency:
    """Reads the saliency map of an image; picklable for worker processes."""

    job: Job

    def __call__(self, image_id: str) -> np.ndarray:
        return read_mask(self.job.saliency_folder() / f"{checked_id(image_id)}.png")


def train(
    job: Job,
    name: str,
    phase: Phase,
    network: Network,
    device: torch.device,
    *,
    ids: list[str],
    mask: Callable[[str], np.ndarray] | None = None,
    planes: Callable[[str], np.ndarray] | None = None,
    plane_fill: float = 0.0,
    target: Callable[[np.ndarray], Any] | None = None,
    score: Callable[[], Mapping[str, float]] | None = None,
    pictures: DrawPictures | None = None,
) -> None:
    """Train a network on the images ``ids`` by the recipe of its phase and write weights/NAME.pt, unless it exists. If
    the phase names a released checkpoint, that is written instead.

    The batches contain saliency maps if the network needs them.

    Args:
        mask: reads the (H, W) uint8 mask of an image, for segmentation networks.
        planes: reads the label planes of an image, for affinity networks, filled with ``plane_fill`` outside it.
        target: turns augmented planes into the training target.
        score: rates the network after every epoch (misc.loop.fit.fit): the weights that are best by its first rating
            are written instead of the last ones, which are kept beside them.
        pictures: pictures of the network for TensorBoard, as for ``fit``.
    """
    recipe = phase.fit
    if all(distributed.joined([job.run.weights(name).exists()])):
        distributed.say(f"{name}: trained already.")
        if distributed.is_main():
            remove_points(job.run.weights(name))  # a training that was killed at its very end leaves them
        return
    if phase.released:
        if distributed.is_main():
            report = load_released(network, phase.released_files)
            distributed.say(f"{name}: used as released, without training. {report}")
            description = _description(job, name, phase, network, device)
            write_model(job.run.weights(name), {k: v.cpu() for k, v in network.state_dict().items()}, description)
        distributed.barrier()
        return
    if recipe.steps != 0:
        distributed.say(f"{name}: trains on the list {job.train_list}, {len(ids)} images.")
    for line in phase.start.load(network, job.run.weights("cam")):
        distributed.say(f"{name}: starts from {line}")

    def calibrate() -> None:
        split = job.cfg.score_list if job.catalog.has_list(job.cfg.score_list) else job.train_list
        distributed.say(f"{name}: measures what inference needs, on {split}.")
        network.calibrate(images.to(device) for images in _corner_images(job, split, phase, network.normalisation))

    finish = calibrate if network.calibrates else None
    description = _description(job, name, phase, network, device)
    if recipe.steps == 0:
        distributed.say(f"{name}: nothing is trained, its start weights are kept.")
        keep(network, device, job.machine(phase, device), job.run.weights(name), description, finish)
        return
    division = divide(recipe, distributed.world())
    draws = Draws(len(ids), recipe.batch_size, recipe.sample_order, job.cfg.seed, recipe.last_batch)
    total = recipe.steps or recipe.epochs * draws.steps_per_epoch
    samples = TrainSet(
        job.catalog, ids, phase.augment, network.normalisation, job.cfg.seed,
        with_mask=mask, planes=planes, plane_fill=plane_fill, target=target,
        saliency=_Saliency(job) if phase.network.wants_saliency else None, views=phase.views(),
    )

    def batches(start: int) -> Iterable[Batch]:
        return make_loader(
            samples, draws, rank=distributed.rank(), world=distributed.world(), micro_batch=division.micro_size,
            start_step=start, total_steps=total, workers=job.cfg.machine.workers,
        )

    fit(
        network, batches, recipe, total, machine=job.machine(phase, device), device=device, seed=job.cfg.seed,
        weights=job.run.weights(name), log=job.run.log, name=name,
        made_by={**identity(flatten(phase)), "images": job.catalog.fingerprint(job.train_list)},
        description=description, finish=finish, score=score, pictures=pictures,
    )


def _corner_images(job: Job, split: str, phase: Phase, normalisation: str) -> Iterator[torch.Tensor]:
    """Images of a list, not resized, cropped or padded at the bottom and right to the training crop: batches (b, 3, S,
    S)."""
    side, ids = phase.augment.crop, job.catalog.ids(split)
    size = phase.fit.micro_batch or phase.fit.batch_size
    for begin in range(0, len(ids), size):
        batch = torch.zeros(len(ids[begin : begin + size]), 3, side, side)
        for canvas, image_id in zip(batch, ids[begin : begin + size], strict=True):
            pixels = read_image(job.catalog.image_path(image_id))[:side, :side]
            image = to_tensor(normalise_image(pixels, normalisation))
            canvas[:, : image.shape[1], : image.shape[2]] = image
        yield batch


def _description(job: Job, name: str, phase: Phase, network: Network, device: torch.device) -> dict[str, Any]:
    """The description stored in the weights file of the phase ``name``."""
    cfg = job.cfg
    part: Part = "aff" if name == "aff" else "seg" if name == "seg" else "cam"
    method = {"cam": cfg.method, "aff": cfg.refiner, "seg": cfg.segmenter}[part]
    recipe = identity(flatten(getattr(cfg, part)))
    test = cfg.seg if name == "cam" and job.single_stage else None
    precision = "not known (released)" if phase.released else job.machine(phase, device).precision(device)
    told = describe_network(part, method, cfg.preset, recipe, job.catalog.classes, network, test)
    return {**told, "precision": precision}
