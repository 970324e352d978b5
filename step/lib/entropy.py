"""An extra step outside the pipeline: entropy of the maps of each layer of a trained CAM network (aream.md section
3)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from misc import distributed
from misc.files.images import read_image
from misc.files.store import write_json
from misc.image.pixels import normalise_image, resize_image, to_tensor
from misc.loop.each import each
from step.lib.config import Job
from step.lib.networks import load_cam_network


def measure_entropy(job: Job, device: torch.device) -> list[float]:
    """Mean entropy in bits of every layer over the training list; also written to layer_entropy.json in the run folder.

    Images are stretched to the square of the training crop; those without a tag are left out. Raises ValueError if the
    method's network has no entropy.
    """
    network = load_cam_network(job, device)
    measure = getattr(network, "layer_entropy", None)
    if measure is None:
        raise ValueError(f"{job.cfg.method} has no layer entropy to measure: only AReAM's methods have it.")
    side = job.cfg.cam.augment.crop
    sums: list[Tensor] = []

    def prepare(image_id: str) -> tuple[Tensor, np.ndarray]:
        pixels = resize_image(read_image(job.catalog.image_path(image_id)), (side, side))
        return to_tensor(normalise_image(pixels, network.normalisation)), job.catalog.tags(image_id)

    def work(image_id: str, prepared: tuple[Tensor, np.ndarray]) -> None:
        image, tags = prepared
        if tags.any():
            present = torch.tensor(tags, dtype=torch.float32, device=device)
            found = measure(image.to(device)[None], present[None])[0]  # (L,)
            sums.append(torch.cat([found, found.new_ones(1)]).double())  # the last entry counts images

    each("entropy", job.train_ids(), work, prepare=prepare, done=lambda _: False, workers=job.cfg.machine.workers)
    nothing = torch.zeros(job.cfg.cam.network.backbone.depth + 1, dtype=torch.float64, device=device)
    total = distributed.total(torch.stack([nothing, *sums]).sum(0))
    if not total[-1]:
        raise ValueError(f"No image of the list {job.train_list} has a tag: there is nothing to measure.")
    entropy = (total[:-1] / total[-1]).tolist()
    if distributed.is_main():
        write_json(job.run.root / "layer_entropy.json", entropy)
    return entropy
