"""PyTorch checkpoints, TorchScript archives and safetensors files in their many wrappings."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]
"""Tensors by name."""

# prefixes that wrappers add to every key: data parallel training, torch.compile, OpenMMLab, Lightning
_WRAPPERS = ("module.", "_orig_mod.", "backbone.", "model.")
# keys under which training scripts store the state dict; the first one that exists is used
_NESTS = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "params_ema", "params", "ema",
    "state_dict_ema", "model_ema", "teacher", "student",
)  # fmt: skip


def _plain_data() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Classes of plain data that training scripts store beside the tensors: command lines, paths, dates, scores.
    Creating them has no side effects. Paths of any system are read as pure paths."""
    paths = [
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name, kind in (
            ("PosixPath", pathlib.PurePosixPath), ("PurePosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath), ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    ]  # fmt: skip
    # the two functions that NumPy's scalars and arrays are pickled by, under their names of NumPy 1 and 2
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    makers = [
        (maker, f"numpy.{package}.multiarray.{name}")
        for package in ("core", "_core")
        for maker, name in ((scalar, "scalar"), (array, "_reconstruct"))
    ]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"} | {type(np.dtype("U1")), type(np.dtype("S1"))}
    return [
        argparse.Namespace, collections.defaultdict, collections.OrderedDict, collections.Counter,
        datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone,
        np.ndarray, np.dtype, *kinds, *makers, *paths, dict, list, set, int, float, str, tuple, bool, complex,
    ]  # fmt: skip


def read_pytorch(path: Path) -> State:
    """State dict of a PyTorch checkpoint; only tensors and plain data are unpickled. ValueError for other archives and
    for files without a tensor, pickle.UnpicklingError for anything else inside."""
    if zipfile.is_zipfile(path):
        _refuse_other_archives(path)
    with torch.serialization.safe_globals(_plain_data()):
        return unwrap(torch.load(path, map_location="cpu", weights_only=True), str(path))


def _refuse_other_archives(path: Path) -> None:
    """Raises ValueError for ZIP archives that are not checkpoints: TorchScript, or a zipped checkpoint."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise ValueError(
            "it is a TorchScript archive, a program and not a state dict; it is not run. If you trust its source, "
            "save the tensors alone: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise ValueError(f"it is a ZIP archive that holds {', '.join(names[:3])}: unpack it and give what is inside")


def unwrap(checkpoint: Mapping[str, object], label: str = "the checkpoint") -> State:
    """The state dict inside a checkpoint, from "state_dict", "model" and other keys of training scripts, without
    wrappers' prefixes. If there are several, a warning says which one is used.

    Entries that are not tensors (such as epoch numbers) are left out. Raises ValueError if no tensor is left.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"it holds a {type(checkpoint).__name__}, not a state dict")
    nests = [nest for nest in _NESTS if isinstance(checkpoint.get(nest), Mapping)]
    nests = [nest for nest in nests if _holds_tensors(checkpoint[nest])] or nests
    if nests:
        if len(nests) > 1:
            warnings.warn(f"{label} holds {', '.join(nests)}: {nests[0]} is taken.", stacklevel=2)
        return unwrap(checkpoint[nests[0]], label)  # type: ignore[arg-type]
    state = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    inner = [name for name, value in checkpoint.items() if isinstance(value, Mapping) and _holds_tensors(value)]
    if not state and len(inner) == 1:
        return unwrap(checkpoint[inner[0]], label)  # type: ignore[arg-type]
    if not state:
        keys = ", ".join(map(str, list(checkpoint)[:10]))
        raise ValueError(
            f"it holds no tensors at its top or under {', '.join(_NESTS)}; its entries are {keys or 'none'}"
        )
    for wrapper in _WRAPPERS:
        wrapped = [name for name in state if name.startswith(wrapper)]
        # a step counter without the data parallel prefix may be present
        if len(wrapped) == len(state) or (wrapper == "module." and 0 < len(state) - len(wrapped) < 3 < len(wrapped)):
            return unwrap({name.removeprefix(wrapper): state[name] for name in wrapped}, label)
    return state


def _holds_tensors(nested: object) -> bool:
    """Whether a mapping, or one nested in it, contains a tensor."""
    return isinstance(nested, Mapping) and any(isinstance(v, Tensor) or _holds_tensors(v) for v in nested.values())


def read_safetensors(path: Path) -> State:
    """State dict of a safetensors file. ValueError if that package is missing or the file holds no tensor."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("the safetensors package is missing (pip install safetensors)") from error
    return unwrap(load_file(path), str(path))
