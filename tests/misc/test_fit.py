"""The training loop: division of the batch, schedules, exact resume, the guard against NaN, what is logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from misc.config import Fit, Machine
from misc.files.store import read_model
from misc.loop.fit import (
    NonFiniteLoss,
    divide,
    fit,
    lr_factor,
    make_optimiser,
    make_rules,
    set_lr,
)
from misc.loop.kept import resume_point
from misc.loop.trainable import Batch, MomentumCopy
from net.groups import Group

TOTAL, BATCH = 8, 4
RECIPE = Fit(steps=TOTAL, batch_size=BATCH, lr=0.005, momentum=0.9, weight_decay=0.01)
MACHINE = Machine(device="cpu", workers=0, checkpoint_every=3)


class Toy(nn.Module):
    """A regression with a mean over images and one over valid entries, dropout, a statistic kept in a buffer, and a
    layer that follows another one by a moving average."""

    finds_unused = False

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(8, 1)
        self.follower = nn.Linear(6, 8).requires_grad_(False)
        self.follower.load_state_dict(self.first.state_dict())
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        self.seen += batch["x"].sum()
        out = self.last(self.drop(torch.tanh(self.first(batch["x"])))).flatten()
        valid = ((out - 2) ** 2 * batch["valid"]).sum() / batch["counts/valid"]
        return {"fit": F.mse_loss(out, batch["y"]), "valid": valid * (1 - progress)}

    def prepare(self, batch: Batch, progress: float) -> Batch:
        return {}

    def lr_scale(self, progress: float) -> float:
        return 1.0

    def momentum_copies(self) -> list[MomentumCopy]:
        return [MomentumCopy(self.follower, self.first, 0.75)]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"valid": batch["valid"].sum()}

    def param_groups(self) -> list[Group]:
        return [Group(list(self.first.parameters())), Group(list(self.last.parameters()), 10.0, False)]


def micro_batches(size: int, change: Callable[[int, Batch], Batch] = lambda _, batch: batch):
    """Batches of a training by its first update, as the data room gives them: functions of the update alone."""

    def batches(start: int) -> Iterable[Batch]:
        for step in range(start, TOTAL):
            rng = torch.Generator().manual_seed(step)
            whole = {"x": torch.randn(BATCH, 6, generator=rng), "y": torch.randn(BATCH, generator=rng)}
            whole["valid"] = (torch.rand(BATCH, generator=rng) > 0.4).float()
            for begin in range(0, BATCH, size):
                yield change(step, {k: v[begin : begin + size] for k, v in whole.items()})

    return batches


def train(folder: Path, recipe: Fit = RECIPE, network: nn.Module | None = None, **changes: Any) -> dict[str, Tensor]:
    """Train the toy; its weights."""
    options: dict[str, Any] = {
        "machine": MACHINE, "device": torch.device("cpu"), "seed": 0, "weights": folder / "weights" / "toy.pt",
        "log": folder / "log", "name": "toy", "made_by": {"fit.lr": recipe.lr}, "description": {"of": "toy"},
        "batches": micro_batches(recipe.micro_batch or BATCH), **changes,
    }  # fmt: skip
    batches = options.pop("batches")
    fit(network or Toy(), batches, recipe, TOTAL, **options)
    return read_model(options["weights"])[0]


def read_log(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "log" / "toy"), size_guidance={"images": 0}).Reload()


def curve(folder: Path, term: str = "fit") -> list[float]:
    """The logged values of a loss term."""
    events = read_log(folder).Scalars(f"toy/{term}")
    assert [e.step for e in events] == list(range(len(events)))
    return [e.value for e in events]


def stopping(at: int, error: type[BaseException], size: int = BATCH):
    """Batches that end with an error before an update."""

    def change(step: int, batch: Batch) -> Batch:
        if step == at:
            raise error("stopped")
        return batch

    return micro_batches(size, change)


# ---------------------------------------------------------------------------------------------- batch and schedule


def test_the_global_batch_is_divided_evenly_or_not_at_all() -> None:
    division = divide(Fit(batch_size=12, micro_batch=2), 3)
    assert (division.per_process, division.micro, division.micro_size) == (4, 2, 2)
    assert divide(Fit(batch_size=12, micro_batch=50), 3).micro_size == 4
    with pytest.raises(ValueError, match="12 images cannot be divided evenly over 5 processes"):
        divide(Fit(batch_size=12), 5)
    with pytest.raises(ValueError, match="6 images per process are not a multiple of micro_batch = 4"):
        divide(Fit(batch_size=12, micro_batch=4), 2)


def test_what_a_network_prepares_is_counted_and_its_rate_is_heeded(tmp_path: Path) -> None:
    class Prepares(Toy):
        """Finds its valid entries itself, in the second half at a hundredth of the rate."""

        def prepare(self, batch: Batch, progress: float) -> Batch:
            assert "counts/valid" not in batch
            return {"valid": batch["hidden"]}

        def lr_scale(self, progress: float) -> float:
            return 1.0 if progress < 0.5 else 0.01

    def hide(step: int, batch: Batch) -> Batch:
        return {"x": batch["x"], "y": batch["y"], "hidden": batch["valid"]}

    recipe = Fit(**{**vars(RECIPE), "micro_batch": 2})
    train(tmp_path / "plain", recipe, Toy(dropout=0))
    train(tmp_path / "own", recipe, Prepares(dropout=0), batches=micro_batches(2, hide))
    half = math.ceil(TOTAL / 2)
    for term in ("fit", "valid"):
        assert curve(tmp_path / "own", term)[: half + 1] == curve(tmp_path / "plain", term)[: half + 1]
    rates = [curve(tmp_path / name, "lr") for name in ("own", "plain")]
    assert rates[0][:half] == rates[1][:half]
    assert rates[0][half:] == pytest.approx([rate / 100 for rate in rates[1][half:]])


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    weights, curves = [], []
    for size in (4, 2, 1):
        folder = tmp_path / str(size)
        recipe = Fit(**{**vars(RECIPE), "micro_batch": size})
        weights.append(train(folder, recipe, Toy(dropout=0)))
        curves.append(curve(folder, "valid"))
    for other in (1, 2):
        assert all(torch.allclose(weights[0][k], weights[other][k], atol=1e-5) for k in weights[0])
        assert curves[0] == pytest.approx(curves[other], rel=1e-4)


def test_momentum_copies_move_once_an_update_before_anything_else(tmp_path: Path) -> None:
    class Watched(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[tuple[Tensor, Tensor]] = []

        def prepare(self, batch: Batch, progress: float) -> Batch:
            self.steps.append((self.first.weight.detach().clone(), self.follower.weight.clone()))
            return {}

    network = Watched()
    train(tmp_path, Fit(**{**vars(RECIPE), "micro_batch": 2}), network)
    of_updates = network.steps[:: BATCH // 2]
    assert len(of_updates) == TOTAL and len(network.steps) == TOTAL * BATCH // 2
    expected = of_updates[0][0]
    for source, copy in of_updates:
        expected = 0.75 * expected + 0.25 * source
        torch.testing.assert_close(copy, expected)
    assert not torch.allclose(of_updates[-1][0], of_updates[-1][1])


def test_the_warm_up_of_poly_ends_where_poly_is() -> None:
    recipe = Fit(schedule="warmup_poly", warmup_steps=4, warmup_ratio=0.1, power=1.0)
    rates = [lr_factor(recipe, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.1, 0.325, 0.55, 0.775, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_poly_and_constant_rates_reach_every_group() -> None:
    network = Toy()
    optimiser = make_optimiser(network.param_groups(), RECIPE, torch.device("cpu"))
    assert [g["weight_decay"] for g in optimiser.param_groups] == [0.01, 0.0]
    for step, share in ((0, 1.0), (4, 0.5**0.9), (TOTAL - 1, (1 / 8) ** 0.9)):
        set_lr(optimiser, RECIPE, step, TOTAL)
        assert [g["lr"] for g in optimiser.param_groups] == pytest.approx([0.005 * share, 0.05 * share])
    assert lr_factor(Fit(schedule="constant"), 5, 8) == 1
    assert lr_factor(Fit(schedule_extra=2, power=1), 5, 8) == pytest.approx(0.5)
    stepped = [lr_factor(Fit(schedule_every=3, power=1), step, 8) for step in range(8)]
    assert stepped == pytest.approx([1, 1, 1, 5 / 8, 5 / 8, 5 / 8, 2 / 8, 2 / 8])


def test_the_step_schedule_falls_with_every_epoch_that_is_divided() -> None:
    recipe = Fit(epochs=6, schedule="step", step_epochs=(2, 5), step_factor=0.5)
    rates = [lr_factor(recipe, step, 12) for step in range(12)]
    assert rates == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625]
    assert lr_factor(recipe, 99, 12) == 0.0625
    with pytest.raises(ValueError, match="step_epochs"):
        Fit(step_epochs=(0,))


class TwoRules(Toy):
    """The last layer follows a rule of its own."""

    rule = Fit(optimiser="sgd", lr=0.25, weight_decay=0, schedule="constant")

    def param_groups(self) -> list[Group]:
        first, last = super().param_groups()
        return [first, Group(last.params, 2.0, rule=self.rule)]


def test_groups_may_follow_another_rule() -> None:
    recipe = Fit(**{**vars(RECIPE), "optimiser": "adamw"})
    (adamw, own), (sgd, other) = make_rules(TwoRules().param_groups(), recipe, torch.device("cpu"))
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(sgd, torch.optim.SGD)
    assert own is recipe and other is TwoRules.rule
    for optimiser, rule in ((adamw, own), (sgd, other)):
        set_lr(optimiser, rule, 4, TOTAL)
    assert [g["lr"] for g in adamw.param_groups] == pytest.approx([0.005 * 0.5**0.9])
    assert [g["lr"] for g in sgd.param_groups] == [0.5] and sgd.param_groups[0]["weight_decay"] == 0
    assert sum(len(g["params"]) for o in (adamw, sgd) for g in o.param_groups) == sum(
        p.requires_grad for p in Toy().parameters()
    )


def test_a_training_by_two_rules_is_resumed_exactly(tmp_path: Path) -> None:
    recipe = Fit(**{**vars(RECIPE), "optimiser": "adamw"})
    whole = train(tmp_path / "whole", recipe, TwoRules())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", recipe, TwoRules(), batches=stopping(5, KeyboardInterrupt))
    cut = train(tmp_path / "cut", recipe, TwoRules())
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    one = train(tmp_path / "one", recipe, Toy())
    assert not torch.equal(one["last.weight"], whole["last.weight"])


def test_the_rate_is_set_before_the_first_update_and_logged(tmp_path: Path) -> None:
    train(tmp_path)
    assert curve(tmp_path, "lr") == pytest.approx([0.005 * (1 - step / TOTAL) ** 0.9 for step in range(TOTAL)])


def test_gradients_are_clipped(tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in Toy().state_dict().items()}
    recipe = Fit(steps=TOTAL, batch_size=BATCH, lr=1e-3, weight_decay=0, clip_norm=1e-4, schedule="constant")
    after = train(tmp_path, recipe)
    moved = math.sqrt(sum(float((after[k] - before[k]).square().sum()) for k in before if k != "seen"))
    # eight updates of a gradient of norm 1e-4, at ten times the rate where it is largest
    assert 0 < moved <= TOTAL * 1e-4 * 1e-2 * 1.001


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_training_lowers_the_loss(optimiser: str, tmp_path: Path) -> None:
    same = micro_batches(BATCH)
    first = list(same(0))[0]
    recipe = Fit(steps=TOTAL, batch_size=BATCH, lr=0.02, optimiser=optimiser, schedule="constant")
    train(tmp_path, recipe, Toy(dropout=0), batches=lambda start: [first] * (TOTAL - start))
    assert curve(tmp_path)[-1] < curve(tmp_path)[0]


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("at", [1, 3, 7])
def test_an_interrupted_training_ends_bit_for_bit_like_an_undisturbed_one(
    at: int, optimiser: str, tmp_path: Path
) -> None:
    recipe = Fit(**{**vars(RECIPE), "optimiser": optimiser})
    train(tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", recipe, batches=stopping(at, KeyboardInterrupt))
    point = resume_point(tmp_path / "cut" / "weights" / "toy.pt")
    assert point.exists() == (at >= 3) and not (tmp_path / "cut" / "weights" / "toy.pt").exists()
    for events in (tmp_path / "cut" / "log" / "toy").iterdir():  # TensorBoard orders by name: second, then a number
        events.rename(events.with_name(events.name.replace("tfevents.", "tfevents.0")))
    torch.manual_seed(99)  # whatever random state the next process has
    starts: list[int] = []
    train(tmp_path / "cut", recipe, batches=lambda start: starts.append(start) or micro_batches(BATCH)(start))
    assert starts == [at // 3 * 3]
    whole, cut = ((tmp_path / name / "weights" / "toy.pt").read_bytes() for name in ("whole", "cut"))
    assert whole == cut and not point.exists()
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_resume_point_of_another_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, batches=stopping(5, KeyboardInterrupt))
    other = Fit(**{**vars(RECIPE), "lr": 0.002})
    with pytest.raises(ValueError, match=r"toy\.resume\.pt is the resume point of another.*fit.lr was 0.005, is 0.002"):
        train(tmp_path, other)
    with pytest.raises(ValueError, match="seed was 0, is 1.*Delete it"):
        train(tmp_path, seed=1)
    resume_point(tmp_path / "weights" / "toy.pt").unlink()
    train(tmp_path, other)


def test_a_damaged_resume_point_is_named(tmp_path: Path) -> None:
    point = resume_point(tmp_path / "weights" / "toy.pt")
    point.parent.mkdir()
    point.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"toy\.resume\.pt cannot be read .*delete it"):
        train(tmp_path)


def test_each_update_draws_its_own_dropout_from_the_seed(tmp_path: Path) -> None:
    weights = [train(tmp_path / str(i), seed=seed)["first.weight"] for i, seed in enumerate((0, 0, 1))]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    first = next(iter(micro_batches(BATCH)(0)))
    recipe = Fit(steps=TOTAL, batch_size=BATCH, lr=1e-9, schedule="constant")
    train(tmp_path / "still", recipe, batches=lambda start: [dict(first) for _ in range(TOTAL)])
    assert len(set(curve(tmp_path / "still"))) == TOTAL


# ---------------------------------------------------------------------------------------------- guard


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_batch_and_resume_point(bad: float, tmp_path: Path) -> None:
    def spoil(step: int, batch: Batch) -> Batch:
        return {**batch, "y": batch["y"] * (bad if step == 5 else 1)}

    with pytest.raises(NonFiniteLoss, match=r"toy: the loss is not finite at update 5 \(fit = (nan|inf), valid = \d.*"
                       r"toy_nonfinite_rank0\.pt.*--machine\.amp off.*smaller --toy.fit.lr"):
        train(tmp_path, Fit(**{**vars(RECIPE), "micro_batch": 2}), batches=micro_batches(2, spoil))
    kept = torch.load(tmp_path / "log" / "toy_nonfinite_rank0.pt", weights_only=True)
    assert len(kept) == 2 and kept[0]["x"].shape == (2, 6) and not torch.isfinite(kept[0]["y"]).any()
    weights = tmp_path / "weights" / "toy.pt"
    assert not weights.exists() and torch.load(resume_point(weights), weights_only=True)["step"] == 3
    assert len(curve(tmp_path)) == 5  # what led to it is in the log


def test_nothing_is_updated_by_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    network = Toy()
    before = network.first.weight.clone()
    with pytest.raises(NonFiniteLoss):
        train(tmp_path, network=network, batches=micro_batches(BATCH, lambda _, b: {**b, "x": b["x"] * math.nan}))
    assert torch.equal(network.first.weight, before)


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    """A loss can be finite and its gradient not: the square root's at 0 is infinite."""

    class Spoiled(Toy):
        def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
            terms = super().forward(batch, progress)
            if progress > 0.8:  # the last update: no later loss tells
                terms["fit"] = terms["fit"] + (self.first.weight * 0).abs().sum().sqrt()
            return terms

    with pytest.raises(NonFiniteLoss, match="toy: weights are not finite"):
        train(tmp_path, network=Spoiled())
    weights = tmp_path / "weights" / "toy.pt"
    assert not weights.exists() and torch.load(resume_point(weights), weights_only=True)["step"] == 6


# ---------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"amp": "fp16"}])
def test_reduced_precision_trains_in_full_precision_weights(options: dict[str, Any], tmp_path: Path) -> None:
    machine = Machine(device="cpu", workers=0, checkpoint_every=3, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, machine=machine, batches=stopping(5, KeyboardInterrupt))
    weights = train(tmp_path, machine=machine)
    plain = train(tmp_path / "plain")
    assert weights["first.weight"].dtype == torch.float32
    assert not torch.equal(weights["first.weight"], plain["first.weight"])
    assert torch.allclose(weights["first.weight"], plain["first.weight"], atol=0.1)


def test_precision_may_change_between_two_calls(tmp_path: Path) -> None:
    for first, then in (("off", "fp16"), ("fp16", "off")):
        folder = tmp_path / first
        with pytest.raises(KeyboardInterrupt):
            train(folder, machine=Machine(amp=first, checkpoint_every=3), batches=stopping(5, KeyboardInterrupt))
        train(folder, machine=Machine(amp=then, checkpoint_every=3))
        assert len(curve(folder)) == TOTAL


def test_trainings_of_one_run_keep_each_others_curves(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path, name="other", weights=tmp_path / "weights" / "other.pt")
    assert len(curve(tmp_path)) == TOTAL


# ---------------------------------------------------------------------------------------------- selection


def rated(network: nn.Module, ratings: list[float], seen: list[int]) -> Callable[[], dict[str, float]]:
    """A rating by epoch, told by how often the network has seen data, and one that falls with it; it changes nothing
    and must not be in training mode."""

    def score() -> dict[str, float]:
        assert not network.training
        number = int(network.updates)
        seen.append(number)
        return {"first": ratings[number // 2 - 1], "second": -number}

    return score


class Counting(Toy):
    """Knows how many updates it has had."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert self.training
        self.updates += 1
        return super().forward(batch, progress)


@pytest.mark.parametrize("ratings, best", [([0.1, 0.7, 0.7, 0.2], 4), ([0.1, 0.2, 0.3, 0.4], 8), ([0.5, 0, 0, 0], 2)])
def test_the_best_rated_epochs_and_the_last_one_are_kept(ratings: list[float], best: int, tmp_path: Path) -> None:
    recipe = Fit(**{**vars(RECIPE), "epochs": 4, "warmup_epochs": 0})
    network, seen = Counting(), []
    kept = train(tmp_path, recipe, network, score=rated(network, ratings, seen))
    assert seen == [2, 4, 6, 8] and kept["updates"] == best
    found = {p.name: read_model(p) for p in (tmp_path / "weights").iterdir()}
    updates = {name: int(state["updates"]) for name, (state, _) in found.items()}
    assert updates == {"toy.pt": best, "toy.second.pt": 2, "toy.last.pt": 8}
    assert {name: told["rating"] for name, (_, told) in found.items()} == {
        "toy.pt": {"last": ratings[-1], "selected": max(ratings)},
        "toy.second.pt": {"last": -8, "selected": -2},
        "toy.last.pt": {"last": ratings[-1]},
    }


@pytest.mark.parametrize("ratings, best", [([math.nan] * 4, 8), ([math.nan, 0.3, math.nan, 0.2], 4)])
def test_ratings_that_are_no_numbers_choose_no_epoch(
    ratings: list[float], best: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Fit(**{**vars(RECIPE), "epochs": 4, "warmup_epochs": 0})
    network = Counting()
    assert train(tmp_path, recipe, network, score=rated(network, ratings, []))["updates"] == best
    found = {p.name: read_model(p) for p in (tmp_path / "weights").iterdir()}
    assert {n: int(state["updates"]) for n, (state, _) in found.items()} == {
        "toy.pt": best, "toy.second.pt": 2, "toy.last.pt": 8,
    }  # fmt: skip
    told, rating = capsys.readouterr().out, found["toy.pt"][1]["rating"]
    assert told.count("first of the epoch nan: the epoch is not chosen") == sum(map(math.isnan, ratings))
    none = "toy: first is not a number (NaN) in any epoch, so none is chosen: the last weights are kept."
    assert (none in told) == (best == 8)
    assert rating == ({"last": None} if best == 8 else {"last": 0.2, "selected": 0.3})


@pytest.mark.parametrize("at", [1, 5, 7])
def test_an_interrupted_selection_keeps_what_an_undisturbed_one_keeps(at: int, tmp_path: Path) -> None:
    recipe = Fit(**{**vars(RECIPE), "epochs": 4, "warmup_epochs": 0})

    def go(folder: Path, **changes: Any) -> None:
        network = Counting()
        train(folder, recipe, network, score=rated(network, [0.1, 0.7, 0.3, 0.2], []), **changes)

    go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", batches=stopping(at, KeyboardInterrupt))
    go(tmp_path / "cut")
    for name in ("toy", "toy.second", "toy.last"):
        whole, cut = ((tmp_path / place / "weights" / f"{name}.pt").read_bytes() for place in ("whole", "cut"))
        assert whole == cut, name


def test_the_best_weights_of_another_training_are_not_used(tmp_path: Path) -> None:
    recipe = Fit(**{**vars(RECIPE), "epochs": 4, "warmup_epochs": 0})
    network = Counting()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe, network, score=rated(network, [9, 9, 9, 9], []), batches=stopping(5, KeyboardInterrupt))
    resume_point(tmp_path / "weights" / "toy.pt").unlink()
    network = Counting()
    kept = train(tmp_path, recipe, network, score=rated(network, [0.1, 0.2, 0.3, 0.4], []))
    assert kept["updates"] == 8
