"""ToCo: what the golden cases don't say: switches, division of the batch, exact resume, foreign weights, defects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import check_division

from misc.config import Fit, Machine
from misc.loop.fit import fit, make_rules, move_copies
from misc.loop.trainable import sample_streams
from net.backbone.vit import ViTOptions
from net.losses import balanced_cross_entropy
from net.seed.toco import Toco, TocoOptions, class_contrast
from net.shared.self_training import Term

CLASSES, SIDE, BATCH = 3, 48, 4
SMALL = TocoOptions(
    backbone=ViTOptions(32, 8, 16, 3, 2, drop_path=0.0), aux_layer=-2, fov_channels=8, fov_dilation=1, crops=2,
    crop_side=16, projection=8, scales=(1.0, 0.5), seg=Term(0.1, 0.5), reg=Term(0.05, 0.5),
)  # fmt: skip


def network(options: TocoOptions = SMALL) -> Toco:
    torch.manual_seed(3)
    return Toco(options, CLASSES)


def batch_of(start: int, count: int) -> dict[str, Tensor]:
    """Samples start .. start + count, functions of their numbers alone."""
    made: dict[str, list[Tensor]] = {}
    for number in range(start, start + count):
        rng = torch.Generator().manual_seed(number)
        for name in ("image", "view/global", "view/local"):
            made.setdefault(name, []).append(torch.randn(3, SIDE, SIDE, generator=rng))
        tags = (torch.rand(CLASSES, generator=rng) > 0.5).float()
        made.setdefault("tags", []).append(tags if tags.any() else torch.ones(CLASSES))
        made.setdefault("box", []).append(torch.tensor([0, SIDE - number % 3 * 8, 8, SIDE]))
        made.setdefault("box/image", []).append(torch.tensor([0, SIDE - number % 3 * 8, 0, SIDE - 8]))
        for name in ("image", "local"):
            made.setdefault(f"mirrored/{name}", []).append(torch.rand((), generator=rng) > 0.5)
        made.setdefault("seed", []).append(torch.tensor(1000 + number))
    return {name: torch.stack(values) for name, values in made.items()}


@pytest.mark.slow
@pytest.mark.parametrize("progress", [0.0, 0.75])
def test_terms_are_the_same_however_the_batch_is_divided(progress: float) -> None:
    whole = check_division(network(), batch_of, progress)
    assert (whole["seg"] != 0) == (progress > 0.5)


def test_the_decoder_decays_before_its_terms_begin() -> None:
    net = network()
    batch = batch_of(0, 2)
    batch |= net.prepare(batch, 0.1)
    assert "label" not in batch
    batch |= {f"counts/{k}": v for k, v in net.counts(batch).items()}
    sum(net(batch, 0.1).values()).backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert not any(p.grad.any() for p in net.decoder.parameters())
    before = net.decoder.conv7.weight.detach().clone()
    recipe = Fit(optimiser="adamw", lr=0.01, weight_decay=0.5)
    ((optimiser, _),) = make_rules(net.param_groups(), recipe, torch.device("cpu"))
    optimiser.step()
    torch.testing.assert_close(net.decoder.conv7.weight.detach(), before * (1 - 0.1 * 0.5))


def test_crops_come_from_each_sample_s_own_stream() -> None:
    net = network()
    both = net.prepare(batch_of(0, 2), 0.0)
    torch.rand(7)  # the global stream plays no part
    alone = net.prepare(batch_of(1, 1), 0.0)
    assert torch.equal(both["crops"][1:], alone["crops"]) and torch.equal(both["flags"][1:], alone["flags"])
    other = batch_of(1, 1) | {"seed": torch.tensor([5])}
    assert not torch.equal(net.prepare(other, 0.0)["crops"], alone["crops"])
    streams = sample_streams({"seed": torch.tensor([1, 1, 2])})
    draws = [tuple(stream.permutation(9)) for stream in streams]
    assert draws[0] == draws[1] != draws[2]


def test_mended_forms_of_published_defects() -> None:
    """Box on the mirrored image, box in pixels on the grid of patches, crops of the mirrored place."""
    net, batch = network(), batch_of(0, BATCH)
    grid = SIDE // SMALL.backbone.patch
    maps, keys = torch.ones(BATCH, 1, SIDE, SIDE), torch.zeros(BATCH, 1, dtype=torch.int64)

    def inside(**changes: bool) -> Tensor:
        net.settings = replace(SMALL, **changes)
        return net.token_label(maps, keys, batch) != 255

    published = inside()
    assert not published.any()  # the box begins at column 8, beyond the 6 columns of the grid
    mended = inside(token_box=True)
    assert mended[0, :, 1:].all() and not mended[0, :, 0].any()
    assert torch.equal(mended[:, -1:].any((1, 2)), batch["box"][:, 1] == SIDE)
    assert torch.equal(inside(token_box=True, mirrored_box=True), mended.flip(-1))
    assert mended.shape == (BATCH, grid, grid)

    net.settings = SMALL
    crops = net.prepare(batch, 0.0)["crops"]
    net.settings = replace(SMALL, shared_mirror=True)
    mirrored = batch["mirrored/local"] != batch["mirrored/image"]
    assert mirrored.any() and not mirrored.all()
    changed = (net.prepare(batch, 0.0)["crops"] != crops).flatten(1).any(1)
    assert torch.equal(changed, mirrored)


def test_a_half_without_pixels_is_zero_and_large_products_do_not_overflow() -> None:
    logits = torch.randn(2, 4, 6, 6, requires_grad=True)
    label = torch.full((2, 6, 6), 2)
    value = balanced_cross_entropy(logits, label, (label == 0).sum(), (label > 0).sum())
    assert value.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, label).item() / 2, rel=1e-5)
    value.backward()
    assert torch.isfinite(logits.grad).all()
    rows = 100 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    loss = class_contrast(rows[:2], rows, torch.tensor([[1, 1, 0, 1, 0, 1]]) > 0, 0.1)
    assert torch.isfinite(loss)


def loader(start: int):
    """Micro-batches of two for each update."""
    for step in range(start, 6):
        yield batch_of(4 * step, 2)
        yield batch_of(4 * step + 2, 2)


def train(folder: Path, batches=loader) -> dict[str, Tensor]:
    net = network()
    weights = folder / "cam.pt"
    fit(
        net, batches, Fit(steps=6, batch_size=4, micro_batch=2, optimiser="adamw", lr=1e-3), 6, seed=0, weights=weights,
        machine=Machine(device="cpu", workers=0, checkpoint_every=2), device=torch.device("cpu"), log=folder / "log",
        name="cam", made_by={}, description={},
    )  # fmt: skip
    return net.state_dict()


@pytest.mark.slow
def test_a_killed_training_ends_bit_for_bit_like_an_undisturbed_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    assert not torch.equal(whole["proj_head.mlp.2.weight"], whole["proj_head_t.mlp.2.weight"])

    def killed(start: int):
        for number, batch in enumerate(loader(start)):
            if number == 7:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "torn", killed)
    torn = train(tmp_path / "torn")
    assert whole.keys() == torn.keys() and all(torch.equal(whole[k], torn[k]) for k in whole)


def test_the_teacher_follows_the_student_and_is_no_parameter_of_the_optimiser() -> None:
    net = network()
    listed = {id(p) for group in net.param_groups() for p in group.params}
    assert not listed & {id(p) for p in net.proj_head_t.parameters()}
    assert listed == {id(p) for p in net.parameters() if p.requires_grad}
    with torch.no_grad():
        net.proj_head.mlp[0].weight.fill_(1.0)
        net.proj_head_t.mlp[0].weight.fill_(0.0)
    move_copies(net)
    assert torch.allclose(net.proj_head_t.mlp[0].weight, torch.tensor(0.1))


def test_released_checkpoints_and_classifiers_load(tmp_path: Path) -> None:
    source = network()
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "released.pth")
    torch.manual_seed(9)
    target = Toco(SMALL, CLASSES)
    assert not torch.equal(target.decoder.conv6.weight, source.decoder.conv6.weight)
    target.load_weights(str(tmp_path / "released.pth"))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())
    with pytest.raises(ValueError, match="another shape"):
        Toco(SMALL, CLASSES + 1).load_weights(str(tmp_path / "released.pth"))

    encoder = source.encoder.state_dict()
    torch.save({"model": encoder}, tmp_path / "deit.pth")
    target = Toco(SMALL, CLASSES)
    target.load_weights(str(tmp_path / "deit.pth"))
    assert all(torch.equal(v, encoder[k]) for k, v in target.encoder.state_dict().items())


@pytest.mark.parametrize("change", [{"crop_side": 4}, {"aux_layer": 5}, {"low": 0.8}, {"temperature": 0.0}])
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} = "):
        replace(SMALL, **change)


def test_images_of_any_size_give_maps_and_masks() -> None:
    net = network().eval()
    with torch.inference_mode():
        images = torch.randn(2, 3, 37, 70)
        assert net.cam(images, torch.ones(2, CLASSES)).shape == (2, CLASSES, 4, 8)
        assert net.logits(images).shape == (2, CLASSES + 1, 4, 8)
        assert net.classify(images, CLASSES).shape == (2, CLASSES)


@pytest.mark.parametrize("rule", ["max_relu", "max"])
def test_labels_come_from_maps_clipped_at_zero_or_not(rule: str) -> None:
    """Published: all that is below 0 is one value. Not clipped, only the lowest place has it."""
    net, batch = network(), batch_of(0, BATCH)
    net.settings = replace(SMALL, map_merge=rule)
    ramp = torch.linspace(-1, 1, SIDE)[:, None].expand(SIDE, SIDE)
    net.raw_maps = lambda images: (ramp.expand(len(images), CLASSES, SIDE, SIDE),) * 2
    (maps, _), _, real = net.online_maps(batch)
    lowest = (maps[real] == 0).flatten(1).float().mean(1)  # share of the place, of each map
    assert lowest.tolist() == pytest.approx([0.5 if rule == "max_relu" else 1 / SIDE] * len(lowest))
