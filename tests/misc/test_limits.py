"""Limits before anything is allocated, damage that no decoder looks for, results that stay in their folder, and Ctrl-C
at any time."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOM

from misc import commandline
from misc.config import CamInference, SegInference
from misc.files import atomic, store
from misc.files.camfiles import read_cam, write_cam
from misc.files.ids import result_path
from misc.files.images import read_image
from misc.image.cam import Cam
from scripts.hostile.formats import png
from step.lib.new_images import ResultFolder, class_file
from voc12.catalog import open_catalog
from voc12.prepare.__main__ import main as prepare
from voc12.tags import DataError

# ---------------------------------------------------------------------------------------------- images


def test_larger_images_are_not_decoded_and_only_shrink_reads_some(tmp_path: Path) -> None:
    def told(side: int, **limit: float) -> str:
        path = tmp_path / "a.png"
        path.write_bytes(png(side, 10_000, b"\0" * 50))
        with pytest.raises(ValueError) as error:
            read_image(path, **limit)
        return str(error.value)

    assert "110 megapixels, more than 100: make a smaller copy by python -m voc12.prepare shrink" in told(11_000)
    assert "megapixels" not in told(10_000) and "megapixels" not in told(11_000, largest=400)
    assert "410 megapixels, more than 400" in told(41_000, largest=400)


def test_scales_that_no_memory_holds_are_refused() -> None:
    for kind in (CamInference, SegInference):
        with pytest.raises(ValueError, match="scales"):
            kind(scales=(1.0, 1e6))
        assert kind(scales=(448.0,), square=True).scales == (448.0,)


# ---------------------------------------------------------------------------------------------- weights


def test_weights_whose_bytes_changed_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "cam.pt"
    values = torch.arange(1000.0)
    store.write_model(path, {"w": values}, {"part": "cam"})
    data = bytearray(path.read_bytes())
    at = data.index(values.numpy().tobytes()) + 2001
    data[at] ^= 1
    path.write_bytes(bytes(data))
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["w"], values)  # PyTorch doesn't look
    with pytest.raises(ValueError, match=r"cam\.pt cannot be read \(the checksum of its part .*is wrong"):
        store.read_model(path)


def test_weights_that_would_unfold(tmp_path: Path) -> None:
    store.write_model(tmp_path / "a.pt", {"w": torch.zeros(1000)}, {"part": "cam"})
    kind = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", kind) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    with pytest.raises(ValueError, match=r"b\.pt cannot be read \(its parts are compressed"):
        store.read_model(tmp_path / "b.pt")


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")], ids=["sparse", "meta"])
def test_weights_without_plain_numbers(tensor: torch.Tensor, tmp_path: Path) -> None:
    store.write_weights(tmp_path / "a.pt", {"model": {"w": tensor}, "description": "{}"})
    with pytest.raises(ValueError, match=r"a\.pt is damaged: 'w' is no tensor of real numbers"):
        store.read_model(tmp_path / "a.pt")


# ---------------------------------------------------------------------------------------------- maps


def test_maps_of_more_classes_than_there_are(tmp_path: Path) -> None:
    write_cam(tmp_path / "a.npz", Cam(np.array([0, 4]), np.zeros((2, 3, 4), np.float32), (12, 16)))
    assert read_cam(tmp_path / "a.npz", 5).keys.tolist() == [0, 4]
    with pytest.raises(ValueError, match=r"a\.npz holds the classes \[0, 4\], and there are 4"):
        read_cam(tmp_path / "a.npz", 4)


@pytest.mark.parametrize(
    "change",
    [{"maps": np.zeros((1, 0, 4))}, {"maps": np.full((1, 3, 4), 1j)}, {"maps": np.full((1, 3, 4), "a")},
     {"maps": np.zeros((1, 200, 4))}, {"size": np.array([3.5, 4])}, {"size": np.array(3)}],
)  # fmt: skip
def test_maps_that_are_none(change: dict[str, np.ndarray], tmp_path: Path) -> None:
    good = {"keys": np.array([0]), "maps": np.zeros((1, 3, 4)), "size": np.array([12, 16])}
    np.savez(tmp_path / "a.npz", **{**good, **change})
    with pytest.raises(ValueError, match=r"a\.npz is no CAM file"):
        read_cam(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "stored",
    [{"keys": np.array([0])}, {"keys": None, "high_res": np.zeros((1, 3, 4))}, {0: None}, {0: [[1, 2], [3]]},
     {0: np.zeros((3, 4)), 1: np.zeros((3, 3))}],
)  # fmt: skip
def test_pickled_maps_that_are_none(stored: dict[object, object], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(stored, object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy"):
        read_cam(tmp_path / "a.npy")


# ---------------------------------------------------------------------------------------------- places


def test_results_stay_in_their_folder_through_links(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")  # the folder itself may be a link
    assert result_path(tmp_path / "out", "trips/a", ".png") == tmp_path / "out/trips/a.png"
    (tmp_path / "elsewhere/masks").mkdir()
    (tmp_path / "elsewhere/masks/trips").symlink_to(tmp_path)
    assert ResultFolder(tmp_path / "out").file("masks", "a", "png") == tmp_path / "out/masks/a.png"
    with pytest.raises(ValueError, match=r"'trips/a' is not allowed: .*masks/trips leads to .*Remove that link"):
        ResultFolder(tmp_path / "out").file("masks", "trips/a", "png")


def test_classes_in_file_names() -> None:
    classes = ("car, red", "a/b", "a_b", "../x", "y" * 300, "dog")
    names = [class_file(classes, key) for key in range(len(classes))]
    assert names[0] == "car, red" and names[5] == "dog" and len(set(names)) == len(names)
    assert not any("/" in name or len(name) > 64 for name in names)


@pytest.mark.parametrize("name", ["labels.csv", "classes.txt"])
def test_tables_that_are_no_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels.csv").write_text("file,classes\na.jpg,cat\n")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{name} is no file"):
        open_catalog("folder", tmp_path)


def test_a_pipe_among_images_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "images/a.jpg")
    os.mkfifo(tmp_path / "images/b.jpg")
    (tmp_path / "labels.csv").write_text("file,classes\na.jpg,cat\nb.jpg,dog\n")
    assert prepare(["folder", "--root", str(tmp_path), "--workers", "0"]) == 1
    assert "b.jpg is no file but a folder, a pipe or a device" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- space


def test_a_limit_on_the_size_of_files_is_reported_as_a_full_disk(tmp_path: Path) -> None:
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(atomic.DiskFull, match=r"No disk space left while writing .*here.*same command again"):
            store.write_arrays(tmp_path / "here", a=np.random.default_rng(0).random((300, 300)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = "import time; from pathlib import Path; from misc.files.atomic import locked\n"
    code += f"with locked(Path({str(tmp_path / 'lock')!r})):\n print('held', flush=True)\n time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOM, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    begin = time.time()
    with atomic.locked(tmp_path / "lock"):
        assert time.time() - begin < 5


# ---------------------------------------------------------------------------------------------- Ctrl-C

PROGRAMS = {
    "run_sample.py": ["run_sample.py", "psa", "--steps", "1"],
    "predict.py": ["predict.py", "a.jpg", "--weights", "x.pt"],
    "evaluation.py": ["evaluation.py", "--list", "x", "--predict-dir", "x", "--gt-dir", "x", "--num-classes", "2"],
    "prepare": ["-m", "voc12.prepare", "folder", "--root", "x"],
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_imports(program: str, tmp_path: Path) -> None:
    own = ["--out", str(tmp_path)] if program == "run_sample.py" else []  # not a run of one's own
    started = subprocess.Popen([sys.executable, *PROGRAMS[program], *own], cwd=ROOM, stderr=subprocess.PIPE, text=True)
    until = time.time() + 60
    while time.time() < until:  # NumPy's library is mapped while the program imports
        maps = Path(f"/proc/{started.pid}/maps").read_text() if started.poll() is None else ""
        if "numpy" in maps or not maps:
            break
        time.sleep(0.002)
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 130 and error.strip().startswith("interrupted: "), error
    assert len(error.splitlines()) == 2


FIRST_CALL = """
import os, signal, sys
import run_sample
from misc import commandline
from step.lib import choices

def import_numpy():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        raise ImportError("cannot load module more than once per process")

commandline.begin("__main__")
choices._index = import_numpy
run_sample.main(sys.argv[1:])
"""


@pytest.mark.parametrize("flags", [(), ("--help",)])
def test_ctrl_c_in_the_first_call_after_a_change_of_the_sources(flags: tuple[str, ...]) -> None:
    """It imports PyTorch to list the flags; NumPy makes another error of a KeyboardInterrupt."""
    command = [sys.executable, "-c", FIRST_CALL, "psa", "--steps", "1", *flags]
    ended = subprocess.run(command, cwd=ROOM, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 130 and ended.stderr.split() == "interrupted: nothing was begun.".split()


LOST = {
    "a __del__": "class Doomed:\n    def __del__(self): signal.raise_signal(signal.SIGINT)",
    "a weak reference": "class Doomed:\n    def __init__(self):\n"
    "        self.watch = weakref.ref(self, lambda _: signal.raise_signal(signal.SIGINT)); kept.append(self.watch)",
    "a generator": "def doomed():\n    try: yield\n    finally: signal.raise_signal(signal.SIGINT)\n"
    "def Doomed():\n    begun = doomed(); next(begun); return begun",
}


@pytest.mark.parametrize("place", LOST)
def test_ctrl_c_that_python_would_ignore(place: str) -> None:
    script = f"""
import signal, sys, time, weakref
from misc.commandline import begin, command
begin(__name__)
kept = []
{LOST[place]}
def work():
    doomed = Doomed()
    del doomed
    time.sleep(60)
sys.exit(command(work, interrupted="so it is"))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOM, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "\ninterrupted: so it is\n")


def test_other_errors_that_python_ignores_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    class Doomed:
        def __del__(self) -> None:
            raise ValueError("of a __del__")

    told: list[object] = []
    before, sys.unraisablehook = sys.unraisablehook, told.append
    try:
        assert commandline.command(lambda: Doomed() and None) == 0
    finally:
        assert sys.unraisablehook == told.append
        sys.unraisablehook = before
    assert len(told) == 1


def test_workers_begin_without_ctrl_c() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('lives')"
    with commandline.holding_interrupts():
        started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert started.communicate(timeout=60)[0] == "lives\n" and started.returncode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "lives" not in plain.stdout


def test_ctrl_c_that_another_thread_is_given_is_held_too() -> None:
    """Linux gives a signal to any thread that does not block it."""
    asleep, reached = threading.Event(), []
    other = threading.Thread(target=asleep.wait)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), commandline.holding_interrupts():
            with commandline.holding_interrupts():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
                reached.append("inner")
            reached.append("outer")
    finally:
        asleep.set()
        other.join()
    assert reached == ["inner", "outer"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with commandline.holding_interrupts():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_killed_process_that_nobody_waited_for_writes_no_more(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its id is not free
    path = tmp_path / f".a.npz.{atomic._host()}-{dead.pid}-0{atomic.SUFFIX}"
    path.write_bytes(b"half")
    assert atomic.remove_leftovers([tmp_path]) == 1 and not path.exists()
    dead.wait()
