"""Checks of the golden cases about data sets: tags from annotations, list files, the palette."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from misc.files.ids import read_ids
from misc.image.draw import palette
from voc12.data_sets.voc12 import VOC_CLASSES
from voc12.tags import encode_tags, names_from_xml


def check_voc_labels(case: Any) -> None:
    """Tags of each annotation of the case, in its order, and the ids of its list file."""
    given = case.meta["input"]
    case.check("labels", np.stack([encode_tags(names_from_xml(text), VOC_CLASSES) for text in given["xml"].values()]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        path.write_text(given["list_file"], encoding="utf-8")
        assert read_ids(path) == case.meta["expected_names"]


def check_voc_palette(case: Any) -> None:
    """The VOC colour map, as long as the case has it."""
    case.check("palette", palette(len(case.stored("palette"))))
