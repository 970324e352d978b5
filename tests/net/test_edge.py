"""net/refine/edge.py: what its fields change; the network itself is tested with IRNet's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from misc.config import override
from misc.crf.dense import CRFSettings
from misc.image.cam import Cam
from misc.image.picture import Picture
from net.refine.edge import EdgeOnly

PUBLISHED, SAMPLE = (EdgeOnly.recipes[name] for name in ("published", "sample"))


def tiny(align_corners: bool = True) -> EdgeOnly:
    torch.manual_seed(0)
    resnet = replace(SAMPLE.network.resnet, width=0.125, strides=(2, 2, 2, 1))
    return replace(SAMPLE.network, resnet=resnet, align_corners=align_corners).build(3, {}).eval()


def scene(keys: list[int]) -> tuple[np.ndarray, Cam]:
    """An image of 40 x 56 with a bright square, and CAMs that are high inside it."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 40, (40, 56, 3)).astype(np.uint8)
    image[10:30, 10:34] += 150
    maps = 0.3 * rng.random((len(keys), 40, 56), np.float32)
    maps[:1, 12:28, 12:32] += 0.6
    return image, Cam.of_maps(np.array(keys, np.int64), maps)


def test_the_upsampling_convention_is_a_field() -> None:
    image = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    logits = []
    for aligned in (True, False):
        network = tiny(aligned)
        convolution, norm, *_ = network.fc_edge3
        with torch.no_grad():
            taps = network.resnet50.forward_stages(image)
            expected = F.relu(F.interpolate(norm(convolution(taps["layer2"])), scale_factor=2, mode="bilinear",
                                            align_corners=aligned))  # fmt: skip
            torch.testing.assert_close(network.fc_edge3(taps["layer2"]), expected)
            logits.append(network.edge_logits(taps))
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    assert PUBLISHED.network.align_corners


def test_published_thresholds_leave_hardly_anything_out_and_puzzle_cam_s_do() -> None:
    image, cam = scene([0, 2])
    shares = []
    for recipe in (PUBLISHED, override(PUBLISHED, {"label.threshold_fg": 0.4, "label.threshold_bg": 0.1})):
        picture, planes = EdgeOnly.make_label(image, cam, recipe.label)
        assert planes.shape == (1, 40, 56) and set(np.unique(picture)) <= {0, 1, 3, 255}
        shares.append((picture == 255).mean())
    assert shares[0] < 0.02 < shares[1]


def test_puzzle_cam_is_the_same_refiner_with_other_fields() -> None:
    order = tuple(name for name in PUBLISHED.augment.order if name != "jitter")
    recipe = override(PUBLISHED, {
        "network.align_corners": False, "network.resnet.depth": (3, 4, 23, 3), "label.threshold_fg": 0.4,
        "label.threshold_bg": 0.1, "augment.order": order, "walk.threshold": 0.35, "walk.crf.iterations": 1,
    })  # fmt: skip
    assert recipe.walk.threshold == 0.35 and "jitter" not in recipe.augment.order


@pytest.mark.parametrize("iterations", [0, 1])
def test_pseudo_masks_have_a_background_and_a_crf_if_asked(iterations: int) -> None:
    network, (image, cam) = tiny(), scene([1, 2])
    x = Picture.of_rgb(image, network.normalisation)
    walk = replace(PUBLISHED.walk, canvas=64, crf=CRFSettings(iterations, bilateral_sxy=50.0, bilateral_srgb=5.0))
    scores = network.refine(x, cam, walk)
    assert scores.shape == (3, 40, 56)
    if iterations:
        np.testing.assert_allclose(scores.sum(0), 1, atol=1e-5)
    else:
        assert (scores[0] == 0.25).all() and scores[1:].max() == pytest.approx(1)
    nothing = network.refine(x, Cam.of_maps(np.zeros(0, np.int64), np.zeros((0, 40, 56), np.float32)), walk)
    assert nothing.shape == (1, 40, 56)


def test_only_the_edge_layers_are_trained_and_all_of_them_decayed() -> None:
    network = PUBLISHED.network.build(20, {})
    (group,) = network.param_groups()
    names = {p: n for n, p in network.named_parameters()}
    assert group.decay and group.lr_scale == 1 and all(names[p].startswith("fc_edge") for p in group.params)
    assert len(group.params) == 5 * 3 + 2
    assert PUBLISHED.fit.momentum == PUBLISHED.fit.weight_decay == 1e-4 and PUBLISHED.fit.nesterov
