"""Pictures to look at."""

from __future__ import annotations

import numpy as np

from misc.image.draw import overlay, palette


def test_an_overlay_shows_classes_and_what_is_not_labelled_and_leaves_the_background() -> None:
    image = np.full((9, 12, 3), 100, np.uint8)
    mask = np.zeros((9, 12), np.uint8)
    mask[:, 4:8], mask[:, 8:] = 3, 255
    shown = overlay(image, mask, opacity=0.5)
    assert (shown[:, :4] == 100).all() and (image == 100).all()
    assert (shown[:, 4] == 255).all() and (shown[:, 8] == 255).all()  # white lines round the class
    assert (shown[:, 5:8] == (100 + palette()[3].astype(int)) // 2).all()
    assert (shown[:, 9:] == (100 + 255) // 2).all()
