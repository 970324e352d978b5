"""Foreign checkpoints: reading their files, renaming their tensors, loading them strictly with a report.

``read`` recognises a file by its content: PyTorch (zip and legacy), MXNet ``.params`` (seam.md section 2.1),
``.caffemodel`` (deeplab.md section C.5) and safetensors. Nothing but tensors is ever unpickled. ``load`` recognises
the naming by a telltale key (``FORMATS``): a further official naming is one function and one line there.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Rename = Callable[[str], str | None]
"""Name in the file -> name in the module, None to drop the tensor."""

TIMM = "timm:"
"""Before the name of one of timm's models, in place of a file."""

# wrappers that leave their name before every key: data parallel training, torch.compile
_WRAPPERS = ("module.", "_orig_mod.")
# where training scripts put the state dict among their other things
_NESTS = ("state_dict", "model")


# ---------------------------------------------------------------------------------------------------- PyTorch


def _read_torch(path: Path) -> State:
    # DeiT's family of training scripts stores its command line beside the tensors: a Namespace is plain data
    with torch.serialization.safe_globals([argparse.Namespace]):
        return unwrap(torch.load(path, map_location="cpu", weights_only=True))


def unwrap(checkpoint: Mapping[str, object]) -> State:
    """The bare state dict inside a checkpoint: out of "state_dict" or "model", without "module." before the names.

    Entries that are no tensors (epoch numbers and the like) are left out. Raises ValueError where no tensor is left.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"the checkpoint is a {type(checkpoint).__name__}, not a state dict")
    for nest in _NESTS:
        if isinstance(checkpoint.get(nest), Mapping):
            return unwrap(checkpoint[nest])
    state = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError("the checkpoint holds no tensors under 'state_dict', 'model' or at its top")
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            return unwrap({name.removeprefix(wrapper): value for name, value in state.items()})
    return state


def _read_safetensors(path: Path) -> State:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("the safetensors package is missing (pip install safetensors)") from error
    return unwrap(load_file(path))


# ---------------------------------------------------------------------------------------------------- MXNet

_MXNET_LIST = 0x112
_MXNET_V1, _MXNET_V2 = 0xF993FAC8, 0xF993FAC9
_MXNET_TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4"}


def _read_mxnet(path: Path) -> State:
    """An MXNet NDArray list, all three record versions: {"arg:NAME" or "aux:NAME": tensor}. seam.md section 2.1."""
    data, position = path.read_bytes(), 0

    def take(kinds: str) -> tuple[int, ...]:
        nonlocal position
        values = struct.unpack_from(f"<{kinds}", data, position)
        position += struct.calcsize(f"<{kinds}")
        return values

    def tensor() -> Tensor:
        nonlocal position
        (version,) = take("I")
        dimension = "Q"
        if version == _MXNET_V2:
            storage, ndim = take("iI")
            if storage != 0:
                raise ValueError(f"sparse array (storage type {storage})")
        elif version == _MXNET_V1:
            (ndim,) = take("I")
        else:  # the oldest version has no magic number: its first field is the number of dimensions
            ndim, dimension = version, "I"
        if not 1 <= ndim <= 8:
            raise ValueError(f"array record with {ndim} dimensions")
        shape = take(dimension * ndim)
        _, _, flag = take("iii")  # the device that the array was on, its type
        if flag not in _MXNET_TYPES:
            raise ValueError(f"array of unknown type {flag}")
        array = np.frombuffer(data, _MXNET_TYPES[flag], math.prod(shape), position)
        position += array.nbytes
        return torch.from_numpy(array.reshape(shape).copy())

    _, _, count = take("QQQ")
    tensors = [tensor() for _ in range(count)]
    (names,) = take("Q")
    if names != count:
        raise ValueError(f"{count} arrays but {names} names")
    state = {}
    for value in tensors:
        (length,) = take("Q")
        state[take(f"{length}s")[0].decode()] = value
    return state


# ---------------------------------------------------------------------------------------------------- Caffe

# field of NetParameter that holds the layers -> fields of a layer: name, type, blobs.
# 100 is today's format; 2 is that of 2014/15 (V1LayerParameter), whose types are numbers.
_CAFFE_LAYERS = {100: (1, 2, 7), 2: (4, 5, 6)}
_CAFFE_INNER_PRODUCT = (b"InnerProduct", 14)


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The variable-length integer at ``position`` and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("not a protobuf message")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protobuf message; strings, messages and packed numbers come as raw bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("not a protobuf message")
        if position + length > len(data):
            raise ValueError("a field is longer than the message")
        yield tag >> 3, data[position : position + length]
        position += length


def _blob(data: memoryview) -> Tensor:
    """One BlobProto; its shape is field 7, or in older files num, channels, height, width in 1 to 4."""
    shape: list[int] | None = None
    legacy = [1, 1, 1, 1]
    values = np.empty(0, "<f4")
    for number, value in _fields(data):
        if number == 7:
            shape = [dim for _, dims in _fields(value) for dim in _dims(dims)]
        elif 1 <= number <= 4:
            legacy[number - 1] = value
        elif number == 5:
            values = np.frombuffer(value, "<f4")
    return torch.from_numpy(values.reshape(legacy if shape is None else shape).copy())


def _dims(value: int | memoryview) -> list[int]:
    """Numbers of a repeated integer field, packed or one by one."""
    if isinstance(value, int):
        return [value]
    dims, position = [], 0
    while position < len(value):
        dim, position = _varint(value, position)
        dims.append(dim)
    return dims


def _layer(kind: bytes | int, name: str, blobs: list[Tensor], batch_norm: str | None) -> State:
    """The tensors of a layer by their PyTorch names. ``batch_norm``: the layer before, where it is a BatchNorm."""
    if not blobs:
        return {}
    if kind == b"BatchNorm":
        mean, variance, factor = blobs
        divisor = factor.item() or math.inf  # Caffe itself takes the statistics as 0 where the factor is 0
        return {
            f"{name}.running_mean": mean.flatten() / divisor,
            f"{name}.running_var": variance.flatten() / divisor,
            f"{name}.num_batches_tracked": torch.tensor(0),
        }
    if kind == b"Scale":  # carries the weight and bias of the BatchNorm before it
        name = batch_norm or name
    elif kind in _CAFFE_INNER_PRODUCT:
        blobs[0] = blobs[0].reshape(blobs[0].shape[-2:])
    if len(blobs) > 2:
        raise ValueError(f"layer {name} has {len(blobs)} blobs, weight and bias were expected")
    tensors = {f"{name}.weight": blobs[0]}
    if len(blobs) == 2:
        tensors[f"{name}.bias"] = blobs[1].flatten()  # older files: (1, 1, 1, n)
    return tensors


def _read_caffe(path: Path) -> State:
    """A caffemodel: {"LAYER.weight", "LAYER.bias"} and running statistics. deeplab.md section C.5."""
    state: State = {}
    batch_norm = None
    for number, layer in _fields(memoryview(path.read_bytes())):
        if number not in _CAFFE_LAYERS:
            continue
        name_field, type_field, blob_field = _CAFFE_LAYERS[number]
        name, kind, blobs = "", b"", []
        for part, value in _fields(layer):
            if part == name_field:
                name = bytes(value).decode()
            elif part == type_field:
                kind = value if isinstance(value, int) else bytes(value)
            elif part == blob_field:
                blobs.append(_blob(value))
        state.update(_layer(kind, name, blobs, batch_norm))
        batch_norm = name if kind == b"BatchNorm" else None
    if not state:
        raise ValueError("no layer in it has weights")
    return state


# ---------------------------------------------------------------------------------------------------- any file

# format -> (does a file that begins with these 16 bytes have it?, its reader); the weakest sign comes last
_READERS: dict[str, tuple[Callable[[bytes], bool], Callable[[Path], State]]] = {
    "safetensors": (lambda head: head[4:9] == b"\0\0\0\0{", _read_safetensors),
    "MXNet .params": (lambda head: head[:8] == struct.pack("<Q", _MXNET_LIST), _read_mxnet),
    "a PyTorch checkpoint": (lambda head: head.startswith((b"PK\x03\x04", b"\x80")), _read_torch),
    "a caffemodel": (lambda head: head.startswith((b"\x0a", b"\x12", b"\xa2\x06")), _read_caffe),
}


def _format(path: Path) -> str:
    """The key of ``_READERS`` that fits the file; ValueError where none does."""
    with path.open("rb") as file:
        head = file.read(16)
    for kind, (recognises, _) in _READERS.items():
        if recognises(head):
            return kind
    raise ValueError(
        f"{path}: no known weight format ({', '.join(_READERS)}); it begins with {head!r}. "
        "A web page may have been saved in place of the file: download it again."
    )


def read_timm(name: str) -> State:
    """Tensors of one of timm's pretrained models by its name there, such as "deit_small_patch16_224".

    Needs the internet the first time. Raises ValueError where there is no such model or it can't be fetched.
    """
    import timm  # slow to import, and most runs don't need it

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}. Give a name of timm.list_models(pretrained=True), or a file.")
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except Exception as error:  # no connection, a proxy, a full disk: each layer of the download has its own
        config = timm.get_pretrained_cfg(name)
        url = config.url if config is not None and config.url else f"the weights of {name}"
        raise ValueError(
            f"timm's weights {name} can't be fetched ({type(error).__name__}: {str(error)[:200]}). Is there a way to "
            f"the internet? If not, bring the file ({url}) and give its path as the weights instead of 'pretrained'."
        ) from error


def read(path: str | Path) -> State:
    """Tensors of a weight file by their names in the file, recognised by content, not by suffix; of ``timm:NAME`` those
    of ``read_timm``.

    Nested dictionaries ("state_dict", "model") and wrapper prefixes ("module.") are taken away.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its format is unknown, it is damaged, or it holds objects that would have to be unpickled.
    """
    if str(path).startswith(TIMM):
        return read_timm(str(path).removeprefix(TIMM))
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file. Give the path of a downloaded checkpoint.")
    kind = _format(path)
    try:
        return _READERS[kind][1](path)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds Python objects other than tensors, which are never unpickled, or is damaged. Where its "
            "code is at hand and trusted, save the bare tensors: torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:  # parsers meet damage in many ways
        raise ValueError(
            f"{path}: can't be read as {kind}: {error}. Truncated or damaged? Compare its size or checksum with the "
            "source's and download it again."
        ) from error


# ---------------------------------------------------------------------------------------------------- names

_MXNET_STATISTICS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}
_MXNET_RESNET38 = re.compile(
    r"(?:arg|aux):(?P<kind>res|bn)(?P<stage>\d)(?:a|b(?P<block>\d+))_(?P<branch>branch\w+?)_"
    r"(?P<value>weight|gamma|beta|moving_mean|moving_var)"
)


def resnet38_from_mxnet(name: str) -> str | None:
    """Name of a tensor of the ImageNet ``.params`` file -> its name in ResNet38; None for the 1000-class layer.

    Other names come back as they are (and then show up as unexpected). seam.md section 2.1.
    """
    if name.startswith("arg:linear1000_"):
        return None
    if name == "arg:conv1a_weight":
        return "conv1a.weight"
    _, _, last = name.partition(":bn7_")
    if last in _MXNET_STATISTICS:
        return f"bn7.{_MXNET_STATISTICS[last]}"
    match = _MXNET_RESNET38.fullmatch(name)
    if match is None:
        return name
    block = f"b{match['stage']}" + (f"_{match['block']}" if match["block"] else "")
    layer = {"res": "conv", "bn": "bn"}[match["kind"]]
    return f"{block}.{layer}_{match['branch']}.{_MXNET_STATISTICS.get(match['value'], match['value'])}"


FORMATS: dict[str, Rename] = {
    "arg:conv1a_weight": resnet38_from_mxnet,
}
"""Key that gives an official naming away -> its renaming."""


# ---------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Report:
    """What ``load`` did, by names of the module (of the file, renamed, for ``unexpected``)."""

    source: str
    """The file, or what the caller called it."""
    loaded: tuple[str, ...]
    """Tensors that took the file's values."""
    missing: tuple[str, ...]
    """Tensors that the file lacks; they keep their values."""
    unexpected: tuple[str, ...]
    """Tensors of the file that the module lacks; they were ignored."""
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Tensors with another shape in the file: (there, in the module); they keep their values."""

    def __str__(self) -> str:
        """One line: the source, the counts, and the names where something was not loaded."""
        shapes = [f"{name} {there} for {here}" for name, (there, here) in self.wrong_shape.items()]
        parts = [f"{len(self.loaded)} loaded"]
        for label, names in (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes)):
            parts.append(f"{len(names)} {label}" + (f" ({_listed(names)})" if names else ""))
        return f"{self.source}: {', '.join(parts)}"


def _listed(names: Sequence[str]) -> str:
    """At most ten of the names, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def load(
    module: nn.Module,
    source: str | Path | Mapping[str, object],
    *,
    rename: Rename | None = None,
    allow_missing: Sequence[str] = (),
    label: str | None = None,
) -> Report:
    """Load foreign weights into a module: everything but its head must be there and fit.

    Wrapper prefixes are stripped, names are renamed, ``num_batches_tracked`` may be absent (files of PyTorch 0.4).
    The module is changed only if nothing is wrong.

    Args:
        module: takes the values; a part of a network (``net.backbone``) is a module too.
        source: a weight file (see ``read``) or a checkpoint that is loaded already.
        rename: name in the file -> name in the module or None; by default what ``FORMATS`` recognises.
        allow_missing: names or prefixes, with ``*`` and ``?`` ("fc8", "f8_*"), of what the file may lack or hold in
            another shape, i.e. the head that is trained anew.
        label: what report and errors call a checkpoint that is loaded already: the file it came from.

    Raises:
        FileNotFoundError, ValueError: as ``read``.
        ValueError: two names in the file become one; more than ``allow_missing`` is missing or has another shape.
    """
    from_file = isinstance(source, str | Path)
    label = label or (str(source) if from_file else "state dict")
    state = _renamed(read(source) if from_file else unwrap(source), rename, label)
    own = module.state_dict()

    def counter(name: str) -> bool:
        return name.endswith("num_batches_tracked")

    wrong_shape = {
        name: (tuple(state[name].shape), tuple(value.shape))
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    }
    report = Report(
        source=label,
        loaded=tuple(name for name in own if name in state and name not in wrong_shape),
        missing=tuple(name for name in own if name not in state and not counter(name)),
        unexpected=tuple(name for name in state if name not in own and not counter(name)),
        wrong_shape=wrong_shape,
    )
    _refuse_gaps(report, allow_missing)
    module.load_state_dict({**own, **{name: state[name] for name in report.loaded}})
    return report


def _renamed(state: State, rename: Rename | None, label: str) -> State:
    """``state`` under the module's names; ValueError where two names become one."""
    if rename is None:
        rename = next((rename for key, rename in FORMATS.items() if key in state), None)
    if rename is None:
        return state
    renamed: State = {}
    for old, value in state.items():
        new = rename(old)
        if new in renamed:
            raise ValueError(f"{label}: {old} and another tensor become {new}: this renaming doesn't fit the file.")
        if new is not None:
            renamed[new] = value
    return renamed


def _refuse_gaps(report: Report, allow_missing: Sequence[str]) -> None:
    """ValueError where more than the allowed is missing or of another shape, or nothing fits at all."""

    def disallowed(names: Sequence[str]) -> list[str]:
        patterns = [p for pattern in allow_missing for p in (pattern, f"{pattern}.*")]
        return [name for name in names if not any(fnmatchcase(name, p) for p in patterns)]

    missing, misfits = disallowed(report.missing), disallowed(list(report.wrong_shape))
    head = f"Only {', '.join(allow_missing)} may differ." if allow_missing else "Nothing may differ."
    remedy = f"{head} Is this the checkpoint of another network, or of other options (width, depth, classes)?"
    if missing:
        found = f"; the file has {_listed(report.unexpected)} instead" if report.unexpected else ""
        raise ValueError(f"{report.source}: {len(missing)} tensors are missing: {_listed(missing)}{found}. {remedy}")
    if misfits:
        shapes = [f"{name} {report.wrong_shape[name][0]} for {report.wrong_shape[name][1]}" for name in misfits]
        raise ValueError(f"{report.source}: {len(misfits)} tensors have another shape: {_listed(shapes)}. {remedy}")
    if not report.loaded:
        raise ValueError(f"{report.source}: none of its tensors belongs to this network. {remedy}")
