"""Speed of every network's training step and CAMs, in float32 and fast: ``python -m scripts.network_speed [NAME ...]``.

Both precisions take turns in one process on the same random batch; times are medians. Each is also given as a share of
the ideal: the floating-point operations of its matrix products and convolutions, done at the highest rate this machine
reaches in that precision in a product of large matrices or a large convolution. With ``--compile`` only training steps
in the precision fast, with torch.compile and without.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from misc.checked import Checked, Count
from misc.config import Machine, Precision
from misc.distributed import device_name
from misc.infer import cams
from misc.loop.fit import make_rules
from misc.precision import allow_tf32, autocast, place
from misc.tables import ResultTable
from net import registry
from net.contract import Network, SeedNetwork, SeedRecipe
from scripts.measured_networks import CLASSES, Task, build, loss_terms, make_batch, tasks

COMPARED: tuple[Precision, ...] = ("off", "fast")
COMPILE_COLUMNS = ("network", "fast", "compiled", "gain", "to compile")
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
    compile: bool = False
    """Measure what torch.compile gains, and how long it takes to compile."""
    json: Path | None = None
    """Also write all figures to this file."""


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def highest_rate(kind: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second in products of large matrices and in large convolutions, which other code
    computes: the better one's best of several."""
    side, batch = (8192, 256) if device.type == "cuda" else (1024, 8)
    a = torch.randn(side, side, device=device, dtype=kind)
    layer = nn.Conv2d(128, 128, 3, padding=1, bias=False)
    layer.to(device, kind, memory_format=torch.channels_last)
    maps = torch.randn(batch, 128, 64, 64, device=device, dtype=kind).to(memory_format=torch.channels_last)
    rates = []
    with torch.inference_mode():
        for form in (lambda: a @ a, lambda: layer(maps)):
            operations = count_operations(form)
            for _ in range(8):
                wait_for(device)
                begin = time.perf_counter()
                form()
                wait_for(device)
                rates.append(operations / (time.perf_counter() - begin))
    return max(rates)


def count_operations(form: Callable[[], object]) -> int:
    """Floating-point operations in matrix products and convolutions of a call.

    Raises:
        RuntimeError: a forward pass asks for gradients.
    """
    mapping = {torch.ops.aten.convolution_backward: backward_operations}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        form()
    return counter.get_total_flops()


def backward_operations(
    gradient: Sequence[int], inputs: Sequence[int], weights: Sequence[int], *more: Any, out_shape: object = None
) -> int:
    """Of a convolution's backward pass, by shapes: as many as forward for each of the two gradients that are wanted.
    PyTorch's own count of it is too high by the number of groups."""
    *_, transposed, _, _, wanted = more
    cells = inputs if transposed else gradient
    return 2 * math.prod(cells) * math.prod(weights[1:]) * sum(wanted[:2])


def training_step(
    network: Network, task: Task, options: SpeedOptions, machine: Machine, compiled: bool = False
) -> Callable[[], None]:
    """A function that makes one update."""
    device = torch.device(options.device)
    place(network.train(), machine, device)
    rules = make_rules(network.param_groups(), task.phase.fit, device)
    batch = make_batch(task, options.batch, device)
    model = torch.compile(network) if compiled else network

    def step() -> None:
        for optimiser, _ in rules:
            optimiser.zero_grad(set_to_none=True)
        sum(loss_terms(network, model, batch, 0.9, autocast(machine, device)).values()).backward()
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
    forms = {amp: make(Machine(amp=amp)) for amp in COMPARED}
    flops: int | None = None
    with contextlib.suppress(RuntimeError):  # PyTorch can't count where the forward pass asks for gradients
        flops = count_operations(forms["off"])
    seconds = medians(forms, options)
    return {"flops": flops, **seconds}


def medians(forms: Mapping[str, Callable[[], None]], options: SpeedOptions) -> dict[str, float]:
    """Median seconds of each form, taking turns, after one call of each that does not count."""
    device = torch.device(options.device)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(-1, options.repeats):
        for name, form in forms.items():
            wait_for(device)
            begin = time.perf_counter()
            form()
            wait_for(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure_compiled(name: str, options: SpeedOptions) -> dict[str, float]:
    """Median seconds of a network's training step without and with torch.compile, and of the calls in which it
    compiles."""
    registry.load_methods()
    torch.set_num_threads(options.threads)
    device, machine = torch.device(options.device), Machine(amp="fast")
    task = next(task for task in tasks(options.preset) if task.name == name)
    plain, compiled = (
        training_step(build(task, device, machine), task, options, machine, compiled=kind) for kind in (False, True)
    )
    begin = time.perf_counter()
    for _ in range(2):  # what the first call assumed to be constant may be compiled again
        compiled()
    wait_for(device)
    compiling = time.perf_counter() - begin
    return {**medians({"fast": plain, "compiled": compiled}, options), "to compile": compiling}


def use_caches(folder: str) -> None:
    """Where PyTorch's compilers keep what they compiled."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}


def measure_compiled_alone(name: str, options: SpeedOptions) -> dict[str, float]:
    """``measure_compiled`` in a process of its own that finds nothing compiled."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=spawn, initializer=use_caches, initargs=(folder,)) as process,
    ):
        return process.submit(measure_compiled, name, options).result()


def compare_compiled(listed: Iterable[Task], options: SpeedOptions) -> None:
    """Measure and print a row for each network that is trained."""
    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    for task in (task for task in listed if task.phase.fit.steps != 0):
        try:
            found = results[task.name] = measure_compiled_alone(task.name, options)
            times = [f"{1e3 * found[name]:.0f} ms" for name in ("fast", "compiled")]
            row = [task.name, *times, f"{found['fast'] / found['compiled']:.2f}", f"{found['to compile']:.0f} s"]
        except Exception as error:  # what PyTorch can't compile is a result too
            results[task.name] = {"error": str(error)}
            row = [task.name, "", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", "", ""]
        rows.append(row)
        print("  ".join(row), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1))
    print("\n" + ResultTable(COMPILE_COLUMNS, rows, range(1, len(COMPILE_COLUMNS))).markdown())


def main(options: SpeedOptions) -> int:
    """Measure and print a row for each step. Returns the exit status."""
    registry.load_methods()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    listed = list(tasks(options.preset))
    if not listed:
        presets = sorted({preset for method in registry.SEEDS.values() for preset in method.recipes})
        print(f"error: no preset {options.preset}: there are {', '.join(presets)}", file=sys.stderr)
        return 2
    if unknown := sorted(set(options.names) - {task.name for task in listed}):
        print(f"error: no network {', '.join(unknown)}: there are {', '.join(t.name for t in listed)}", file=sys.stderr)
        return 2
    listed = [task for task in listed if not options.names or task.name in options.names]
    if options.compile:
        compare_compiled(listed, options)
        return 0
    kinds = {"off": torch.float32, "fast": Machine(amp="fast").amp_dtype(device) or torch.float32}
    rates = {}
    for amp, kind in kinds.items():
        allow_tf32(amp == "fast")
        rates[amp] = highest_rate(kind, device)
    print(f"{device_name(device)}, {options.threads} thread(s), PyTorch {torch.__version__}; highest rates: "
          + ", ".join(f"{kinds[amp]} {rate / 1e9:.0f} GFLOP/s" for amp, rate in rates.items()), flush=True)  # fmt: skip
    rows: list[list[str]] = []
    results: dict[str, Any] = {"rates": rates}
    for task in listed:
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
