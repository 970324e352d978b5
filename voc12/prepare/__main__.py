"""Prepares and checks a downloaded data set: lists, tags, masks, and every missing or damaged file by name.

    python -m voc12.prepare voc12 --root VOCdevkit/VOC2012 --sbd benchmark_RELEASE
    python -m voc12.prepare coco14 --root coco
    python -m voc12.prepare folder --root my_photos --val-share 0.2
    python -m voc12.prepare shrink --root my_photos --out my_photos_1024
    python -m voc12.prepare from coco roboflow_export --root my_photos

A second call continues where the first stopped and changes no existing file. The exit status is 1 if it finds a
problem, 2 if the call was refused before any work.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

from misc import commandline

commandline.begin(__name__)

from collections.abc import Sequence

import tyro

from misc.loop.each import WorkerDied
from voc12.prepare.coco14 import prepare_coco14
from voc12.prepare.folder import prepare_folder
from voc12.prepare.from_export import prepare_from
from voc12.prepare.shrink import shrink_folder
from voc12.prepare.voc12 import prepare_voc12

COMMANDS = {
    "voc12": prepare_voc12,
    "coco14": prepare_coco14,
    "folder": prepare_folder,
    "shrink": shrink_folder,
    "from": prepare_from,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""

    def work() -> int:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=argv, prog="python -m voc12.prepare", description=__doc__
        )

    return commandline.command(work, (ValueError, OSError, WorkerDied), "start the same command again to go on.")


if __name__ == "__main__":
    sys.exit(main())
