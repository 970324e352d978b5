"""Reading and writing of bytes, JSON, weights and arrays. Images, CAMs and lists have their own modules.

Files are written atomically (misc/files/atomic.py). Nothing that could run code is unpickled. Errors name the
file and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from misc.files.atomic import writing
from misc.files.schema import Schema, find_fault

LARGEST_TEXT = 256 << 20
"""Bytes of the largest list, table or JSON of our own that is read."""


def check_file(path: Path, largest: int | None = None) -> None:
    """ValueError for what is no file (a folder, a pipe, a device: reading might never end) or larger than ``largest``
    bytes; FileNotFoundError where there is nothing."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{path} is no file but a folder, a pipe or a device")
    if largest is not None and state.st_size > largest:
        raise ValueError(f"{path} has {state.st_size >> 20} MB, more than the {largest >> 20} MB that are read")


@contextmanager
def reading(path: Path, what: str, missing: str, damaged: str) -> Iterator[None]:
    """While a file is read: FileNotFoundError where there is none; ValueError for whatever else a decoder raises, which
    for damaged bytes can be anything. ``what`` begins both messages, ``missing`` and ``damaged`` end them."""
    try:
        check_file(path)
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{what} {path} does not exist{missing}.".lstrip()) from None
    except Exception as error:
        # torch's message advises to read the file unsafely and says only later what is wrong with it
        lines = [line.strip() for line in str(error).splitlines() if "weights_only" not in line and line.strip()]
        cause = lines[0].rstrip(".") if lines else type(error).__name__
        cause = re.sub(r" <_io\.\w+ .*>", "", cause)  # Pillow's name of bytes and files that are no picture
        raise ValueError(f"{what} {path} cannot be read ({cause}): {damaged}.".lstrip()) from error


def read_text(path: Path, what: str = "", largest: int = LARGEST_TEXT) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; FileNotFoundError, ValueError (no text, too large).
    ``what`` begins the messages."""
    with reading(path, what, "", "save it as UTF-8 text"):
        check_file(path, largest)
        return Path(path).read_text(encoding="utf-8-sig")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with writing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path, form: Schema = None) -> Any:
    """Read JSON of a form (misc/files/schema.py); FileNotFoundError, ValueError for a damaged file or another form."""
    with reading(path, "", "", "delete it and run again"):
        check_file(path, LARGEST_TEXT)
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        fault = find_fault(value, form)
        if fault:
            raise ValueError(fault)
        return value


def write_weights(path: Path, value: Any) -> None:
    """Write tensors (a state dict or a resume point) atomically; equal values give equal bytes."""
    with writing(path) as file:
        torch.save(value, file)


def read_weights(path: Path) -> Any:
    """Read what ``write_weights`` wrote, to the CPU; never unpickles arbitrary objects.

    Raises FileNotFoundError; ValueError for a damaged file and for one that holds more than tensors.
    """
    damaged = "give another file, or, if it is a run's own, delete it and start the run's command again"
    with reading(path, "", ": run the step that trains it first", damaged):
        _check_parts(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_parts(path: Path) -> None:
    """ValueError where a part of the archive that ``torch.save`` writes is compressed (it could unfold to gigabytes) or
    has another checksum than its head says, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("its parts are compressed, which PyTorch never does")
        if (part := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its part {part} is wrong")


def write_model(path: Path, state: dict[str, Any], description: Mapping[str, Any]) -> None:
    """Write a network's state dict with its description (plain values, kept as JSON) atomically."""
    write_weights(path, {"model": state, "description": json.dumps(description)})


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dict (on the CPU) and description of a file of ``write_model``.

    Raises FileNotFoundError; ValueError for a damaged file and for one that doesn't describe itself.
    """
    stored = read_weights(path)
    try:
        state, description = stored["model"], dict(json.loads(stored["description"]))
    except (RecursionError, AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise ValueError(
            f"{path} doesn't say which network and classes it is of: it was written by another project, or by an early "
            "version of this one. Train with this version (a run's weights/*.pt do say it); foreign weights can be "
            "what such a training starts from (--seg.weights FILE)."
        ) from None
    check_finite(path, state)
    return state, description


def check_finite(path: Path, state: Any) -> None:
    """ValueError where a state dict holds anything but real, finite tensors by name."""
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged: its weights are a {type(state).__name__}. Give another file.")
    for name, tensor in state.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not plain or tensor.is_complex() or tensor.is_meta:
            raise ValueError(f"{path} is damaged: {name!r} is no tensor of real numbers. Give another file.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path} is damaged: {name} holds values that are not finite. Give another file.")


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


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays as a compressed npz, atomically; equal arrays give equal bytes."""
    with writing(path) as file:
        np.savez_compressed(file, **arrays)


_LARGEST_ARRAYS = 2 << 30


def _check_npz(file: BinaryIO) -> None:
    """ValueError where an npz file would unfold to gigabytes, or a header claims another size than its data has."""
    with zipfile.ZipFile(file) as packed:
        if sum(part.file_size for part in packed.infolist()) > _LARGEST_ARRAYS:
            raise ValueError(f"its arrays have more than {_LARGEST_ARRAYS >> 30} GB")
        for part in packed.infolist():
            with packed.open(part) as array:
                check_array_header(array, part.file_size)
    file.seek(0)


def check_array_header(file: Any, size: int) -> np.dtype:
    """Type of the array in an opened npy file of ``size`` bytes; ValueError where its header claims more than that."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if not dtype.hasobject and (min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size):
        raise ValueError(f"an array claims the shape {shape}, more than its {size} bytes hold")
    return dtype


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an npz file of plain arrays; FileNotFoundError, ValueError for a damaged file or one with objects."""
    remedy = "delete it and start the command that makes it again"
    with reading(path, "", ": run the step that makes it first", remedy), open(path, "rb") as file:
        _check_npz(file)
        with np.lib.npyio.NpzFile(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
