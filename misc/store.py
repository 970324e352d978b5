"""Files in and out: everything the project reads or writes passes here.

A file appears whole or not at all (written beside its place, flushed, renamed). Nothing is unpickled that could run
code. An image id cannot leave its folder. Errors name the file and the remedy.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from misc.imaging import palette


class DiskFull(OSError):
    """No space is left: the step must stop, not go on to the next image."""


@contextmanager
def writing(path: Path):
    """A binary file to write; it takes its name only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                error.errno, f"No disk space left while writing {path}. Free some and start the same command again"
            ) from error
        raise
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with writing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; ValueError names a damaged file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Delete it and run again.") from error


def write_weights(path: Path, value: Any) -> None:
    """Write tensors (a state dict or a resume point) atomically; the bytes depend on the values alone."""
    with writing(path) as file:
        torch.save(value, file)


def read_weights(path: Path) -> Any:
    """Read what ``write_weights`` wrote, to the CPU; never unpickles arbitrary objects."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: run the step that trains it first.") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint ({error}). Delete it and train again.") from error


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
"""Image files, the preferred one first where an id has several."""


def image_id(file: str) -> str:
    """Id of an image file: its name without folders and without an image extension (``a.b`` stays ``a.b``)."""
    name = PurePosixPath(file.strip().replace("\\", "/")).name
    return name.rsplit(".", 1)[0] if name.lower().endswith(IMAGE_SUFFIXES) else name


def checked_id(image_id: str) -> str:
    """The id itself; ValueError where it would leave its folder (``../``, absolute, drive, backslash) or is empty."""
    parts = PurePosixPath(image_id).parts
    if not image_id or image_id.startswith("/") or ".." in parts or "\\" in image_id or ":" in image_id:
        raise ValueError(f"Image id {image_id!r} is not allowed: ids are file names inside the data folder.")
    if "\0" in image_id or image_id in (".",):
        raise ValueError(f"Image id {image_id!r} is not allowed.")
    return image_id


def read_list(path: Path) -> list[str]:
    """Image ids of a list file: the first word of each line, its file name without extension (evaluation.md 3.1).

    Bare ids and lines such as ``/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png`` are understood.
    Raises FileNotFoundError, ValueError (an empty list, an id that leaves the folder, an id twice).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"List file {path} does not exist.")
    ids: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        word = line.split()[0]
        try:
            # a path is cut to its file name, but one that climbs is refused rather than quietly tamed
            checked_id(word.lstrip("/"))
            ids.append(checked_id(image_id(word)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not ids:
        raise ValueError(f"{path} is empty: put one image id a line.")
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        more = " ..." if len(twice) > 5 else ""
        raise ValueError(f"{path} names images twice: {', '.join(twice[:5])}{more}. Remove the copies.")
    return ids


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of any image file that Pillow reads, turned as its EXIF orientation says.

    Grey, palette, CMYK and 16-bit images are converted; of an animation the first frame is taken.
    Raises FileNotFoundError; ValueError for a damaged file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":
                values = np.asarray(image).astype(np.int64)
                image = Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"Image {path} does not exist.") from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError) as error:
        raise ValueError(f"Image {path} cannot be read ({error}): replace it, or take it off the list.") from error


def read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 indices of a palette or grey PNG mask.

    Raises FileNotFoundError; ValueError for a damaged file and for a colour image (indices would be lost).
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in ("P", "L", "1"):
                raise ValueError(
                    f"Mask {path} is a {image.mode} image: masks hold class indices in one 8-bit channel "
                    "(palette or grey). Convert it."
                )
            return np.array(image.convert("L") if image.mode == "1" else image)
    except FileNotFoundError:
        raise FileNotFoundError(f"Mask {path} does not exist.") from None
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"Mask {path} cannot be read ({error}): replace it.") from error


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write (H, W) uint8 indices as a PNG with the VOC palette, atomically."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    image.putpalette(palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def png_bytes(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> PNG file bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays as a compressed npz, atomically; equal arrays give equal bytes."""
    with writing(path) as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an npz file of plain arrays; ValueError for a damaged file or one that holds objects."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: run the step that makes it first.") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it and run the step that makes it again.") from error


@dataclass(frozen=True)
class Cam:
    """The class maps of one image.

    keys (K,) int64, present classes, 0-based; maps (K, h, w) float32; size: height and width of the image.
    """

    keys: np.ndarray
    maps: np.ndarray
    size: tuple[int, int]

    def full(self) -> np.ndarray:
        """The maps at image size, (K, H, W) float32, bilinear with align_corners False."""
        if self.maps.shape[1:] == self.size or len(self.keys) == 0:
            return self.maps.reshape(len(self.keys), *self.size) if len(self.keys) == 0 else self.maps
        maps = torch.from_numpy(self.maps)[None]
        return torch.nn.functional.interpolate(maps, size=self.size, mode="bilinear", align_corners=False)[0].numpy()


def write_cam(path: Path, keys: np.ndarray, maps: np.ndarray, size: tuple[int, int]) -> None:
    """Write ``cam/ID.npz``: maps are clipped to [0, 1] and stored as float16.

    SEAM's rule gives negative values where a class is ruled out (seam.md 5); as 0 they lose every arg-max alike.
    """
    write_arrays(
        path,
        keys=np.asarray(keys, np.int64),
        maps=np.clip(maps, 0, 1).astype(np.float16),
        size=np.asarray(size, np.int64),
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
    return Cam(keys.astype(np.int64), maps, size)  # type: ignore[arg-type]


def _foreign_cam(path: Path, stored: Any) -> Cam:
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not a dict of class maps.")
    if "keys" in stored or "key" in stored:
        keys = np.asarray(stored.get("keys", stored.get("key")))
        maps = np.asarray(stored.get("high_res", stored.get("hr_cam", stored.get("cam"))), np.float32)
        if len(keys) == len(maps) + 1:
            keys = keys[1:] - 1  # SemFormer's keys start with the background and count from 1 (semformer.md 6)
    else:
        keys = np.asarray(sorted(stored), dtype=np.int64)
        maps = np.stack([np.asarray(stored[k], np.float32) for k in keys]) if len(keys) else np.zeros((0, 1, 1))
    if maps.ndim != 3 or len(keys) != len(maps):
        raise ValueError(f"{path}: {len(keys)} classes but maps of shape {maps.shape}.")
    return Cam(keys.astype(np.int64), maps.astype(np.float32), (maps.shape[1], maps.shape[2]))


# what NumPy itself names when an array or a scalar is pickled, whatever module it lives in
_REBUILD = {"_reconstruct": np.zeros(0).__reduce__()[0], "scalar": np.float32(0).__reduce__()[0]}


class _Unpickler(pickle.Unpickler):
    """Knows NumPy arrays, scalars and dtypes, and the plain containers that pickle builds in; nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy":
            if name in _REBUILD and module.endswith("multiarray"):
                return _REBUILD[name]
            if name in ("ndarray", "dtype") and module == "numpy":
                return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not read from data files")


def read_pickled(path: Path) -> Any:
    """The object in a ``.npy`` file of the field (a 0-d object array) or the plain array in it, without running code.

    Raises FileNotFoundError; ValueError for a damaged file or any object but arrays, dicts, strings and numbers.
    """
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = _header(file, version)
            if not dtype.hasobject:
                file.seek(0)
                return np.load(file, allow_pickle=False)
            value = _Unpickler(file).load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    except (ValueError, EOFError, OSError, struct.error, pickle.UnpicklingError, AttributeError, TypeError,
            IndexError, KeyError, ImportError) as error:
        raise ValueError(f"{path} is damaged or holds what is not read from data files: {error}.") from error
    return value.item() if isinstance(value, np.ndarray) and shape == () else value


def _header(file: BinaryIO, version: tuple[int, int]) -> tuple[tuple[int, ...], bool, np.dtype]:
    reader: Callable[..., Any] = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    return reader(file)


def quiet_threads() -> None:
    """One thread for this process: worker processes share the cores among themselves."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
