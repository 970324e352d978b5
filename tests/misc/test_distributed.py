"""Two processes under torchrun do what one does: the same losses, weights and files."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from running import ROOM, arguments, digests, make_set, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_fit import RECIPE, Toy, curve, train

from misc import distributed
from misc.config import Fit
from misc.files.camfiles import read_cam
from misc.files.store import read_model

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def curves(log: Path) -> dict[str, list[float]]:
    """Every logged curve of a training."""
    events = EventAccumulator(str(log))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith("/images_per_second")]
    return {tag: [e.value for e in events.Scalars(tag)] for tag in tags}


def close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts agree in what is trained (statistics are each process's own)."""
    assert one.keys() == two.keys()
    trained = [k for k in one if "running_" not in k and "num_batches" not in k and k != "seen"]
    return all(torch.allclose(one[k], two[k], rtol=1e-5, atol=1e-7) for k in trained)


@pytest.mark.slow
def test_the_loops_of_two_processes(tmp_path: Path) -> None:
    script = str(ROOM / "tests" / "misc" / "two_processes.py")
    ended = start([*TORCHRUN, script, str(tmp_path)], PYTHONPATH=f"{ROOM}:{ROOM}/tests")
    assert ended.returncode == 0, ended.stderr
    assert "2 process(es) x 2 micro-batch(es) x 1" in ended.stdout
    alone = train(tmp_path / "alone", Fit(**{**vars(RECIPE), "micro_batch": None}), Toy(dropout=0))
    assert close(read_model(tmp_path / "fit" / "weights" / "toy.pt")[0], alone)
    for term in ("fit", "valid"):
        assert curve(tmp_path / "fit", term) == pytest.approx(curve(tmp_path / "alone", term), rel=1e-6)
    assert (tmp_path / "unused" / "weights" / "toy.pt").exists()
    # an image that failed in one process is told by all, so that none takes the step for done
    told = [(tmp_path / f"failed{rank}.txt").read_text() for rank in range(2)]
    assert told[0] == told[1] and "1 of 5 images failed" in told[0] and "b: ValueError: b.jpg is no image." in told[0]
    makers = {p.name: p.read_text() for p in (tmp_path / "images").iterdir()}
    assert makers == {"a": "0", "c": "0", "e": "0", "d": "1"}


@pytest.mark.slow
def test_a_run_of_two_processes_gives_the_losses_weights_and_files_of_one(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data")
    frozen = [f"--{part}.network.resnet38.freeze-bn" for part in ("cam", "aff")]
    micro = [word for part in ("cam", "aff", "seg") for word in (f"--{part}.fit.micro-batch", "2")]
    ended = {}
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        ended[name] = start([*launcher, "run_sample.py", *arguments(data, tmp_path / name, *frozen, *micro)])
        assert ended[name].returncode == 0, ended[name].stderr
    assert "1 process(es) x 2 micro-batch(es) x 2" in ended["one"].stdout
    assert "2 process(es) x 1 micro-batch(es) x 2" in ended["two"].stdout
    made = [digests(tmp_path / name, "*", "weights/*", "cam/*", "aff_label/*", "label/*", "seg/*") for name in ended]
    assert made[0].keys() == made[1].keys() and len(made[0]) > 40
    for part in ("cam", "aff", "seg"):
        logged = [curves(tmp_path / name / "log" / part) for name in ended]
        assert logged[0].keys() == logged[1].keys() and len(logged[0]) >= 2
        for term, values in logged[0].items():
            # two processes add the gradients of two halves as one process adds those of two micro-batches
            assert values == pytest.approx(logged[1][term], rel=1e-6), term
        weights = [read_model(tmp_path / name / "weights" / f"{part}.pt")[0] for name in ended]
        assert close(*weights), part
    for path in (tmp_path / "one" / "cam").iterdir():
        maps = [torch.from_numpy(read_cam(p).maps) for p in (path, tmp_path / "two" / "cam" / path.name)]
        assert torch.allclose(*maps, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "terms"), [("toco", "ptc ctc seg reg"), ("more", "mct ptc cle une seg reg")]
)
def test_views_draws_and_momentum_copies_are_the_same_in_two_processes(
    method: str, terms: str, tmp_path: Path
) -> None:
    """Every term from the start, without what each process has of its own (batch norms, drop path). Losses are those of
    the whole batch at once too; weights are compared with those of micro-batches, which are added up in the same order,
    as AdamW makes steps of full size of gradients that are next to nothing."""
    data = make_set(tmp_path / "data")
    flags = """
    --machine.workers 0 --machine.device cpu --machine.amp off --steps train_cam --cam.fit.steps 3
    --cam.fit.batch-size 4 --cam.network.backbone.stem 0 --cam.network.backbone.drop-path 0
    """.split()
    flags += [word for term in terms.split() for word in (f"--cam.network.{term}.start", "0")]
    for name, launcher, micro in (("whole", [], "4"), ("one", [], "2"), ("two", TORCHRUN, "2")):
        run = ["run_sample.py", method, "--root", str(data), "--out", str(tmp_path / name), *flags]
        ended = start([*launcher, *run, "--cam.fit.micro-batch", micro])
        assert ended.returncode == 0, ended.stderr
    whole, one, two = (curves(tmp_path / name / "log" / "cam") for name in ("whole", "one", "two"))
    assert {f"cam/{term}" for term in terms.split()} < whole.keys() == one.keys() == two.keys()
    for term, values in two.items():
        for other in (whole, one):
            assert all(values) and values == pytest.approx(other[term], rel=1e-4), term
    weights = [read_model(tmp_path / name / "weights" / "cam.pt")[0] for name in ("one", "two")]
    assert close(*weights)


def test_one_process_needs_no_group() -> None:
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    assert distributed.joined([1, 2]) == [1, 2] and distributed.total(torch.tensor(3)) == 3
    distributed.barrier()
    distributed.stop()


def test_a_missing_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--machine.device cuda: PyTorch sees no GPU"):
        distributed.start("cuda")
    assert distributed.start("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="There are 2 GPUs but more processes: lower --nproc-per-node"):
        distributed.start("auto")


ON_GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def number_printed(*lines: str) -> int:
    """What a program of these lines prints in a process of its own, after a run's start on the CPU."""
    begin = ("import torch", "from misc import distributed", "distributed.start('cpu')")
    ended = start(["-c", "\n".join((*begin, *lines))])
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def test_free_memory_is_that_of_the_tightest_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    job = groups / "batch" / "job"
    for folder in (proc / "self", job):
        folder.mkdir(parents=True)
    monkeypatch.setattr(distributed, "_PROC", proc)
    monkeypatch.setattr(distributed, "_GROUPS", groups)
    assert distributed.free_memory() == 0 == distributed.used_memory()
    (proc / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    (proc / "self/status").write_text("VmHWM:\t    30 kB\nVmRSS:\t    20 kB\n")
    assert (distributed.used_memory(), distributed.used_memory(largest=True)) == (20 * 1024, 30 * 1024)
    assert distributed.free_memory() == 5000 * 1024
    (proc / "self/cgroup").write_text("4:memory:/old\n0::/batch/job\n")
    assert distributed.free_memory() == 5000 * 1024

    def limit(group: Path, most: str) -> int:
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text("1000\n")
        (group / "memory.stat").write_text("anon 900\ninactive_file 100\n")
        return distributed.free_memory()

    assert limit(job, "max") == 5000 * 1024
    assert limit(groups / "batch", "3000") == 2100
    assert limit(job, "4000") == 2100
    assert limit(job, "2000") == 1100
    assert limit(job, "500") == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert limit(job, "2000") == 550
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    old = groups / "memory" / "old"
    old.mkdir(parents=True)
    (proc / "self/cgroup").write_text("4:cpu,memory:/old\n0::/\n")
    for group, most in ((old.parent, 2**63 - 4096), (old, 1700)):
        (group / "memory.limit_in_bytes").write_text(f"{most}\n")
        (group / "memory.usage_in_bytes").write_text("1000\n")
        (group / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 200\n")
    assert distributed.free_memory() == 900


@pytest.mark.slow
@ON_GLIBC
def test_freed_memory_is_used_again() -> None:
    assert number_printed(
        "import resource",
        "for _ in range(40):",  # the first ones find their places
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt",
        "    torch.ones(32 << 20)",
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)",
    ) < 1000, "of some 32,800 pages"  # fmt: skip


@pytest.mark.slow
@ON_GLIBC
def test_unused_memory_is_given_back() -> None:
    assert number_printed(
        "size = lambda: int(open('/proc/self/statm').read().split()[1]) >> 8",  # MB
        "torch.ones(64 << 20)",
        "kept = size()",
        "distributed.give_memory_back()",
        "print(kept - size())",
    ) > 200, "of 256 MB"  # fmt: skip
