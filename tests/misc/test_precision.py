"""misc.config.Machine and misc.precision: which precision and memory layout networks have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from misc import precision
from misc.config import Machine
from misc.precision import autocast, full_precision, place
from net import registry
from net.contract import Phase, SeedRecipe

CPU, GPU = torch.device("cpu"), torch.device("cuda")
registry.load_methods()


def test_the_recipe_says_the_precision_unless_the_machine_names_one() -> None:
    assert Machine().with_recipe("bf16", CPU).amp_dtype(CPU) == torch.bfloat16
    assert Machine().with_recipe("fp16", GPU).amp_dtype(GPU) == torch.float16
    assert Machine().with_recipe("fp16", GPU).precision(GPU) == "float16 autocast"
    assert Machine().with_recipe("fp16", CPU).precision(CPU) == "float32"  # the recipe's fp16 is meant for GPUs
    assert Machine(amp="fp16").with_recipe("off", CPU).precision(CPU) == "float16 autocast"
    assert Machine(amp="off").with_recipe("fp16", GPU).precision(GPU) == "float32"


@pytest.fixture(params=[True, False], ids=["fast_bf16", "no_fast_bf16"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this machine's processor and GPU are fast at bf16, for the time of a test."""
    monkeypatch.setattr("misc.config.has_fast_bf16", lambda kind: request.param)
    return request.param


@pytest.fixture(params=["x86_64", "AMD64", "aarch64"])
def is_x86(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this machine's processor is one of x86, for the time of a test."""
    monkeypatch.setattr("platform.machine", lambda: request.param)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    return request.param != "aarch64"


def test_fast_is_bf16_where_the_hardware_is_fast_at_it(has_bf16: bool) -> None:
    fast, words = Machine(amp="fast"), "bfloat16 autocast" if has_bf16 else "float32"
    assert fast.precision(GPU) == f"{words} with TF32" and fast.precision(CPU) == words


def test_fast_is_channels_last_on_x86_in_whatever_precision(has_bf16: bool, is_x86: bool) -> None:
    fast = Machine(amp="fast")
    for device in (CPU, GPU):
        assert fast.uses_channels_last(device) == (is_x86 and device == CPU)
        assert not Machine(amp="off").uses_channels_last(device)
        assert not Machine(amp="bf16").uses_channels_last(device)
        assert Machine(amp="bf16", channels_last=True).uses_channels_last(device)
        assert not Machine(amp="fast", channels_last=False).uses_channels_last(device)


@pytest.fixture
def _nothing_known() -> Iterator[None]:
    """What is known of the hardware is found out anew, in a test and after it."""
    precision.has_fast_bf16.cache_clear()
    yield
    precision.has_fast_bf16.cache_clear()


@pytest.mark.usefixtures("_nothing_known")
def test_emulated_bf16_of_a_gpu_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not precision.has_fast_bf16("cuda")


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize("source", ["pytorch", "linux"])
@pytest.mark.parametrize(("instructions", "fast"), [
    ("amx_bf16", True), ("avx512_bf16", True), ("amx_int8", False), ("avx512f", False), ("avx512_fp16", False),
])  # fmt: skip
def test_processors_that_multiply_in_bf16_are_known(
    source: str, instructions: str, fast: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By PyTorch's list of what the processor has; PyTorch 2.6 has none, there Linux's is read."""
    if source == "pytorch":
        listed = {"amx_bf16": False, "avx512_bf16": False, instructions: True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed, raising=False)
    else:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu vme {instructions} sse\n")
        monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    assert precision.has_fast_bf16("cpu") is (fast and torch.backends.mkldnn.is_available())


class _Mixed(nn.Module):
    """A convolution, a grouped one, a wide linear layer and a narrow block."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.grouped = nn.Conv2d(3, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1, groups=256)
        self.wide, self.block = nn.Linear(256, 512), nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 8))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        dense = self.dense(images)
        grouped = self.grouped(dense)
        wide = self.wide(grouped.mean((2, 3)))
        return {"dense": dense, "grouped": grouped, "wide": wide, "block": self.block(wide)}


def test_each_kind_of_layer_has_its_precision_on_the_cpu(has_bf16: bool, is_x86: bool) -> None:
    torch.manual_seed(0)
    network, machine, images = _Mixed(), Machine(amp="fast"), torch.randn(2, 3, 8, 8)
    wanted = network(images)
    for _ in range(2):  # a second time changes nothing
        place(network, machine, CPU)
    with autocast(machine, CPU):
        found = network(images)
    low = {"dense", "wide"} if has_bf16 else set()
    for name, value in found.items():
        assert value.dtype == (torch.bfloat16 if name in low else torch.float32), name
        torch.testing.assert_close(value.float(), wanted[name], atol=0.03, rtol=0.03)
    assert found["dense"].is_contiguous(memory_format=torch.channels_last) == is_x86
    assert found["dense"].is_contiguous() != is_x86
    sum(value.float().sum() for value in found.values()).backward()
    after = network(images)  # without autocast everything is float32
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_narrow_blocks_are_float32_one_by_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("misc.config.has_fast_bf16", lambda kind: True)
    blocks, machine = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), Machine(amp="fast")
    place(blocks, machine, CPU)
    with autocast(machine, CPU):
        assert blocks(torch.ones(1, 8)).dtype == blocks[1](torch.ones(1, 8)).dtype == torch.float32


def test_full_precision_is_float32_without_tf32_and_ends() -> None:
    a = torch.randn(4, 4)
    with autocast(Machine(amp="fast"), CPU), torch.autocast("cpu", torch.bfloat16):
        with full_precision("cpu"):
            assert (a @ a).dtype == torch.float32
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        assert (a @ a).dtype == torch.bfloat16
    precision.allow_tf32(False)


@pytest.mark.parametrize(("amp", "tf32"), [("off", False), ("fast", True), ("bf16", False)])
def test_tf32_is_for_fast_alone(amp: str, tf32: bool) -> None:
    """PyTorch computes convolutions in TF32 unless told otherwise."""
    torch.backends.cudnn.allow_tf32 = not tf32
    with autocast(Machine(amp=amp), CPU):  # type: ignore[arg-type]
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32


def _phases() -> list[tuple[str, str, str, str]]:
    found = []
    for table in (registry.SEEDS, registry.REFINERS, registry.SEGMENTERS):
        for method, cls in table.items():
            for preset, recipe in cls.recipes.items():
                phase = getattr(recipe, "cam", recipe)
                phases = phase.phases() if isinstance(phase, SeedRecipe) else (("", phase),)
                found += [(method, preset, name, part.amp) for name, part in phases
                          if isinstance(part, Phase) and part.fit.steps != 0]  # fmt: skip
    return found


def test_published_trainings_say_their_precision_and_sample_ones_are_fast() -> None:
    """MCTformer trained and inferred in half precision; nothing else did (mctformer.md section 6)."""
    for method, preset, name, amp in _phases():
        if preset.startswith("published"):
            assert amp == ("fp16" if method == "mctformer" else "off"), (method, preset, name)
        else:
            assert amp == "fast", (method, preset, name)


@pytest.mark.parametrize("amp", ["bf16", "fast"])
def test_images_of_two_pixels_width_get_numbers(amp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided convolutions in bf16 read unwritten memory there."""
    monkeypatch.setattr("misc.config.has_fast_bf16", lambda kind: True)
    torch.manual_seed(0)
    machine, device = Machine(device="cpu", amp=amp), torch.device("cpu")
    layer, x = nn.Conv2d(16, 128, 3, stride=2, padding=1), torch.randn(1, 16, 125, 2)
    expected = layer(x)
    precision.place(layer, machine, device)
    junk = torch.full((3_000_000,), math.nan, dtype=torch.bfloat16)  # what an allocation of that memory holds
    del junk
    with torch.inference_mode(), precision.autocast(machine, device):
        assert torch.allclose(layer(x).float(), expected, atol=0.05)
