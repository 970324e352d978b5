"""CAM files: this project's ``cam/ID.npz``, and the pickled ``.npy`` files of other WSSS repositories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from misc.files.images import LARGEST_MEGAPIXELS
from misc.files.pickled import read_pickled
from misc.files.store import read_arrays, write_arrays
from misc.image.cam import Cam


def write_cam(path: Path, cam: Cam) -> None:
    """Write ``cam/ID.npz``: maps, and ``coarse`` ones if there are any, are clipped to [0, 1] and stored as float16.

    SEAM's rule gives negative values where a class is ruled out (seam.md 5); stored as 0 they lose every arg-max just
    the same. Raises ValueError for values that are not finite, which no later step would notice.
    """
    stored = {"maps": cam.maps} if cam.coarse is None else {"maps": cam.maps, "coarse": cam.coarse}
    if not all(np.isfinite(values).all() for values in stored.values()):
        raise ValueError(f"{path} is not written, its maps are not finite: train again, or try --machine.amp off.")
    write_arrays(
        path,
        keys=np.asarray(cam.keys, np.int64),
        size=np.asarray(cam.size, np.int64),
        **{name: np.clip(values, 0, 1).astype(np.float16) for name, values in stored.items()},
    )


def read_cam(path: Path) -> Cam:
    """Read CAMs: this project's npz, or the field's npy (a pickled dict {class: map}, {"keys", "high_res" or "cam"},
    {"key", "cam"}), the latter by an unpickler that knows NumPy arrays, dict, list, tuple, str and numbers only."""
    path = Path(path)
    if path.suffix == ".npy":
        return _foreign_cam(path, read_pickled(path))
    stored = read_arrays(path)
    if not {"keys", "maps", "size"} <= stored.keys():
        raise ValueError(f"{path} is no CAM file: it holds {sorted(stored)}, not keys, maps and size.")
    keys, maps, size = stored["keys"], stored["maps"].astype(np.float32), tuple(int(v) for v in stored["size"])
    if maps.ndim != 3 or len(keys) != len(maps) or len(size) != 2:
        raise ValueError(f"{path} is no CAM file: {len(keys)} keys, maps of shape {maps.shape}, size {size}.")
    coarse = stored["coarse"].astype(np.float32) if "coarse" in stored else None
    _check(path, keys, maps, coarse)
    if min(size) < 1 or size[0] * size[1] > LARGEST_MEGAPIXELS * 1e6 or max(size) > _COARSEST * max(maps.shape[1:]):
        raise ValueError(f"{path} is no CAM file: maps of shape {maps.shape} for an image of {size[0]} x {size[1]}.")
    return Cam(keys.astype(np.int64), maps, size, coarse)  # type: ignore[arg-type]


_COARSEST = 64
"""Pixels of an image to a value of its maps, at most."""


def _check(path: Path, keys: np.ndarray, maps: np.ndarray, coarse: np.ndarray | None) -> None:
    """ValueError for classes that are no numbers of classes, or come twice, and for maps that are not finite."""
    if keys.dtype.kind not in "iu" or keys.ndim != 1 or len(set(keys.tolist())) < len(keys):
        raise ValueError(f"{path} is no CAM file: its classes {keys.tolist()!r:.60} must be whole numbers, each once.")
    if len(keys) and not 0 <= keys.min() <= keys.max() <= 253:
        raise ValueError(f"{path} is no CAM file: its classes {keys.tolist()!r:.60} must be numbers from 0 to 253.")
    if not all(np.isfinite(values).all() for values in (maps, coarse) if values is not None):
        raise ValueError(f"{path} is damaged: its maps hold values that are not finite. Make it again.")


def _foreign_cam(path: Path, stored: Any) -> Cam:
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not a dict of class maps.")
    if "keys" in stored or "key" in stored:
        keys = np.asarray(stored.get("keys", stored.get("key")))
        maps = np.asarray(stored.get("high_res", stored.get("hr_cam", stored.get("cam"))), np.float32)
        full = {"high_res", "hr_cam"} & stored.keys()
        coarse = np.asarray(stored["cam"], np.float32) if full and stored.get("cam") is not None else None
        if len(keys) == len(maps) + 1:
            keys = keys[1:] - 1  # SemFormer's keys start with the background and count from 1 (semformer.md 6)
    else:
        coarse = None
        if not all(isinstance(key, int | np.integer) for key in stored):
            raise ValueError(f"{path}: its classes {list(stored)!r:.60} must be whole numbers.")
        keys = np.asarray(sorted(stored), dtype=None if stored else np.int64)
        maps = np.stack([np.asarray(stored[k], np.float32) for k in keys]) if len(keys) else np.zeros((0, 1, 1))
    if maps.ndim != 3 or len(keys) != len(maps):
        raise ValueError(f"{path}: {len(keys)} classes but maps of shape {maps.shape}.")
    _check(path, keys, maps, coarse)
    return Cam(keys.astype(np.int64), maps.astype(np.float32), (maps.shape[1], maps.shape[2]), coarse)
