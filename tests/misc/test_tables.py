"""Tables of results as text and as Markdown; their HTML is part of the report page (tests/step/test_run.py)."""

from __future__ import annotations

import pytest

from misc.tables import ResultTable


def test_text_and_markdown() -> None:
    table = ResultTable(("score", "mIoU"), [("CAM", "9.5"), ("masks, walked", "61.25")], numbers={1})
    assert table.text() == "score           mIoU\nCAM              9.5\nmasks, walked  61.25"
    assert table.markdown().splitlines() == [
        "| score         |  mIoU |",
        "| ------------- | ----: |",
        "| CAM           |   9.5 |",
        "| masks, walked | 61.25 |",
    ]


def test_no_trailing_blanks_and_rows_of_one_length() -> None:
    assert ResultTable(("a", "note"), [("1", "")]).text() == "a  note\n1"
    with pytest.raises(ValueError, match="1 cells in a table of 2 columns"):
        ResultTable(("a", "b"), [("1",)])
