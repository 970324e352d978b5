"""Files of class-agnostic segments, one an image: ID.json, ID.npy, ID.npz or ID.png.

    ID.json   what SAM's automatic generator gives: a list of objects with a ``segmentation`` in COCO's run lengths
              ({"size": [H, W], "counts": ...}), or {"annotations": that list} as in SA-1B
    ID.npy    the same list pickled by NumPy, with arrays (H, W) or run lengths; or an array (n, H, W)
    ID.npz    one array (n, H, W), boolean or of 0 and 1
    ID.png    an indexed or grey picture, 8 or 16 bits: every value but 0 is a segment

All are read without running code, and what they claim is checked before memory is taken for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from misc.files import store
from misc.files.ids import checked_id
from misc.files.images import LARGEST_MEGAPIXELS, read_indices
from misc.files.pickled import read_pickled
from misc.files.runlengths import read_run_lengths, runs_of_region
from misc.files.schema import Number, find_fault
from misc.image.segments import Segments

SUFFIXES = (".json", ".npy", ".npz", ".png")
MOST = 10_000
"""Segments of an image; more are refused."""
_LARGEST = 1 << 30
"""Bytes of a file; larger ones are refused."""
_SIZE = [Number(1, 65535, whole=True)]


def segments_file(folder: Path, image_id: str) -> Path:
    """The file of an image's segments. FileNotFoundError where there is none, ValueError where there are several."""
    name = checked_id(image_id)
    found = [path for path in (folder / f"{name}{suffix}" for suffix in SUFFIXES) if path.is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has {' and '.join(path.name for path in found)}: keep one of them.")
    if not found:
        raise FileNotFoundError(
            f"{folder / name} has no segments ({', '.join(SUFFIXES)}): make them by python -m voc12.segments."
        )
    return found[0]


def read_segments(folder: Path, image_id: str, size: tuple[int, int]) -> Segments:
    """The segments of an image of ``size`` (H, W). Those of a smaller or larger copy, of the same shape to a pixel, are
    resized.

    Raises FileNotFoundError; ValueError for a damaged file, another form, or segments of another image's size.
    """
    path = segments_file(folder, image_id)
    with store.reading(path, "Segments", "", "make them again by python -m voc12.segments, or give other ones"):
        store.check_file(path, _LARGEST)
        found = _READERS[path.suffix](path, size)
        (height, width), (wanted_height, wanted_width) = found.size, size
        if abs(height * wanted_width - width * wanted_height) > max(size):
            raise ValueError(f"they are of {height} x {width} pixels, the image is {wanted_height} x {wanted_width}")
        return found.at_size(size)


def write_segments(path: Path, masks: Sequence[np.ndarray], size: tuple[int, int], made_by: dict[str, Any]) -> None:
    """Write masks (H, W) bool as ID.json in run lengths; ``made_by`` is kept with them."""
    listed = []
    for mask in masks:
        coded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        listed.append({"segmentation": {"size": list(size), "counts": coded["counts"].decode("ascii")},
                       "area": int(mask.sum())})  # fmt: skip
    store.write_bytes(path, json.dumps({"made_by": made_by, "annotations": listed}).encode())


def _checked_size(size: Sequence[int]) -> tuple[int, int]:
    """(H, W) as a file has it; ValueError for more pixels than an image may have."""
    if find_fault(size, _SIZE) or len(size) != 2:
        raise ValueError(f"a segment's size is {str(size)[:40]}, not height and width")
    height, width = size
    if height * width > LARGEST_MEGAPIXELS * 1e6:
        raise ValueError(f"a segment has {height * width / 1e6:.0f} megapixels, more than {LARGEST_MEGAPIXELS}")
    return height, width


def _listed(content: Any, size: tuple[int, int]) -> Segments:
    """Of a list of SAM's objects."""
    if isinstance(content, dict):
        content = content.get("annotations")
    if not isinstance(content, list):
        raise ValueError("it holds no list of segments")
    if len(content) > MOST:
        raise ValueError(f"it lists {len(content)} segments, more than {MOST}")
    runs, sizes = [], set()
    for number, entry in enumerate(content, 1):
        shape = entry.get("segmentation") if isinstance(entry, dict) else None
        try:
            if isinstance(shape, np.ndarray):
                sizes.add(_checked_size(list(shape.shape)))
                runs.append(runs_of_region(_truth(shape)))
            elif isinstance(shape, dict):
                height, width = _checked_size(shape.get("size"))
                sizes.add((height, width))
                runs.append(read_run_lengths(shape.get("counts"), height, width))
            else:
                raise ValueError("it has no 'segmentation' of run lengths (size, counts) or an array")
        except ValueError as error:
            raise ValueError(f"segment {number}: {error}") from None
    if len(sizes) > 1:
        raise ValueError(f"its segments have several sizes: {', '.join(map(str, sorted(sizes)[:3]))}")
    return Segments(sizes.pop() if sizes else size, tuple(runs))


def _truth(values: np.ndarray) -> np.ndarray:
    """Of an array of truth values, or of two numbers the lower of which is 0: the same shape, bool."""
    found = [] if values.dtype.kind == "b" else np.unique(values).tolist()
    if values.dtype.kind not in "bui" or len(found) > 2 or min(found, default=0) < 0 or (len(found) == 2 and found[0]):
        raise ValueError(f"an array of {values.dtype} with more than 0 and 1 in it is no mask")
    return values != 0


def _stacked(values: Any) -> Segments:
    """Of an array (n, H, W)."""
    if not isinstance(values, np.ndarray) or values.ndim != 3:
        raise ValueError(f"it holds {getattr(values, 'shape', type(values).__name__)}, not an array (n, H, W)")
    if len(values) > MOST:
        raise ValueError(f"it holds {len(values)} segments, more than {MOST}")
    size = _checked_size(list(values.shape[1:]))
    return Segments.of_masks((_truth(mask) for mask in values), size)


def _read_json(path: Path, size: tuple[int, int]) -> Segments:
    return _listed(json.loads(path.read_text(encoding="utf-8")), size)


def _read_npy(path: Path, size: tuple[int, int]) -> Segments:
    content = read_pickled(path)
    if isinstance(content, np.ndarray) and content.dtype.hasobject:
        content = content.ravel().tolist()
    return _listed(content, size) if isinstance(content, list) else _stacked(content)


def _read_npz(path: Path, size: tuple[int, int]) -> Segments:
    arrays = store.read_arrays(path)
    if len(arrays) != 1:
        raise ValueError(f"it holds {len(arrays)} arrays ({', '.join(sorted(arrays)[:5])}), not one")
    return _stacked(next(iter(arrays.values())))


def _read_png(path: Path, size: tuple[int, int]) -> Segments:
    index = read_indices(path)
    values = [int(value) for value in np.unique(index) if value]
    if len(values) > MOST:
        raise ValueError(f"it holds {len(values)} segments, more than {MOST}")
    return Segments.of_masks((index == value for value in values), index.shape)


_READERS = {".json": _read_json, ".npy": _read_npy, ".npz": _read_npz, ".png": _read_png}
