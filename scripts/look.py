"""One image through all steps of a run, as one PNG: ``python scripts/look.py IMAGE --run RUN``.

IMAGE is an id of the run's data set, or a file. Its CAMs, affinity label, pseudo mask and prediction are made anew by
the run's networks, so it may be a photograph that the run has never seen; steps that the run has not made are left out.
Tags are those of the data set, or --tags, or else the classes that the segmentation network finds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if not __package__:
    import as_file  # noqa: F401

import numpy as np
import torch
import tyro

from misc import commandline, distributed
from misc.files import store
from misc.files.images import png_bytes, read_image, read_mask
from misc.files.runfolder import RunFolder
from misc.image import draw
from misc.image.cam import Cam
from misc.image.picture import Picture
from misc.score.metrics import mask_at
from net.contract import AffinityNetwork
from step import plan
from step.lib.config import Job, open_job, recorded_config
from step.lib.inference import infer_class_scores, predict_cam, pseudo_mask, settle_walk, walk_cam
from step.lib.networks import load_cam_network, load_refiner, load_segmentation_network
from step.lib.report.judge import RunImages
from step.lib.sizes import make_copies
from step.lib.tagged_images import split_tags
from voc12.tags import DataError

LEAST_SHARE = 0.005
"""Share of the pixels of a prediction from which a class counts as found, where there are no tags."""

Panels = list[tuple[str, np.ndarray, draw.Legend]]
"""Captions, pictures (H, W, 3) uint8, and the entries of their legends."""
_LETTERS = 15


def find_image(job: Job, name: str) -> tuple[str | None, Path]:
    """Id (None for a file outside the data set) and file of an image, of a large one the run's copy. Raises
    FileNotFoundError."""
    path, image_id = Path(name), name if name in job.catalog.images else None
    if image_id is None and not path.is_file():
        raise FileNotFoundError(f"{name} is neither a file nor an image of {job.catalog.root}.")
    if image_id is None and path.stem in job.catalog.images:
        files = ((i, job.large[i][0] if i in job.large else job.catalog.image_path(i)) for i in job.catalog.images)
        image_id = next((i for i, file in files if file.is_file() and file.samefile(path)), None)
    if image_id is None:
        return None, path
    make_copies(job, [image_id])
    return image_id, job.catalog.image_path(image_id)


def find_tags(job: Job, image_id: str | None, tags: str | None, mask: np.ndarray | None) -> tuple[np.ndarray, str]:
    """(C,) float32 tags of the image, and where they come from. Raises ValueError for unknown ones, and if there are
    none and no ``mask`` (H, W) of a prediction to take them from."""
    classes = job.catalog.classes
    if tags is not None:
        names = split_tags(tags, classes)
        if unknown := [name for name in names if name not in classes]:
            raise ValueError(f"--tags: there is no class {', '.join(unknown)}. There are: {', '.join(classes)}.")
        return np.array([name in names for name in classes], np.float32), "tags as given"
    if image_id is not None:
        try:
            return job.catalog.tags(image_id), "tags of the data set"
        except DataError:
            pass
    if mask is None:
        raise ValueError("The image has no tags, and the run no segmentation network to find any: give --tags A,B.")
    shares = np.array([(mask == c + 1).mean() for c in range(len(classes))])
    return (shares >= LEAST_SHARE).astype(np.float32), "no tags: the classes of the prediction"


def predict_masks(job: Job, image: np.ndarray, device: torch.device) -> dict[str, np.ndarray]:
    """The masks (H, W) of the segmentation network by caption, before and after the CRF; none before it is trained."""
    if not job.run.weights("cam" if job.single_stage else "seg").exists():
        return {}
    network = load_segmentation_network(job, device)
    machine = job.machine(job.cfg.cam if job.single_stage else job.cfg.seg, device)
    before, after = infer_class_scores(network, image, job.cfg.seg.infer, machine, device)
    masks = {"prediction": after.argmax(0).astype(np.uint8)}
    if job.cfg.seg.infer.crf.iterations:
        masks = {"prediction before the CRF": before.argmax(0).astype(np.uint8), **masks}
    return masks


def refine_cam(job: Job, image: np.ndarray, cam: Cam, device: torch.device) -> dict[str, np.ndarray]:
    """Affinity label and pseudo mask (H, W) by caption, as far as the run has the refiner."""
    if job.single_stage or (job.refine_method().is_trained and not job.run.weights("aff").exists()):
        return {}
    refiner, made = load_refiner(job, device), {}
    if isinstance(refiner, AffinityNetwork):
        made["affinity label"] = refiner.make_label(image, cam, job.cfg.aff.label)[0]  # type: ignore[attr-defined]
    picture, walk = Picture.of_rgb(image, refiner.normalisation), settle_walk(job.cfg.aff.walk, job.run)
    scores, _ = walk_cam(refiner, picture, cam, walk, job.machine(job.cfg.aff, device), device)
    return {**made, "pseudo mask": pseudo_mask(scores, cam.keys, job.cfg.aff.ignore_below)}


def show_steps(job: Job, image_id: str | None, image: np.ndarray, tags: str | None, device: torch.device) -> Panels:
    """The pictures of an image (H, W, 3) uint8 in the order of the steps."""
    classes, predicted = job.catalog.classes, predict_masks(job, image, device)
    present, source = find_tags(job, image_id, tags, predicted.get("prediction"))
    network = load_cam_network(job, device)
    cam = predict_cam(network, image, present, job.cfg.cam.infer, job.machine(job.cfg.cam, device), device)
    cam = Cam.of_maps(cam.keys, cam.full_maps().clip(0, 1), cam.coarse)
    panels: Panels = [(f"image ({source})", image, [])]
    panels += [(f"CAM: {classes[k]}", draw.heat(image, score), []) for k, score in zip(cam.keys, cam.maps, strict=True)]
    threshold = RunImages.of(job.catalog, job.run).threshold
    masks = {f"CAM above {threshold:.2f}": mask_at((cam.keys, cam.maps), threshold)}
    if len(cam.keys):
        masks |= refine_cam(job, image, cam, device)
    masks |= predicted
    truth = job.catalog.mask_path(image_id) if image_id is not None else None
    if truth is not None:
        masks["truth"] = read_mask(truth)
    panels += [(c, draw.overlay(image, mask), draw.legend_entries(mask, classes)) for c, mask in masks.items()]
    if truth is not None and len(masks) > 1:
        caption, last = list(masks.items())[-2]
        wrong = draw.lay_over(image, draw.mistake_layer(last, masks["truth"]))
        panels.append((f"mistakes of the {caption}", wrong, draw.mistake_entries()))
    return panels


def look_arguments(
    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    run: Path,
    out: Path | None = None,
    tags: str | None = None,
    root: Path | None = None,
    columns: int = 4,
    height: int = 260,
    device: str = "auto",
) -> tuple[str, Path, Path | None, str | None, Path | None, int, int, str]:
    """Show one image through all steps of a run, as one PNG.

    Args:
        image: Id of an image of the run's data set, or an image file.
        run: Run folder.
        out: Path of the picture. Default: look_ID.png.
        tags: Classes in the image, separated by commas, or by semicolons where names hold commas. Default: those of the
            data set, else those that the segmentation network finds.
        root: Folder of the data set, if it is no longer where it was.
        columns: Pictures in a row.
        height: Height of each picture. Pixels.
        device: auto, cpu or cuda.
    """
    return image, run, out, tags, root, columns, height, device


def main(argv: Sequence[str]) -> int:
    """Command line. Returns the exit status."""
    return commandline.command(lambda: look_at(argv), plan.PROBLEMS)


def look_at(argv: Sequence[str]) -> None:
    """Write the picture of an image in all steps."""
    name, run, out, tags, root, columns, height, device = commandline.parse_options(
        look_arguments, argv, prog="python scripts/look.py", description=__doc__
    )
    try:
        job = open_job(recorded_config(RunFolder(run), root))
        image_id, path = find_image(job, name)
        image = read_image(path)
        panels = show_steps(job, image_id, image, tags, distributed.start(device))
        cells = [draw.append_legend(draw.titled(p, caption, height), names, _LETTERS) for caption, p, names in panels]
        target = out or Path(f"look_{Path(name).stem}.png")
        store.write_bytes(target, png_bytes(draw.framed(cells, columns)))
    finally:
        distributed.stop()
    print(f"picture: {target}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
