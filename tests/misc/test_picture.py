"""Images with their network values, and the published way back from these."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from misc.image.picture import Picture, truncate_image, truncate_values, truncate_values_to_image
from misc.image.pixels import NORMALISATIONS, mean_colour, normalise_image

LEVELS = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)


@pytest.mark.parametrize("name", sorted(NORMALISATIONS))
def test_truncation_takes_at_most_one_level(name: str) -> None:
    image = LEVELS.copy()
    image[..., 2] = image[::-1, :, 2]  # another blue: a swap of channels would show
    picture = Picture.of_rgb(image, name)
    assert picture.size == (16, 16) and picture.values.shape == (3, 16, 16)
    found = truncate_values_to_image(picture.values, name)
    lost = image.astype(int) - found
    assert set(np.unique(lost)) <= {0, 1}
    np.testing.assert_array_equal(truncate_image(image, name), found)
    batch = truncate_values(picture.values[None].repeat(2, 1, 1, 1), name)
    assert batch.shape == (2, 3, 16, 16) and batch.dtype == torch.float32
    np.testing.assert_array_equal(batch[1].permute(1, 2, 0).numpy(), found)


def test_the_precision_of_the_normalisation_decides_which_levels_are_lost() -> None:
    double, single = (truncate_image(LEVELS, "imagenet", single=single) for single in (False, True))
    assert (double != single).any() and (double != LEVELS).any() and (single != LEVELS).any()


@pytest.mark.parametrize("name", sorted(NORMALISATIONS))
def test_the_mean_colour_has_values_near_zero(name: str) -> None:
    values = normalise_image(np.array(mean_colour(name), np.uint8)[None, None], name)
    assert np.abs(values).max() <= 0.51 / min(NORMALISATIONS[name].std) / NORMALISATIONS[name].scale
