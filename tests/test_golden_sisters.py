"""Further cases of a family: a checker takes names, sizes, labels and settings from the case, not from our own one.

The expected arrays of such a case are what the checker itself computes for it, once; so a size that a checker does not
read fails, and a name that it does not read shows in outputs that stay the same when the name changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_case import GOLDEN, Case, array, load_fill
from test_golden import checker, checkers, problems

from net.backbone.vit import ViTOptions
from net.seed.mctformer import MCTformerOptions
from net.seed.tscam import TsCamOptions

Meta = dict[str, Any]
FILL = load_fill(GOLDEN)


class Recorder(Case):
    """A case whose outputs are not there yet: it keeps what the checker computes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.recorded: dict[str, np.ndarray] = {}

    @property
    def names(self) -> list[str]:
        return [*super().names, *self.meta["outputs"]]

    def stored(self, name: str) -> np.ndarray:
        """Of an output that is not there yet, its shape."""
        shape = self.meta["outputs"].get(name, {}).get("shape")
        return super().stored(name) if name in super().names else np.zeros(shape)

    def check(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        self.recorded[name] = self.sample(name, value)

    def compare(self, name: str, value: Any, expected: Any = None, **options: Any) -> None:
        self.recorded[name] = array(value)


def make_sister(folder: Path, name: str, meta: Meta, inputs: dict[str, np.ndarray]) -> Case:
    """Lay a case into a folder, with the outputs that its checker computes."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(meta))
    np.savez(path.with_suffix(".npz"), **inputs)
    recorder = Recorder(path)
    checkers()[checker(name)](recorder)
    assert recorder.recorded.keys() == meta["outputs"].keys()
    np.savez(path.with_suffix(".npz"), **inputs, **recorder.recorded)
    return Case(path)


def original(name: str) -> tuple[Meta, dict[str, np.ndarray]]:
    """JSON and inputs of one of our cases."""
    case = Case(GOLDEN / f"{name}.json")
    return case.meta, {key: case.stored(key) for key in case.names if key not in case.meta["outputs"]}


def aream_entropy() -> tuple[Meta, dict[str, np.ndarray]]:
    """Four layers, two heads, seven classes, another grid."""
    meta, inputs = original("aream_entropy")
    given = meta["input"]
    given |= {"grid": [3, 4], "images": [{"present_classes": [1, 5]}, {"present_classes": [0, 6]}]}
    given["att"] = given["att"].replace("linspace(1, 6, 12)", "linspace(1, 4, 4)")
    given["att"] = given["att"].replace("(12,1,6,T,T)", "(4,1,2,T,T)")
    given["cam"] = given["cam"].replace("(1,20,h,w)", "(1,7,h,w)")
    return meta, inputs


def crt_losses() -> tuple[Meta, dict[str, np.ndarray]]:
    """Five classes, another size and weight."""
    meta, _ = original("crt_losses")
    meta["input"] = {"labels": [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]], "cam_lambda": 0.3, "upsampled_size": 96}
    draw = np.random.default_rng(0).standard_normal
    return meta, {name: draw((2, 5, 6, 6)).astype(np.float32) for name in ("cam_cnn", "cam_transformer")}


SMALL = ViTOptions(image_size=64, width=24, depth=2, heads=3, mlp_ratio=2.0, drop_path=0.0)


def tscam_forward() -> tuple[Meta, dict[str, np.ndarray]]:
    """A small DeiT, thirty classes."""
    meta, inputs = original("tscam_forward")
    meta["constructor"] = "30 classes, 3 heads"
    meta["keys"] = FILL.keys_of(TsCamOptions(deit=SMALL).build(30, {}))
    meta["input"] = {"image": {"name": "sister/image", "shape": [3, 3, 64, 64]}, "targets": [6, 29, 0]}
    return meta, inputs


def mctformer_cam_merge() -> tuple[Meta, dict[str, np.ndarray]]:
    """A small transformer, four classes, one image, one alpha."""
    meta, inputs = original("mctformer_cam_merge")
    meta["constructor"] = "MCTformer-V2, 3 heads"
    meta["keys"] = FILL.keys_of(MCTformerOptions("v2", SMALL).build(4, {}))
    meta["input"] |= {"scales": [1.0, 1.5], "class_to_patch_layers": "last 1"}
    meta["input"]["images"] = [{"image": "in_image0", "present_classes": [0, 3]}]
    meta["outputs"] = {name: meta["outputs"][name] for name in ("cam0", "crf0_alpha12", "crflabel0_alpha12")}
    return meta, {"in_image0": inputs["in_image0"]}


def aream_schedule() -> tuple[Meta, dict[str, np.ndarray]]:
    """Other rates, epochs and steps."""
    meta, inputs = original("aream_schedule")
    outputs = meta["outputs"]
    for name, changes in (
        ("mct_lr_per_epoch_f64", {"0..59": "0..29", "6.25e-5": "2e-4"}),
        ("conformer_lr_per_step_f64", {"0..239": "0..29", "5e-5": "3e-4", "1e-6": "2e-6", "12 epochs": "6 epochs",
                                       "20 steps, 1 warm": "5 steps, 2 warm"}),
    ):  # fmt: skip
        for old, new in changes.items():
            assert old in outputs[name]["meaning"]
            outputs[name]["meaning"] = outputs[name]["meaning"].replace(old, new)
    return meta, inputs


def aream_pseudo_label() -> tuple[Meta, dict[str, np.ndarray]]:
    """One small image of class 27, other scores, no ignored pixel at the border."""
    meta, _ = original("aream_pseudo_label")
    meta["input"] |= {"labels": [[3, 27]], "thresholds": [0.3, 0.6]}
    meta["input"]["image"] |= {"name": "sister.image", "shape": [1, 3, 48, 64]}
    return meta, {"in_cam0": np.random.default_rng(0).random((2, 48, 64)).astype(np.float32)}


def par_refine() -> tuple[Meta, dict[str, np.ndarray]]:
    """Other dilations and weights, another size."""
    meta, _ = original("par_refine")
    meta["constructor"] = "w1 = 0.5, w2 = 0.2; no parameters"
    meta["input"]["image"] |= {"name": "sister.image", "shape": [1, 3, 20, 28]}
    meta["outputs"]["refined"]["meaning"] = "after 4 iterations with dilations 1,3"
    return meta, {"in_mask": np.random.default_rng(0).random((1, 2, 20, 28)).astype(np.float32)}


def getam_pamr() -> tuple[Meta, dict[str, np.ndarray]]:
    """Other dilations and iterations, another size and stride of the stored weights."""
    meta, _ = original("getam_pamr")
    meta["description"] = "PAMR refinement, dilations 1,3, with 2 and 4 iterations"
    for name in ("image", "maps"):
        del meta["outputs"][name]
    meta["outputs"]["affinity"]["meaning"] = "sampled [..., ::3, ::3]"
    draw = np.random.default_rng(0)
    image = draw.integers(0, 255, (1, 3, 20, 28)).astype(np.uint8)
    return meta, {"image": image, "maps": draw.random((1, 3, 10, 14)).astype(np.float32)}


def getam_losses() -> tuple[Meta, dict[str, np.ndarray]]:
    """Five classes, another size."""
    meta, _ = original("getam_losses")
    meta["input"]["seg_logits"] = "2*fill.image('sister',4,3,24,20).reshape(2,6,24,20)"
    draw, size = np.random.default_rng(0), (2, 24, 20)
    inputs = {
        "seg_label": draw.choice([0, 1, 2, 5, 255], size).astype(np.uint8),
        "image": draw.integers(0, 255, (2, 3, 24, 20)).astype(np.uint8),
        "roi": np.ones(size, np.uint8), "saliency": draw.choice([0, 128, 255], size).astype(np.uint8),
        "cls_logits": draw.standard_normal((2, 5)).astype(np.float32),
        "labels": np.array([[1, 0, 0, 0, 1], [0, 1, 0, 0, 0]], np.float32),
    }  # fmt: skip
    meta["outputs"] = {name: output for name, output in meta["outputs"].items() if name not in inputs}
    shapes = {
        "gate": (2, 12, 10), "grad_dense_seg": (2, 3, 8, 7), "grad_total_seg": (2, 3, 8, 7),
        **dict.fromkeys(("grad_dense_exact_scaled", "filtered_lattice", "filtered_exact"), (2, 2, 6, 5)),
    }  # fmt: skip
    for name, shape in shapes.items():
        meta["outputs"][name]["shape"] = shape
    return meta, inputs


def getam_test_merge() -> tuple[Meta, dict[str, np.ndarray]]:
    """Four labels, two sizes, another CRF."""
    meta, _ = original("getam_test_merge")
    meta["input"]["logits"] = "3*fill.image('sister_'+str(s),2,2,s,s)[:, :2].reshape(1,4,s,s) for s in 16,24"
    meta["crf"] = "unary -log p; Gaussian sxy 2 compat 1; bilateral sxy 30 srgb 10 compat 3; 5 iterations"
    del meta["outputs"]["image"]
    meta["outputs"]["prob"] |= {"meaning": "softmax", "shape": [4, 30, 40]}
    image = np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    return meta, {"image": image}


def semformer_random_walk() -> tuple[Meta, dict[str, np.ndarray]]:
    """Another radius, exponent, number of squarings and size."""
    meta, _ = original("semformer_random_walk")
    meta["description"] = "Random walk on edges: radius 3, beta 6, 4 squarings, then upsampling and normalisation"
    meta["input"]["image size"] = [46, 62]
    for name in ("cam", "edge"):
        del meta["outputs"][name]
    draw = np.random.default_rng(0)
    return meta, {name: draw.random((count, 12, 16)).astype(np.float32) for name, count in (("cam", 2), ("edge", 1))}


def irn_make_cam() -> tuple[Meta, dict[str, np.ndarray]]:
    """Five classes, two scales, strides 8 and 2."""
    meta, _ = original("irn_make_cam")
    meta = json.loads(json.dumps(meta).replace("/16)", "/8)").replace("ceil(h/4)", "ceil(h/2)"))
    meta["description"] = meta["description"].replace("multiple of 16", "multiple of 8")
    meta["input"] = {"image_size": [45, 61], "scales": [1.0, 2.0], "label_indices (0-based foreground classes)": [1, 4]}
    meta["outputs"]["keys"] = {}
    draw = np.random.default_rng(0)
    maps = [draw.random((5, height, width)).astype(np.float32) for height, width in ((6, 8), (12, 16))]
    return meta, {f"cam_scale{number}": array for number, array in enumerate(maps)}


def irn_poly_optimizer() -> tuple[Meta, dict[str, np.ndarray]]:
    """Another rate, decay, momentum and length."""
    meta, inputs = original("irn_poly_optimizer")
    meta["input"]["constructor"] = "lr=0.05, weight_decay=1e-3, max_step=4, momentum (power) 0.9"
    meta["effective_momentum"] = [0.5, 0.5]
    for name in ("w", "v", "lr"):
        meta["outputs"][name]["shape"][0] = 5
    return meta, inputs


def wsol_cub_sample() -> tuple[Meta, dict[str, np.ndarray]]:
    """Another side and schedule."""
    meta, inputs = original("wsol_cub_sample")
    meta["description"] = meta["description"].replace("224x224", "160x160").replace("LR_STEPS [30]", "LR_STEPS [4]")
    meta["outputs"]["lr_per_epoch"]["shape"] = [9]
    return meta, inputs


def wsol_boxes() -> tuple[Meta, dict[str, np.ndarray]]:
    """Two other sizes, another stride of what is stored."""
    meta, inputs = original("wsol_boxes")
    meta["input"] = {"sizes": [96, 160], "thresholds": [0.2, 0.5]}
    meta["outputs"]["resized"]["meaning"] = "sampled [:, ::5, ::6]"
    return meta, {"maps": inputs["maps"][:3]}


def wsol_maxboxacc() -> tuple[Meta, dict[str, np.ndarray]]:
    """Another side, other thresholds, another stride."""
    meta, inputs = original("wsol_maxboxacc")
    meta["input"]["scoremaps"] = meta["input"]["scoremaps"].replace("224x224", "160x160")
    meta["input"]["thresholds"] = "np.arange(0,1,0.1)"
    meta["outputs"]["scoremap"]["meaning"] = "sampled [:, ::7, ::8]"
    return meta, inputs


def wsol_pxap() -> tuple[Meta, dict[str, np.ndarray]]:
    """Another side, other thresholds, another stride and tolerance."""
    meta, inputs = original("wsol_pxap")
    meta["input"]["scoremaps"] = meta["input"]["scoremaps"].replace("224x224", "160x160")
    meta["input"]["thresholds"] = "np.arange(0,1,0.1)"
    meta["outputs"]["gt_mask"]["meaning"] = "sampled [:, ::3, ::5]"
    meta["tolerance"]["hist"] = "each bin within 2 counts"
    return meta, inputs


FAMILIES: list[Callable[[], tuple[Meta, dict[str, np.ndarray]]]] = [
    aream_entropy, aream_pseudo_label, aream_schedule, crt_losses, getam_losses, getam_pamr, getam_test_merge,
    irn_make_cam, irn_poly_optimizer, mctformer_cam_merge, par_refine, semformer_random_walk, tscam_forward, wsol_boxes,
    wsol_cub_sample, wsol_maxboxacc, wsol_pxap,
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_checker_takes_everything_from_its_case(
    tmp_path: Path, family: Callable[[], tuple[Meta, dict[str, np.ndarray]]]
) -> None:
    name = f"{family.__name__}_b"
    case = make_sister(tmp_path, name, *family())
    checkers()[checker(name)](case)
    assert not problems(case, checker(name))
    for output in case.meta["outputs"]:  # a wrong expected array is found
        wrong = {key: -case.stored(key) if key == output else case.stored(key) for key in case.names}
        np.savez(case.path.with_suffix(".npz"), **{key: value.astype(np.float64) if key == output else value
                                                   for key, value in wrong.items()})  # fmt: skip
        with pytest.raises(AssertionError):
            checkers()[checker(name)](Case(case.path))


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [(aream_entropy, "aream_entropy.KIND", "sister.KIND"), (tscam_forward, "sister/image", "another/image")],
)
def test_a_checker_takes_the_names_of_its_inputs_from_its_case(
    tmp_path: Path, family: Callable[[], tuple[Meta, dict[str, np.ndarray]]], old: str, new: str
) -> None:
    meta, inputs = family()
    one = make_sister(tmp_path, f"{family.__name__}_b", meta, inputs)
    renamed = json.loads(json.dumps(meta).replace(old, new))
    two = make_sister(tmp_path, f"{family.__name__}_c", renamed, inputs)
    for output in meta["outputs"]:
        assert not np.allclose(one.stored(output), two.stored(output), rtol=1e-3), output


def test_what_a_checker_does_not_compare_is_found(tmp_path: Path) -> None:
    meta, inputs = crt_losses()
    case = make_sister(tmp_path, "crt_losses_b", meta, inputs)
    np.savez(case.path.with_suffix(".npz"), forgotten=np.ones(3), **{key: case.stored(key) for key in case.names})
    again = Case(case.path)
    checkers()["crt_losses"](again)
    assert problems(again, "crt_losses") == ["forgotten is never compared"]
    again.compare("forgotten", np.full(3, 0.5), absolute=1.0)
    (found,) = problems(again, "crt_losses")
    assert found.startswith("forgotten passes with zeros computed, zeros expected")
