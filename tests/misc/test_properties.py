"""Properties that hold for whatever input: of the random walk, of resizing, of the confusion matrix, of the reader of
pickled arrays, of step names."""

from __future__ import annotations

import builtins
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis.extra import numpy as arrays

from misc.files.pickled import read_pickled
from misc.image.pixels import resize_maps, resize_mask, resize_masks
from misc.propagate.walk import half_circle, pair_cells, transition, walk
from misc.score.metrics import Confusion
from step import STEPS, select

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


# ---------------------------------------------------------------------------------------------- resizing

side = st.integers(1, 40)


@few
@hypothesis.given(old=st.tuples(side, side), new=st.tuples(side, side), seed=st.integers(0, 999))
def test_masks_of_a_batch_are_resized_as_pil_does_each(
    old: tuple[int, int], new: tuple[int, int], seed: int
) -> None:
    masks = np.random.default_rng(seed).integers(0, 256, (2, *old), np.uint8)
    resized = resize_masks(torch.from_numpy(masks), new).numpy()
    np.testing.assert_array_equal(resized, np.stack([resize_mask(mask, new) for mask in masks]))


@few
@hypothesis.given(
    count=st.integers(0, 3), old=st.tuples(side, side), new=st.tuples(side, side), seed=st.integers(0, 999)
)
def test_resized_maps_are_means_of_their_values(
    count: int, old: tuple[int, int], new: tuple[int, int], seed: int
) -> None:
    """Nothing leaves the range, a mirrored map is resized to the mirrored result, the own size changes nothing."""
    maps = torch.rand(count, *old, generator=torch.Generator().manual_seed(seed))
    resized = resize_maps(maps, new)
    assert resized.shape == (count, *new) and resized.dtype == torch.float32
    torch.testing.assert_close(resize_maps(maps[None], new)[0], resized)
    torch.testing.assert_close(resize_maps(maps.flip(-1), new), resized.flip(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(resize_maps(maps, old), maps)
    for before, after in zip(maps, resized, strict=True):
        assert before.min() - 1e-6 <= after.min() and after.max() <= before.max() + 1e-6


# ---------------------------------------------------------------------------------------------- pickled arrays

plain = st.recursive(
    st.integers(-(2**40), 2**40) | st.text(max_size=8) | st.floats(allow_nan=False) | st.booleans() | st.none()
    | arrays.arrays(st.sampled_from([np.float32, np.uint8, np.int64]), arrays.array_shapes(max_dims=3, max_side=4),
                    elements=st.integers(0, 99)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(0, 20), inner),
    max_leaves=6,
)  # fmt: skip


def saved(folder: str, content: object) -> Path:
    """A ``.npy`` file of a 0-d object array, as the field's code writes it."""
    box = np.empty((), object)
    box[()] = content
    np.save(Path(folder) / "a.npy", box)
    return Path(folder) / "a.npy"


@pytest.mark.slow
@few
@hypothesis.given(content=plain)
def test_whatever_data_a_pickled_file_holds_comes_back(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        np.testing.assert_equal(read_pickled(saved(folder, content)), content)


class Calls:
    """Pickles as a call of any importable object."""

    def __init__(self, called: Any, arguments: tuple[Any, ...]) -> None:
        self.called, self.arguments = called, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called, self.arguments


callables = st.sampled_from(
    [os.system, os.getcwd, eval, exec, getattr, builtins.open, print, bytearray, pickle.loads, np.load, np.fromfile,
     np.frombuffer, torch.load, torch.zeros, Path, complex, set]
)  # fmt: skip


@few
@hypothesis.given(
    called=callables, depth=st.integers(0, 3), protocol=st.integers(0, 5), arguments=st.tuples() | st.tuples(st.text())
)
def test_no_callable_is_reached_through_a_pickled_file(
    called: Any, depth: int, protocol: int, arguments: tuple[Any, ...]
) -> None:
    """However deep it lies and however it is written: refused before anything of it is called."""
    content: Any = Calls(called, arguments)
    for level in range(depth):
        content = {level: [content]}
    with tempfile.TemporaryDirectory() as folder, patch("subprocess.Popen", side_effect=AssertionError):
        path = saved(folder, 0)
        path.write_bytes(path.read_bytes()[:128] + pickle.dumps(content, protocol=protocol))  # behind the header
        with pytest.raises(ValueError, match="which is not read from data files"):
            read_pickled(path)


# ---------------------------------------------------------------------------------------------- step names

numbers = st.integers(1, len(STEPS))
spelled = st.tuples(numbers, st.booleans()).map(lambda step: STEPS[step[0] - 1].name if step[1] else str(step[0]))


def number_of(text: str) -> int:
    """The number of a step, from its name or number."""
    return int(text) if text.isdecimal() else 1 + [step.name for step in STEPS].index(text)


@few
@hypothesis.given(singles=st.lists(spelled, max_size=4), ranges=st.lists(st.tuples(spelled, spelled), max_size=3))
def test_steps_are_chosen_by_numbers_names_and_ranges(
    singles: list[str], ranges: list[tuple[str, str]]
) -> None:
    """Each step once, in the pipeline's order; a range that runs backwards is refused."""
    words = [*singles, *(f"{first}-{last}" for first, last in ranges)]
    hypothesis.assume(words)
    if any(number_of(first) > number_of(last) for first, last in ranges):
        with pytest.raises(ValueError, match="runs backwards"):
            select(words)
        return
    wanted = {number_of(word) for word in singles}
    for first, last in ranges:
        wanted |= set(range(number_of(first), number_of(last) + 1))
    assert [STEPS.index(step) + 1 for step in select(words)] == sorted(wanted)


@few
@hypothesis.given(word=st.text(st.characters(codec="ascii", exclude_characters="-"), min_size=1))
def test_what_is_no_step_is_refused(word: str) -> None:
    hypothesis.assume(word not in [step.name for step in STEPS] and word not in map(str, range(1, len(STEPS) + 1)))
    with pytest.raises(ValueError, match="there is no such step"):
        select([word])
