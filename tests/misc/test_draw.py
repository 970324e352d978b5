"""The contact sheet."""

from __future__ import annotations

import numpy as np

from misc.image import draw


def picture(height: int, width: int, value: int) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_columns_of_a_sheet_with_headings_are_aligned() -> None:
    rows = [[picture(20, 80, 10), picture(20, 80, 20)], [picture(20, 40, 30), picture(20, 40, 40)]]
    plain = draw.tile(rows, 20, 4)
    assert plain.shape == (2 * 24, 2 * 84, 3)
    assert (plain[24, :40] == 30).all() and (plain[24, 44:84] == 40).all()  # one after the other
    headed = draw.tile(rows, 20, 4, headings=("image", "class activation map"))
    top = headed.shape[0] - plain.shape[0]
    assert headed.shape[1] == plain.shape[1] and top > 0
    assert (headed[top, :80] == 10).all() and (headed[top, 84:164] == 20).all()
    assert (headed[top + 24, 20:60] == 30).all() and (headed[top + 24, 104:144] == 40).all()  # centred
    assert (headed[top + 24, :20] == 255).all() and (headed[top + 24, 60:104] == 255).all()
    ink = np.flatnonzero((headed[:top] < 128).any((0, 2)))
    assert ink.min() < 80 and ink.max() > 84, "both headings are drawn"
    assert ((ink < 80) | (ink >= 84)).all(), "each in its own column"
