"""Every golden case against its checker: the function ``check_PREFIX`` of tests/golden_checks whose PREFIX is the
longest that the case's name starts with. A case without a checker fails."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from golden_case import Case

SLOW = """
aream_conformer_forward aream_infer_conformer aream_infer_mct aream_mct_forward aream_msf_cam_conformer
aream_msf_cam_mct aream_train_step_conformer aream_train_step_mct caae_forward clipes_gradcam clipes_text_features
clipes_vitb16_forward conformer_forward crt_cnn_forward crt_deit_forward crt_make_cam_end_to_end crt_wsol_forward
deeplabv1_largefov deeplabv1_seam deeplabv1_seam_train deeplabv2_loss deeplabv2_msc deeplabv3plus_forward
deeplabv3plus_train getam_forward_deit_distilled getam_forward_vitb_hybrid getam_label_pipeline
getam_map_deit_distilled irn_aff_displacement_loss irn_cam_net irn_edge_displacement irn_sem_seg mctformer_cam_merge
mctformer_deit_load mctformer_plus_cam_merge mctformer_plus_deit_load mctformer_plus_forward mctformer_v1_forward
mctformer_v2_forward more_forward more_lam_merge more_test_merge more_train_step psa_aff_forward psa_aff_vgg16
psa_cls_resnet38 psa_cls_vgg16 psa_random_walk puzzlecam_resnest_stages seam_aff_small seam_infer seam_net
seam_random_walk_crf seam_train_step semformer_affinitynet semformer_cam_merge semformer_edge_inference
semformer_forward_train toco_forward toco_train_step transcam_deeplab_train transcam_forward transcam_train_loss
tscam_forward
""".split()
"""Cases of about a second or more on one thread."""

ZERO = {
    ("aream_aff_loss", "all_ignored"): "the loss of a label without a pair is zero",
    ("caffemodel_parse", "*.num_batches_tracked"): "a count that no Caffe file holds starts at zero",
    ("more_losses", "seg_none"): "a label without a known pixel has no loss",
    ("more_train_step", "grad0.decoder.*"): "before its terms begin the decoder's gradient is zero, not missing",
    ("semformer_activation_losses", "act_cplt_single"): "an image of the background has nothing to complement",
}
"""Outputs that are zero, which neither zeros nor the negative can be told from: (checker, names), and the reason."""


def checkers() -> dict[str, Callable[[Case], None]]:
    found: dict[str, Callable[[Case], None]] = {}
    here = Path(__file__).parent / "golden_checks"
    for module in pkgutil.iter_modules([str(here)]):
        for name, value in vars(importlib.import_module(f"golden_checks.{module.name}")).items():
            if name.startswith("check_"):
                prefix = name.removeprefix("check_")
                assert found.setdefault(prefix, value) is value, f"two checkers {name}"
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_path" in metafunc.fixturenames:
        paths = sorted(metafunc.config.getoption("golden").glob("*.json"))
        assert paths, "no golden cases"
        marks = [[pytest.mark.slow] if p.stem in SLOW else [] for p in paths]
        metafunc.parametrize(
            "case_path", [pytest.param(p, marks=m, id=p.stem) for p, m in zip(paths, marks, strict=True)]
        )


def checker(name: str) -> str:
    """The prefix whose checker a case has."""
    fitting = [prefix for prefix in checkers() if name.startswith(prefix)]
    assert fitting, f"{name} has no checker"
    return max(fitting, key=len)


def problems(case: Case, prefix: str) -> list[str]:
    """What a case's checker, which has run, cannot see."""
    found = [f"{name} is never compared" for name in case.untouched()]
    zero = [pattern for owner, pattern in ZERO if owner == prefix]
    for comparison in case.compared:
        blind = comparison.blind_to()
        if any(fnmatchcase(comparison.name, pattern) for pattern in zero):
            found += [] if not comparison.expected.any() else [f"{comparison.name} is listed as zero but is not"]
        elif blind:
            found.append(f"{comparison.name} passes with {', '.join(blind)}: {comparison.allowed}")
    return found


def test_golden(case_path: Path) -> None:
    case, prefix = Case(case_path), checker(case_path.stem)
    checkers()[prefix](case)
    assert not problems(case, prefix)
