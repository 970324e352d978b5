"""Step 8: draw boxes round the objects of the validation images and score them, on data sets that have true boxes:
box/ID.npz. Boxes are taken at one fixed threshold (TS-CAM's protocol: wsol.md sections 6 and 7) and at all thresholds
(wsolevaluation's: section 8)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import torch

from misc.files.images import read_image
from misc.files.store import write_arrays
from misc.infer.cams import infer_logits, infer_raw_maps
from misc.loop.each import each
from misc.precision import autocast
from misc.score import wsol
from step.lib.boxes import on_grid
from step.lib.config import Job
from step.lib.networks import load_cam_network
from step.lib.scoring import score_boxes

AskMaps = Callable[[np.ndarray], list[torch.Tensor]]
"""Classes -> their raw maps, as ``misc.infer.cams.merge_maps`` takes them."""


def localise(
    job: Job, logits: np.ndarray, maps: AskMaps, target: int, truth: np.ndarray, region: np.ndarray | None,
    size: tuple[int, int],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Find and score the boxes of one image.

    The boxes of the five best classes are found from logits and image alone. Those of the true class (GT-Known,
    MaxBoxAcc, PxAP) come from maps of that class, in a separate pass.

    Args:
        logits: (C,). maps: see ``AskMaps``.
        target: true class. truth: (n, 4) true boxes in pixels of the image, whose size is ``size`` (H, W).
        region: see ``Catalog.region``.

    Returns:
        best (k,), boxes (k, 4), known (4,), truth (n, 4) on the grid; the fields of ``wsol.Verdict``; overlap (2, T);
        pixels (2, T + 2), zeros if there is no region; score (side, side) uint8, the map of the best class.
    """
    options = job.cfg.cam.boxes
    best = wsol.best_classes(logits)
    scores = on_grid(job, maps(np.sort(best)), "bilinear")[np.argsort(np.argsort(best))]  # (k, side, side)
    boxes = np.stack([wsol.fixed_box(m, options.threshold) for m in scores])
    asked = maps(np.array([target]))
    known = wsol.fixed_box(on_grid(job, asked, "bilinear")[0], options.threshold)
    clipped = wsol.scaled_boxes(truth, size, options.side, clip=True)
    verdict = wsol.judge_boxes(best, boxes, known, target, clipped)
    taus = wsol.list_thresholds(options.interval)
    swept = on_grid(job, asked, "bicubic")[0]
    pixels = np.zeros((2, len(taus) + 2), np.int64)
    if region is not None:
        pixels = wsol.region_histograms(swept, wsol.region_on_grid(region, options.side), taus)
    return {
        "best": best, "boxes": boxes, "known": known, "truth": clipped, "score": wsol.to_levels(scores[0]),
        "overlap": wsol.best_overlaps(swept, taus, wsol.scaled_boxes(truth, size, options.side, clip=False)),
        "pixels": pixels, **{name: np.array(value) for name, value in vars(verdict).items()},
    }  # fmt: skip


def run(job: Job, device: torch.device) -> None:
    """Find, score and record the boxes of the validation list. Class scores are computed without tags."""
    for kind in ("", *job.further_weights):
        localise_list(job, device, kind)
        score_boxes(job, device, kind)


def localise_list(job: Job, device: torch.device, kind: str = "") -> None:
    """Find the boxes by the CAM network, or by the one of ``Job.further_weights`` that is named."""
    network, catalog = load_cam_network(job, device, kind), job.catalog
    infer, values = job.cfg.cam.infer, network.normalisation

    def prepare(image_id: str) -> np.ndarray:
        return read_image(catalog.image_path(image_id))

    def work(image_id: str, image: np.ndarray) -> None:
        targets = np.flatnonzero(catalog.tags(image_id))
        if len(targets) != 1:
            raise ValueError(f"it has {len(targets)} classes: images must have one. Take it off the list.")

        def maps(classes: np.ndarray) -> list[torch.Tensor]:
            asked = np.zeros(catalog.num_classes, np.float32)
            asked[classes] = 1
            return list(infer_raw_maps(network.cam, image, asked, infer, values, device))

        grad = contextlib.nullcontext() if network.map_needs_gradient else torch.inference_mode()
        with grad, autocast(job.machine(job.cfg.cam, device), device):
            logits = infer_logits(network.classify, image, catalog.num_classes, infer, values, device)
            found = localise(
                job, logits, maps, int(targets[0]), catalog.boxes(image_id), catalog.region(image_id), image.shape[:2]
            )
        write_arrays(job.run.box(image_id, kind), **found)

    each(
        f"localise {kind}".strip(), catalog.ids(job.cfg.val_list), work, prepare=prepare,
        done=lambda i: job.run.box(i, kind).exists(), workers=job.cfg.machine.workers, part=job.cfg.shard_part(),
        in_processes=device.type == "cpu",
    )
