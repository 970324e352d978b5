"""misc/propagate/par.py against plain forms: everything stacked, pixel by pixel."""

from __future__ import annotations

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from misc.propagate.par import PAMR, PAR, Kernel, PixelAdaptive, distances, neighbours


def images(height: int = 11, width: int = 14) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(2, 3, height, width)


@pytest.mark.parametrize("kernel", [PAR, PAMR], ids=["par", "pamr"])
@pytest.mark.parametrize("size", [(11, 14), (5, 3)])
def test_equals_the_plain_form(kernel: Kernel, size: tuple[int, int]) -> None:
    """On images that are smaller than the largest dilation too."""
    image, maps = images(*size), torch.rand(2, 4, *size)
    refine = PixelAdaptive(image, kernel)
    expected = plain.pixel_weights(image, kernel)
    torch.testing.assert_close(refine.weights, expected, rtol=1e-4, atol=1e-6)
    for _ in range(3):
        maps, before = (plain.stacked_neighbours(maps, kernel.dilations) * expected[:, None]).sum(2), maps
        torch.testing.assert_close(refine(before, 1), maps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(refine(refine(before, 2), 3), refine(before, 5))


def test_what_the_weights_sum_to() -> None:
    """PAR makes a mask larger by 1.01 an iteration, which no arg-max sees; PAMR keeps it."""
    flat = torch.ones(2, 1, 11, 14)
    torch.testing.assert_close(PixelAdaptive(images())(flat), flat * 1.01**10, rtol=1e-4, atol=0)
    torch.testing.assert_close(PixelAdaptive(images(), PAMR)(flat), flat, rtol=1e-4, atol=0)
    assert torch.equal(PixelAdaptive(images())(flat, 0), flat)


@pytest.mark.parametrize("kernel", [PAR, PAMR], ids=["par", "pamr"])
def test_a_mask_follows_the_colours(kernel: Kernel) -> None:
    """A spot inside one of two plain areas fills its area and does not reach the other."""
    image = torch.zeros(1, 3, 24, 40)
    image[..., 20:] = 1
    spot = torch.zeros(1, 1, 24, 40)
    spot[..., 8:16, 4:14] = 1
    refined = PixelAdaptive(image, kernel)(spot)[0, 0]
    assert refined[:, :20].min() > 0.05 and refined[:, 20:].max() < 0.02 * refined[:, :20].min()


def test_maps_are_refined_alone() -> None:
    """Planes do not mix, images neither."""
    maps = torch.rand(2, 3, 11, 14)
    together = PixelAdaptive(images())(maps)
    for number in range(2):
        refine = PixelAdaptive(images()[number : number + 1])
        for plane in range(3):
            alone = refine(maps[number : number + 1, plane : plane + 1])[0, 0]
            torch.testing.assert_close(together[number, plane], alone, rtol=1e-4, atol=1e-6)


def test_neighbours_are_views_and_in_order() -> None:
    maps = torch.arange(42.0).view(1, 1, 6, 7)
    found = list(neighbours(maps, (1, 3)))
    assert len(found) == 16 and len({n.untyped_storage().data_ptr() for n in found}) == 1
    assert torch.equal(torch.stack(found, 2), plain.stacked_neighbours(maps, (1, 3)))
    torch.testing.assert_close(distances((1, 3))[:4], torch.tensor([2**0.5, 1, 2**0.5, 1]))
    assert F.mse_loss(distances((1, 3))[8:], 3 * distances((1,))) < 1e-10


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dilations": ()}, "dilations"), ({"dilations": (0, 1)}, "dilations"), ({"power": 3}, "power"),
     ({"width": 0.0}, "width"), ({"place": -1.0}, "place")],
)  # fmt: skip
def test_impossible_kernels(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kernel(**changes)  # type: ignore[arg-type]
