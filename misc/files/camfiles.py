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


def read_cam(path: Path, num_classes: int = 254) -> Cam:
    """Read CAMs: this project's npz, or the field's npy (a pickled dict {class: map}, {"keys", "high_res" or "cam"},
    {"key", "cam"}), the latter by an unpickler that knows NumPy arrays, dict, list, tuple, str and numbers only.

    Raises FileNotFoundError; ValueError for a damaged file, one without maps, maps that are not finite, and a class
    that is none of ``num_classes``.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return _foreign_cam(path, read_pickled(path), num_classes)
    stored = read_arrays(path)
    if not {"keys", "maps", "size"} <= stored.keys():
        raise ValueError(f"{path} is no CAM file: it holds {sorted(stored)}, not keys, maps and size.")
    keys, maps, sides = (stored[name] for name in ("keys", "maps", "size"))
    if sides.shape != (2,) or sides.dtype.kind not in "iu":
        raise ValueError(f"{path} is no CAM file: its size is {sides!r:.60}, not a height and a width.")
    size, sides = (int(sides[0]), int(sides[1])), (*maps.shape, 0, 0)[1:3]
    _check(path, keys, maps, stored.get("coarse"), num_classes)
    fits = max(size) <= _COARSEST * max(sides) and max(sides) <= max(_COARSEST, _FINEST * max(size))
    if min(size) < 1 or size[0] * size[1] > LARGEST_MEGAPIXELS * 1e6 or not fits:
        raise ValueError(f"{path} is no CAM file: maps of shape {maps.shape} for an image of {size[0]} x {size[1]}.")
    maps, coarse = maps.astype(np.float32), stored.get("coarse")
    coarse = None if coarse is None else coarse.astype(np.float32)
    return Cam(keys.astype(np.int64), maps, size, coarse)  # type: ignore[arg-type]


_COARSEST = 64
"""Pixels of an image to a value of its maps, at most."""
_FINEST = 4
"""Values of its maps to a pixel of an image, at most (along a side)."""


def _check(path: Path, keys: np.ndarray, maps: np.ndarray, coarse: np.ndarray | None, num_classes: int) -> None:
    """ValueError for classes that are no numbers of classes, or come twice, for maps without pixels, and for those that
    are not finite real numbers."""
    if maps.ndim != 3 or keys.ndim != 1 or len(keys) != len(maps):
        raise ValueError(f"{path} is no CAM file: classes of shape {keys.shape}, maps of shape {maps.shape}.")
    if len(keys) and min(maps.shape) < 1:
        raise ValueError(f"{path} is no CAM file: its maps of shape {maps.shape} have no pixel.")
    if any(values.dtype.kind not in "fiub" for values in (maps, coarse) if values is not None):
        raise ValueError(f"{path} is no CAM file: its maps are no real numbers.")
    if keys.dtype.kind not in "iu" or keys.ndim != 1 or len(set(keys.tolist())) < len(keys):
        raise ValueError(f"{path} is no CAM file: its classes {keys.tolist()!r:.60} must be whole numbers, each once.")
    if len(keys) and not 0 <= keys.min() <= keys.max() < num_classes:
        raise ValueError(
            f"{path} holds the classes {keys.tolist()!r:.60}, and there are {num_classes}, counted from 0. Make it "
            "again, or give the data that it was made from."
        )
    if not all(np.isfinite(values).all() for values in (maps, coarse) if values is not None):
        raise ValueError(f"{path} is damaged: its maps hold values that are not finite. Make it again.")


def _foreign_cam(path: Path, stored: Any, num_classes: int) -> Cam:
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not a dict of class maps.")
    if "keys" in stored or "key" in stored:
        keys = np.asarray(stored.get("keys", stored.get("key")))
        maps = _numbers(path, stored.get("high_res", stored.get("hr_cam", stored.get("cam"))))
        full = {"high_res", "hr_cam"} & stored.keys()
        coarse = _numbers(path, stored["cam"]) if full and stored.get("cam") is not None else None
        if keys.ndim == maps.ndim - 2 == 1 and len(keys) == len(maps) + 1:
            keys = keys[1:] - 1  # SemFormer's keys start with the background and count from 1 (semformer.md 6)
    else:
        coarse = None
        if not all(isinstance(key, int | np.integer) and not isinstance(key, bool) for key in stored):
            raise ValueError(f"{path}: its classes {list(stored)!r:.60} must be whole numbers.")
        keys = np.asarray(sorted(stored), dtype=None if stored else np.int64)
        each = [_numbers(path, stored[key]) for key in keys]
        if len({one.shape for one in each}) > 1:
            raise ValueError(f"{path}: its maps have the shapes {sorted({one.shape for one in each})!r:.90}.")
        maps = np.stack(each) if each else np.zeros((0, 1, 1))
    _check(path, keys, maps, coarse, num_classes)
    return Cam(keys.astype(np.int64), maps.astype(np.float32), (maps.shape[1], maps.shape[2]), coarse)


def _numbers(path: Path, values: Any) -> np.ndarray:
    """An array of float32; ValueError for what is no array of numbers."""
    try:
        return np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{path} holds a {type(values).__name__} in place of maps.") from None
