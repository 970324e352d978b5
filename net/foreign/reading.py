"""Reads any weights file; the format is recognised by content, not by suffix."""

from __future__ import annotations

import os
import pickle
import struct
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from net.foreign.caffe import read_caffe
from net.foreign.mxnet import MXNET_LIST, read_mxnet
from net.foreign.pytorch import State, read_pytorch, read_safetensors

_SECONDS = 5
TIMM = "timm:"
"""Prefix before the name of one of timm's models, instead of a file."""

# format -> (test of the first 16 bytes, reader); the least specific test comes last
_READERS: dict[str, tuple[Callable[[bytes], bool], Callable[[Path], State]]] = {
    "safetensors": (lambda head: head[4:9] == b"\0\0\0\0{", read_safetensors),
    "MXNet .params": (lambda head: head[:8] == struct.pack("<Q", MXNET_LIST), read_mxnet),
    "a PyTorch checkpoint": (lambda head: head.startswith((b"PK\x03\x04", b"\x80")), read_pytorch),
    "a caffemodel": (lambda head: head.startswith((b"\x0a", b"\x12", b"\xa2\x06")), read_caffe),
}

_OTHERS: dict[bytes, str] = {
    b"version https:/": "a pointer of git LFS, not the file itself: run git lfs pull, or download the file",
    b"<!doctype": "a web page was saved in place of the file: download it again",
    b"<html": "a web page was saved in place of the file: download it again",
    b"\x1f\x8b": "a gzip archive: unpack it and give what is inside",
    b"bzh": "a bzip2 archive: unpack it and give what is inside",
    b"\xfd7zxz": "an xz archive: unpack it and give what is inside",
    b"7z\xbc\xaf": "a 7z archive: unpack it and give what is inside",
    b"rar!": "a RAR archive: unpack it and give what is inside",
}
"""First bytes, in lower case, of files that are often mistaken for weights files."""


def _format(path: Path) -> str:
    """The key of ``_READERS`` that fits the file. Raises ValueError if none does."""
    with path.open("rb") as file:
        head = file.read(16)
    for begins, told in _OTHERS.items():
        if head.lower().lstrip().startswith(begins):
            raise ValueError(f"{path}: {told}.")
    for kind, (recognises, _) in _READERS.items():
        if recognises(head):
            return kind
    _refuse_tar(path)
    raise ValueError(
        f"{path}: not a known weights format ({', '.join(_READERS)}); it begins with {head!r}. "
        "If it should be one of these, download it again."
    )


def _refuse_tar(path: Path) -> None:
    """Raises ValueError for a tar archive, also one of a checkpoint from before PyTorch 0.2. Many files named .pth.tar
    are none, but ordinary checkpoints."""
    if not tarfile.is_tarfile(path):
        return
    with tarfile.open(path) as archive:
        names = archive.getnames()
    if {"pickle", "storages", "tensors"} <= set(names):
        raise ValueError(
            f"{path}: a checkpoint in the format of PyTorch before 0.2, which is not read. If you trust its source, "
            "load it (torch.load(FILE, weights_only=False)) and save the tensors anew."
        )
    raise ValueError(f"{path}: a tar archive that holds {', '.join(names[:3])}: unpack it and give what is inside.")


def read_timm(name: str) -> State:
    """Tensors of one of timm's pretrained models by its name there, such as "deit_small_patch16_224".

    Needs the internet the first time. Raises ValueError if there is no such model or it can't be downloaded.
    """
    import timm  # slow to import, and most runs don't need it

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}. Give a name of timm.list_models(pretrained=True), or a file.")
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ValueError(f"timm has no weights of {name!r}. Give a name of timm.list_pretrained(), or a file.")
    file = f"model.safetensors of {_hub()}/{config.hf_hub_id}" if config.hf_hub_id else config.url
    remedy = f"bring {file} and give its path as the weights, in place of 'pretrained'."
    if config.hf_hub_id and (reason := why_not_here(config.hf_hub_id, ("model.safetensors", "pytorch_model.bin"))):
        raise ValueError(f"timm's weights {name} {reason}: {remedy}")
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except Exception as error:  # no connection, a proxy, a full disk: each raises its own type
        raise ValueError(
            f"timm's weights {name} can't be fetched ({type(error).__name__}: {str(error)[:200]}). Is there a way to "
            f"the internet? If not, {remedy}"
        ) from error


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def why_not_here(repository: str, files: Sequence[str]) -> str:
    """Why none of the files of a repository of the hub can be had, in words that follow their name; empty if one is in
    the local cache, or the hub answers. The hub's own client tries again and again for half a minute or more before it
    says that it does not."""
    if _is_cached(repository, files) or not (reason := _unreachable(_hub())):
        return ""
    return f"are not on this machine, and {_hub()} can't be reached ({reason})"


def _is_cached(repository: str, files: Sequence[str]) -> bool:
    """Whether one of the files of a repository of the hub is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in files)


def _unreachable(address: str) -> str:
    """Why a web address does not answer within a few seconds; empty if it does."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def read_tensors(path: str | Path) -> State:
    """Tensors of a weights file by their names in the file; for ``timm:NAME`` those of ``read_timm``.

    Nested dictionaries ("state_dict", "model") and wrapper prefixes ("module.") are removed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its format is unknown, it is damaged, or it contains objects that would have to be unpickled.
    """
    if str(path).startswith(TIMM):
        return read_timm(str(path).removeprefix(TIMM))
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file. Give the path of a downloaded checkpoint.")
    kind = _format(path)
    try:
        return _READERS[kind][1](path)
    except MemoryError:
        raise
    except OSError as error:  # of an archive that was cut, without a file's name
        raise ValueError(f"{path}: can't be read as {kind}: {error}. Download it again.") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds Python objects other than tensors, which are never unpickled, or is damaged. Where its "
            "code is at hand and trusted, save the bare tensors: torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:  # parsers raise many types on damaged files
        if kind == "a PyTorch checkpoint" and isinstance(error, ValueError):  # an intact file with other content
            raise ValueError(f"{path}: {error}.") from error
        raise ValueError(
            f"{path}: can't be read as {kind}: {error}. Truncated or damaged? Compare its size or checksum with the "
            "source's and download it again."
        ) from error
