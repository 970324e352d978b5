"""Speed of every network's training step and CAMs, in float32 and fast: ``python -m scripts.network_speed [NAME ...]``.

Both precisions take turns in one process on the same random batch; times are medians. Each is also given as a share of
the ideal: the floating-point operations of its matrix products and convolutions, done at the rate at which this machine
multiplies large matrices in that precision.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from misc.checked import Checked, Count
from misc.config import Machine, Precision
from misc.distributed import device_name
from misc.infer import cams
from misc.loop.fit import make_rules
from misc.precision import autocast, place
from misc.tables import ResultTable
from net import registry
from net.contract import Network, SeedNetwork, SeedRecipe
from scripts.measured_networks import CLASSES, Task, build, loss_terms, make_batch, tasks

COMPARED: tuple[Precision, ...] = ("off", "fast")
COLUMNS = ("network", "of", "float32", "ideal", "fast", "ideal", "gain")


@dataclass(frozen=True)
class SpeedOptions(Checked):
    """What is measured, and how."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Networks, such as seam, semformer.caae, 'refiner psa', deeplabv2. Default: all."""
    preset: str = "sample"
    """Recipes to take."""
    device: str = "cpu"
    """Where to measure."""
    threads: Count = 1
    """Threads on the CPU."""
    batch: Count = 4
    """Images in a training step."""
    height: Count = 100
    """Height of the image whose CAMs are made."""
    width: Count = 140
    """Its width."""
    repeats: Count = 5
    """Timed repeats of each precision, after one that does not count."""
    json: Path | None = None
    """Also write all figures to this file."""


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(kind: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second in products of large matrices: the best of several."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=kind)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        wait_for(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def training_step(network: Network, task: Task, options: SpeedOptions, machine: Machine) -> Callable[[], None]:
    """A function that makes one update."""
    device = torch.device(options.device)
    place(network.train(), machine, device)
    rules = make_rules(network.param_groups(), task.phase.fit, device)
    batch = make_batch(task, options.batch, device)

    def step() -> None:
        for optimiser, _ in rules:
            optimiser.zero_grad(set_to_none=True)
        sum(loss_terms(network, network, batch, 0.9, autocast(machine, device)).values()).backward()
        for optimiser, _ in rules:
            optimiser.step()

    return step


def cam_inference(network: Network, task: Task, options: SpeedOptions, machine: Machine) -> Callable[[], None]:
    """A function that makes the CAMs of one image of two classes."""
    assert isinstance(network, SeedNetwork) and isinstance(task.phase, SeedRecipe)
    device, inference = torch.device(options.device), task.phase.infer
    place(network.eval(), machine, device)
    image = np.random.default_rng(0).integers(0, 256, (options.height, options.width, 3), np.uint8)
    tags = np.zeros(CLASSES, np.float32)
    tags[[3, 7]] = 1

    def infer() -> None:
        grad = contextlib.nullcontext() if network.map_needs_gradient else torch.inference_mode()
        with grad, autocast(machine, device):
            cams.infer_cam(network.cam, image, tags, inference, network.normalisation, device)

    return infer


def measure_both(make: Callable[[Machine], Callable[[], None]], options: SpeedOptions) -> dict[str, Any]:
    """Median seconds in each precision, taking turns, and the floating-point operations."""
    device = torch.device(options.device)
    forms = {amp: make(Machine(amp=amp)) for amp in COMPARED}
    flops: int | None = None
    with contextlib.suppress(RuntimeError):  # PyTorch can't count where the forward pass asks for gradients
        with FlopCounterMode(display=False) as counter:
            forms["off"]()
        flops = counter.get_total_flops()
    for form in forms.values():
        form()
    seconds: dict[str, list[float]] = {amp: [] for amp in COMPARED}
    for _ in range(options.repeats):
        for amp, form in forms.items():
            wait_for(device)
            begin = time.perf_counter()
            form()
            wait_for(device)
            seconds[amp].append(time.perf_counter() - begin)
    return {"flops": flops, **{amp: statistics.median(times) for amp, times in seconds.items()}}


def main(options: SpeedOptions) -> int:
    """Measure and print a row for each step. Returns the exit status."""
    registry.load_methods()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    listed = list(tasks(options.preset))
    if unknown := sorted(set(options.names) - {task.name for task in listed}):
        print(f"error: no network {', '.join(unknown)}: there are {', '.join(t.name for t in listed)}", file=sys.stderr)
        return 2
    kinds = {"off": torch.float32, "fast": Machine(amp="fast").amp_dtype(device) or torch.float32}
    rates = {amp: matrix_rate(kind, device) for amp, kind in kinds.items()}
    print(f"{device_name(device)}, {options.threads} thread(s), PyTorch {torch.__version__}; matrix products: "
          + ", ".join(f"{kinds[amp]} {rate / 1e9:.0f} GFLOP/s" for amp, rate in rates.items()), flush=True)  # fmt: skip
    rows: list[list[str]] = []
    results: dict[str, Any] = {"rates": rates}
    for task in (task for task in listed if not options.names or task.name in options.names):
        made = {"training": training_step, "CAM": cam_inference}
        if task.phase.fit.steps == 0:
            del made["training"]
        if task.name not in registry.SEEDS:
            del made["CAM"]
        for what, form in made.items():
            networks = {amp: build(task, device, Machine(amp=amp)) for amp in COMPARED}
            found = measure_both(lambda m, f=form, n=networks: f(n[m.amp], task, options, m), options)  # noqa: B023
            results[f"{task.name} {what}"] = found
            rows.append(speed_row(task.name, what, found, rates))
            print("  ".join(rows[-1]), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(results, indent=1))
    print("\n" + ResultTable(COLUMNS, rows, range(2, len(COLUMNS))).markdown())
    return 0


def speed_row(name: str, what: str, found: dict[str, Any], rates: dict[str, float]) -> list[str]:
    """The cells of ``COLUMNS`` for a measurement."""
    cells = [name, what]
    for amp in COMPARED:
        ideal = "" if found["flops"] is None else f"{100 * found['flops'] / rates[amp] / found[amp]:.0f} %"
        cells += [f"{1e3 * found[amp]:.0f} ms", ideal]
    return [*cells, f"{found['off'] / found['fast']:.2f}"]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(SpeedOptions, prog="python -m scripts.network_speed")))
