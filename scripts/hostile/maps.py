"""Hostile class maps (npz and npy), affinity labels and other arrays of a run."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.hostile.cases import ONE, Bench, Data, HostileFile, Must
from scripts.hostile.formats import (
    CODE_IN_HEADER,
    HUGE_NPY,
    MARKER,
    Evil,
    later,
    npy,
    npy_of_pickle,
    npz,
    npz_of,
    patched,
    pickled_code,
    saved,
)  # fmt: skip


def npz_cases(bench: Bench) -> Iterator[HostileFile]:
    """CAM files, read by evaluation.py and by the step that makes affinity labels."""
    stored = np.load(bench.base / "run" / "cam" / f"{ONE}.npz")
    keys, maps, size = stored["keys"], stored["maps"], stored["size"]
    half = np.arange(maps.shape[1])[:, None] < maps.shape[1] // 2

    def cam(**changes: Any) -> bytes:
        return npz(**{"keys": keys, "maps": maps, "size": size, **changes})

    members = {"keys": npy(keys), "maps": npy(maps), "size": npy(size)}
    code = np.array([Evil()], dtype=object)
    with_code = {**members, "maps": npy(code)}
    climbing = npz_of(**{f"..__..__..__{MARKER}": b"x"}, **members)
    bomb = later(lambda: npz(keys=np.array([0, 1]), maps=np.zeros((2, 13000, 13000), np.float32), size=size))
    rows: list[tuple[str, Data, Must]] = [
        ("NaN maps", cam(maps=np.where(half, np.float16(np.nan), maps)), "refuse"),
        ("infinite maps", cam(maps=np.where(half, np.float16(np.inf), maps)), "refuse"),
        ("all NaN", cam(maps=np.full_like(maps, np.nan)), "refuse"),
        ("maps times -100", cam(maps=maps * -100), "any"),
        ("values of 1e30", cam(maps=np.full(maps.shape, 1e30, np.float64)), "any"),
        ("key 7", cam(keys=keys + 7), "refuse"),
        ("key -1", cam(keys=keys * 0 - 1), "refuse"),
        ("key 2^40", cam(keys=keys + 2**40), "refuse"),
        ("key 256", cam(keys=keys + 256), "refuse"),
        ("keys with fractions", cam(keys=keys + 0.5), "refuse"),
        ("NaN keys", cam(keys=keys * np.nan), "refuse"),
        ("one key twice", cam(keys=np.zeros(2, np.int64), maps=np.concatenate([maps[:1]] * 2)), "refuse"),
        ("keys are texts", cam(keys=np.array(["a"] * len(keys))), "refuse"),
        ("keys of two dimensions", cam(keys=keys[:, None]), "refuse"),
        ("maps of two dimensions", cam(maps=maps[0]), "refuse"),
        ("maps without pixels", cam(maps=maps[:, :0]), "refuse"),
        ("complex maps", cam(maps=maps.astype(np.complex64)), "any"),
        ("size 10^6 squared", cam(size=np.array([10**6, 10**6])), "refuse"),
        ("size 30000 squared", cam(size=np.array([30000, 30000])), "refuse"),
        ("size negative", cam(size=-size), "refuse"),
        ("size 0", cam(size=size * 0), "refuse"),
        ("size of another image", cam(size=size + 9), "refuse"),
        ("coarse maps of NaN", cam(coarse=np.full_like(maps, np.nan)), "any"),
        ("coarse maps of texts", cam(coarse=np.full(maps.shape, "a")), "any"),
        ("no keys", npz(maps=maps, size=size), "refuse"),
        ("other names", npz(a=maps), "refuse"),
        ("maps with code", npz_of(**with_code), "refuse"),
        ("keys with code", npz_of(**{**members, "keys": npy(code)}), "refuse"),
        ("climbing member", climbing, "any"),
        ("header says 6 TB", npz_of(**{**members, "maps": HUGE_NPY}), "refuse"),
        ("header with code", npz_of(**{**members, "maps": CODE_IN_HEADER}), "refuse"),
        ("empty archive", npz_of(), "refuse"),
        ("a pickle under its name", pickled_code(), "refuse"),
        ("a bomb of 1.3 GB", bomb, "refuse"),
    ]
    for name, data, must in rows:
        heavy = "bomb" in name
        yield HostileFile("maps npz", f"{name} (evaluation)", "evaluation.py", bench.evaluate_maps,
                   bench.in_evaluation(f"cam/{ONE}.npz", data), must, ONE, heavy=heavy)  # fmt: skip
        if must == "refuse":
            argv = [*bench.run, "--steps", "3"]
            yield HostileFile("maps npz", f"{name} (run, make_aff_label)", "run_sample.py", argv,
                       bench.in_run(f"cam/{ONE}.npz", data, "make_aff_label"), must, ONE, heavy=heavy)  # fmt: skip


def full_maps(bench: Bench) -> np.ndarray:
    """A map (H, W) float32 of the image ONE."""
    full = np.zeros((bench.height, bench.width), np.float32)
    full[: bench.height // 2] = 0.7
    return full


def npy_only(bench: Bench, cwd: Path) -> None:
    """Maps of the other images as .npy."""
    for path in (cwd / "cam").glob("*.npz"):
        if path.stem != ONE:
            shape = np.array(Image.open(bench.sample / "SegmentationClass" / f"{path.stem}.png")).shape
            (cwd / "cam" / f"{path.stem}.npy").write_bytes(npy({0: np.zeros(shape, np.float32)}))


def npy_in_evaluation(bench: Bench, data: Data) -> Any:
    """The .npy file of the image ONE in a folder of maps."""
    return bench.in_evaluation(f"cam/{ONE}.npy", data, also=lambda cwd: npy_only(bench, cwd))


def _storage_code() -> bytes:
    inner = saved({"a": Evil()})
    return npy_of_pickle(pickled_code(torch.storage._load_from_bytes, inner))


def npy_cases(bench: Bench) -> Iterator[HostileFile]:
    """Pickled class maps, as other repositories write them."""
    full = full_maps(bench)
    good = npy({0: full})
    bad = np.where(full > 0, np.nan, 0).astype(np.float32)
    infinite = np.where(full > 0, np.inf, 0).astype(np.float32)
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    tuples = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    small = pickle.dumps({0: np.zeros((2, 3), np.float32)}).replace(b"K\x02K\x03", b"J\xff\xff\xff\x7fK\x04")
    header = b"\x93NUMPY\x01\0" + struct.pack("<H", 60000) + b"{" * 60000
    touch = f"__import__('os').system('touch {MARKER}')"
    rows: list[tuple[str, bytes, Must]] = [
        ("good", good, "accept"),
        ("code: os.system", npy(np.array(Evil(), dtype=object)), "refuse"),
        ("code in a dict", npy({0: full, 1: Evil()}), "refuse"),
        ("code: eval", npy(np.array(Evil(eval, touch), dtype=object)), "refuse"),
        ("code: subprocess", npy(np.array(Evil(subprocess.check_call, ["touch", MARKER]), dtype=object)), "refuse"),
        ("code through torch.storage", _storage_code(), "refuse"),
        ("code through numpy's loader", npy_of_pickle(pickled_code(np.load, "evil.npy")), "refuse"),
        ("code: getattr", npy_of_pickle(b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."), "refuse"),
        ("code in the header", CODE_IN_HEADER, "refuse"),
        ("NaN maps", npy({0: bad}), "refuse"),
        ("infinite maps", npy({0: infinite}), "refuse"),
        ("key 7", npy({7: full}), "refuse"),
        ("key -1", npy({-1: full}), "refuse"),
        ("key 256", npy({256: full}), "refuse"),
        ("key 0.5", npy({0.5: full}), "refuse"),
        ("key a text", npy({"a": full}), "refuse"),
        ("keys of two kinds", npy({0: full, "a": full}), "refuse"),
        ("key a tuple", npy({(1, 2): full}), "refuse"),
        ("maps of two sizes", npy({0: full, 1: full[:-1]}), "refuse"),
        ("map is None", npy({0: None}), "refuse"),
        ("map is a list", npy({0: [[1, 2], [3]]}), "refuse"),
        ("a plain array", npy(full[None]), "refuse"),
        ("a list", npy(np.array([1, "a"], dtype=object)), "refuse"),
        ("dict with None", npy({"keys": None, "high_res": full[None]}), "refuse"),
        ("keys without maps", npy({"keys": np.array([0])}), "refuse"),
        ("header says 6 TB", HUGE_NPY, "refuse"),
        ("header of 60 KB", header, "refuse"),
        ("version 9", patched(good, 6, b"\x09\x09"), "refuse"),
        ("memo bomb (8 GB from 20 bytes)", npy_of_pickle(b"\x80\x02Nr\x00\x00\x00\x20."), "refuse"),
        ("bytes of 2^62", npy_of_pickle(b"\x80\x04\x8e" + struct.pack("<Q", 2**62)), "refuse"),
        ("array state too short", npy_of_pickle(pickle.dumps({0: full}).replace(full.tobytes()[:64], b"")), "refuse"),
        ("400 lists deep", npy_of_pickle(pickle.dumps({0: deep})), "refuse"),
        ("2000 marks", npy_of_pickle(b"\x80\x02" + b"(" * 2000 + b"Nl."), "refuse"),
        ("laughing tuples", npy_of_pickle(b"\x80\x02K\x01q\0" + tuples + b"."), "refuse"),
        ("huge integer text", npy_of_pickle(b"I" + b"9" * 200000 + b"\n."), "refuse"),
        ("array of 2^33 from nothing", npy_of_pickle(small), "refuse"),
    ]
    argv = ["npy" if word == "npz" else word for word in bench.evaluate_maps]
    for name, data, must in rows:
        yield HostileFile("maps npy", name, "evaluation.py", argv, npy_in_evaluation(bench, data), must, ONE)


def label_cases(bench: Bench) -> Iterator[HostileFile]:
    """Affinity labels."""
    file = bench.made(f"aff_label/{ONE}.npz")
    planes = np.load(io.BytesIO(file))["planes"]
    rows: list[tuple[str, bytes, Must]] = [
        ("NaN", npz(planes=np.full(planes.shape, np.nan, np.float32)), "refuse"),
        ("other shape", npz(planes=planes[..., :5]), "refuse"),
        ("values 99", npz(planes=np.full_like(planes, 99)), "any"),
        ("no planes", npz(x=planes), "refuse"),
        ("texts", npz(planes=planes.astype("U3")), "refuse"),
        ("one dimension", npz(planes=planes.ravel()), "refuse"),
        ("objects with code", npz_of(planes=npy(np.array([Evil()], dtype=object))), "refuse"),
        ("cut", file[: len(file) // 2], "refuse"),
    ]
    for name, data, must in rows:
        build = bench.in_run(f"aff_label/{ONE}.npz", data, "train_aff")
        yield HostileFile("aff_label", name, "run_sample.py", [*bench.run, "--steps", "4"], build, must, ONE)


def all_map_cases(bench: Bench) -> Iterator[HostileFile]:
    """Class maps and affinity labels."""
    for make in (npz_cases, npy_cases, label_cases):
        yield from make(bench)
