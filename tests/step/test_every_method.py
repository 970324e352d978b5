"""Every method through every step, on a user's own folder and on COCO's layout, as its sample recipe has it."""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest
from layouts import as_coco, as_folder
from running import make_set

import run_sample
from misc.files.camfiles import read_cam
from misc.files.images import read_image, read_mask
from net import registry
from net.names import OWN
from step.lib.config import default_config
from voc12.catalog import open_catalog
from voc12.prepare.__main__ import main as prepare

registry.load_methods()


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One set of two classes in three layouts."""
    room = tmp_path_factory.mktemp("layouts")
    voc = make_set(room / "voc12", images=6, val=2)
    as_folder(voc, room / "folder")
    as_coco(voc, room / "coco14")
    assert prepare(["coco14", "--root", str(room / "coco14"), "--workers", "0"]) == 0
    return {data: room / data for data in ("voc12", "folder", "coco14")}


def short(method: str) -> list[str]:
    """Flags that leave of a sample recipe two updates a training, one scale and no CRF, and that make masks of maps
    which have learnt nothing: any score beats a background of 0."""
    cfg = default_config(method, "sample")
    trained = ["cam" if name == "cam" else f"cam.{name}" for name, phase in cfg.cam.phases() if phase.fit.steps != 0]
    flags = {"machine.workers": "0", "machine.device": "cpu", "cam.infer.scales": str(cfg.cam.infer.scales[0])}
    refined = registry.REFINERS[cfg.refiner].is_trained
    parts = [*trained, *(["aff"] if refined else []), *([] if cfg.segmenter == OWN else ["seg"])]
    for part in parts:
        flags |= {f"{part}.fit.steps": "2", f"{part}.fit.batch-size": "3"}
    flags |= {"aff.walk.crf.iterations": "0", "aff.walk.threshold": "0"}
    flags |= {"aff.label.crf.iterations": "0"} if refined else {}
    if hasattr(cfg.aff.walk, "background"):
        flags["aff.walk.background"] = "constant"
    flags |= {"seg.infer.crf.iterations": "0", "seg.infer.scales": str(cfg.seg.infer.scales[0])}
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["folder", "coco14"])
@pytest.mark.parametrize("method", sorted(registry.SEEDS))
def test_every_step_of_every_method(method: str, data: str, roots: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    wanted = any(phase.network.wants_saliency for _, phase in default_config(method, "sample").cam.phases())
    saliency = ["--saliency", str(roots["voc12"] / "Saliency")] if wanted else []
    flags = ["--preset", "sample", "--data", data, "--root", str(roots[data]), "--out", str(out)]
    flags += [*short(method), *saliency]
    assert run_sample.main([method, *flags]) == 0
    catalog = open_catalog(data, roots[data])
    for image_id in catalog.ids("train"):
        cam = read_cam(out / "cam" / f"{image_id}.npz")
        assert cam.keys.tolist() == np.flatnonzero(catalog.tags(image_id)).tolist()
    folders = {"seg": catalog.ids("val")}
    if default_config(method, "sample").segmenter != OWN:
        folders["label"] = catalog.ids("train")
    for folder, ids in folders.items():
        for image_id in ids:
            mask = read_mask(out / folder / f"{image_id}.png")
            assert mask.shape == read_image(catalog.image_path(image_id)).shape[:2] and mask.max() <= 2
    assert (out / "report.html").exists()
    if data == "folder" and sys.platform == "linux":
        again_in_processes(method, flags, out, catalog.ids("train"))


def again_in_processes(method: str, flags: list[str], out: Path, ids: list[str]) -> None:
    """The per-image steps by forked processes: the same files."""
    before = {image_id: read_cam(out / "cam" / f"{image_id}.npz") for image_id in ids}
    masks = {path: path.read_bytes() for folder in ("label", "seg") for path in sorted((out / folder).glob("*.png"))}
    rmtree(out / "cam")
    for path in masks:
        path.unlink()
    steps = ["make_cam", *(["random_walk"] if (out / "label").exists() else []), "infer_seg"]
    assert run_sample.main([method, *flags, "--machine.workers", "2", "--steps", *steps]) == 0
    for image_id, was in before.items():
        np.testing.assert_allclose(read_cam(out / "cam" / f"{image_id}.npz").maps, was.maps, atol=1e-6)
    assert all(path.read_bytes() == content for path, content in masks.items())
