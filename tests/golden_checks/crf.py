"""Golden cases of the dense CRF (psa.md sections 3 and 4, deeplab.md C.4).

Settings, alphas, iterations and the given probabilities are read from the case.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import numpy as np

from misc.crf.dense import CRFSettings, DenseCRF

FEW_PIXELS = 0.002
"""The cases allow a few differing pixels in arg-max maps: at most this fraction."""


def _check_argmax(case: Any, name: str, posterior: np.ndarray) -> None:
    case.compare(name, case.sample(name, posterior.argmax(axis=0)), share=1 - FEW_PIXELS)


def check_psa_crf_label(case: Any) -> None:
    """Posteriors of [(1 - max)^alpha, CAMs], the lattices of an image shared by all alphas."""
    numbers = re.search(
        r"(\d+) iterations.*Gaussian sxy (\S+) compat ([^;]+);.*sxy (\S+) srgb (\S+) compat (\S+)", case.meta["crf"]
    ).groups()
    cams = case.input("cams").astype(np.float32)
    background = 1 - cams.max(axis=0, keepdims=True)  # (1, H, W)
    refine: dict[int, DenseCRF] = {}
    for name in case.meta["outputs"]:
        found = re.fullmatch(r"(crf|argmax)_alpha([\d.]+)(?:_t(\d+))?", name)
        if not found:
            assert name in ("image", "cams"), f"unknown output {name}"
            continue
        kind, alpha, steps = found.groups()
        iterations = int(steps or numbers[0])
        if iterations not in refine:
            refine[iterations] = DenseCRF(case.input("image"), CRFSettings(iterations, *map(float, numbers[1:])))
        posterior = refine[iterations](np.concatenate([background ** float(alpha), cams]))
        if kind == "crf":
            case.check(name, posterior)
        else:
            _check_argmax(case, name, posterior)


def check_crf_deeplabv2(case: Any) -> None:
    """Posteriors of given probabilities with the kernels that each output names."""
    scale = re.fullmatch(r"softmax over channels of (.+)", case.meta["input"]["prob"])[1]
    scores = case.evaluate(scale)[0].softmax(dim=0).numpy()  # (n, H, W)
    order = ("iter_max", "pos_xy_std", "pos_w", "bi_xy_std", "bi_rgb_std", "bi_w")
    for name, described in case.meta["outputs"].items():
        if not name.startswith("crf_"):
            continue
        kernels = ast.literal_eval(described["meaning"])
        posterior = DenseCRF(case.input("image"), CRFSettings(*(kernels[key] for key in order)))(scores)
        case.check(name, posterior)
        _check_argmax(case, name.replace("crf_", "pred_", 1), posterior)
