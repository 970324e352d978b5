"""Files in and out: everything the project reads or writes passes here.

A file appears whole or not at all (misc/files/atomic.py). Nothing is unpickled that could run
code. An image id cannot leave its folder. Errors name the file and the remedy.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from misc.files.atomic import writing
from misc.image.draw import palette


@contextmanager
def _reading(path: Path, what: str, missing: str, damaged: str) -> Iterator[None]:
    """FileNotFoundError where there is no file; a ValueError for whatever else a decoder raises, which for damaged
    bytes can be anything. ``what`` begins both messages, ``missing`` and ``damaged`` end them."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{what} {path} does not exist{missing}.".lstrip()) from None
    except Exception as error:
        # torch's message advises to read the file unsafely and says only later what is wrong with it
        lines = [line.strip() for line in str(error).splitlines() if "weights_only" not in line and line.strip()]
        cause = lines[0].rstrip(".") if lines else type(error).__name__
        raise ValueError(f"{what} {path} cannot be read ({cause}): {damaged}.".lstrip()) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with writing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; FileNotFoundError, ValueError for a damaged file."""
    with _reading(path, "", "", "delete it and run again"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def write_weights(path: Path, value: Any) -> None:
    """Write tensors (a state dict or a resume point) atomically; the bytes depend on the values alone."""
    with writing(path) as file:
        torch.save(value, file)


def read_weights(path: Path) -> Any:
    """Read what ``write_weights`` wrote, to the CPU; never unpickles arbitrary objects.

    Raises FileNotFoundError; ValueError for a damaged file and for one that holds more than tensors.
    """
    damaged = "give another file, or, if it is a run's own, delete it and start the run's command again"
    with _reading(path, "", ": run the step that trains it first", damaged):
        return torch.load(path, map_location="cpu", weights_only=True)


def write_model(path: Path, state: dict[str, Any], description: Mapping[str, Any]) -> None:
    """Write a network's state dict with its description (plain values, kept as JSON) atomically."""
    write_weights(path, {"model": state, "description": json.dumps(description)})


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dict (on the CPU) and description of a file of ``write_model``.

    Raises FileNotFoundError; ValueError for a damaged file and for one that doesn't describe itself.
    """
    stored = read_weights(path)
    try:
        return stored["model"], dict(json.loads(stored["description"]))
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(
            f"{path} doesn't say which network and classes it is of: it was written by another project, or by an early "
            "version of this one. Train with this version (a run's weights/*.pt do say it); foreign weights can be "
            "what such a training starts from (--seg.weights FILE)."
        ) from None


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return f"{size} bytes, sha256 {digest.hexdigest()}"


def fingerprint(path: Path) -> str:
    """Size and sha256 of a file's content: the same wherever it lies. Raises FileNotFoundError."""
    path = Path(path).resolve()
    state = path.stat()
    return _digest(path, state.st_size, state.st_mtime_ns)


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


def id_of_line(line: str) -> str:
    """Id of a line of a list file: its first word, the file name without extension (evaluation.md 3.1).

    Bare ids and lines such as ``/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png`` are understood.
    Raises ValueError for an id that leaves the folder.
    """
    word = line.split()[0]
    # a path is cut to its file name, but one that climbs is refused rather than quietly tamed
    checked_id(word.lstrip("/"))
    return checked_id(image_id(word))


def read_list(path: Path, key: Callable[[str], str] = id_of_line) -> list[str]:
    """Image ids of a list file, ``key`` of each line that is not blank.

    Raises FileNotFoundError, ValueError (an empty list, an id twice, no text, what ``key`` refuses).
    """
    with _reading(path, "List file", "", "save it as UTF-8 text, one image id a line"):
        text = Path(path).read_text(encoding="utf-8-sig")
    ids: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            ids.append(key(line))
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
    Raises FileNotFoundError; ValueError for a damaged file, and for floating-point pixels, whose range nobody knows.
    """
    with _reading(path, "Image", "", "replace it, or take it off the list"), Image.open(path) as opened:
        opened.load()
        if opened.mode == "F":
            raise ValueError("its pixels are floating-point numbers, save it with 8 or 16 bits")
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16") or image.mode == "I":
            values = np.asarray(image).astype(np.int64)
            image = Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
        return np.array(image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 indices of a palette or grey PNG mask.

    Raises FileNotFoundError; ValueError for a damaged file and for a colour image (indices would be lost).
    """
    with _reading(path, "Mask", "", "replace it"), Image.open(path) as image:
        image.load()
        mode, mask = image.mode, np.array(image)
    if mode not in ("P", "L", "1"):
        raise ValueError(
            f"Mask {path} is a {mode} image: masks hold class indices in one 8-bit channel (palette or grey). "
            "Convert it."
        )
    return mask.astype(np.uint8)


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


def jpeg_bytes(image: np.ndarray, quality: int = 90) -> bytes:
    """(H, W, 3) uint8 -> JPEG file bytes; ``quality`` is Pillow's, the default is for pictures to look at."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays as a compressed npz, atomically; equal arrays give equal bytes."""
    with writing(path) as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an npz file of plain arrays; FileNotFoundError, ValueError for a damaged file or one with objects."""
    remedy = "delete it and start the command that makes it again"
    with _reading(path, "", ": run the step that makes it first", remedy), open(path, "rb") as file:
        with np.lib.npyio.NpzFile(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}


@dataclass(frozen=True)
class Cam:
    """The class maps of one image.

    keys (K,) int64, present classes, 0-based; maps (K, h, w) float32; size: height and width of the image; coarse
    (K, h', w') float32, the same maps added up on a coarser grid, where the method's recipe keeps them.
    """

    keys: np.ndarray
    maps: np.ndarray
    size: tuple[int, int]
    coarse: np.ndarray | None = None

    def full(self) -> np.ndarray:
        """The maps at image size, (K, H, W) float32, bilinear with align_corners False."""
        if self.maps.shape[1:] == self.size or len(self.keys) == 0:
            return self.maps.reshape(len(self.keys), *self.size) if len(self.keys) == 0 else self.maps
        maps = torch.from_numpy(self.maps)[None]
        return torch.nn.functional.interpolate(maps, size=self.size, mode="bilinear", align_corners=False)[0].numpy()


def write_cam(
    path: Path, keys: np.ndarray, maps: np.ndarray, size: tuple[int, int], coarse: np.ndarray | None = None
) -> None:
    """Write ``cam/ID.npz``: maps, and ``coarse`` ones if there are any, are clipped to [0, 1] and stored as float16.

    SEAM's rule gives negative values where a class is ruled out (seam.md 5); as 0 they lose every arg-max alike.
    Raises ValueError for values that are not finite: no later step could tell.
    """
    stored = {"maps": maps} if coarse is None else {"maps": maps, "coarse": coarse}
    if not all(np.isfinite(values).all() for values in stored.values()):
        raise ValueError(f"{path} is not written, its maps are not finite: train again, or try --machine.amp off.")
    write_arrays(
        path,
        keys=np.asarray(keys, np.int64),
        size=np.asarray(size, np.int64),
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
    return Cam(keys.astype(np.int64), maps, size, coarse)  # type: ignore[arg-type]


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
        keys = np.asarray(sorted(stored), dtype=np.int64)
        maps = np.stack([np.asarray(stored[k], np.float32) for k in keys]) if len(keys) else np.zeros((0, 1, 1))
    if maps.ndim != 3 or len(keys) != len(maps):
        raise ValueError(f"{path}: {len(keys)} classes but maps of shape {maps.shape}.")
    return Cam(keys.astype(np.int64), maps.astype(np.float32), (maps.shape[1], maps.shape[2]), coarse)


class _Dtype:
    """Stands for a pickled NumPy dtype: takes its kind and byte order, not its flags, which could break NumPy."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def real(self) -> np.dtype:
        dtype = np.dtype(self.code)
        if dtype.kind not in "biufOU":
            raise pickle.UnpicklingError(f"it holds an array of {dtype}, which is not read from data files")
        return dtype.newbyteorder(self.order)


class _Array(np.ndarray):
    """An array being unpickled."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *version, shape, dtype, fortran, content = state
        super().__setstate__((*version, shape, dtype.real(), fortran, content))


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype.real())[0]


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    return torch.empty(0, dtype=storage.dtype).set_(storage, offset, size, stride).numpy()


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class _Unpickler(pickle.Unpickler):
    """Knows NumPy arrays, scalars and dtypes, torch tensors (IRNet's files hold some; they come as arrays), and the
    plain containers that pickle builds in; nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"_reconstruct": lambda *_: _Array(0), "scalar": _scalar, "ndarray": _Array, "dtype": _Dtype}
        if module.split(".")[0] == "numpy" and name in known:  # NumPy 1 and 2 have them in modules of other names
            return known[name]
        tensors = {"_rebuild_tensor_v2": _tensor, "_load_from_bytes": _storage}
        if module in ("torch._utils", "torch.storage") and name in tensors:
            return tensors[name]
        if (module, name) == ("collections", "OrderedDict"):  # a tensor's hooks, empty
            return dict
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not read from data files")


def read_pickled(path: Path) -> Any:
    """The object in a ``.npy`` file of the field (a 0-d object array) or the plain array in it, without running code.

    Raises FileNotFoundError; ValueError for a damaged file or any object but arrays, dicts, strings and numbers.
    """
    with _reading(path, "", "", "replace it"), open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = _header(file, version)
        if not dtype.hasobject:
            file.seek(0)
            return np.load(file, allow_pickle=False)
        value = _Unpickler(file).load()
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
