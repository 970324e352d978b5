"""Properties that hold for whatever input: of the random walk and of the confusion matrix."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import torch

from misc.propagate.walk import half_circle, pair_cells, transition, walk
from misc.score.metrics import Confusion

few = hypothesis.settings(max_examples=40, deadline=None)


@few
@hypothesis.given(
    height=st.integers(1, 7), width=st.integers(1, 7), radius=st.integers(2, 4), beta=st.floats(0.5, 12),
    steps=st.integers(1, 16), seed=st.integers(0, 999),
)  # fmt: skip
def test_a_walk_makes_means_of_the_scores(
    height: int, width: int, radius: int, beta: float, steps: int, seed: int
) -> None:
    """Every cell's score after a walk is a weighted mean: constants stay, nothing leaves the range, it is linear."""
    draw, cells = torch.Generator().manual_seed(seed), height * width
    source, target = pair_cells(half_circle(radius), height, width)
    affinity = torch.rand(len(source), generator=draw)
    step = transition(source, target, affinity, cells, beta)
    scores = torch.rand(3, cells, generator=draw)
    walked = walk(step, scores, steps)
    assert (walked.amin(1) >= scores.amin(1) - 1e-5).all() and (walked.amax(1) <= scores.amax(1) + 1e-5).all()
    torch.testing.assert_close(walk(step, torch.full((1, cells), 0.7), steps), torch.full((1, cells), 0.7))
    torch.testing.assert_close(walk(step, 2 * scores[:1] + scores[1:2], steps), 2 * walked[:1] + walked[1:2])


labels = st.lists(st.sampled_from([0, 1, 2, 3, 255]), min_size=6, max_size=6)
predictions_of = st.lists(st.integers(0, 3), min_size=6, max_size=6)


@few
@hypothesis.given(st.lists(st.tuples(labels, predictions_of), min_size=1, max_size=5))
def test_a_confusion_counts_pixels_whatever_images_they_lie_in(pairs: list[tuple[list[int], list[int]]]) -> None:
    """One image after the other is as all pixels at once; ignored ones don't count; IoUs are fractions."""
    one, whole = Confusion(4), Confusion(4)
    for truth, prediction in pairs:
        one.add(np.array(truth, np.uint8).reshape(2, 3), np.array(prediction, np.uint8).reshape(2, 3))
    truths, predictions = (np.array(side, np.uint8) for side in zip(*pairs, strict=True))
    whole.add(truths, predictions)
    np.testing.assert_array_equal(one.matrix, whole.matrix)
    assert one.matrix.sum() == (truths != 255).sum()
    assert np.trace(one.matrix) == ((truths == predictions) & (truths != 255)).sum()
    with np.errstate(invalid="ignore"):
        iou = one.iou("nanmean")
    assert ((iou[~np.isnan(iou)] >= 0) & (iou[~np.isnan(iou)] <= 1)).all()
