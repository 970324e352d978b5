"""Scores masks (png) or class maps (npz, npy) against ground-truth masks: IoU per class, mIoU, threshold curve.

Masks: python evaluation.py --list val.txt --predict-dir runs/x/seg --gt-dir SegmentationClass --num-classes 21

Maps: the same with --type npz, and --threshold 0.26 (a given background score) or --curve (the best of many).

Every image of the list must have a prediction of the right size with known values; otherwise nothing is scored and the
exit status is 1. Pixels with 255 in the ground truth are ignored. Option names accept - and _.
"""

from __future__ import annotations

# ruff: noqa: E402
import os
import sys
from pathlib import Path

from misc import commandline

commandline.begin(__name__)
_USAGE = "--list FILE --predict-dir DIR --gt-dir DIR --num-classes N [options]"
if __name__ == "__main__" and (done := commandline.answer_early(Path(__file__), sys.argv[1:], _USAGE)) is not None:
    sys.exit(done)  # before PyTorch is imported, which takes seconds

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from misc.files.atomic import remove_leftovers
from misc.files.camfiles import read_cam
from misc.files.ids import IdReader, file_of_id, read_ids
from misc.files.images import read_mask
from misc.files.store import read_text, write_json
from misc.loop.each import WorkerDied
from misc.loop.pool import WorkerKilled
from misc.score.evaluate import EvaluationError, Scores, evaluate_cams, evaluate_masks
from misc.score.metrics import Convention, Maps
from misc.tables import ResultTable


@dataclass(frozen=True)
class EvaluationOptions:
    """Options: predictions, ground truth, and how to score."""

    list_file: Annotated[Path, tyro.conf.arg(name="list")]
    """Text file of the images to score, one per line: an id (sub-folders and blanks are part of it), or the path of its
    image."""
    predict_dir: Path
    """Folder with one prediction per image: ID.png, ID.npz or ID.npy."""
    gt_dir: Path
    """Folder with the ground-truth masks ID.png (palette or grey; 255: ignored)."""
    num_classes: int
    """Number of classes INCLUDING the background, as is usual: 21 for VOC, 81 for COCO."""
    type: Literal["png", "npz", "npy"] = "png"
    """What the predictions are. png: masks. npz: maps of this project. npy: pickled dicts of maps, as other WSSS
    repositories write them (read safely, without running code)."""
    threshold: float | None = None
    """Fixed background score for maps: a pixel is background unless a map is above it."""
    curve: bool = False
    """Try many background scores and report the best one, marked as "searched" on the ground truth of these images."""
    start: float = 0.0
    """First background score of the curve."""
    end: float = 0.59
    """Last background score of the curve."""
    step: float = 0.01
    """Step between the background scores of the curve."""
    erosion: int = 0
    """For maps: erode every region of the mask, background included, by a square of this odd side before scoring; the
    remaining pixels become background. 0: no erosion. Published scores of SemFormer's CAMs: 7; all others: 0."""
    convention: Convention = "counting"
    """Classes in the mean: all, absent ones as 0 (counting); those in truth or prediction (nanmean); or those in the
    truth."""
    boundary: bool = True
    """Also compute the boundary IoU (within 2 % of the image diagonal). With --curve this takes a second pass over the
    files."""
    missing_as_background: bool = False
    """Count an image without a prediction as all background, and report the number of such images."""
    split: str | None = None
    """Name of the set of images in the report, such as train or val. Default: the list's file name."""
    classes: Path | None = None
    """Text file of class names, one per line, with or without the background as the first."""
    json: Path | None = None
    """Also write all results to this JSON file (in percent)."""
    workers: int = 1
    """Number of processes that read and score images."""

    def prediction(self, image_id: str) -> Path:
        """The file with the prediction of an image."""
        return file_of_id(self.predict_dir, image_id, f".{self.type}")

    def truth(self, image_id: str) -> Path:
        """The file with the ground truth of an image."""
        return file_of_id(self.gt_dir, image_id, ".png")

    def is_folder(self, name: str) -> bool:
        """Whether images lie in this folder below both folders' tops."""
        return os.path.isdir(self.predict_dir / name) or os.path.isdir(self.gt_dir / name)

    def __contains__(self, image_id: str) -> bool:
        """Whether there is an image of this id."""
        return os.path.isfile(self.truth(image_id)) or os.path.isfile(self.prediction(image_id))

    def read_list(self) -> list[str]:
        """Ids of the images to score; ValueError, FileNotFoundError for a wrong list."""
        return read_ids(self.list_file, IdReader(self, self.is_folder))


def _truth(options: EvaluationOptions, image_id: str) -> np.ndarray:
    return read_mask(options.truth(image_id))


def _mask(options: EvaluationOptions, image_id: str) -> np.ndarray | None:
    path = options.prediction(image_id)
    return None if options.missing_as_background and not path.is_file() else read_mask(path)


def _maps(options: EvaluationOptions, image_id: str) -> Maps | None:
    path = options.prediction(image_id)
    if options.missing_as_background and not path.is_file():
        return None
    cam = read_cam(path)
    return (cam.keys, cam.full_maps()) if len(cam.keys) else None


_MOST_SCORES = 10000
"""Largest number of background scores: more, from a mistyped --step, would take hours."""


def _thresholds(options: EvaluationOptions) -> list[float]:
    """Background scores to try; empty for masks. Raises ValueError for an impossible combination of options."""
    if options.erosion and (options.type == "png" or options.erosion < 0 or options.erosion % 2 == 0):
        raise ValueError(f"--erosion {options.erosion} must be odd, and is for maps (--type npz or npy)")
    if options.type == "png":
        if options.curve or options.threshold is not None:
            raise ValueError("--curve and --threshold are for maps (--type npz or npy): masks have no background score")
        return []
    if options.curve == (options.threshold is not None):
        raise ValueError(f"--type {options.type} needs a background score: give either --threshold T or --curve")
    if options.threshold is not None:
        if not math.isfinite(options.threshold):
            raise ValueError(f"--threshold {options.threshold} must be a finite number")
        return [options.threshold]
    numbers = (options.start, options.end, options.step)
    if not all(map(math.isfinite, numbers)) or options.step <= 0 or options.end <= options.start:
        raise ValueError("--curve needs --end above --start and a positive --step")
    steps = (options.end - options.start) / options.step + 1e-6
    if steps >= _MOST_SCORES:
        raise ValueError(f"--step {options.step:g} makes {steps:.3g} background scores, {_MOST_SCORES} are the most")
    count = int(steps) + 1
    # rounded, so that scores are exact decimals (0.29, as i/100 in the published scripts)
    return [round(options.start + i * options.step, 9) for i in range(count)]


def _names(options: EvaluationOptions) -> list[str]:
    """Names of all classes, background first."""
    if options.classes is None:
        return ["background", *(f"class {i}" for i in range(1, options.num_classes))]
    names = [line.strip() for line in read_text(options.classes, "List of classes").splitlines() if line.strip()]
    if len(names) == options.num_classes - 1:
        names.insert(0, "background")
    if len(names) != options.num_classes:
        raise ValueError(
            f"{options.classes} has {len(names)} names for --num-classes {options.num_classes}: "
            f"give {options.num_classes - 1} names, or {options.num_classes} with the background first"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{options.classes} names {twice[0]!r} twice: each class has one line")
    if any(name.strip("_").lower() == "background" for name in names[1:]):
        raise ValueError(f"{options.classes}: the background has the mask value 0, so its line must be the first")
    return names


def _check_present(options: EvaluationOptions, ids: Sequence[str]) -> int:
    """Number of missing predictions to be counted as background. Raises FileNotFoundError if other files are
    missing."""
    absent_truth = [i for i in ids if not options.truth(i).is_file()]
    absent = [i for i in ids if not options.prediction(i).is_file()]
    remedies = [(absent_truth, "ground truths", options.gt_dir, "png", "check --gt-dir and --list")]
    if not options.missing_as_background:
        remedy = "run the step that makes them, or count them as background with --missing-as-background"
        remedies.append((absent, "predictions", options.predict_dir, options.type, remedy))
    faults = [
        f"{len(lacking)} of {len(ids)} {what} are missing in {folder} (ID.{suffix}): {', '.join(lacking[:10])}"
        f"{' ...' if len(lacking) > 10 else ''}. Remedy: {remedy}"
        for lacking, what, folder, suffix, remedy in remedies
        if lacking
    ]
    if faults:
        raise FileNotFoundError("\n".join(faults))
    return len(absent)


def _score(options: EvaluationOptions, ids: Sequence[str]) -> Scores:
    thresholds, truth = _thresholds(options), partial(_truth, options)
    common: dict[str, Any] = {"boundary": options.boundary, "workers": options.workers}
    try:
        if not thresholds:
            return evaluate_masks(ids, partial(_mask, options), truth, options.num_classes, **common)
        common |= {"convention": options.convention, "erosion": options.erosion}
        return evaluate_cams(ids, partial(_maps, options), truth, options.num_classes, thresholds, **common)
    except EvaluationError as error:
        files = [(f"{options.prediction(i)} against {options.truth(i)}", text) for i, text in error.problems]
        raise EvaluationError(files) from None


def evaluate(options: EvaluationOptions) -> dict[str, Any]:
    """Scores and their provenance for JSON: ``Scores.to_dict`` and the paths of the files.

    Raises WrongCall (options, a wrong list, missing files) before anything is read, EvaluationError for images.
    """
    with commandline.before_work((ValueError, OSError)):
        if not 2 <= options.num_classes <= 255:
            raise ValueError(f"--num-classes {options.num_classes} is not in 2..255 (it counts the background)")
        _thresholds(options)
        if options.json is not None and options.json.is_dir():
            raise ValueError(f"--json {options.json} is a folder: give the file to write")
        names, ids = _names(options), options.read_list()
        missing = _check_present(options, ids)
    result = _score(options, ids).to_dict(names, options.split or options.list_file.stem, options.convention)
    return {
        "list": str(options.list_file),
        "predictions": str(options.predict_dir),
        "ground_truth": str(options.gt_dir),
        "type": options.type,
        "num_classes": options.num_classes,
        "missing_as_background": missing,
        **result,
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def class_table(result: dict[str, Any]) -> str:
    """The scores per class and their means as aligned text, in percent; "-": not in the mean."""
    heads = {"iou": "IoU", "precision": "precision", "recall": "recall", "boundary_iou": "boundary IoU"}
    keys = [key for key in heads if key in result["classes"][0]]
    means = {"iou": "miou", "precision": "mean_precision", "recall": "mean_recall", "boundary_iou": "boundary_miou"}
    rows = [["class", *(heads[key] for key in keys)]]
    rows += [[c["name"], *(_percent(c[key]) for key in keys)] for c in result["classes"]]
    rows.append(["mean", *(_percent(result[means[key]]) for key in keys)])
    return ResultTable(rows[0], rows[1:], numbers=range(1, len(rows[0]))).text()


def curve_text(result: dict[str, Any]) -> str:
    """The threshold curve, one "threshold  mIoU" per line; the best one, which is reported, is marked."""
    return "\n".join(
        f"{point['threshold']:<6g}  {_percent(point['miou']):>6}"
        f"{'  <- best' if point['threshold'] == result['threshold'] else ''}"
        for point in result["curve"]
    )


def summary(result: dict[str, Any]) -> str:
    """Overall scores and their provenance, one per line."""
    matrix = np.array(result["confusion"])
    absent = int((matrix.sum(0) + matrix.sum(1) + result["predicted_void"] == 0).sum())
    lines = {
        "mIoU": _percent(result["miou"]),
        "boundary mIoU": _percent(result["boundary_miou"]) if "boundary_miou" in result else "not computed",
        "pixel accuracy": _percent(result["pixel_accuracy"]),
        "class accuracy": _percent(result["class_accuracy"]),
        "frequency-weighted IoU": _percent(result["frequency_weighted_iou"]),
        "false positives / negatives": f"{_percent(result['false_positive'])} / {_percent(result['false_negative'])}",
        "mean over classes": f"{result['convention']} ({absent} of {result['num_classes']} classes occur nowhere)",
        "images": str(result["images"]),
        "split": result["split"],
        "list": result["list"],
        "predictions": f"{result['predictions']} ({result['type']})",
        "ground truth": result["ground_truth"],
    }
    if result["threshold"] is None:
        lines["255 in predictions"] = f"{result['void_predictions']} ({sum(result['predicted_void'])} pixels)"
    else:
        lines["threshold"] = f"{result['threshold']:g}, {result['threshold_choice']}"
        if result["erosion"]:
            lines["erosion"] = f"regions eroded by {result['erosion']} x {result['erosion']} pixels before counting"
        lines["255 in predictions"] = "none: maps are cut into background and the classes stored in each file"
    if result["truths_of_0_and_255"]:
        lines["ground truths of 0 and 255"] = f"{result['truths_of_0_and_255']} images: 255 is not scored"
    if result["missing_as_background"]:
        lines["missing predictions"] = f"{result['missing_as_background']} images counted as background"
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status: 0 scored, 1 not scored, 2 refused before any work: wrong options, missing
    files (the reason is on stderr)."""
    words = commandline.as_help(sys.argv[1:] if argv is None else argv)

    def work() -> None:
        options = commandline.parse_options(EvaluationOptions, words, description=__doc__, prog="evaluation.py")
        try:
            result = evaluate(options)
        except WorkerKilled:
            raise WorkerDied(
                "A worker process died (often: out of memory). Start again, with fewer --workers."
            ) from None
        if options.json is not None:
            remove_leftovers([options.json])
            write_json(options.json, result)
        parts = [class_table(result), *([curve_text(result)] if "curve" in result else []), summary(result)]
        print("\n\n".join(parts))

    return commandline.command(work, (ValueError, OSError, WorkerDied), "nothing is written.")


if __name__ == "__main__":
    commandline.end(main())
