"""Checks and measures the project on a GPU: ``python -m scripts.gpu_check --out DIR [--minutes 8]``.

Everything is written to ``--out``: results.json, anew after every measurement, and the folders of the sample runs. A
failure is recorded and the rest goes on; nothing begins when the time is up. ``--markdown`` prints the tables of the
results.json that is there. ``--device cpu --tiny`` tries the script itself. The parts, those of most value first:

agree      losses, gradient and maps of every network (sample recipes), GPU against CPU: float32, TF32, bf16
sample     the sample run of seam on the GPU, beside agree, and on the CPU, beside everything: seconds, scores
torchrun   a very short run under torchrun with one process: NCCL, barriers, gathered objects
operators  random walk and dense CRF of an image of 375 x 500: ms on GPU and CPU, largest difference
train      an update of every published recipe: images a second, peak memory, share of the time that the GPU works
cams       CAMs of images of 375 x 500 by the published recipes, and of ever new sizes: images a second one by one and
           four at once, the same share
masks      the same of predictions by the segmentation networks, with their CRF
compile    updates with torch.compile, after those without: seconds until compiled, images a second
cpu        updates of the sample recipes on the CPU, in float32 and fast, in a process of their own: does it survive?
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from misc import commandline
from misc.config import Machine, Precision
from misc.crf.dense import DenseCRF
from misc.distributed import usable_cores
from misc.infer import cams
from misc.infer.masks import segment_inputs
from misc.loop.each import is_out_of_memory
from misc.loop.fit import make_rules
from misc.precision import allow_tf32, autocast, place
from misc.propagate import walk
from misc.tables import ResultTable
from net import registry
from net.contract import Network, SeedNetwork, SeedRecipe
from scripts import ROOT
from scripts.measured_networks import CLASSES, Task, build, loss_terms, make_batch, tasks
from step.lib.inference import infer_class_scores, infer_class_scores_together, predict_cam, predict_cams

CPU = torch.device("cpu")
PARTS = ("agree", "sample", "torchrun", "operators", "train", "cams", "masks", "compile", "cpu")
FEW_UPDATES = ("--sample.images 16 --sample.val 4 --cam.fit.steps 4 --aff.fit.steps 2 --seg.fit.steps 2 "
         "--cam.fit.batch-size 4 --aff.fit.batch-size 4 --seg.fit.batch-size 4").split()  # fmt: skip
COMPILED = ("mctformer", "irn_cam", "deeplabv2", "transcam")
"""Networks that are compiled, those that are likeliest to gain first."""
PRECISIONS: tuple[tuple[str, Precision, bool], ...] = (
    ("float32", "off", False), ("tf32", "off", True), ("bf16", "bf16", False)
)  # fmt: skip
"""What is compared with the CPU's float32: name, autocast, whether TF32 is allowed."""

Result = dict[str, Any]
"""Named figures of a measurement; FAILED: why there are none."""


class Check:
    """The measurements of one call of this script and their results."""

    def __init__(self, out: Path, minutes: float, device: torch.device, tiny: bool) -> None:
        self.out, self.device, self.tiny = out.resolve(), device, tiny
        self.gpu = device.type == "cuda"
        self.deadline = time.monotonic() + 60 * minutes
        self.size = (90, 120) if tiny else (375, 500)
        self.results: dict[str, dict[str, Any]] = {}
        self.networks: dict[str, Network] = {}
        out.mkdir(parents=True, exist_ok=True)

    # -------------------------------------------------------------------------------------------- recording

    def left(self) -> float:
        """Seconds until the time is up."""
        return self.deadline - time.monotonic()

    def record(self, part: str, name: str, measure: Callable[[], Result]) -> None:
        """Run one measurement: its figures, or why it failed, are printed and kept. Nothing happens if the time is
        up."""
        if self.left() < 5:
            return
        begin = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # one failure must not cost the rest
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))]
            at = f" at {Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else ""
            found = {"FAILED": f"{type(error).__name__}: {str(error).strip()[:300]}{at}"}
        if self.gpu:
            torch.cuda.empty_cache()
        self.results.setdefault(part, {})[name] = found
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1))
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
        print(f"{part:<10}{name:<38}{shown}   [{time.monotonic() - begin:.0f} s]", flush=True)

    def failures(self) -> list[str]:
        """A line for each measurement that failed."""
        return [
            f"{part} {name}: {found['FAILED']}"
            for part, rows in self.results.items() for name, found in rows.items()
            if isinstance(found, dict) and "FAILED" in found
        ]  # fmt: skip

    # -------------------------------------------------------------------------------------------- timing

    def wait(self) -> None:
        """Wait until the GPU has done all its work."""
        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], least: int = 3, longest: float = 2.0) -> float:
        """Mean seconds of a call, the GPU's work included, after one that does not count."""
        work()
        self.wait()
        begin, count = time.perf_counter(), 0
        while count < least or (count < 20 and time.perf_counter() - begin < longest):
            work()
            count += 1
        self.wait()
        return (time.perf_counter() - begin) / count

    def busy(self, work: Callable[[], object]) -> Result:
        """Share of a call's time in which a GPU kernel runs: low where the GPU waits for the CPU."""
        if not self.gpu:
            return {}
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                begin = time.perf_counter()
                work()
                self.wait()
                wall = time.perf_counter() - begin
            kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            return {"busy": sum(e.time_range.elapsed_us() for e in kernels) / 1e6 / wall, "kernels": len(kernels)}
        except RuntimeError as error:  # a GPU may not let its counters be read
            return {"busy": f"unknown ({str(error)[:60]})"}

    # -------------------------------------------------------------------------------------------- agree

    def agree(self, task: Task) -> Result:
        """Largest differences from the CPU's float32, of the largest value. In evaluation mode, so that nothing is
        drawn at random; the same random start weights on both devices."""
        wanted, result = self.compute(task, CPU, Machine(amp="off"), tf32=False), {}
        for name, amp, tf32 in PRECISIONS:
            found = self.compute(task, self.device, Machine(amp=amp), tf32)
            worst = {key: apart(found[key], value) for key, value in wanted.items()}
            for kind in ("loss", "gradient", "map"):
                if values := [value for key, value in worst.items() if key.startswith(kind)]:
                    result[f"{name} {kind}"] = max(values)
        return result

    def compute(self, task: Task, device: torch.device, machine: Machine, tf32: bool) -> dict[str, Tensor]:
        """Loss terms of a batch late in the training, norms of the gradients, and the class maps."""
        network = build(task, device).eval()
        batch = make_batch(task, 2, device)
        found: dict[str, Tensor] = {}
        if task.phase.fit.steps != 0:
            terms = loss_terms(network, network, batch, 0.9, precision(machine, device, tf32))
            sum(terms.values()).backward()
            found = {f"loss {name}": value for name, value in terms.items()}
            found["gradient"] = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None])
        if isinstance(network, SeedNetwork):
            grad = contextlib.nullcontext() if network.map_needs_gradient else torch.inference_mode()
            with grad, precision(machine, device, tf32):
                found["map"] = network.cam(batch["image"], batch["tags"])
        return found

    # -------------------------------------------------------------------------------------------- sample runs

    def sample_command(self, device: str, *flags: str, launcher: Sequence[str] = ()) -> tuple[list[str], Path]:
        """Command line of a sample run and its folder."""
        folder = self.out / f"run_{'torchrun' if launcher else device}"
        folder.mkdir(exist_ok=True)
        workers = str(min(8, max(1, usable_cores() // 2)))
        command = [
            sys.executable, *launcher, str(ROOT / "run_sample.py"), "seam", "--machine.device", device,
            "--machine.workers", workers, "--out", str(folder / "seam"), *flags,
        ]  # fmt: skip
        return command, folder

    def sample_run(self, device: str, *flags: str, launcher: Sequence[str] = ()) -> Result:
        """A sample run from its beginning to its end."""
        command, folder = self.sample_command(device, *flags, launcher=launcher)
        with open(folder / "log.txt", "w") as log:
            longest = min(90, max(5, self.left()))  # processes that wait for each other must not cost the other parts
            ended = subprocess.run(command, cwd=folder, stdout=log, stderr=log, timeout=longest)
        return finished_run(folder, ended.returncode)

    # -------------------------------------------------------------------------------------------- networks

    def train(self, task: Task, amp: Precision, compiled: bool = False) -> Result:
        """Updates of a recipe at its own batch, or at half of it as often as the memory requires."""
        size = 2 if self.tiny else task.phase.fit.micro_batch or task.phase.fit.batch_size
        while size > 1:
            with small_memory_left_out():
                return self.updates(task, amp, compiled, size)
            torch.cuda.empty_cache()
            size //= 2
        return self.updates(task, amp, compiled, size)

    def updates(self, task: Task, amp: Precision, compiled: bool, size: int) -> Result:
        """A few updates to warm up, the first as at the start of a training (some terms begin late), then those that
        are timed."""
        machine = Machine(amp=amp)
        network = self.networks.get(task.name) or build(task, CPU)
        if self.gpu and not compiled:
            self.networks[task.name] = network
        network.to(memory_format=torch.contiguous_format).train()
        place(network, machine, self.device)
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        rules = make_rules(network.param_groups(), task.phase.fit, self.device)
        batch = make_batch(task, size, self.device)
        model = torch.compile(network) if compiled else network

        def update(progress: float = 0.9) -> None:
            for optimiser, _ in rules:
                optimiser.zero_grad(set_to_none=True)
            terms = loss_terms(network, model, batch, progress, autocast(machine, self.device))
            sum(terms.values()).backward()
            torch.stack([term.detach().float() for term in terms.values()]).tolist()  # as the loop's finite check
            for optimiser, _ in rules:
                optimiser.step()

        begin = time.perf_counter()
        for progress in (0.0, 0.9, 0.91, 0.92)[: 2 if self.tiny else 4]:
            update(progress)
        self.wait()
        warm, mean = time.perf_counter() - begin, self.seconds(update, *((1, 0.1) if self.tiny else (3, 1.0)))
        found: Result = {"batch": size, "images/s": size / mean}
        if self.gpu:
            found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        found |= {"warm-up s": warm} if compiled else self.busy(update)
        network.zero_grad(set_to_none=True)
        return found

    def infer(self, task: Task, amp: Precision) -> Result:
        """A step make_cam or infer_seg without its files, of inputs that are resized before: image by image, four at
        once, and images that each have a size of their own, for which a GPU's library chooses its kernels anew."""
        network, machine, phase = self.networks.get(task.name) or build(task, CPU), Machine(amp=amp), task.phase
        place(network.eval(), machine, self.device)
        tags = np.zeros(CLASSES, np.float32)
        tags[[3, 7]] = 1

        def inputs(image: np.ndarray) -> list[Tensor]:
            if isinstance(phase, SeedRecipe):
                return list(cams.scaled_inputs(image, phase.infer, network.normalisation))
            return list(segment_inputs(image, phase.infer, network.normalisation))

        random, (height, width) = np.random.default_rng(0), self.size

        def picture(less: int = 0) -> np.ndarray:
            noise = random.integers(0, 256, (24, 32, 3), np.uint8)  # enlarged: for the CRF noise is no image
            return cv2.resize(noise, (width - 13 * less, height - 9 * less), interpolation=cv2.INTER_CUBIC)

        several, others = [picture() for _ in range(4)], [picture(less) for less in range(1, 6)]
        ready, new = [inputs(image) for image in several], [inputs(image) for image in others]

        def one(image: np.ndarray = several[0], prepared: list[Tensor] = ready[0]) -> None:
            if isinstance(phase, SeedRecipe):
                predict_cam(network, image, tags, phase.infer, machine, self.device, prepared)
            else:
                infer_class_scores(network, image, phase.infer, machine, self.device, prepared)

        def together() -> None:
            if isinstance(phase, SeedRecipe):
                predict_cams(network, self.size, [tags] * 4, phase.infer, machine, self.device, ready)
            else:
                infer_class_scores_together(network, several, phase.infer, machine, self.device, ready)

        found: Result = {"images/s": 1 / self.seconds(one, *((1, 0.1) if self.tiny else (3, 1.0)))}
        begin = time.perf_counter()
        for image, prepared in zip(others, new, strict=True):
            one(image, prepared)
        self.wait()
        found["new sizes/s"] = len(others) / (time.perf_counter() - begin)
        with small_memory_left_out():
            found["of 4/s"] = 4 / self.seconds(together, 1, 0.1 if self.tiny else 1.0)
        return {**found, **self.busy(one)}

    # -------------------------------------------------------------------------------------------- operators

    def walk_on(self, device: torch.device, stride: int) -> Callable[[], Tensor]:
        """256 steps of the walk of three classes and the background, with its transition matrix."""
        height, width = (-(-side // stride) for side in self.size)
        source, target = walk.pair_cells(walk.half_circle(5), height, width, radius=5)
        seeded = torch.Generator().manual_seed(0)
        affinity = torch.rand(len(source), generator=seeded).to(device)
        scores = torch.rand(4, height * width, generator=seeded).to(device)
        return lambda: walk.walk(walk.transition(source, target, affinity, height * width, 8.0), scores, 256)

    def crf_on(self, device: torch.device, flat: bool) -> Callable[[], Tensor]:
        """The CRF of an image. Flat pictures put many pixels into one vertex of the lattice, which one thread of a GPU
        adds up."""
        random = np.random.default_rng(0)
        cells = random.integers(0, 256, (3, 4, 3) if flat else (24, 32, 3)).astype(np.float32)
        planes = torch.from_numpy(cells).permute(2, 0, 1)[None]
        mode = {"mode": "nearest"} if flat else {"mode": "bicubic", "align_corners": False}
        large = torch.nn.functional.interpolate(planes, self.size, **mode)[0]  # type: ignore[arg-type]
        image = np.ascontiguousarray(large.permute(1, 2, 0).clamp(0, 255).numpy(), np.uint8)
        scores = random.random((4, *self.size), dtype=np.float32)
        return lambda: torch.from_numpy(DenseCRF(image, device=device)(scores))

    def operator(self, make: Callable[..., Callable[[], Tensor]], argument: object) -> Result:
        """Milliseconds of an operator on both devices, and how far apart the results are."""
        here, there = make(CPU, argument), make(self.device, argument)
        times = {"GPU ms": 1e3 * self.seconds(there), "CPU ms": 1e3 * self.seconds(here, 1, 0.5)}
        return {**times, "apart": apart(there(), here()), **self.busy(there)}

    # -------------------------------------------------------------------------------------------- order

    def run(self, parts: Sequence[str]) -> None:
        """All parts in the order of their value."""
        preset, flags = ("sample", FEW_UPDATES) if self.tiny else ("published", [])
        where = torch.cuda.get_device_name() if self.gpu else "CPU"
        self.results["machine"] = {"device": where, "torch": torch.__version__, "cores": usable_cores()}
        print(json.dumps(self.results["machine"]), flush=True)
        beside: dict[str, subprocess.Popen[bytes]] = {}
        if "sample" in parts:
            beside = {kind: self.begin(*self.sample_command(kind, *flags)) for kind in {self.device.type, "cpu"}}
        if "cpu" in parts and self.gpu:
            words = ["--device", "cpu", "--tiny", "--parts", "train", "--out", str(self.out / "cpu")]
            beside["updates"] = self.begin([sys.executable, "-m", "scripts.gpu_check", *words], self.out / "cpu")
        if "agree" in parts:
            for task in tasks("sample"):
                self.record("agree", task.name, partial(self.agree, task))
        if "torchrun" in parts:
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
            measured = partial(self.sample_run, self.device.type, *FEW_UPDATES, launcher=launcher)
            self.record("torchrun", "1 process", measured)
        if self.gpu and self.device.type in beside:  # what follows is timed
            self.collect(beside, self.device.type)
        if "operators" in parts:
            for name, make, argument in (
                ("walk, stride 8, 256 steps", self.walk_on, 8), ("walk, stride 4, 256 steps", self.walk_on, 4),
                ("CRF, 10 iterations, smooth", self.crf_on, False), ("CRF, 10 iterations, flat", self.crf_on, True),
            ):  # fmt: skip
                self.record("operators", name, partial(self.operator, make, argument))
        if "train" in parts:
            self.train_all(preset, "fast")
        self.infer_all(parts, preset, "fast")
        if "compile" in parts:
            for task in tasks(preset):
                if task.name in COMPILED:
                    self.record("compile", task.name, partial(self.train, task, "fast", compiled=True))
        if "train" in parts:
            self.train_all(preset, "off")
        self.infer_all(parts, preset, "off")
        for kind in list(beside):
            self.collect(beside, kind)

    def train_all(self, preset: str, amp: Precision) -> None:
        """Updates of every network that is trained, in one precision."""
        for task in tasks(preset):
            if task.phase.fit.steps != 0:
                self.record("train", f"{task.name} {amp}", partial(self.train, task, amp))

    def infer_all(self, parts: Sequence[str], preset: str, amp: Precision) -> None:
        """CAMs and predictions of every network that makes them, in one precision."""
        for part, table in (("cams", registry.SEEDS), ("masks", registry.SEGMENTERS)):
            for task in tasks(preset):
                if part in parts and task.name in table:
                    self.record(part, f"{task.name} {amp}", partial(self.infer, task, amp))

    def begin(self, command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
        """Start a process that runs beside the other parts, on four cores; its output goes to log.txt."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log:
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            environment = {**os.environ, "OMP_NUM_THREADS": "4", "PYTHONPATH": path}
            return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)

    def collect(self, beside: dict[str, subprocess.Popen[bytes]], kind: str) -> None:
        """Wait for a process that runs beside as long as there is time, and record what it found."""
        process = beside.pop(kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1, self.left() - 6))
        if process.poll() is None:
            process.terminate()
            print(f"{kind}: not finished in time")
        elif kind == "updates":
            self.record("cpu", "updates of the sample recipes", partial(updates_beside, self.out / "cpu", process))
        else:
            measured = partial(finished_run, self.out / f"run_{kind}", process.returncode)
            self.record("sample", f"{kind}, beside others", measured)


@contextlib.contextmanager
def precision(machine: Machine, device: torch.device, tf32: bool) -> Iterator[None]:
    """Autocast as in a run, with or without TF32."""
    with autocast(machine, device):
        allow_tf32(tf32)
        yield


@contextlib.contextmanager
def small_memory_left_out() -> Iterator[None]:
    """What does not fit into the memory is not measured."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def apart(got: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def finished_run(folder: Path, status: int) -> Result:
    """Scores and seconds of the steps of a sample run. Raises RuntimeError with the end of its log if it failed."""
    if status:
        raise RuntimeError(f"exit status {status}: {(folder / 'log.txt').read_text()[-300:]}")
    scores = json.loads((folder / "seam" / "scores.json").read_text())
    steps = json.loads((folder / "seam" / "run.json").read_text())["steps"]
    found = {name.split(" (")[0]: float(score["miou"]) for name, score in scores.items() if "miou" in score}
    return {**found, **{f"{name} s": step["seconds"] for name, step in steps.items()}}


def updates_beside(folder: Path, process: subprocess.Popen[bytes]) -> Result:
    """How many updates on the CPU were measured, and how much faster they are in the precision fast (median)."""
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {(folder / 'log.txt').read_text()[-300:]}")
    rows = json.loads((folder / "results.json").read_text())["train"]
    rates = {name: found.get("images/s", 0.0) for name, found in rows.items()}
    gains = [rates[n] / rates[o] for n in rates if n.endswith(" fast") and rates.get(o := n[:-4] + "off")]
    failed = [name for name, found in rows.items() if "FAILED" in found]
    return {"updates": len(rates), "failed": failed, "fast over float32": float(np.median(gains))}


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as Markdown: the machine, then a table for each part."""
    lines = [", ".join(f"{key}: {value}" for key, value in results["machine"].items())]
    for part in (part for part in PARTS if part in results):
        names = list(dict.fromkeys(key for found in results[part].values() for key in found))
        rows = [[name, *(shown(found.get(key, "")) for key in names)] for name, found in results[part].items()]
        lines += ["", ResultTable([part, *names], rows, range(1, len(names) + 1)).markdown()]
    return "\n".join(lines)


def shown(value: object) -> str:
    """A figure with three digits; anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class GpuCheckOptions:
    """What to check, where, and for how long."""

    out: Path
    """Folder for results.json and the sample runs."""
    minutes: float = 8.0
    """Nothing begins after this time."""
    device: str = "cuda"
    """Where to measure; cpu tries the script."""
    tiny: bool = False
    """Sample recipes and very short runs."""
    parts: tuple[str, ...] = PARTS
    """Parts to run."""
    markdown: bool = False
    """Only print the results that are there, as Markdown."""


def main(options: GpuCheckOptions) -> int:
    """Run the parts, or print what they found. Returns the exit status: 1 if a measurement failed."""
    if options.markdown:
        print(markdown(json.loads((options.out / "results.json").read_text())))
        return 0
    if unknown := sorted(set(options.parts) - set(PARTS)):
        print(f"error: --parts {' '.join(unknown)}: the parts are {', '.join(PARTS)}.", file=sys.stderr)
        return 2
    registry.load_methods()
    check = Check(options.out, options.minutes, torch.device(options.device), options.tiny)
    check.run(options.parts)
    failed = check.failures()
    print(f"\n{len(failed)} failed" + "".join(f"\n  {line}" for line in failed) + f"\n{check.out / 'results.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    prog = "python -m scripts.gpu_check"
    commandline.end(commandline.command(lambda: main(commandline.parse_options(GpuCheckOptions, prog=prog))))
