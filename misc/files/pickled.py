"""Pickled ``.npy`` files of other WSSS repositories, read without running code by an unpickler restricted to arrays and
dicts."""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from misc.files.store import check_array_header, reading


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
    """Stands for a NumPy array during unpickling."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *version, shape, dtype, fortran, content = state
        super().__setstate__((*version, shape, dtype.real(), fortran, content))


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype.real())[0]


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    if math.prod(size) > len(storage):
        raise pickle.UnpicklingError(f"it holds a tensor of shape {tuple(size)} in {len(storage)} numbers")
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
    with reading(path, "", "", "replace it"), open(path, "rb") as file:
        dtype = check_array_header(file, os.fstat(file.fileno()).st_size)
        start = file.tell()
        file.seek(0)
        shape = _header(file, np.lib.format.read_magic(file))[0]
        if not dtype.hasobject:
            file.seek(0)
            return np.load(file, allow_pickle=False)
        _check_memo(file.read())
        file.seek(start)
        value = _Unpickler(file).load()
    return value.item() if isinstance(value, np.ndarray) and shape == () else value


def _check_memo(content: bytes) -> None:
    """ValueError where the pickle remembers things under numbers of which it has no use: the table of them would fill
    the memory."""
    for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > max(255, number):
            raise ValueError(f"it asks for {argument} places to remember things")


def _header(file: BinaryIO, version: tuple[int, int]) -> tuple[tuple[int, ...], bool, np.dtype]:
    reader: Callable[..., Any] = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    return reader(file)
