"""``python -m voc12.generated DIR``: writes a generated sample set (see --help)."""

from __future__ import annotations

import functools
from typing import Any

from misc import commandline
from voc12.generated.sets import generate

_HELP = """Write the generated sample set; a finished set of the same parameters is left as it is.

In VOC 2012's layout: JPEGImages, Annotations, SegmentationClass, SegmentationObject, ImageSets/Segmentation, Saliency
(noisy object saliency, 8 bit, one channel), classes.txt (line n names class n). In CUB's: images, segmentations and its
text files. An interrupted run is done again; a folder that holds anything else is refused."""


def main() -> None:
    """The command line of `generate`; ends the process."""

    @functools.wraps(generate)
    def checked(*args: Any, **parameters: Any) -> None:
        with commandline.before_work((ValueError, FileExistsError)):
            generate(*args, **parameters)

    commandline.run_script(checked, prog="python -m voc12.generated", description=_HELP)


if __name__ == "__main__":
    main()
