"""``labelmap.txt``: names and colours of classes, as CVAT writes them beside masks in colour
(name:r,g,b:parts:actions)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from misc.files.ids import composed
from misc.files.store import read_text
from misc.image.labels import IGNORE

NO_CLASS = ("ignore", "void", "unlabeled", "unlabelled", "dontcare")
"""Names (without underscores at their ends) of what is no class but pixels that nobody labelled."""
_LINE = re.compile(r"(?P<name>[^:]+):(?P<colour>\d{1,3},\d{1,3},\d{1,3}):.*")


@dataclass(frozen=True)
class LabelMap:
    """What a ``labelmap.txt`` says.

    classes: names in the order of the file, which is that of the mask values 1, 2, ...; background and ignored ones are
    left out. values: {(r, g, b): mask value}.
    """

    classes: tuple[str, ...]
    values: dict[tuple[int, int, int], int]


def read_labelmap(path: Path) -> LabelMap:
    """Read one; ValueError for a line of another form, a colour or a name twice, more than 254 classes."""
    classes: list[str] = []
    values: dict[tuple[int, int, int], int] = {}
    for number, line in enumerate(read_text(path, "Table of colours").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        colour = tuple(int(v) for v in found["colour"].split(",")) if found else ()
        if found is None or max(colour) > 255:
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not name:red,green,blue::")
        name = composed(found["name"].strip())
        if colour in values or name in classes:
            raise ValueError(f"{path}, line {number}: the colour or the name of {name!r} comes twice.")
        if name.strip("_").lower() == "background":
            value = 0
        elif name.strip("_").lower() in NO_CLASS:
            value = IGNORE
        else:
            classes.append(name)
            value = len(classes)
        if value == IGNORE and len(classes) > 254:
            raise ValueError(f"{path} has more than 254 classes.")
        values[colour] = value  # type: ignore[index]
    if not classes:
        raise ValueError(f"{path} names no class: it needs lines name:red,green,blue::")
    return LabelMap(tuple(classes), values)
