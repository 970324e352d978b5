"""Precision and memory layout of the networks' arithmetic, as the machine's settings ask for (misc.config.Machine)."""

from __future__ import annotations

import contextlib
import functools
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from misc.config import Machine

_BF16 = frozenset({"amx_bf16", "avx512_bf16"})
"""What processors are said to have that multiply in bf16: AMX, or AVX-512 (AMD since Zen 4)."""
_CPUINFO = Path("/proc/cpuinfo")
_NARROW = 256
"""Linear layers with fewer inputs or outputs gain less from bf16 on the CPU than the conversions around them cost."""


@functools.cache
def has_fast_bf16(kind: str) -> bool:
    """Whether matrix products in bf16 are at least twice as fast as in float32 on devices of a type: on GPUs that have
    them in hardware (emulated they are slow), and on processors with such instructions (whose PyTorch says so, or
    Linux)."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.6 has no such function yet
        return any(torch.cpu.get_capabilities().get(name, False) for name in _BF16)
    try:
        return not _BF16.isdisjoint(_CPUINFO.read_text().split())
    except OSError:
        return False


def prefers_channels_last(kind: str) -> bool:
    """Whether convolutions are faster with channels last, in bf16 and in float32, on devices of a type: on x86
    processors, where oneDNN computes them; others were not measured, and GPUs were slower."""
    return kind == "cpu" and torch.backends.mkldnn.is_available() and platform.machine().lower() in {"x86_64", "amd64"}


def allow_tf32(allowed: bool) -> None:
    """Whether matrix products and convolutions in float32 may be computed in TF32, for the whole process. PyTorch's
    default allows it for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def autocast(machine: Machine, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a run; no effect if amp is off. Also sets, for the whole process (a backward pass runs
    outside this context), whether float32 may be computed in TF32."""
    allow_tf32(machine.amp == "fast")
    kind = machine.amp_dtype(device)
    if kind is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=kind)


@contextlib.contextmanager
def full_precision(kind: str) -> Iterator[None]:
    """Float32 without autocast and without TF32 on devices of this type, for what half precision would spoil: the
    forward pass alone (TF32 stays allowed in the backward pass)."""
    with torch.autocast(kind, enabled=False):
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        if torch.compiler.is_compiling() or not any(before):  # a compiled graph can't change the process's settings
            yield
            return
        try:
            allow_tf32(False)
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32: for maps and logits before they are resized, which in half precision makes ties,
    and gradients that are added up coarsely."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def place(network: nn.Module, machine: Machine, device: torch.device) -> None:
    """Move a network to a device, in the memory layout and with the precision of each kind of layer that the machine's
    settings ask for.

    Convolutions give their results in the layout of their weights, so inputs need not be converted. In the precision
    fast on the CPU, bf16 is for convolutions and wide linear layers: its backward pass of grouped convolutions is
    slower than float32's, and so are transformers of few channels.
    """
    network.to(device)
    if machine.uses_channels_last(device):
        network.to(memory_format=torch.channels_last)
    if device.type == "cpu" and machine.amp_dtype(device) is not None:
        if machine.amp == "fast":
            _keep_small_layers(network)
        _guard_narrow_inputs(network)


def _keep_small_layers(module: nn.Module) -> None:
    """Let grouped convolutions and the largest parts without convolutions, whose linear layers are all narrow, compute
    in float32 under autocast."""
    layers = list(module.modules())
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
    linear = [m for m in layers if isinstance(m, nn.Linear)]
    grouped = isinstance(module, nn.Conv2d) and module.groups > 1
    if grouped or (not convolutions and linear and all(min(m.in_features, m.out_features) < _NARROW for m in linear)):
        for layer in layers:  # a list of blocks may be called block by block
            if "forward" not in vars(layer):  # not yet
                layer.forward = _in_float32(layer.forward)
        return
    for child in module.children():
        _keep_small_layers(child)


def _guard_narrow_inputs(network: nn.Module) -> None:
    """Let convolutions with strides compute in float32 where an image is hardly wider than the stride: PyTorch's bf16
    kernels on CPUs (2.14 with oneDNN at least) then read memory that nobody wrote, and give any numbers or NaN."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and "forward" not in vars(layer):
            layer.forward = _in_float32(layer.forward, 2 * max(layer.stride))


def _in_float32(forward: Callable[..., Any], at_most: float = math.inf) -> Callable[..., Any]:
    """A layer's ``forward`` without autocast, its bf16 tensors converted to float32; of inputs whose shorter side has
    at most so many pixels."""

    def convert(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

    @functools.wraps(forward)
    def full(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu") or (at_most < math.inf and min(args[0].shape[-2:]) > at_most):
            return forward(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return forward(*map(convert, args), **{name: convert(value) for name, value in kwargs.items()})

    return full
