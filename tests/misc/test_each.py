"""The per-image loop: sharding, resume, failures that do not stop other images, worker processes that die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from running import gone, wait_for

from misc import distributed
from misc.files import atomic, store
from misc.loop import each as each_module
from misc.loop.each import EachFailed, WorkerDied, each, shard

IDS = [f"im{i}" for i in range(12)]


@dataclass(frozen=True)
class Work:
    """Writes a file for an id; picklable. ``bad`` ids raise, ``deadly`` ones kill, ``full`` fill the disk."""

    folder: Path
    bad: tuple[str, ...] = ()
    deadly: tuple[str, ...] = ()
    full: tuple[str, ...] = ()

    def __call__(self, image_id: str, prepared: str = "") -> None:
        if image_id in self.bad:
            raise ValueError(f"{image_id}.jpg is no image.")
        if image_id in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if image_id in self.full:
            raise atomic.DiskFull(28, "No disk space left")
        store.write_bytes(self.folder / image_id, f"{os.getpid()} {prepared}".encode())

    def done(self, image_id: str) -> bool:
        return (self.folder / image_id).exists()

    def made(self) -> list[str]:
        """Finished files; one that a killed worker was writing starts with a dot."""
        return sorted((p.name for p in self.folder.iterdir() if not p.name.startswith(".")), key=IDS.index)


def prepare(image_id: str) -> str:
    if image_id == "im3":
        raise FileNotFoundError("im3.jpg does not exist.")
    return f"read {image_id}"


MODES = {"here": {}, "processes": {"workers": 2}, "look-ahead": {"prepare": str, "workers": 3}}
FORKED = {"prepare": str, "workers": 2, "in_processes": True}
if sys.platform == "linux":
    MODES["all in processes"] = FORKED
forks = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.mark.parametrize("mode", MODES)
def test_all_ids_are_worked_on_once(mode: str, tmp_path: Path) -> None:
    work = Work(tmp_path)
    each("step", IDS, work, done=work.done, **MODES[mode])
    assert work.made() == IDS
    first = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    each("step", IDS, work, done=work.done, **MODES[mode])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == first


def test_processes_are_other_processes_and_look_ahead_is_not(tmp_path: Path) -> None:
    for mode, here in (("here", True), ("look-ahead", True), ("processes", False)):
        work = Work(tmp_path / mode)
        each("step", IDS, work, done=work.done, **MODES[mode])
        makers = {int(p.read_text().split()[0]) for p in work.folder.iterdir()}
        assert (makers == {os.getpid()}) == here, mode


@forks
def test_images_are_read_and_computed_in_processes_and_so_are_those_left(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The last one too, alone: by one thread, as in an undisturbed run."""
    work, readers = Work(tmp_path / "made"), tmp_path / "read"

    def read(image_id: str) -> int:
        (readers / image_id).write_text(str(os.getpid()))
        return torch.get_num_threads()

    readers.mkdir()
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(2)
    settings = {**FORKED, "prepare": read}
    for processes in (3, 4):  # one that tells how much memory it needs, then two; another one for the last
        each("step", IDS, work, done=work.done, **settings)
        made = [p.read_text().split() for p in work.folder.iterdir()]
        assert {threads for _, threads in made} == {"1"}
        assert [pid for pid, _ in made] == [(readers / p.name).read_text() for p in work.folder.iterdir()]
        assert len({pid for pid, _ in made} - {str(os.getpid())}) == processes
        (work.folder / "im7").unlink()


@forks
def test_what_is_left_of_an_image_is_done_in_its_process(tmp_path: Path) -> None:
    each("step", IDS, lambda i, _: lambda: Work(tmp_path)(i), done=lambda _: False, **FORKED)
    assert len({p.read_text().split()[0] for p in tmp_path.iterdir()} - {str(os.getpid())}) == 3


@forks
@pytest.mark.parametrize("freed", [False, True])
def test_as_many_processes_as_there_is_memory_for(
    freed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where this process has freed as much before, which its processes would use unseen."""
    distributed.keep_freed_memory()
    if freed:
        torch.ones(400 << 18)
    for free, processes in ((4.5 * 400e6, 1 + 2), (3.5 * 400e6, 1 + 1)):
        work = Work(tmp_path / str(processes))

        def take(image_id: str, prepared: str, work: Work = work) -> None:
            if image_id in ("im0", "im1", "im2"):  # each time the same memory
                torch.ones(100_000_000)
            work(image_id, prepared)

        monkeypatch.setattr(each_module.distributed, "free_memory", lambda free=free: int(free))
        each("step", IDS, take, done=work.done, **{**FORKED, "workers": 4})
        assert work.made() == IDS
        assert len({p.read_text().split()[0] for p in work.folder.iterdir()}) == processes
    told = "step: one process computes all images, as there is no memory for two of some 0.4 GB."
    assert told in capsys.readouterr().out


@forks
def test_images_that_need_hardly_any_memory_may_be_followed_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(tmp_path)
    monkeypatch.setattr(each_module.distributed, "free_memory", lambda: 900 << 20)
    each("step", IDS, work, done=work.done, **FORKED)
    assert os.getpid() in {int(p.read_text().split()[0]) for p in tmp_path.iterdir()}


def test_in_this_process_where_a_gpu_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    work = Work(tmp_path)
    each("step", IDS, work, done=work.done, **FORKED)
    assert {p.read_text().split()[0] for p in tmp_path.iterdir()} == {str(os.getpid())}


@pytest.mark.parametrize("settings", [{"workers": 1}, {"workers": 9}, {"workers": 0}])
def test_in_this_process_where_there_is_one_worker_or_few_images(settings: dict[str, int], tmp_path: Path) -> None:
    work = Work(tmp_path)
    each("step", IDS, work, done=work.done, **{**FORKED, **settings})
    assert {p.read_text().split()[0] for p in tmp_path.iterdir()} == {str(os.getpid())}


def test_what_was_prepared_belongs_to_its_image(tmp_path: Path) -> None:
    work = Work(tmp_path)
    each("step", IDS[:3], work, done=work.done, prepare=prepare, workers=2)
    assert [(tmp_path / i).read_text().split(" ", 1)[1] for i in IDS[:3]] == [f"read {i}" for i in IDS[:3]]


def test_memory_is_given_back_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    work = Work(tmp_path)
    made = lambda: given.append(len(list(tmp_path.iterdir())))  # noqa: E731
    monkeypatch.setattr(each_module.distributed, "give_memory_back", made)
    each("step", [f"image {n}" for n in range(70)], work, done=work.done, prepare=str, workers=1)
    assert given == [32, 64]


def test_only_what_is_missing_is_read_and_made(tmp_path: Path) -> None:
    work = Work(tmp_path, bad=("im0", "im7"))
    for image_id in ("im0", "im7"):
        (tmp_path / image_id).write_text("kept")
    (tmp_path / ".im1.99.part").write_text("half")  # left by a killed process
    asked: list[str] = []
    each("step", IDS, work, done=work.done, prepare=lambda i: asked.append(i) or "", workers=1)
    assert sorted(asked, key=IDS.index) == [i for i in IDS if i not in ("im0", "im7")]
    assert (tmp_path / "im0").read_text() == "kept" and "half" not in (tmp_path / "im1").read_text()


@pytest.mark.parametrize("mode", MODES)
def test_a_failing_image_does_not_stop_the_others(mode: str, tmp_path: Path) -> None:
    work = Work(tmp_path, bad=("im2", "im9"))
    with pytest.raises(EachFailed) as told:
        each("step", IDS, work, done=work.done, **MODES[mode])
    assert work.made() == [i for i in IDS if i not in work.bad]
    assert [f.image_id for f in told.value.failures] == ["im2", "im9"]
    text = str(told.value)
    assert "step: 2 of 12 images failed" in text and "im9: ValueError: im9.jpg is no image." in text
    assert "same command again" in text
    mended = Work(tmp_path)
    each("step", IDS, mended, done=mended.done, **MODES[mode])
    assert mended.made() == IDS


def test_a_failing_preparation_does_not_stop_the_others(tmp_path: Path) -> None:
    work = Work(tmp_path)
    with pytest.raises(EachFailed, match="im3: FileNotFoundError: im3.jpg does not exist"):
        each("step", IDS, work, done=work.done, prepare=prepare, workers=2)
    assert work.made() == [i for i in IDS if i != "im3"]


def test_a_long_list_of_failures_is_cut(tmp_path: Path) -> None:
    work = Work(tmp_path, bad=tuple(IDS))
    with pytest.raises(EachFailed, match=r"im9: .*\n  \.\.\. and 2 more"):
        each("step", IDS, work, done=work.done)


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_stops_at_once(mode: str, tmp_path: Path) -> None:
    work = Work(tmp_path, full=("im1",))
    with pytest.raises(atomic.DiskFull):
        each("step", IDS, work, done=work.done, **MODES[mode])
    assert "im0" in work.made() and "im11" not in work.made()


def test_shards_share_the_ids_evenly() -> None:
    parts = [shard(IDS, (i, 5)) for i in range(5)]
    assert sorted(sum(parts, []), key=IDS.index) == IDS
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_and_processes_share_the_ids_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(each_module.distributed, "world", lambda: 2)
    seen: list[str] = []
    for rank in range(2):
        monkeypatch.setattr(each_module.distributed, "rank", lambda rank=rank: rank)
        for part in range(3):
            seen += shard(IDS, (part, 3))
    assert sorted(seen, key=IDS.index) == IDS


def test_a_worker_that_is_killed_is_reported_with_the_image_and_a_remedy(tmp_path: Path) -> None:
    work = Work(tmp_path, deadly=("im5",))
    with pytest.raises(WorkerDied, match=r"died .*im5.*same command again, with fewer --machine.workers"):
        each("step", IDS, work, done=work.done, workers=2)
    mended = Work(tmp_path)
    each("step", IDS, mended, done=mended.done, workers=2)
    assert mended.made() == IDS


def test_workers_are_spawned_where_a_gpu_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    methods: list[str] = []
    context = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: methods.append(method) or context("fork"))
    each("step", IDS, Work(tmp_path), done=Work(tmp_path).done, workers=2)
    assert methods == ["spawn"]


@dataclass(frozen=True)
class Sleeper:
    """Notes its process and sleeps."""

    folder: Path

    def __call__(self, image_id: str) -> None:
        (self.folder / str(os.getpid())).touch()
        time.sleep(600)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    options = {"done": lambda i: False, "workers": 2}
    parent = multiprocessing.get_context("fork").Process(
        target=each, args=("step", IDS, Sleeper(tmp_path)), kwargs=options, daemon=False
    )
    parent.start()
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.kill()
    parent.join()
    wait_for(lambda: all(gone(int(p.name)) for p in tmp_path.iterdir()))


def test_an_image_out_of_memory_is_tried_once_more(capsys: pytest.CaptureFixture[str]) -> None:
    tries: list[str] = []

    def work(image_id: str) -> None:
        tries.append(image_id)
        if image_id == "a" and tries.count("a") == 1 or image_id == "b":
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(EachFailed) as failed:
        each("step", ["a", "b", "c"], work, done=lambda _: False)
    assert tries == ["a", "a", "b", "b", "c"] and [f.image_id for f in failed.value.failures] == ["b"]


def test_a_broken_gpu_ends_the_step_at_once() -> None:
    tries: list[str] = []

    def work(image_id: str) -> None:
        tries.append(image_id)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory"):
        each("step", ["a", "b"], work, done=lambda _: False)
    assert tries == ["a"]


def test_files_are_written_by_threads_and_their_failures_told(tmp_path: Path) -> None:
    main, writers = threading.get_ident(), set()

    def work(image_id: str, prepared: str) -> each_module.Rest:
        def write() -> None:
            writers.add(threading.get_ident())
            if image_id == "im3":
                raise OSError("not written")
            store.write_bytes(tmp_path / image_id, prepared.encode())

        return write

    with pytest.raises(EachFailed) as failed:
        each("step", IDS, work, prepare=str.upper, done=lambda _: False, workers=2)
    assert [f.image_id for f in failed.value.failures] == ["im3"] and main not in writers
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {i: i.upper() for i in IDS if i != "im3"}


def test_a_full_disk_in_a_thread_ends_the_step() -> None:
    def work(image_id: str, prepared: str) -> each_module.Rest:
        def write() -> None:
            raise atomic.DiskFull(28, "No disk space left")

        return write

    with pytest.raises(atomic.DiskFull):
        each("step", IDS, work, prepare=str.upper, done=lambda _: False)


def test_images_of_a_kind_go_together_and_apart_where_that_fails() -> None:
    groups: list[list[str]] = []
    alone: list[str] = []
    fail = False

    def several(ids: list[str], prepared: list[str]) -> list[each_module.Rest]:
        assert prepared == [image_id.upper() for image_id in ids]
        groups.append(ids)
        if fail:
            raise RuntimeError("not at once")
        return [lambda: None for _ in ids]

    ids = ["a1", "b1", "a2", "none", "a3", "b2", "bad", "a4"]

    def prepare(image_id: str) -> str:
        if image_id == "bad":
            raise OSError("not read")
        return image_id.upper()

    def kind(prepared: str) -> str | None:
        return None if prepared == "NONE" else prepared[0]

    together = each_module.Together(3, kind, several)
    for fail in (False, True):
        groups.clear(), alone.clear()
        with pytest.raises(EachFailed, match="bad: OSError: not read"):
            each("step", ids, lambda i, _: alone.append(i), prepare=prepare, done=lambda _: False, together=together)
        assert groups == [["a1", "a2", "a3"], ["b1", "b2"]]
        rest = ["none", "a4"] if not fail else ["a1", "a2", "a3", "b1", "b2", "none", "a4"]
        assert alone == rest


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize(("fits", "groups"), [
    (2, [4, 2, 2, 2, 2, 2]), (3, [4, 2, 2, 2, 2, 2]), (1, [4, 2]),
])  # fmt: skip
def test_fewer_images_go_together_where_the_memory_is_too_small(
    fits: int, groups: list[int], kind: type[Exception], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []
    made: list[str] = []

    def several(ids: list[str], prepared: list[str]) -> list[each_module.Rest]:
        tried.append(len(ids))
        if len(ids) > fits:
            raise kind("CUDA error: out of memory")
        made.extend(ids)
        return [lambda image_id=i, text=p: store.write_bytes(tmp_path / image_id, text.encode()) for i, p in
                zip(ids, prepared, strict=True)]  # fmt: skip

    def alone(image_id: str, prepared: str) -> None:
        made.append(image_id)
        store.write_bytes(tmp_path / image_id, prepared.encode())

    together = each_module.Together(4, lambda _: "all", several)
    ids = IDS[:10]
    each("step", ids, alone, prepare=str.upper, done=lambda _: False, workers=2, together=together)
    assert made == ids and tried == groups
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {i: i.upper() for i in ids}
    told = [line for line in capsys.readouterr().out.splitlines() if "too small" in line]
    assert len(told) == (1 if fits > 1 else 2) and f"--machine.images {2 if fits > 1 else 1}" in told[-1]


def test_an_image_too_large_alone_is_tried_twice_and_told_after_its_group_was_halved() -> None:
    tries: list[str] = []

    def too_large(ids: list[str], prepared: list[str]) -> list[each_module.Rest]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def alone(image_id: str, prepared: str) -> None:
        tries.append(image_id)
        if image_id == "b":
            raise torch.OutOfMemoryError("CUDA out of memory")

    together = each_module.Together(4, lambda _: "all", too_large)
    with pytest.raises(EachFailed, match="b: out of GPU memory"):
        each("step", ["a", "b", "c"], alone, prepare=str.upper, done=lambda _: False, together=together)
    assert tries == ["a", "b", "b", "c"]


def test_images_are_read_while_a_group_is_computed() -> None:
    """The last images that are read ahead are not waited for."""
    computing = threading.Event()
    too_early: list[bool] = []

    def prepare(image_id: str) -> str:
        if image_id in ("8", "9"):  # four groups are chosen from, one more is read
            too_early.append(not computing.wait(timeout=5))
        return image_id

    def several(ids: list[str], prepared: list[str]) -> list[each_module.Rest]:
        computing.set()
        return [lambda: None for _ in ids]

    together = each_module.Together(2, lambda _: "all", several)
    each("step", [str(n) for n in range(12)], print, prepare=prepare, done=lambda _: False, together=together)
    assert too_early == [False, False]
