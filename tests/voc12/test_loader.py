"""Training batches: the same samples whatever the processes, workers, micro-batches and restarts."""

from __future__ import annotations

import functools
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import gone, wait_for

from misc.config import Augment, View
from misc.files.images import read_mask
from voc12 import loader
from voc12.catalog import Catalog, open_catalog
from voc12.loader import Draws, TrainSet, WorkerDied, make_loader
from voc12.tags import DataError

IDS = [f"im{i}" for i in range(7)]
RECIPE = Augment(long_side=(20, 40), crop=24)


@pytest.fixture
def data(tmp_path: Path) -> Catalog:
    numbers = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / folder).mkdir()
    for number, image_id in enumerate(IDS):
        size = (20 + number, 30 - number)
        Image.fromarray(numbers.integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            tmp_path / "JPEGImages" / f"{image_id}.jpg"
        )
        Image.fromarray(np.full(size, number % 3, np.uint8)).save(tmp_path / "SegmentationClass" / f"{image_id}.png")
    (tmp_path / "labels.csv").write_text("".join(f"{i},{'dog' if i != 'im3' else ''}\n" for i in IDS))
    return open_catalog("voc12", tmp_path)


class Masks:
    """Reads true masks; an object of a named class, so that worker processes can be given it."""

    def __init__(self, data: Catalog) -> None:
        self.data = data

    def __call__(self, image_id: str) -> np.ndarray:
        path = self.data.mask_path(image_id)
        assert path is not None
        return read_mask(path)


def planes_of(image_id: str) -> np.ndarray:
    number = IDS.index(image_id)
    return np.full((2, 20 + number, 30 - number), number, np.uint8)


def brightest(planes: np.ndarray) -> np.ndarray:
    return planes.max(axis=(1, 2)).astype(np.float32)


def wreck(image_id: str) -> np.ndarray:
    raise IndexError("that is a bug")


def kill(image_id: str) -> np.ndarray:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def global_batches(
    data: Catalog, *, world: int = 1, micro: int | None = None, workers: int = 0, start: int = 0, total: int = 4,
    recipe: Augment = RECIPE, order: str = "epochs", views: dict[str, View] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """The global batches of 4 that all processes and micro-batches make together; views stand in place of masks."""
    train = TrainSet(data, IDS, recipe, "imagenet", 5, with_mask=None if views else Masks(data), views=views)
    micro = micro or 4 // world
    per_update = 4 // world // micro
    parts: list[list[dict[str, torch.Tensor]]] = [[] for _ in range(start, total)]
    for rank in range(world):
        draws = Draws(len(IDS), 4, order, 5)  # type: ignore[arg-type]
        batches = list(make_loader(train, draws, rank, world, micro, start, total, workers))
        assert len(batches) == per_update * (total - start)
        for number, batch in enumerate(batches):
            parts[number // per_update].append(batch)
    return [{key: torch.cat([part[key] for part in update]) for key in update[0]} for update in parts]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def test_batch_contents(data: Catalog) -> None:
    batch = global_batches(data)[0]
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "image": ((4, 3, 24, 24), torch.float32),
        "tags": ((4, 20), torch.float32),
        "box": ((4, 4), torch.int64),
        "seed": ((4,), torch.int64),
        "mask": ((4, 24, 24), torch.int64),
    }
    for image, box, mask in zip(batch["image"], batch["box"].tolist(), batch["mask"], strict=True):
        outside = torch.ones(24, 24, dtype=torch.bool)
        outside[box[0] : box[1], box[2] : box[3]] = False
        assert not image[:, outside].any() and (mask[outside] == 255).all() and (mask[~outside] < 3).all()


def test_saliency_is_in_the_batch_where_it_is_asked_for(data: Catalog) -> None:
    train = TrainSet(data, IDS, RECIPE, "imagenet", 5, with_mask=Masks(data), saliency=Masks(data))
    sample = train[(4, 3, 0)]
    assert sample["saliency"].dtype == torch.uint8
    assert torch.equal(sample["saliency"].long(), sample["mask"].masked_fill(sample["mask"] == 255, 0))
    del sample["saliency"]
    assert same([sample], [TrainSet(data, IDS, RECIPE, "imagenet", 5, with_mask=Masks(data))[(4, 3, 0)]])


def test_samples_of_a_batch_are_augmented_independently(data: Catalog) -> None:
    train = TrainSet(data, IDS, RECIPE, "imagenet", 5)
    images = [train[(0, position, 0)]["image"] for position in range(4)]
    assert not any(torch.equal(images[0], other) for other in images[1:])
    assert torch.equal(images[2], train[(0, 2, 0)]["image"])
    assert not torch.equal(images[2], TrainSet(data, IDS, RECIPE, "imagenet", 6)[(0, 2, 0)]["image"])


SHARED = Augment(order=("long_side", "flip", "crop", "normalize"), long_side=(14, 30), crop=24)
VIEWS = {
    "plain": View(start="shared", order=("normalize",)),
    "turned": View(start="shared", order=("flip", "normalize"), flip=1.0),
    "image": View(start="shared", order=("flip", "blur", "normalize"), flip=0.5, blur=1.0),
    "global": View(order=("resized_crop", "solarise", "grey", "normalize"), crop=16, grey=1.0),
}


def test_views_show_the_same_crop_or_another_part_of_the_file(data: Catalog) -> None:
    batches = global_batches(data, recipe=SHARED, views=VIEWS)
    alone = global_batches(data, recipe=SHARED, views={"plain": VIEWS["plain"]})
    for batch, other in zip(batches, alone, strict=True):
        plain, turned = batch["view/plain"], batch["view/turned"]
        assert torch.equal(plain, turned.flip(-1)) and torch.equal(plain, other["view/plain"])
        assert torch.equal(other["image"], plain) and torch.equal(batch["image"], batch["view/image"])
        assert batch["mirrored/turned"].all() and not batch["mirrored/plain"].any()
        assert torch.equal(batch["box"], batch["box/plain"]) and batch["view/global"].shape == (4, 3, 16, 16)
        top, bottom, left, right = batch["box"].unbind(1)
        assert torch.equal(batch["box/turned"], torch.stack([top, bottom, 24 - right, 24 - left], 1))
        truth = torch.where(batch["mirrored/image"][:, None], batch["box/turned"], batch["box"])
        assert torch.equal(batch["box/image"], truth)
        assert not torch.equal(batch["image"], plain)
    mirrored = torch.cat([batch["mirrored/image"] for batch in batches])
    assert mirrored.any() and not mirrored.all()
    grey = batches[0]["view/global"] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    grey = grey + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    assert (grey.amax(1) - grey.amin(1)).max() < 1e-4


def test_views_and_seeds_are_the_same_however_the_work_is_divided(data: Catalog) -> None:
    plain = global_batches(data, recipe=SHARED, views=VIEWS)
    seeds = torch.cat([batch["seed"] for batch in plain])
    assert len(seeds.unique()) == len(seeds)
    for division in ({"world": 2}, {"micro": 1}, {"workers": 2}):
        assert same(plain, global_batches(data, recipe=SHARED, views=VIEWS, **division)), division
    assert same(plain[3:], global_batches(data, recipe=SHARED, views=VIEWS, start=3))


def test_views_that_cannot_be_are_refused(data: Catalog) -> None:
    with pytest.raises(ValueError, match="masks, label planes or saliency has none"):
        TrainSet(data, IDS, SHARED, "imagenet", 5, with_mask=Masks(data), views=VIEWS)
    with pytest.raises(ValueError, match="normalize must come last in its order, which is long_side"):
        TrainSet(data, IDS, RECIPE, "imagenet", 5, views=VIEWS)
    with pytest.raises(ValueError, match="order = .* crop or resized_crop, from a file"):
        View(order=("flip", "normalize"))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["epochs", "stream"])
def test_same_samples_however_the_work_is_divided(data: Catalog, order: str) -> None:
    plain = global_batches(data, order=order)
    assert not same(plain[:1], plain[1:2])
    for division in ({"world": 2}, {"micro": 1}, {"world": 2, "micro": 1}, {"workers": 2}):
        assert same(plain, global_batches(data, order=order, **division)), division  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_start_in_the_middle_gives_the_same_tail(data: Catalog, workers: int) -> None:
    assert same(global_batches(data)[3:], global_batches(data, start=3, workers=workers))


def test_scale_per_batch_is_common_to_all_processes(data: Catalog) -> None:
    recipe = Augment(order=("scale", "normalize", "crop"), scale=(0.5, 1.5), scale_per_batch=True, crop=64)
    factors = []
    for batch, draws in zip(global_batches(data, world=2, recipe=recipe), _indices(4), strict=True):
        box = batch["box"]
        seen = [(int(b[1] - b[0]) / (20 + i), int(b[3] - b[2]) / (30 - i)) for b, i in zip(box, draws, strict=True)]
        assert np.ptp(seen) < 0.06  # the same but for whole pixels
        factors.append(np.mean(seen))
    assert np.ptp(factors) > 0.1


def _indices(updates: int) -> list[list[int]]:
    draws = Draws(len(IDS), 4, "epochs", 5)
    return [[draws.draw(u * 4 + k)[0] for k in range(4)] for u in range(updates)]


def test_epochs_drop_the_last_batch() -> None:
    draws = Draws(10, 4, "epochs", 0)
    assert draws.steps_per_epoch == 2
    epochs = [[draws.draw(p)[0] for p in range(e * 8, e * 8 + 8)] for e in range(30)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 30
    assert set().union(*epochs) == set(range(10))
    assert draws.draw(9) == Draws(10, 4, "epochs", 0).draw(9) and draws.draw(9)[1:] == (9, 2)
    assert [Draws(10, 4, "epochs", 1).draw(p)[0] for p in range(8)] != epochs[0]


@pytest.mark.parametrize(("images", "order"), [(10, "stream"), (3, "epochs")])
def test_stream_crosses_borders(images: int, order: str) -> None:
    draws = Draws(images, 4, order, 0)  # type: ignore[arg-type]
    assert draws.steps_per_epoch == max(1, images // 4)
    seen = [draws.draw(p)[0] for p in range(images * 6)]
    assert all(sorted(seen[k : k + images]) == list(range(images)) for k in range(0, len(seen), images))
    assert Counter(seen) == {i: 6 for i in range(images)}


def test_uneven_shares_are_refused() -> None:
    for world, micro in ((3, 1), (2, 3), (1, 5), (8, 1)):
        with pytest.raises(ValueError, match="evenly"):
            list(Draws(9, 4, "epochs", 0).micro_batches(0, world, micro, 0, 1))


def test_target_from_planes(data: Catalog) -> None:
    recipe = Augment(order=("normalize", "crop", "flip"), crop=40)
    train = TrainSet(
        data, IDS, recipe, "imagenet", 0, planes=planes_of, plane_fill=99, target=brightest
    )  # every image is smaller than the crop: the filling is seen
    made = train[(2, 0, 0)]
    assert made["target"].tolist() == [99, 99] and "mask" not in made
    recipe = Augment(order=("normalize", "crop"), crop=8)
    train = TrainSet(data, IDS, recipe, "imagenet", 0, planes=planes_of, plane_fill=99, target=brightest)
    assert train[(2, 0, 0)]["target"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="both or neither"):
        TrainSet(data, IDS, recipe, "imagenet", 0, planes=planes_of)
    with pytest.raises(ValueError, match="lacks crop"):
        TrainSet(data, IDS, Augment(order=("normalize",)), "imagenet", 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_named(data: Catalog, workers: int) -> None:
    data.image_path("im2").write_bytes(data.image_path("im2").read_bytes()[:200])
    train = TrainSet(data, IDS, RECIPE, "imagenet", 0)
    with pytest.raises(DataError) as error:
        list(make_loader(train, Draws(7, 7, "epochs", 0), 0, 1, 7, 0, 1, workers))
    assert str(error.value).startswith("Image 'im2'") and str(data.image_path("im2")) in str(error.value)


@pytest.mark.slow
def test_any_failure_of_a_sample_names_id_and_file(data: Catalog) -> None:
    train = TrainSet(data, IDS, RECIPE, "imagenet", 0, with_mask=wreck)
    with pytest.raises(DataError, match=r"'im1' \(.*im1\.jpg\): IndexError: that is a bug"):
        train[(1, 0, 0)]
    train = TrainSet(data, [*IDS, "im9"], RECIPE, "imagenet", 0)
    with pytest.raises(DataError, match="no image 'im9'"):
        train[(7, 0, 0)]


def test_mask_with_an_unknown_class_is_named(data: Catalog) -> None:
    train = TrainSet(data, IDS, RECIPE, "imagenet", 0, with_mask=lambda i: np.full_like(Masks(data)(i), 33))
    with pytest.raises(DataError, match="'im1'.*value 33, but there are 20 classes"):
        train[(1, 0, 0)]


def test_killed_worker_gives_a_clear_error(data: Catalog) -> None:
    train = TrainSet(data, IDS, RECIPE, "imagenet", 0, with_mask=kill)
    with pytest.raises(WorkerDied, match="use fewer workers"):
        list(make_loader(train, Draws(7, 7, "epochs", 0), 0, 1, 7, 0, 1, 1))


def test_loader_leaves_the_global_random_state_alone(data: Catalog) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    list(make_loader(TrainSet(data, IDS, RECIPE, "imagenet", 0), Draws(7, 7, "epochs", 0), 0, 1, 7, 0, 1, 0))
    assert torch.equal(torch.rand(1), wanted)


def test_the_incomplete_last_batch_is_kept_where_the_recipe_says_so() -> None:
    """CUB: 10 images in batches of 4 are 3 updates an epoch, the last of 2 images."""
    draws = Draws(10, 4, "epochs", 5, "keep")
    assert draws.steps_per_epoch == 3 and Draws(10, 4, "epochs", 5).steps_per_epoch == 2
    batches = list(draws.micro_batches(0, 1, 4, 0, 6))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    assert [draw[2] for batch in batches for draw in batch] == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 4 + [4] * 4 + [5] * 2
    for epoch in (batches[:3], batches[3:]):
        assert sorted(draw[0] for batch in epoch for draw in batch) == list(range(10))  # every image once
    assert list(draws.micro_batches(0, 1, 4, 4, 6)) == batches[4:]  # resumed in the middle
    parts = [list(draws.micro_batches(rank, 2, 1, 0, 3)) for rank in (0, 1)]
    assert [len(batch) for batch in parts[0]] == [1] * 6 == [len(batch) for batch in parts[1]]
    last = [draw for part in parts for batch in part[4:] for draw in batch]
    assert {draw[0] for draw in last} == {draw[0] for draw in batches[2]}  # two images for four places
    assert list(Draws(8, 4, "epochs", 0, "keep").micro_batches(0, 1, 4, 0, 4)) == list(
        Draws(8, 4, "epochs", 0).micro_batches(0, 1, 4, 0, 4)
    )


def test_a_worker_is_silent_about_a_batch_that_nobody_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the main process while a thread of the worker hands a batch over; other errors are told."""
    told: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(error))
    monkeypatch.setattr(loader, "quiet_threads", lambda: None)  # this process keeps its threads
    monkeypatch.setattr(loader, "end_with_parent", lambda: None)  # it has none
    loader._start_worker(0)
    for error in (EOFError(), ConnectionResetError(), ValueError("wrong")):
        hook = functools.partial(sys.excepthook, type(error), error, None)
        thread = threading.Thread(target=hook, daemon=True)
        thread.start()
        thread.join()
        hook()  # of the worker's own work: nothing is kept back
    assert [type(error) for error in told] == [EOFError, ConnectionResetError, ValueError, ValueError]


def test_ctrl_c_is_not_lost_while_reading_processes_are_waited_for(
    data: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Batches:
        def __iter__(self) -> Batches:
            return self

        def __next__(self) -> dict[str, torch.Tensor]:
            return {}

        def __del__(self) -> None:  # whose errors are told and forgotten
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", lambda self: Batches())
    dataset = TrainSet(data, IDS, RECIPE, "imagenet", 0)
    batches = iter(make_loader(dataset, Draws(7, 7, "epochs", 0), 0, 1, 7, 0, 1, 0))
    next(batches)
    with pytest.raises(KeyboardInterrupt):
        batches.close()


def read_for_ever(self: TrainSet, draw: object) -> None:
    time.sleep(600)


def start_reading(data: Catalog, children: multiprocessing.connection.Connection) -> None:
    TrainSet.__getitem__ = read_for_ever  # type: ignore[assignment]
    dataset = TrainSet(data, IDS, RECIPE, "imagenet", 0)
    batches = iter(make_loader(dataset, Draws(7, 7, "epochs", 0), 0, 1, 1, 0, 7, 2))
    threading.Timer(1, lambda: children.send([child.pid for child in multiprocessing.active_children()])).start()
    next(batches)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_reading_processes_end_with_a_main_process_that_is_killed(data: Catalog) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    main = context.Process(target=start_reading, args=(data, theirs))
    main.start()
    assert ours.poll(60)
    children = ours.recv()
    main.kill()
    main.join()
    assert len(children) == 2
    wait_for(lambda: all(gone(child) for child in children))
