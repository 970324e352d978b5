"""Scores localisation maps of other code, in wsolevaluation's layout: MaxBoxAcc, MaxBoxAccV2 and, with masks, PxAP.

  python -m scripts.box_scores scoremaps metadata/CUB/test

The metadata folder holds image_ids.txt, image_sizes.txt and localization.txt; the map of an image is MAPS/IMAGE_ID.npy
(such as 001.Black_footed_Albatross/NAME.jpg.npy), that of its true class.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from misc import commandline
from misc.checked import Range
from misc.files.images import read_mask
from misc.files.store import write_json
from misc.score import wsol


def read_columns(path: Path, columns: int) -> dict[str, list[list[str]]]:
    """Lines of a metadata file, ``image id,value,...``, by image id in the file's order; ValueError for a line with
    another number of values than ``columns``."""
    lines: dict[str, list[list[str]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        image_id, *values = line.strip().rsplit(",", columns) if line.strip() else [""]
        if image_id and len(values) != columns:
            raise ValueError(f"{path}, line {number}: {line!r} is not an image id and {columns} values.")
        if image_id:
            lines.setdefault(image_id, []).append(values)
    return lines


def read_map(path: Path, side: int) -> np.ndarray:
    """A map file (h, w) on the grid: (side, side) float, in [0, 1]. One of the grid's size is taken as it is, others
    are resized bicubically and scaled from minimum and maximum to 0 and 1.

    Raises FileNotFoundError, and ValueError for what is no such map."""
    # wsol.md section 8
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such map. Maps are named by the ids of image_ids.txt, with .npy behind.")
    scores = np.load(path, allow_pickle=False)
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.floating) or not scores.size:
        raise ValueError(f"{path}: {scores.dtype} values of shape {scores.shape}; a map is (height, width) of floats.")
    if np.isnan(scores).any():
        raise ValueError(f"{path}: the map contains NaN.")
    if scores.shape != (side, side):
        return wsol.resize_map(scores.astype(np.float32), side, "bicubic")
    if scores.min() < 0 or scores.max() > 1:
        raise ValueError(f"{path}: values from {scores.min():.3g} to {scores.max():.3g}; maps must be in 0 .. 1.")
    return scores


def main(
    maps: tyro.conf.Positional[Path], metadata: tyro.conf.Positional[Path], masks: Path | None = None, side: int = 224,
    interval: Annotated[float, Range(above=0, most=0.5)] = 0.001, out: Path | None = None,
) -> int:
    """Score the maps of all images of the metadata folder; returns the exit status.

    Args:
        maps: Folder with the maps, one .npy file per image.
        metadata: The folder metadata/DATASET/SPLIT of wsolevaluation.
        masks: Folder with an object mask IMAGE_ID.png per image (1: object, 0: background, 255: ignored), for PxAP.
        side: Side of the square grid on which boxes are compared.
        interval: Step between the thresholds (wsolevaluation: 0.001 in training, 0.01 in its own evaluation script).
        out: JSON file to write the scores to, too.
    """
    try:
        scores = score_maps(maps, metadata, masks, side, interval)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(scores, indent=2))
    if out is not None:
        write_json(out, scores)
    return 0


def score_maps(maps: Path, metadata: Path, masks: Path | None, side: int, interval: float) -> dict[str, float | int]:
    """Scores in percent by name, the best threshold, and the number of images; see ``main``."""
    ids = [line.strip() for line in (metadata / "image_ids.txt").read_text(encoding="utf-8").splitlines()]
    ids = [image_id for image_id in ids if image_id]
    sizes, boxes = read_columns(metadata / "image_sizes.txt", 2), read_columns(metadata / "localization.txt", 4)
    for image_id in ids:
        if image_id not in sizes or image_id not in boxes:
            raise ValueError(f"{metadata}: image_sizes.txt or localization.txt has no line of {image_id}.")
    if not ids:
        raise ValueError(f"{metadata / 'image_ids.txt'} names no image.")
    taus = wsol.list_thresholds(interval)
    overlap, pixels = [], np.zeros((2, len(taus) + 2), np.int64)
    for image_id in ids:
        scores = read_map(maps / f"{image_id}.npy", side)
        width, height = (int(value) for value in sizes[image_id][0])
        truth = np.array([[float(value) for value in box] for box in boxes[image_id]])
        overlap.append(wsol.best_overlaps(scores, taus, wsol.scaled_boxes(truth, (height, width), side, clip=False)))
        if masks is not None:
            region = wsol.region_on_grid(read_mask(masks / f"{image_id}.png"), side)
            pixels += wsol.region_histograms(scores, region, taus)
    largest, every = np.stack(overlap, 1)  # (N, T) each
    best, at = wsol.max_box_acc(largest, taus)
    result: dict[str, float | int] = {
        "images": len(ids), "MaxBoxAcc": best, "threshold": at, "MaxBoxAccV2": wsol.max_box_acc_v2(every),
    }
    if masks is not None:
        result["PxAP"] = wsol.pxap(pixels)
    return result


if __name__ == "__main__":
    commandline.run_script(main, prog="python -m scripts.box_scores")
