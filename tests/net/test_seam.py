"""net/seed/seam.py: what the golden cases don't say about SEAM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from misc.config import override
from net.backbone.resnet38 import ResNet38Options
from net.refine.psa import PSA
from net.seed import seam
from net.seed.seam import Seam, SeamOptions
from tests import plain

CLASSES = 3
TINY = SeamOptions(
    resnet38=ResNet38Options(width=0.125, depth=(1, 1, 1, 1), dropout=(0.0, 0.0), frozen="b2"), dropout=0.0
)


def network(classes: int = CLASSES, options: SeamOptions = TINY) -> Seam:
    torch.manual_seed(0)
    return options.build(classes, {})


def batch(size: tuple[int, int] = (40, 56), images: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])[:images]
    return {"image": torch.randn(images, 3, *size), "tags": tags}


@pytest.mark.parametrize("block", [7, 54, 512])
def test_correlation_by_blocks_and_its_gradient_are_the_plain_ones(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "_BLOCK", block)
    torch.manual_seed(0)
    values, features = torch.rand(2, 4, 6, 9), torch.randn(2, 16, 6, 9, requires_grad=True)
    results = []
    for form in (plain.correlate, seam.correlate):
        spread = form(values, features)
        (spread * torch.linspace(-1, 1, spread.numel()).view_as(spread)).sum().backward()
        results.append((spread.detach(), features.grad))
        features.grad = None
    (expected, wanted), (spread, gradient) = results
    torch.testing.assert_close(spread, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("block", "kept"), [(53, False), (54, True)])
def test_a_matrix_of_one_block_is_kept_for_the_backward_pass(
    block: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam, "_BLOCK", block)
    saved: list[int] = []

    def save(values: Tensor) -> Tensor:
        saved.append(values.numel())
        return values

    with torch.autograd.graph.saved_tensors_hooks(save, lambda values: values):
        seam.correlate(torch.rand(1, 2, 6, 9), torch.randn(1, 4, 6, 9, requires_grad=True))
    assert (54 * 54 in saved) == kept and max(saved) <= 54 * 54


@pytest.mark.parametrize("trained", [False, True])
def test_correlation_never_holds_the_whole_matrix(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "_BLOCK", 10)
    largest: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, Tensor) else 0)
            return result

    features = torch.randn(1, 4, 5, 20).requires_grad_(trained)
    with Watch():
        spread = seam.correlate(torch.rand(1, 2, 5, 20), features)
        if trained:
            spread.sum().backward()
    assert max(largest) == 4 * 100  # the features; the matrix has 10,000 entries


def test_correlation_averages_and_stays_in_float32() -> None:
    """Weights of a pixel sum to one, in mixed precision too."""
    features = torch.rand(1, 8, 5, 7, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spread = seam.correlate(torch.ones(1, 2, 5, 7), features)
    assert spread.dtype == torch.float32
    torch.testing.assert_close(spread, torch.ones(1, 2, 5, 7), rtol=0, atol=1e-4)


def test_the_plain_part_of_a_training_trains_the_classifier_alone() -> None:
    net = network(options=override(TINY, {"plain_share": 0.5}))
    plain = net(batch(), 0.49)
    assert list(plain) == ["cls"] and net.finds_unused
    plain["cls"].backward()
    assert net.fc8.weight.grad.any() and all(p.grad is None for p in (net.f8_3.weight, net.f8_4.weight, net.f9.weight))
    whole = net(batch(), 0.5)
    assert len(whole) > 1 and not network().finds_unused and network()(batch(), 0.0).keys() == whole.keys()


def test_attention_values_keep_the_strongest_class() -> None:
    cam = torch.tensor([[9.0, 9.0], [4.0, 1.0], [2.0, -1.0], [4.0, 0.5]]).view(1, 4, 1, 2).requires_grad_()
    values = seam.attention_values(cam)
    assert not values.requires_grad
    # pixel 0: the first and third class tie and both stay, the second is weaker by an epsilon; pixel 1: the first wins
    expected = torch.tensor([[0.0, 0.75], [1.0, 0.25], [0.0, 0.0], [1.0, 0.0]]).view(1, 4, 1, 2)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)


def test_empty_maps_give_finite_losses_and_gradients() -> None:
    maps = [torch.zeros(2, 4, *size, requires_grad=True) for size in ((20, 24), (20, 24), (6, 7), (6, 7))]
    losses = seam.seam_losses(*maps, torch.zeros(2, 3))
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(m.grad).all() for m in maps)


def test_equivariance_losses_of_equivariant_maps_are_zero() -> None:
    """Second maps that are the resized first ones, of a class that is present everywhere at most once a pixel."""
    tags = torch.tensor([[1.0, 0.0]])
    ramp = torch.linspace(0, 1, 21).expand(1, 1, 21, 21)
    first = torch.cat([1 - ramp, ramp, torch.zeros_like(ramp)], 1)
    second = F.interpolate(first, size=(11, 11), mode="bilinear", align_corners=True)
    er, ecr1, ecr2 = seam.equivariance_losses(first, first, second, second, tags)
    assert er < 1e-4 and ecr1 < 1e-3 and ecr2 < 1e-3
    er, ecr1, ecr2 = seam.equivariance_losses(first, first, second.flip(-1), second, tags)
    assert er > 0.1 and ecr1 > 0.1 and ecr2 < 1e-3


def test_loss_of_a_batch_is_the_mean_of_its_images() -> None:
    """So that accumulation and several processes train alike."""
    model, both = network().train(), batch()
    whole = model(both, 0.0)
    assert list(whole) == ["cls", "min", "er", "ecr"]
    parts = [model({k: v[i : i + 1] for k, v in both.items()}, 0.0) for i in range(2)]
    for name, value in whole.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-6)


def grads(model: Seam, *terms: str) -> set[str]:
    """Names of the layers that these loss terms reach."""
    model.zero_grad()
    losses = model(batch(), 0.0)
    sum(losses[t] for t in terms).backward()
    return {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_gradient_routes() -> None:
    """seam.md section 4.1: ECR and the minimum pooling train the attention only, the others all below fc8 but it."""
    model = network().train()
    attention = {"f8_3", "f8_4", "f9"}
    assert grads(model, "min") == grads(model, "ecr") == attention
    reached = {"b3", "b4", "b5", "b6", "b7", "fc8"}
    assert grads(model, "cls") == reached
    assert not model.fc8.weight.grad[0].any() and model.fc8.weight.grad[1:].any()
    assert grads(model, "er") == reached
    assert not model.fc8.weight.grad[0].any()


def test_maps_have_the_size_of_the_input_and_no_background() -> None:
    model = network().eval()
    sample = batch((37, 50))
    with torch.inference_mode():
        maps = model.cam(sample["image"], sample["tags"])
    assert maps.shape == (2, CLASSES, 37, 50) and maps.dtype == torch.float32
    assert maps.min() >= 0 and 0 < maps.max() <= 1


def test_groups_hold_every_trained_parameter_once() -> None:
    free = override(TINY, {"resnet38.freeze_bn": False, "resnet38.frozen": "none"})
    for options, number in ((TINY, 4), (free, 5)):
        model = network(options=options)
        groups = model.param_groups()
        listed = [p for g in groups for p in g.params]
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(groups) == number and len(listed) == len(trained) == len({id(p) for p in listed})
        assert {id(p) for p in listed} == {id(p) for p in trained}
        assert {id(p) for p in groups[2].params} == {id(getattr(model, n).weight) for n in model.head}
        if number == 5:
            assert not groups[4].decay and all(p.ndim == 1 for p in groups[4].params)


def save(tmp_path: Path, state: dict[str, Tensor]) -> str:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return str(path)


def other_state(classes: int = CLASSES) -> dict[str, Tensor]:
    return {k: v + 1 for k, v in network(classes).state_dict().items()}


def test_whole_checkpoint_is_loaded(tmp_path: Path) -> None:
    model, state = network(), other_state()
    model.load_weights(save(tmp_path, state))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("classifier", [True, False], ids=["psa classifier", "backbone"])
def test_start_without_head(tmp_path: Path, classifier: bool) -> None:
    state = {k: v for k, v in other_state().items() if k.split(".")[0] not in Seam.head}
    if classifier:  # no background, so one row less
        state["fc8.weight"] = torch.zeros(CLASSES, network().fc8.in_channels, 1, 1)
    model = network()
    head = model.fc8.weight.clone()
    model.load_weights(save(tmp_path, state))
    assert torch.equal(model.bn7.weight, state["bn7.weight"]) and torch.equal(model.fc8.weight, head)


def test_wrong_seam_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="number of classes"):
        network().load_weights(save(tmp_path, other_state(CLASSES + 1)))
    state = other_state()
    del state["f8_3.weight"]
    with pytest.raises(ValueError, match="f8_3"):
        network().load_weights(save(tmp_path, state))
    del state["b7.conv_branch1.weight"], state["f9.weight"]
    with pytest.raises(ValueError, match="b7.conv_branch1"):
        network().load_weights(save(tmp_path, state))


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="second_scale"):
        SeamOptions(second_scale=0)


@pytest.mark.parametrize("preset", ["published", "sample"])
def test_recipes_fit_their_refiner_and_build(preset: str) -> None:
    recipe = Seam.recipes[preset]
    refine = override(PSA.recipes[preset], recipe.refine)
    if preset == "published":
        assert (refine.label.alpha_high, refine.walk.logt, refine.walk.alpha) == (24, 6, 6)
    with torch.device("meta"):
        model = recipe.cam.network.build(20, {})
    if preset == "published":
        assert sum(p.numel() for p in model.parameters()) == 105_358_208
        assert model.fc8.weight.shape[0] == 21 and model.dropout7.p == 0.5
