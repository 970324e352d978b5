"""Masks of the Semantic Boundaries Dataset (SBD), whose ``.mat`` files hold 11 355 annotated VOC images.

``cls/ID.mat`` holds a struct ``GTcls`` with the fields Boundaries (20 sparse maps, one a class), Segmentation
((H, W), 0 background, 1..20 VOC's classes in its order) and CategoriesPresent. SegmentationClassAug, the mask folder
that the field passes round, contains these maps as PNG.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io

from voc12.tags import DataError


def find_sbd_maps(folder: Path) -> Path:
    """The folder of ``ID.mat`` files in an unpacked SBD (benchmark_RELEASE, or dataset, or cls itself)."""
    tried = [folder / part for part in ("", "cls", "dataset/cls", "benchmark_RELEASE/dataset/cls")]
    for place in tried:
        if place.is_dir() and any(place.glob("*.mat")):
            return place
    raise DataError(f"No SBD in {folder}: looked for ID.mat files in {', '.join(map(str, tried))}.")


def read_sbd_mask(path: Path, num_classes: int = 20) -> np.ndarray:
    """(H, W) uint8 mask of an image, 0 background and 1..num_classes.

    Raises DataError for a file that is missing, damaged or of another structure (``inst/ID.mat``, MATLAB 7.3).
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    try:
        content = scipy.io.loadmat(path, struct_as_record=False)
    except NotImplementedError:
        raise DataError(f"{path} is of MATLAB 7.3, SBD's are version 5: save it with -v7, or download it.") from None
    except Exception as error:  # scipy's reader raises many types on damaged files
        raise DataError(f"{path} is no MATLAB file or a damaged one ({error}): download it again.") from None
    truth = content.get("GTcls")
    if truth is None:
        there = ", ".join(sorted(k for k in content if not k.startswith("__"))) or "nothing"
        hint = " (SBD's inst/ folder holds these: give cls/)" if "GTinst" in content else ""
        raise DataError(f"{path} holds {there}, not GTcls{hint}.")
    truth = truth.flat[0] if truth.size else None  # MATLAB's struct is a 1 x 1 array of structs
    mask = getattr(truth, "Segmentation", None)
    if mask is None:
        fields = ", ".join(getattr(truth, "_fieldnames", ())) or type(truth).__name__
        raise DataError(f"{path}: GTcls has no Segmentation (it has {fields}).")
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "uif":
        raise DataError(f"{path}: GTcls.Segmentation is {mask.dtype} {mask.shape}, not a map of numbers.")
    if mask.size == 0 or mask.min() < 0 or mask.max() > num_classes or (mask != np.floor(mask)).any():
        raise DataError(f"{path}: GTcls.Segmentation holds values outside 0..{num_classes}.")
    return mask.astype(np.uint8)
