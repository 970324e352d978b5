"""Lists of image ids: reading, choosing some, and naming a few in a message."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from misc.files.ids import read_ids
from voc12.tags import DataError

SHOWN = 10
"""Number of items that a message names."""


class NoSuchList(DataError):
    """The data set has no list of this name; a list that is there and damaged is another error."""


def is_list_file(split: str) -> bool:
    """Whether a split is given as the path of a list file (has a ``/`` or ends in .txt), not by its name."""
    return split.endswith(".txt") or "/" in split or os.sep in split


def read_list(path: Path, id_of_line: Callable[[str], str]) -> list[str]:
    """Ids of a list file, one a line, in its order; ``id_of_line`` makes an id of a line, or raises ValueError.

    Raises NoSuchList where the file does not exist, DataError for a damaged or empty one, or an id that comes twice.
    """
    try:
        return read_ids(path, id_of_line)
    except FileNotFoundError as error:
        raise NoSuchList(str(error)) from None
    except (OSError, ValueError) as error:
        raise DataError(str(error)) from None


def pick_evenly(ids: Sequence[str], count: int) -> list[str]:
    """``count`` ids at equal distances in the list: a fixed choice, not a selection of good results."""
    return [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int))] if ids else []


def shorten(items: Iterable[str], between: str = ", ") -> str:
    """The first ten items in one text, and how many more there are."""
    items = list(items)
    more = [f"... {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return between.join([*items[:SHOWN], *more])
