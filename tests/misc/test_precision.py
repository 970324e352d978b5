"""misc.config.Machine and misc.loop.fit.autocast: which precision is used."""

from __future__ import annotations

import pytest
import torch

from misc.config import Machine
from misc.loop.fit import autocast
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


def test_fast_is_bf16_where_the_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert Machine(amp="fast").precision(GPU) == "bfloat16 autocast with TF32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert Machine(amp="fast").precision(GPU) == "float32 with TF32"
    assert Machine(amp="fast").precision(CPU) == "float32"


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
