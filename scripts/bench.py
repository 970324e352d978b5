"""Speed and memory of our fast forms and the published ones, in one run: ``python -m scripts.bench [CASE ...]``.

Every form runs in its own process. Memory: how much a first run adds to the process's peak resident memory, the inputs
being in memory before (Linux; elsewhere 0); code that is read for the first time counts, some 25 MB. Time: the best of
the repeats after it. Both forms get the same inputs; the largest difference of their results is printed and must stay
below the bound of the case. The cases are in scripts/bench_cases.py.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from json import dumps
from pathlib import Path

import numpy as np
import torch
import tyro

from misc import commandline, distributed
from scripts.bench_cases import CASES

_ENOUGH = 20.0
"""Seconds of timed runs after which none begins."""


def _measure(name: str, form: str, threads: int) -> tuple[float, float, np.ndarray]:
    """Seconds, MB and result of one form; runs in its own process."""
    torch.set_num_threads(threads)
    case = CASES[name]
    inputs = case.prepare()
    compute = getattr(case, form)
    before = distributed.used_memory(largest=True)
    result = compute(*inputs)
    grown = (distributed.used_memory(largest=True) - before) / 2**20
    distributed.keep_freed_memory()  # as every step does
    times: list[float] = []
    while len(times) < 1 + case.repeats and sum(times) < _ENOUGH:
        start = time.perf_counter()
        compute(*inputs)
        times.append(time.perf_counter() - start)
    return min(times), grown, np.asarray(result)


def compare(name: str, threads: int) -> tuple[str, dict[str, float]]:
    """The lines of one case, and its figures by name. Raises ValueError if the two forms disagree."""
    case = CASES[name]
    lines, measured, figures = [f"{name}: {case.what}"], {}, {}
    for form in ("published", "ours"):
        if getattr(case, form) is None:
            lines.append(f"  {form:10} not run: minutes, or more memory than there may be")
            continue
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            measured[form] = process.submit(_measure, name, form, threads).result()
        seconds, grown, _ = measured[form]
        figures |= {f"{form} s": seconds, f"{form} MB": grown}
        lines.append(f"  {form:10} {seconds:9.3f} s {grown:9.1f} MB")
    if "published" in measured:
        (slow, _, expected), (fast, _, got) = measured["published"], measured["ours"]
        apart = figures["apart"] = float(np.abs(got - expected).max())
        lines.append(f"  {slow / fast:.1f} times as fast, results at most {apart:.1e} apart")
        if not apart <= case.bound:
            raise ValueError(f"{name}: the forms are {apart:.1e} apart, more than {case.bound}")
    return "\n".join(lines), figures


def main(cases: tyro.conf.Positional[tuple[str, ...]] = (), threads: int = 1, json: Path | None = None) -> None:
    """Compare fast and published forms.

    Args:
        cases: Names of the cases. Default: all.
        threads: Number of threads of every measured process.
        json: Also write seconds, MB and differences to this file.
    """
    unknown = set(cases) - set(CASES)
    if unknown:
        raise commandline.WrongCall(f"No case {', '.join(sorted(unknown))}; the cases are {', '.join(CASES)}.")
    results: dict[str, dict[str, float]] = {}
    for name in cases or CASES:
        lines, results[name] = compare(name, threads)
        print(lines, flush=True)
        if json is not None:
            json.write_text(dumps(results, indent=1))


if __name__ == "__main__":
    commandline.run_script(main, prog="python -m scripts.bench")
