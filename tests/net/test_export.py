"""ONNX files of every network that predicts masks compute what PyTorch computes, at any size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from misc.image.pixels import normalise_image
from net import export, registry
from net.contract import Segmenter, SingleStage

registry.load_methods()
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CLASSES = ("dog", "Tür")
SIZES = ((1, 8, 8), (1, 48, 64), (3, 31, 90), (1, 200, 9), (2, 129, 128))


OWN = sorted(name for name, cls in registry.SEEDS.items() if issubclass(cls, SingleStage))
PREDICTING = {**registry.SEGMENTERS, **{name: registry.SEEDS[name] for name in OWN}}
PRESETS = [
    (name, preset) for name, cls in PREDICTING.items() for preset in cls.recipes if preset in ("sample", "photos")
]


def network(name: str, preset: str = "sample", **changed: str) -> Segmenter | SingleStage:
    torch.manual_seed(0)
    recipe = PREDICTING[name].recipes[preset]
    options = replace(getattr(recipe, "cam", recipe).network, **changed)
    return options.build(len(CLASSES), {}).eval()  # type: ignore


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset", "changed"),
    [*((name, preset, {}) for name, preset in PRESETS), ("deeplabv1", "photos", {"backbone": "timm/resnet18"})],
)
def test_the_file_computes_what_the_network_computes(
    name: str, preset: str, changed: dict[str, str], tmp_path: Path
) -> None:
    path, corners = tmp_path / "deep" / "seg.onnx", name != "deeplabv1"
    net = network(name, preset, **changed)
    assert export.export_onnx(net, path, CLASSES, corners) < 1e-4
    assert [p.name for p in path.parent.iterdir()] == ["seg.onnx"]  # weights inside
    session = onnxruntime.InferenceSession(str(path))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["background", *CLASSES]
    rng = np.random.default_rng(0)
    for batch, height, width in SIZES:
        images = rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        found = session.run(None, {"image": images.transpose(0, 3, 1, 2).astype(np.float32)})[0]
        values = torch.from_numpy(np.stack([normalise_image(image, net.normalisation) for image in images]))
        with torch.no_grad():
            wanted = net.logits(values.permute(0, 3, 1, 2))
            wanted = torch.nn.functional.interpolate(
                wanted, size=(height, width), mode="bilinear", align_corners=corners
            )
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_a_network_whose_code_fixes_a_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network("deeplabv1")
    inner = net.logits
    monkeypatch.setattr(net, "logits", lambda images: inner(images)[..., : int(images.shape[-2]) // 2, :])
    with pytest.raises(ValueError, match=r"x\.onnx is not written|can't be exported"):
        export.export_onnx(net, tmp_path / "x.onnx", CLASSES, True)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_PACKAGES", ("onnx", "nosuchpackage"))
    with pytest.raises(ValueError, match="--export onnx needs nosuchpackage: pip install onnx nosuchpackage"):
        export.export_onnx(network("deeplabv1"), tmp_path / "x.onnx", CLASSES, True)


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"x\.onnx is not written: it would differ from PyTorch"):
        export.export_onnx(network("deeplabv1"), tmp_path / "x.onnx", CLASSES, True)
    assert not list(tmp_path.iterdir())
