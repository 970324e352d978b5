"""Checks of the golden cases about foreign weight files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from net.backbone.resnet38 import ResNet38
from net.foreign.mxnet import resnet38_from_mxnet
from net.foreign.reading import read_tensors


def check_resnet38_mxnet_params(case: Any) -> None:
    """The full rename table, the module's keys, and each file of the case (three record versions)."""
    for old, new in case.meta["rename_table"].items():
        assert resnet38_from_mxnet(old) == new, old
    with torch.device("meta"):
        own = {name: list(value.shape) for name, value in ResNet38().state_dict().items()}
    assert own == case.meta["keys"]
    assert {case.meta["rename_table"][old]: shape for old, shape in case.meta["shapes"].items()} == {
        name: shape for name, shape in own.items() if not name.endswith("num_batches_tracked")
    }
    expected = {name.removeprefix("out/") for name in case.names if name.startswith("out/")}
    files = [name for name in case.names if name.startswith("file_")]
    assert files
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.params"
            path.write_bytes(case.input(file).tobytes())
            state = read_tensors(path)
        renamed = {resnet38_from_mxnet(name): value for name, value in state.items()}
        renamed.pop(None, None)
        assert set(renamed) == expected, file
        for name, value in renamed.items():
            case.check(f"out/{name}", value)
