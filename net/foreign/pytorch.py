"""PyTorch checkpoints and safetensors files in their many wrappings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Tensors by name."""

# wrappers that leave their name before every key: data parallel training, torch.compile
_WRAPPERS = ("module.", "_orig_mod.")
# where training scripts put the state dict among their other things
_NESTS = ("state_dict", "model")


def read_pytorch(path: Path) -> State:
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


def read_safetensors(path: Path) -> State:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("the safetensors package is missing (pip install safetensors)") from error
    return unwrap(load_file(path))
