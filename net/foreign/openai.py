"""CLIP's weights in the names of the official files: OpenAI's TorchScript archive, open_clip's safetensors, a plain
state dict, or fetched by open_clip (clipes.md section 2.3).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from net.foreign.pytorch import State
from net.foreign.reading import read_tensors, why_not_here

OPEN_CLIP = "open_clip:"
"""Before the name of one of open_clip's models, in place of a file."""
_SETTINGS = ("input_resolution", "context_length", "vocab_size")
"""Integers that OpenAI's archive holds beside the weights."""
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names that open_clip looks for in a repository of the hub."""
_OPENAI = (
    "https://openaipublic.azureedge.net/clip/models/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/"
    "ViT-B-16.pt"
)


def read_clip(source: str) -> State:
    """Both towers of CLIP, float32, under their official names.

    Args:
        source: a file, or ``open_clip:NAME`` for OpenAI's weights, which open_clip fetches from the internet and keeps;
            NAME is one of its models with quickgelu, which is what OpenAI's weights were trained with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no CLIP with an image tower of a vision transformer under the official names; open_clip is
            not installed, or can't fetch them.
    """
    name = source.removeprefix(OPEN_CLIP)
    state = _fetched(name) if name != source else _read_file(Path(source))
    state = {name: value.float() for name, value in state.items() if name not in _SETTINGS}
    if "visual.proj" in state and "visual.conv1.weight" in state and "text_projection" in state:
        return state
    if "norm_pre.weight" in state:
        raise ValueError(
            f"{source}: this is CLIP's image tower alone, in timm's names; texts can't be encoded with it. Give the "
            f"file with both towers: open_clip_model.safetensors of the same repository, or {_OPENAI}"
        )
    raise ValueError(
        f"{source}: no CLIP with a vision transformer in the official names (visual.proj, text_projection, ...). Give "
        f"OpenAI's file ({_OPENAI}), or an open_clip_model.safetensors of a ViT."
    )


def _read_file(path: Path) -> State:
    """Tensors of a file: of OpenAI's TorchScript archive too, from which they are taken without running anything."""
    if not zipfile.is_zipfile(path):
        return read_tensors(path)
    with zipfile.ZipFile(path) as archive:
        if not any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist()):
            return read_tensors(path)
    if not hasattr(torch.jit, "load"):
        raise ValueError(f"{path}: this PyTorch reads no TorchScript archives: give open_clip_model.safetensors.")
    try:
        return {name: value.detach() for name, value in torch.jit.load(path, "cpu").state_dict().items()}
    except RuntimeError as error:
        raise ValueError(f"{path}: is no archive like OpenAI's ({str(error)[:200]}): download it again.") from error


def _fetched(name: str) -> State:
    """OpenAI's weights by open_clip's name of the model."""
    if "quickgelu" not in name:
        raise ValueError(f"open_clip's {name} has another activation than OpenAI's weights: take {name}-quickgelu.")
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            "CLIP's weights are fetched by open_clip, which is not installed: run  pip install -r "
            f"requirements-clip.txt  , or bring the file {_OPENAI} and give its path in place of 'pretrained'."
        ) from error
    remedy = f"bring the file {_OPENAI} and give its path as the weights."
    repository = (open_clip.get_pretrained_cfg(name, "openai") or {}).get("hf_hub", "").rstrip("/")
    if repository and (reason := why_not_here(repository, _HUB_FILES)):
        raise ValueError(f"CLIP's weights {reason}: {remedy}")
    try:
        return dict(open_clip.create_model(name, pretrained="openai").state_dict())
    except Exception as error:  # no connection, a proxy, a full disk: each layer of the download has its own
        raise ValueError(
            f"CLIP's weights can't be fetched ({type(error).__name__}: {str(error)[:200]}). Is there a way to the "
            f"internet? If not, {remedy}"
        ) from error
