"""Adding a method is one new file: tests/a_method.py, put beside the others, runs through all steps with no other
change; a file that does not import is named, and the others still run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import ROOM, make_set, start

PRODUCT = ("misc", "net", "step", "voc12", "scripts", "run_sample.py", "evaluation.py", "predict.py")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the product with the new method, a file that does not import and one without recipes."""
    root = tmp_path_factory.mktemp("copy")
    for name in PRODUCT:
        source = ROOM / name
        shutil.copytree(source, root / name) if source.is_dir() else shutil.copy(source, root / name)
    shutil.copy(ROOM / "tests" / "a_method.py", root / "net" / "seed" / "three_layers.py")
    (root / "net" / "seed" / "broken.py").write_text('"""A method under way."""\n\nfrom net.contract import Nothing\n')
    method = (ROOM / "tests" / "a_method.py").read_text()
    without_recipes = method[: method.index("ThreeLayers.recipes")].replace("three_layers", "unfinished")
    (root / "net" / "seed" / "unfinished.py").write_text(without_recipes)
    make_set(root / "set", images=6, val=2)
    return root


FLAGS = """
--machine.workers 0 --machine.device cpu --cam.fit.steps 2 --aff.fit.steps 2 --aff.fit.batch-size 2
--aff.label.crf.iterations 0 --aff.walk.threshold 0 --aff.walk.background constant --seg.fit.steps 2
--seg.fit.batch-size 2 --seg.infer.scales 1.0 --seg.infer.crf.iterations 0 --aff.weights none --seg.weights none
""".split()


def run(copy: Path, *words: str) -> tuple[int, str]:
    """Exit status of the copy's driver, and its output."""
    code = f"import sys; sys.path[0] = {str(copy)!r}; import run_sample; sys.exit(run_sample.main(sys.argv[1:]))"
    done = start(["-c", code, *words], PYTHONPATH=str(copy))
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_new_file_runs_through_all_steps_and_a_broken_one_is_named(copy: Path) -> None:
    status, said = run(copy, "three_layers", "--root", str(copy / "set"), "--out", str(copy / "run"), *FLAGS)
    assert status == 0, said
    assert "net/seed/broken.py is left out because it does not import: ImportError: cannot import name" in said
    assert "ThreeLayers.recipes has no recipe" in said
    assert len(list((copy / "run" / "seg").glob("*.png"))) >= 2 and (copy / "run" / "report.html").exists()
    status, said = run(copy, "broken", "--root", str(copy / "set"), "--out", str(copy / "broken"))
    assert status == 2 and "net/seed/broken.py does not import: ImportError" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_mistake_is_reported_before_any_work_starts(copy: Path) -> None:
    file = copy / "net" / "seed" / "three_layers.py"
    whole = file.read_text()
    file.write_text(whole.replace('self.body(batch["image"])', 'self.body(batch["images"])'))
    try:
        status, said = run(copy, "three_layers", "--root", str(copy / "set"), "--out", str(copy / "slip"), *FLAGS)
    finally:
        file.write_text(whole)
    told = "net/seed/three_layers.py: ThreeLayers: a training step on two images of 64 x 64 pixels fails with KeyError"
    assert status == 2 and told in said and "Traceback" not in said
    assert not (copy / "slip" / "weights").exists()
