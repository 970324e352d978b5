"""Ids of the lines of list files, as people write them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from misc.files.ids import IdReader, checked_id

KNOWN = {"photo", "beach 1", "rome", "trips/rome", "a", "b", "v1.2.final", "2007", "it's (3) [1 0]", "Größe"}

LINES = {
    "photo": "photo",
    "beach 1": "beach 1",
    "beach 1.JPG": "beach 1",
    "photo 1": "photo 1",  # not photo.png, which is another image
    "beach 2": "beach 2",
    "trips/rome.jpg": "trips/rome",
    "images/rome.png": "rome",
    "trips/paris.jpg": "trips/paris",  # trips is a folder of the data set: not paris of another
    "trips\\rome.jpg": "trips/rome",
    "./a.jpg": "a",
    "v1.2.final": "v1.2.final",
    "it's (3) [1 0].png": "it's (3) [1 0]",
    "/JPEGImages/2007.jpg /SegmentationClassAug/2007.png": "2007",
    "images/a.jpg masks/b.png": "a",
    "images/beach 1.jpg masks/b.png": "beach 1",
    "a  1": "a",
    "a -1": "a",
    "b.jpg 0 1 1": "b",
    "/data/set/images/trips/rome.jpg": "trips/rome",
    unicodedata.normalize("NFD", "Größe.png"): "Größe",
}


@pytest.mark.parametrize("line, image_id", LINES.items(), ids=map(repr, LINES))
def test_the_whole_line_is_the_id_where_there_is_such_an_image(line: str, image_id: str) -> None:
    assert IdReader(KNOWN, roots=[Path("/data/set")])(line) == image_id


@pytest.mark.parametrize("line", ["/elsewhere/set/images/a.jpg", "C:\\photos\\a.jpg", "../a.jpg", "/a.jpg", "x" * 5000])
def test_a_line_that_leaves_the_data_set_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        IdReader(KNOWN, roots=[Path("/data/set")])(line)


def test_a_colon_is_part_of_a_name_unless_it_reads_as_a_drive() -> None:
    assert checked_id("shot 10:00:01") == "shot 10:00:01"
    with pytest.raises(ValueError, match="its ':' reads as a drive"):
        checked_id("c:d")
    with pytest.raises(ValueError, match="not allowed"):
        checked_id("a\nb")
