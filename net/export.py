"""Export of a trained segmentation network to an ONNX file that does not need this project."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.files import store
from misc.image import pixels
from net.contract import Segmenter, SingleStage

SIZES = ((1, 64, 80), (2, 97, 61), (1, 33, 200))
"""Batch, height and width at which an export is compared with PyTorch."""
TOLERANCE = 1e-3
"""Largest difference allowed in that comparison, relative to the largest logit."""

_PACKAGES = ("onnx", "onnxruntime")


class Exported(nn.Module):
    """The exported computation: images as read from files -> logits at their size.

    Args:
        network: in evaluation mode.
        align_corners: bilinear convention of the resize.
    """

    def __init__(self, network: Segmenter | SingleStage, align_corners: bool) -> None:
        super().__init__()
        norm = pixels.find_normalisation(network.normalisation)
        self.network, self.align_corners, self.bgr = network, align_corners, norm.bgr
        self.register_buffer("mean", torch.tensor(norm.mean).view(1, 3, 1, 1) * norm.scale)
        self.register_buffer("std", torch.tensor(norm.std).view(1, 3, 1, 1) * norm.scale)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) float32 RGB in 0 .. 255 -> (B, C + 1, H, W), background first."""
        if self.bgr:
            image = image.flip(1)
        logits = self.network.logits((image - self.mean) / self.std)
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=self.align_corners)


def export_onnx(
    network: Segmenter | SingleStage, path: Path, classes: Sequence[str], align_corners: bool
) -> float:
    """Write a segmentation network as ONNX, one scale, without CRF, after comparing it with PyTorch on ``SIZES``.

    Input "image" (batch, 3, height, width) float32 RGB in 0 .. 255, all three of any size; output "logits"
    (batch, C + 1, height, width), background first: the arg-max is the mask. Class names and normalisation are in the
    file's metadata.

    Args:
        network: on the CPU, in evaluation mode.
        path: the file to write.
        classes: names of the foreground classes.
        align_corners: of the resize to the image (SegInference).

    Returns:
        The largest difference from PyTorch, relative to the largest logit.

    Raises:
        ValueError: a package is missing; the network can't be exported; the file's results differ from PyTorch's.
    """
    _need_packages()
    import onnx

    module = Exported(network, align_corners).eval()
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.onnx"
        _export(module, draft)
        model = onnx.load(draft)
        norm = {"name": network.normalisation, **asdict(pixels.find_normalisation(network.normalisation))}
        description = {"classes": json.dumps(["background", *classes]), "normalisation (inside)": json.dumps(norm)}
        onnx.helper.set_model_props(model, description)
        content = model.SerializeToString()
    difference = _difference(module, content)
    if difference > TOLERANCE:
        raise ValueError(
            f"{path} is not written: it would differ from PyTorch by {difference:.1e} of the largest logit at some "
            "size. Another version of onnx or PyTorch may do."
        )
    store.write_bytes(path, content)
    return difference


def _need_packages() -> None:
    import importlib.util

    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--export onnx needs {', '.join(missing)}: pip install {' '.join(_PACKAGES)}")


def _export(module: nn.Module, path: Path) -> None:
    sizes = {0: "batch", 2: "height", 3: "width"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's internals
        try:
            # traced: the exporter that follows the code symbolically (dynamo=True) gives up on images that a network
            # scales itself, as DeepLab v2 does. What tracing takes for a constant, the comparison on SIZES finds.
            torch.onnx.export(
                module, (torch.zeros(2, 3, 64, 80),), str(path), dynamo=False, opset_version=17,
                input_names=["image"], output_names=["logits"], dynamic_axes={"image": sizes, "logits": sizes},
            )  # fmt: skip
        except Exception as error:  # the exporter's errors are of many kinds
            cause = str(error).strip().splitlines()
            raise ValueError(
                f"The network can't be exported to ONNX ({cause[0] if cause else type(error).__name__}). Its file "
                "still serves predict.py; please report the network's name and the versions of torch and onnx."
            ) from error


def _difference(module: nn.Module, content: bytes) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for number, (batch, height, width) in enumerate(SIZES):
        image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(number)) * 255
        with torch.no_grad():
            wanted = module(image)
        try:
            found: Any = torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])
        except Exception:  # of its own kinds, at a size that tracing has fixed
            return float("inf")
        if found.shape != wanted.shape or not bool(torch.isfinite(wanted).all()):
            return float("inf")
        largest = max(largest, float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)))
    return largest
