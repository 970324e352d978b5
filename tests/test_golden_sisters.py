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


FAMILIES: list[Callable[[], tuple[Meta, dict[str, np.ndarray]]]] = [
    aream_entropy, crt_losses, tscam_forward, mctformer_cam_merge,
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
