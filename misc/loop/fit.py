"""The training loop for all networks (docs/design.md section 2, rule 3).

AMP, DDP under torchrun, the global batch and its division, exact resume, TensorBoard and the finite-loss guard live
here and nowhere else. A network's ``forward(batch, progress)`` returns named loss terms whose sum is minimised.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from misc import distributed
from misc.config import Fit, Machine
from misc.files import store
from misc.loop.each import WorkerDied
from misc.loop.kept import keep, keep_best, keep_rated, remove_best, remove_points, resume_point
from misc.loop.progress import Progress
from misc.loop.trainable import Batch, Trainable
from misc.loop.watch import PICTURES, DrawPictures, Watch, falls_due
from misc.precision import autocast, full_precision, place


class OutOfMemory(RuntimeError):
    """The GPU's memory is too small for the images of a micro-batch. The last resume point is kept."""


class NonFiniteLoss(RuntimeError):
    """A loss term became NaN or infinite. Training has stopped; the last resume point is kept."""


@dataclass(frozen=True)
class Division:
    """How the global batch is divided: ``per_process`` images each, in ``micro`` micro-batches of ``micro_size``."""

    per_process: int
    micro: int
    micro_size: int


def divide(fit: Fit, world: int) -> Division:
    """Division of the global batch over processes and accumulation steps.

    Raises ValueError if the global batch cannot be divided evenly: the batch would differ from the recipe's.
    """
    if fit.batch_size % world:
        raise ValueError(
            f"The global batch of {fit.batch_size} images cannot be divided evenly over {world} processes."
        )
    per_process = fit.batch_size // world
    size = min(fit.micro_batch or per_process, per_process)
    if per_process % size:
        raise ValueError(f"The {per_process} images per process are not a multiple of micro_batch = {size}.")
    return Division(per_process, per_process // size, size)


def lr_factor(fit: Fit, step: int, total: int) -> float:
    """Factor of the base learning rate at update ``step`` (0-based) of ``total``; constant after the end."""
    if fit.schedule == "constant":
        return 1.0
    if fit.schedule == "step":
        # published: tested by divisibility, so that 30 acts at epoch 60 too (wsol.md section 9)
        epoch = min(step, total - 1) * fit.epochs // total + 1
        return fit.step_factor ** sum(any(e % every == 0 for every in fit.step_epochs) for e in range(1, epoch + 1))
    if fit.schedule == "cosine":
        return _cosine(fit, step, total) / fit.lr
    if fit.schedule == "timm_cosine":
        # published: the rate is set after an epoch with that epoch's index, so it lags by one epoch (mctformer.md 6)
        return _timm_cosine(fit, max(0, min(step, total - 1) * fit.epochs // total - 1)) / fit.lr
    if fit.schedule == "warmup_poly" and step < fit.warmup_steps:
        return 1 - (1 - step / fit.warmup_steps) * (1 - fit.warmup_ratio)
    step = min(step, total - 1)
    return (1 - (step - step % fit.schedule_every) / (total + fit.schedule_extra)) ** fit.power


def _half_wave(high: float, low: float, share: float) -> float:
    """Cosine from ``high`` at 0 to ``low`` at 1."""
    return low + (high - low) / 2 * (1 + math.cos(math.pi * share))


def _cosine(fit: Fit, step: int, total: int) -> float:
    """Rate of an update if the cosine starts after the warm-up (aream.md section 8, Conformer)."""
    step, warmup = min(step, total - 1), round(total * fit.warmup_epochs / fit.epochs)
    if step < warmup:
        return fit.warmup_lr + (fit.lr - fit.warmup_lr) * step / max(1, warmup - 1)
    return _half_wave(fit.lr, fit.final_lr, (step - warmup) / (total - warmup))


def _timm_cosine(fit: Fit, t: int) -> float:
    """timm's rate for epoch ``t``: the cosine counts from epoch 0, warm-up included (mctformer.md section 6)."""
    if t < fit.warmup_epochs:
        return fit.warmup_lr + t * (fit.lr - fit.warmup_lr) / fit.warmup_epochs
    return _half_wave(fit.lr, fit.final_lr, t / fit.epochs)


def make_optimiser(groups: list[Any], fit: Fit, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimiser over a network's parameter groups; each group remembers its ``lr_scale``."""
    listed = [
        {
            "params": group.params,
            "lr_scale": group.lr_scale,
            "lr": fit.lr * group.lr_scale,
            "weight_decay": fit.weight_decay if group.decay else 0.0,
        }
        for group in groups
        if group.params
    ]
    if fit.optimiser == "adamw":
        return torch.optim.AdamW(listed, lr=fit.lr, fused=device.type == "cuda")
    # not fused: with momentum that fails where some parameters get their first gradient later than others
    return torch.optim.SGD(listed, lr=fit.lr, momentum=fit.momentum, nesterov=fit.nesterov)


Rules = list[tuple[torch.optim.Optimizer, Fit]]
"""The optimisers of a training, each with its recipe."""


def make_rules(groups: list[Any], fit: Fit, device: torch.device) -> Rules:
    """One optimiser for the groups that follow the recipe, and one for each other ``rule`` of a group."""
    sorted_groups: dict[Fit, list[Any]] = {}
    for group in groups:
        sorted_groups.setdefault(group.rule or fit, []).append(group)
    return [(make_optimiser(listed, rule, device), rule) for rule, listed in sorted_groups.items()]


def set_lr(optimiser: torch.optim.Optimizer, fit: Fit, step: int, total: int, scale: float = 1.0) -> None:
    """Set every group's rate for update ``step``, before the update; ``scale`` is the network's factor of all rates."""
    for group in optimiser.param_groups:
        group["lr"] = fit.lr * group["lr_scale"] * lr_factor(fit, step, total) * scale


def seed_step(seed: int, step: int) -> None:
    """Seed the random numbers of an update (dropout, drop path) from (seed, step, rank) alone, so that a resumed
    training draws the same numbers as an uninterrupted one."""
    mixed = (seed * 1_000_003 + step * 7919 + distributed.rank() * 104_729) % (2**32)
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def fit(
    network: Trainable,
    batches: Callable[[int], Iterable[Batch]],
    recipe: Fit,
    total: int,
    *,
    machine: Machine,
    device: torch.device,
    seed: int,
    weights: Path,
    log: Path,
    name: str,
    made_by: Mapping[str, Any],
    description: Mapping[str, Any],
    score: Callable[[], Mapping[str, float]] | None = None,
    finish: Callable[[], None] | None = None,
    pictures: DrawPictures | None = None,
) -> None:
    """Train a network and write its state dict with its description to ``weights`` (store.write_model).

    Args:
        network: on any device; it is moved to ``device``.
        batches: called with the first update to run; yields this process's micro-batches, ``divide(...).micro`` for
            each update.
        recipe: optimiser and schedule.
        total: number of updates.
        machine: precision, compilation, resume points.
        seed: of random numbers during the training, such as dropout.
        weights: path of the final weights file.
        log: TensorBoard folder; this training's curves go to its sub-folder ``name``.
        name: label in the progress bar and the log.
        made_by: plain values that determine the result (settings, data); a resume point with other values is refused.
        description: plain values that describe the network in the weights file.
        score: ratings of the network in evaluation mode, by name; called by the main process after every epoch
            (1 / epochs of the updates). The weights of the epoch with the best first rating are written to ``weights``,
            those with the best of each further one to ``beside(weights, NAME)``, the first in a tie (where all are NaN,
            the last weights); those after the last update to ``beside(weights, "last")``. None: the last ones to
            ``weights``.
        finish: called by the main process after the last update, with the network in evaluation mode and without
            gradients, before the weights are written (Network.calibrate).
        pictures: draws for TensorBoard; called by the main process ``PICTURES`` times, evenly over the updates, with
            the network in evaluation mode. It changes nothing in the training.

    Raises:
        NonFiniteLoss: a loss term is NaN or infinite; the batch is saved for inspection.
        ValueError: the resume point belongs to a different training.
    """
    division = divide(recipe, distributed.world())
    main = distributed.is_main()
    place(network, machine, device)
    network.train()
    rules = make_rules(network.param_groups(), recipe, device)
    scaler = torch.amp.GradScaler(device.type, enabled=machine.amp_dtype(device) == torch.float16)
    resume = resume_point(weights)
    identity = json.dumps({**made_by, "updates": total, "seed": seed}, default=str)
    start = _resume(resume, network, rules, scaler, identity)
    ratings: dict[str, float] = {}
    if main and not start:
        remove_best(weights)  # left over from a training without a resume point
    model = _wrap(network, machine, device)
    distributed.say(
        f"{name}: {total} updates of {recipe.batch_size} images = {distributed.world()} process(es) x "
        f"{division.micro} micro-batch(es) x {division.micro_size}"
        + (f"; going on from update {start}" if start else "")
    )
    every = machine.checkpoint_every or max(1, total // 20)
    stream = iter(batches(start))
    with (
        _dead_readers_named(),
        Watch(log, name, start, pictures) as watch,
        Progress(total=total, initial=start, desc=name, unit="update", disable=not main) as bar,
    ):
        for step in range(start, total):
            for optimiser, rule in rules:
                set_lr(optimiser, rule, step, total, network.lr_scale(step / total))
            seed_step(seed, step)
            move_copies(network)
            micro = [
                {k: v.to(device, non_blocking=True) for k, v in batch.items()}
                for batch in [next(stream) for _ in range(division.micro)]
            ]
            with _explained(name, division):
                terms = _update(model, network, rules, scaler, micro, step / total, recipe, machine, device)
            if not all(math.isfinite(v) for v in terms.values()):
                _stop(micro, terms, step, log, name)
            watch.add_update(step, terms, rules[0][0].param_groups[0]["lr"], recipe.batch_size)
            bar.set_postfix(watch.tell(terms), refresh=False)
            bar.update()
            if falls_due(step, total, PICTURES):
                watch.add_pictures(step, network)
            if score is not None and falls_due(step, total, recipe.epochs):
                _check_weights(network, step, name)
                ratings = keep_best(weights, network, score, name)
                watch.add_ratings(step, ratings)
            if (step + 1) % every == 0 and step + 1 < total:
                _check_weights(network, step, name)
                _save(resume, network, rules, scaler, identity, step + 1)
    _check_weights(network, total - 1, name)
    if score is None:
        keep(network, device, machine, weights, description, finish)
    else:
        keep_rated(network, device, machine, weights, description, finish, ratings, name)
    if main:
        remove_points(weights)
    distributed.barrier()


def _wrap(network: Trainable, machine: Machine, device: torch.device) -> nn.Module:
    model: nn.Module = network
    if distributed.world() > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids, find_unused_parameters=bool(network.finds_unused))
    if machine.compile:  # last, so that the compiler divides the backward pass where gradients are exchanged
        model = torch.compile(model)  # type: ignore[assignment]
    return model


@contextlib.contextmanager
def _dead_readers_named() -> Iterator[None]:
    """PyTorch tells of a reading process that was killed by an error wherever the main process is just then."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise WorkerDied(
            "A worker process that reads images died (often: out of memory). Start the same command again, with fewer "
            "--machine.workers if it happens again."
        ) from None


@contextlib.contextmanager
def _explained(name: str, division: Division) -> Iterator[None]:
    """Says what helps if the GPU's memory is too small for an update."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size, flag = division.micro_size, f"--{name}" if name in ("cam", "aff", "seg") else f"--cam.{name}"
        smaller = f"{flag}.fit.micro-batch {size // 2}" if size > 1 else f"a smaller {flag}.augment.crop"
        raise OutOfMemory(
            f"{name}: the GPU's memory is too small for {size} image(s) at a time. Train in another run folder with "
            f"{smaller}" + ("; the recipe's batch stays the same." if size > 1 else ".") +
            f" PyTorch says: {str(error).splitlines()[0]}"
        ) from None


def _update(
    model: nn.Module, network: Trainable, rules: Rules, scaler: torch.amp.GradScaler,
    micro: list[Batch], progress: float, recipe: Fit, machine: Machine, device: torch.device,
) -> dict[str, float]:
    """One update from its micro-batches; returns the loss terms averaged over micro-batches and processes."""
    with full_precision(device.type):
        for batch in micro:
            batch.update(network.prepare(batch, progress))
    _share_counts(network, micro)
    for optimiser, _ in rules:
        optimiser.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(micro):
        # processes exchange gradients once per update, with the last micro-batch
        quiet = distributed.world() > 1 and number + 1 < len(micro)
        with model.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
            with autocast(machine, device):
                terms = model(batch, progress)
            scaler.scale(sum(terms.values()) / len(micro)).backward()
        for term, value in terms.items():
            sums[term] = sums.get(term, torch.zeros((), device=device)) + value.detach().float() / len(micro)
    stacked = distributed.total(torch.stack(list(sums.values()))) / distributed.world()
    values = dict(zip(sums, stacked.tolist(), strict=True))
    if all(math.isfinite(v) for v in values.values()):
        if recipe.clip_norm:
            for optimiser, _ in rules:
                scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        for optimiser, _ in rules:
            scaler.step(optimiser)
        scaler.update()
    return values


@torch.no_grad()
def move_copies(network: Trainable) -> None:
    """Move the network's momentum copies one step towards what they follow (Trainable.momentum_copies)."""
    for pair in network.momentum_copies():
        for copy, source in zip(pair.copy.parameters(), pair.source.parameters(), strict=True):
            copy.mul_(pair.momentum).add_(source, alpha=1 - pair.momentum)


def _share_counts(network: Trainable, micro: list[Batch]) -> None:
    """Add to every micro-batch the mean counts over all micro-batches of all processes (Network.counts)."""
    counted = [network.counts(batch) for batch in micro]
    for key in counted[0]:
        mean = distributed.total(torch.stack([c[key].float() for c in counted]).sum())
        mean = mean / (len(micro) * distributed.world())
        for batch in micro:
            batch[f"counts/{key}"] = mean


def _save(
    path: Path, network: Trainable, rules: Rules, scaler: torch.amp.GradScaler, identity: str, step: int
) -> None:
    if distributed.is_main():
        optimisers = [optimiser.state_dict() for optimiser, _ in rules]
        state = {"network": network.state_dict(), "optimisers": optimisers, "scaler": scaler.state_dict()}
        store.write_weights(path, {**state, "identity": identity, "step": step})


def _resume(
    path: Path, network: Trainable, rules: Rules, scaler: torch.amp.GradScaler, identity: str
) -> int:
    distributed.barrier()
    if not path.exists():
        return 0
    state = store.read_weights(path)
    now = json.loads(identity)
    try:
        there = dict(json.loads(state["identity"]))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise ValueError(f"{path} is no resume point: delete it to train from the start.") from None
    differing = [k for k in {**there, **now} if there.get(k) != now.get(k)]
    if differing:
        shown = "; ".join(f"{k} was {there.get(k)!r}, is {now.get(k)!r}" for k in differing[:5])
        raise ValueError(
            f"{path} is the resume point of another training ({shown}). Delete it to train from the start, or use the "
            "settings it was made with."
        )
    try:
        step, total = int(state["step"]), now["updates"]
        if not 0 < step < total:
            raise ValueError(f"its update {step} is not one of {total}")
        store.check_finite(path, state["network"])
        network.load_state_dict(state["network"])
        for (optimiser, _), stored in zip(rules, state["optimisers"], strict=True):
            optimiser.load_state_dict(stored)
        if state["scaler"]:  # empty if it was saved without fp16
            scaler.load_state_dict(state["scaler"])
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        told = str(error).split("\n")[0]
        raise ValueError(f"{path} is damaged ({told}): delete it to train from the start.") from None
    return step


def _check_weights(network: Trainable, step: int, name: str) -> None:
    """Refuse to write weights that are not finite: a finite loss can have non-finite gradients."""
    if not all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
        raise NonFiniteLoss(
            f"{name}: weights are not finite after update {step} and are not written. An earlier resume point is kept. "
            f"Start the same command again with --machine.amp off, or train anew with a smaller --{name}.fit.lr."
        )


def _stop(micro: list[Batch], terms: dict[str, float], step: int, log: Path, name: str) -> None:
    kept = log / f"{name}_nonfinite_rank{distributed.rank()}.pt"
    store.write_weights(kept, [{k: v.cpu() for k, v in batch.items()} for batch in micro])
    shown = ", ".join(f"{k} = {v}" for k, v in terms.items())
    raise NonFiniteLoss(
        f"{name}: the loss is not finite at update {step} ({shown}). An earlier resume point is kept; the batch is in "
        f"{kept}. Start the same command again with --machine.amp off, or train anew with a smaller "
        f"--{name}.fit.lr in another run folder."
    )
