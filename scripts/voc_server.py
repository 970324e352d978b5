"""Predictions of a list in the layout that VOC's evaluation server takes.

  python run_sample.py METHOD ... --val-list test --steps infer_seg --out runs/NAME
  python -m scripts.voc_server runs/NAME --root VOCdevkit/VOC2012
"""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import tyro

from misc import commandline
from misc.files.images import read_mask
from misc.files.runfolder import RunFolder
from voc12.catalog import open_catalog


def main(
    run: tyro.conf.Positional[Path], root: Path, split: str = "test", out: Path = Path("results.tgz"),
    competition: str = "comp6_test_cls",
) -> int:
    """Pack a run's masks as results/VOC2012/Segmentation/COMPETITION/ID.png; returns the exit status.

    Args:
        run: Run folder with the predictions of the list (its folder seg).
        root: VOCdevkit/VOC2012.
        split: The list.
        out: The archive to write.
        competition: comp6_test_cls: trained with other data than VOC's own; comp5_test_cls: with that alone.
    """
    catalog, folder = open_catalog("voc12", root), RunFolder(run)
    ids = catalog.ids(split)
    missing = [i for i in ids if not folder.seg(i).exists()]
    if missing:
        print(
            f"error: {len(missing)} of {len(ids)} predictions of the list {split} are not in {run}/seg "
            f"({', '.join(missing[:3])}): run infer_seg with --val-list {split}.",
            file=sys.stderr,
        )
        return 1
    for image_id in ids:
        if read_mask(folder.seg(image_id)).max() > len(catalog.classes):
            print(f"error: {folder.seg(image_id)} holds other values than classes.", file=sys.stderr)
            return 1
    with tarfile.open(out, "w:gz") as archive:
        for image_id in ids:
            archive.add(folder.seg(image_id), f"results/VOC2012/Segmentation/{competition}/{image_id}.png")
    print(f"{out}: {len(ids)} masks of the list {split}")
    return 0


if __name__ == "__main__":
    commandline.run_script(main, prog="python -m scripts.voc_server")
