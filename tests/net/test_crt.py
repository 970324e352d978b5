"""CRT: tiles, rounds, the joint loss and its epochs, groups, weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import run_sample
from misc.config import override
from net.seed import crt
from net.seed.crt import Crt, CrtOptions
from voc12.generated.sets import generate

SMALL = override(
    Crt.recipes["sample"].cam.network,
    {"cnn.width": 0.125, "transformer.image_size": 32, "transformer.width": 24, "transformer.depth": 2},
)


def network(**changes: object) -> Crt:
    torch.manual_seed(0)
    return override(SMALL, changes).build(3, {}).eval()


def images(count: int, *size: int) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def batch(side: int = 48) -> dict[str, Tensor]:
    return {"image": images(2, side, side), "tags": torch.tensor([[1.0, 0, 1], [0, 1, 0]])}


# ------------------------------------------------------------------ tiles


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (64, 32)])
def test_what_is_cut_and_merged_again_is_the_image(size: tuple[int, int]) -> None:
    x = images(3, *size)
    tiles, grid = crt.cut_tiles(x, 32)
    assert grid == tuple(side // 16 - 1 for side in size) and len(tiles) == 3 * grid[0] * grid[1]
    torch.testing.assert_close(crt.merge_tiles(tiles, grid), x)


def test_tiles_are_tile_major_and_overlapping_ones_are_averaged() -> None:
    tiles, grid = crt.cut_tiles(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 32, 48), 32)
    assert grid == (1, 2) and tiles[:, 0, 0, 0].tolist() == [0, 1, 0, 1]
    maps = torch.tensor([0.0, 6.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    assert crt.merge_tiles(maps, (1, 2))[0, 0, 0].tolist() == [0, 0, 3, 3, 6, 6]


def test_images_that_tiles_do_not_cover_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 16 and at least 32, got 40 x 32.*cam\.augment\.crop"):
        crt.cut_tiles(images(1, 40, 32), 32)


# ------------------------------------------------------------------ the transformer


def test_rounds_add_what_goes_in_and_one_round_is_the_plain_transformer() -> None:
    x = torch.randn(2, 17, 24)
    plain, twice = network(rounds=1).transformer, network(rounds=2).transformer
    block = plain.forward_blocks(x)
    torch.testing.assert_close(twice.forward_blocks(x), (x + block) + plain.forward_blocks(x + block))


def test_a_tiled_image_is_looked_at_tile_by_tile() -> None:
    """The map of the last tile knows nothing of the first one's part."""
    net = network(**{"transformer.patch": 8})
    x = images(1, 32, 80)
    other = x.clone()
    other[..., :16] += 5
    change = (net.transformer(x) - net.transformer(other)).abs()[0].amax((0, 1)).tolist()
    assert min(change[:4]) > 0 and max(change[4:]) == 0


def test_maps_are_rectified_after_the_tiles_are_merged() -> None:
    net = network()
    x = images(2, 40, 70)
    maps = net.cam(x, torch.ones(2, 3))
    signed = net.transformer.forward_any_size(x, coupled=True)
    assert maps.shape == (2, 3, 5, 9) and (signed < 0).any()
    torch.testing.assert_close(maps, signed.relu())
    alone = torch.cat([net.cam(image[None], torch.ones(1, 3)) for image in x])
    torch.testing.assert_close(maps, alone, rtol=1e-4, atol=1e-5)


def test_without_tiles_the_image_is_seen_whole() -> None:
    net = network(tiles=False)
    x = images(1, 32, 80)
    other = x.clone()
    other[..., :8] += 5
    assert (net.transformer(x) - net.transformer(other)).abs()[..., -1].max() > 0
    assert net.cam(images(1, 35, 50), torch.ones(1, 3)).shape == (1, 3, 4, 6)


def test_scores_are_the_means_of_the_maps_that_are_trained() -> None:
    net = network(tiles=False)
    x = batch(32)["image"]
    torch.testing.assert_close(net.classify(x, 3), net.transformer(x).mean((2, 3)))


# ------------------------------------------------------------------ training


def test_each_branch_learns_from_its_own_loss_and_both_from_their_difference() -> None:
    net = network(agreement_from=0.5)

    def reached(names: list[str], progress: float) -> set[str]:
        net.zero_grad()
        terms = net(batch(), progress)
        sum(terms[name] for name in names).backward()
        return {n.split(".")[0] for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}

    assert list(net(batch(), 0.49)) == ["cnn", "transformer"]
    assert reached(["cnn"], 0.0) == {"cnn"} and reached(["transformer"], 0.0) == {"transformer"}
    assert reached(["agreement"], 0.5) == {"cnn", "transformer"}


def test_the_difference_is_weighted_and_compared_where_the_option_says() -> None:
    one, other = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    other[0, 0, 0, 0] = 1  # a corner: aligned corners give it less than its share of the image
    assert crt.agreement_loss(one, other, None).item() == pytest.approx(1 / 18)
    assert crt.agreement_loss(one, other, (48, 48)).item() < 0.6 / 18
    for weight in (0.1, 1.0):
        net = network(agreement=weight, agreement_size="grid")
        maps = net.cnn(batch()["image"]) - net.transformer(batch()["image"])
        torch.testing.assert_close(net(batch(), 0.9)["agreement"], weight * maps.abs().mean())


def test_alternating_epochs() -> None:
    options = override(SMALL, {"agreement_from": 4 / 20, "agreement_period": 10 / 20})
    used = [epoch for epoch in range(1, 21) if options.agrees((epoch - 1) / 20)]
    assert used == [5, 6, 7, 8, 9, 15, 16, 17, 18, 19]


def test_one_rule_or_two() -> None:
    net = network(head_lr=10.0)
    names = {p: n for n, p in net.named_parameters()}
    body, heads = net.param_groups()
    assert {names[p] for p in heads.params} == {
        "cnn.classifier.weight", "transformer.head.weight", "transformer.head.bias",
    }  # fmt: skip
    assert (body.lr_scale, heads.lr_scale, body.decay, heads.decay) == (1, 10, True, True)
    assert body.rule is None and heads.rule is None

    two = network(optimisers="two").param_groups()
    assert [(g.lr_scale, g.decay, g.rule and (g.rule.optimiser, g.rule.lr, g.rule.momentum)) for g in two] == [
        (1, False, None), (1, True, None), (1, True, ("sgd", 0.005, 0)), (10, True, ("sgd", 0.005, 0)),
    ]  # fmt: skip


def test_frozen_stages_are_in_no_group() -> None:
    published = override(SMALL, {"cnn.frozen": "layer2", "cnn.norm": "fixed"})
    net = published.build(3, {})
    groups = {p for group in net.param_groups() for p in group.params}
    names = {n.split(".")[2] for n, p in net.named_parameters() if p in groups and n.startswith("cnn.resnet50")}
    assert names == {"layer3", "layer4"}


# ------------------------------------------------------------------ weights


def test_it_starts_from_the_official_files_of_both_branches(tmp_path: Path) -> None:
    source, net = network(), network()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 1
    torch.save(source.transformer.state_dict(), tmp_path / "deits_cam.pth")
    official = source.cnn.state_dict()
    aliases = {k.replace("resnet50.layer1", "stage1.4"): v for k, v in official.items() if "layer1" in k}
    torch.save({**official, **aliases, "newly_added.0.weight": official["classifier.weight"]}, tmp_path / "res_cam.pth")
    report = [net.load_weights(str(tmp_path / name)) for name in ("deits_cam.pth", "res_cam.pth")]
    assert all("0 missing" in line for line in report), report
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name])
    torch.save(source.state_dict(), tmp_path / "cam.pt")
    again = override(SMALL, {}).build(3, {})
    again.load_weights(str(tmp_path / "cam.pt"))
    torch.testing.assert_close(again.cnn.classifier.weight, source.cnn.classifier.weight)


def test_two_weight_files_are_checked_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "deit.pth"
    there.write_bytes(b"x")
    flags = ["--root", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--steps", "1"]
    generate(tmp_path / "set", images=2, val=1, classes=2, long_side=(64, 70))
    assert run_sample.main(["crt", *flags, "--cam.weights", f"{there},{tmp_path / 'nothing.pth'}"]) == 2
    assert f"{tmp_path / 'nothing.pth'}: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"agreement_from": 1.5}, {"agreement_period": -0.5}, {"loss": "l2"}])
def test_impossible_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CrtOptions(**wrong)  # type: ignore[arg-type]


def test_tiles_must_overlap_in_whole_patches() -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of two patches"):
        override(SMALL, {"transformer.image_size": 40, "transformer.patch": 8})
