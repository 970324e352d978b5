"""The weights files of a training: the last ones, those of the epoch with the best rating, and what an unfinished
training leaves beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from misc import distributed
from misc.config import Machine
from misc.files import store
from misc.loop.trainable import Trainable
from misc.precision import autocast


def beside(weights: Path, kind: str) -> Path:
    """Path of further weights of a training, beside its weights file."""
    return weights.with_name(f"{weights.stem}.{kind}.pt")


def resume_point(weights: Path) -> Path:
    """Path of the resume point, beside the weights file; it exists while the training is unfinished."""
    return beside(weights, "resume")


def remove_points(weights: Path) -> None:
    """Remove what only an unfinished training of these weights needs."""
    resume_point(weights).unlink(missing_ok=True)
    remove_best(weights)


def remove_best(weights: Path) -> None:
    """Remove the best weights so far of an unfinished training."""
    for left in weights.parent.glob(f"{weights.stem}.*.best.pt"):
        left.unlink()


def keep(
    network: nn.Module, device: torch.device, machine: Machine, weights: Path, description: Mapping[str, Any],
    finish: Callable[[], None] | None = None,
) -> None:
    """Write a network as it is, as the end of a training does; of a network that nothing is trained of it is the whole
    training. To be called by all processes; arguments as for ``fit``."""
    if distributed.is_main():
        network.to(device)
        if finish is not None:
            network.eval()
            with torch.no_grad(), autocast(machine, device):
                finish()
        state = {k: v.cpu().contiguous() for k, v in network.state_dict().items()}  # in no layout of this machine's
        store.write_model(weights, state, description)
    distributed.barrier()


def keep_best(
    weights: Path, network: Trainable, score: Callable[[], Mapping[str, float]], name: str
) -> dict[str, float]:
    """Rate the network, and save its weights for each rating that is the best so far; one that is NaN is no rating. A
    resumed training rates some epochs again, whose weights are saved already. Returns the ratings in the main process,
    nothing in others."""
    ratings: dict[str, float] = {}
    if distributed.is_main():
        network.eval()
        ratings = dict(score())
        network.train()
        for rating, value in ratings.items():
            path = beside(weights, f"{rating}.best")
            better = value > (float(store.read_weights(path)["score"]) if path.exists() else -math.inf)
            told = ", the best so far" if better else ": the epoch is not chosen" if math.isnan(value) else ""
            distributed.say(f"{name}: {rating} of the epoch {value:.4f}{told}")
            if better:
                store.write_weights(path, {"network": network.state_dict(), "score": value})
    distributed.barrier()
    return ratings


def keep_rated(
    network: Trainable, device: torch.device, machine: Machine, weights: Path, description: Mapping[str, Any],
    finish: Callable[[], None] | None, ratings: Mapping[str, float], name: str,
) -> None:
    """Write the last weights and the best ones by each rating; the file of the first, which says that the training is
    done, at the end. Where a rating was NaN in every epoch, its file gets the last weights, which is said."""
    first, *further = distributed.joined(list(ratings))  # known in the main process
    told: dict[str, float | None] = {n: None if math.isnan(value) else value for n, value in ratings.items()}
    for rating in ("last", *further, first):
        kept = {"last": told.get(first if rating == "last" else rating)}
        best = beside(weights, f"{rating}.best")
        if distributed.is_main() and best.exists():
            stored = store.read_weights(best)
            network.load_state_dict(stored["network"])
            kept["selected"] = float(stored["score"])
        elif distributed.is_main() and rating != "last":
            reason = f"{rating} is not a number (NaN) in any epoch, so none is chosen"
            distributed.say(f"{name}: {reason}: the last weights are kept.")
            network.load_state_dict(store.read_model(beside(weights, "last"))[0])
        path = weights if rating == first else beside(weights, rating)
        keep(network, device, machine, path, {**description, "rating": kept}, finish)
