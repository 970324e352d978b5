"""Overlays and their legend, mistakes, the contact sheet."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

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


SEEN = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""Linear RGB as seen (Machado, Oliveira and Fernandes 2009, severity 1)."""


def lab(colours: np.ndarray, sight: str) -> np.ndarray:
    """(n, 3) sRGB 0 .. 255 -> CIELAB as seen."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(SEEN[sight]).T, 0, 1)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    xyz /= np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("sight", SEEN)
def test_ten_classes_are_told_apart_with_any_kind_of_colour_blindness(sight: str) -> None:
    seen = lab(draw.class_colours(10).astype(float), sight)
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 20


def test_an_overlay_tints_and_outlines_classes_on_grey_and_hatches_what_is_not_labelled() -> None:
    image = np.zeros((60, 90, 3), np.uint8)
    image[:] = 200, 20, 20
    mask = np.zeros((60, 90), np.uint8)
    mask[:, 30:60], mask[:, 60:] = 3, 255
    shown = draw.overlay(image, mask)
    grey, colour = draw.greyed(image)[0, 0].astype(int), draw.class_colours(3)[2].astype(int)
    assert len(set(grey)) == 1 and (image[0, 0] == (200, 20, 20)).all()
    assert (shown[:, :28] == grey).all()  # the background
    assert (shown[:, 31] == colour).all() or (shown[:, 30] == colour).all()  # the outline
    assert np.abs(shown[30, 45] - (grey + colour) / 2).max() <= 1.5  # the tint
    veil = shown[:, 62:]
    assert (veil == grey).all(2).any() and (veil > grey).all(2).any()
    assert len(np.unique(veil.reshape(-1, 3), axis=0)) == 2


def test_a_legend_names_the_classes_in_the_mask_alone() -> None:
    image, mask = picture(64, 300, 90), np.zeros((64, 300), np.uint8)
    classes = ("ant", "bee", "cat")
    assert draw.overlay(image, mask, classes).shape == image.shape  # nothing to name
    mask[10:40, 20:90] = 2
    assert [name for name, _ in draw.legend_entries(mask, classes)] == ["bee"]
    shown, plain = draw.overlay(image, mask, classes), draw.overlay(image, mask)
    assert (shown[:64] == plain).all() and shown.shape[0] > 64
    square = (shown[64:] == draw.class_colours(2)[1]).all(2)  # the outline of its square
    assert square.sum() >= 40 and not (shown[64:] == draw.class_colours(1)[0]).all(2).any()
    mask[50:, 5:60] = 255
    assert [name for name, _ in draw.legend_entries(mask, classes)] == ["bee", "not labelled"]


def test_mistakes_are_missed_false_and_confused() -> None:
    truth = np.array([[0, 0, 1, 1, 2, 255, 1, 0]], np.uint8)
    mask = np.array([[0, 1, 1, 0, 1, 1, 255, 255]], np.uint8)
    layer = draw.mistake_layer(mask, truth)
    missed, false, confused = draw.MISTAKES.values()
    assert (layer[0, :, 3] > 0).tolist() == [False, True, False, True, True, False, True, False]
    found = [tuple(layer[0, i, :3].tolist()) for i in (1, 3, 4, 6)]
    assert found == [false, missed, confused, missed]


def colours_of(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}


def test_the_squares_of_a_legend_have_the_colours_of_the_pictures() -> None:
    grey, truth = picture(120, 160, 128), np.zeros((120, 160), np.uint8)
    for value in (1, 2, 12, draw.IGNORE):
        mask = truth.copy()
        mask[30:90, 40:120] = value
        shown = colours_of(draw.overlay(grey, mask)) - {tuple(draw.greyed(grey)[0, 0])}
        ((name, swatch),) = draw.legend_entries(mask, [f"c{n}" for n in range(12)])
        square = colours_of(swatch(14)) - {tuple(draw.greyed(grey)[0, 0])}
        assert square == shown, name
    truth[:60], mask = 1, np.roll(truth, 20, axis=1)
    mask[30:90, :40], mask[:, 100:] = 2, 1
    wrong = colours_of(draw.lay_over(grey, draw.mistake_layer(mask, truth))) - {tuple(draw.greyed(grey)[0, 0])}
    assert set().union(*(colours_of(swatch(14)) for _, swatch in draw.mistake_entries())) == wrong and len(wrong) == 3
    boxed = colours_of(draw.draw_boxes(grey, np.array([[1, 1, 9, 9]]), np.array([12, 12, 20, 20]), 24))
    assert set().union(*(colours_of(swatch(14)) for _, swatch in draw.box_entries())) == boxed - {(128, 128, 128)}
