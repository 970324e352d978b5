"""MoRe: what the golden cases don't say: division of the batch, draws, maps, switches, foreign weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from training import check_division, mean_terms

from net.backbone.vit import ViTOptions
from net.seed.more import More, MoreOptions, certain_patches, draw_uncertain
from net.shared.self_training import Term, patch_contrast

CLASSES, SIDE = 3, 64
SMALL = MoreOptions(
    backbone=ViTOptions(32, 8, 16, 3, 2, drop_path=0.0), aux_layer=-2, fov_channels=8, fov_dilation=1,
    scales=(1.0, 0.5), seg=Term(0.12, 0.25), reg=Term(0.05, 0.25),
)  # fmt: skip


def network(options: MoreOptions = SMALL) -> More:
    torch.manual_seed(3)
    return More(options, CLASSES)


def batch_of(start: int, count: int) -> dict[str, Tensor]:
    """Samples start .. start + count, functions of their numbers alone."""
    images, tags = [], []
    for number in range(start, start + count):
        rng = torch.Generator().manual_seed(number)
        images.append(torch.randn(3, SIDE, SIDE, generator=rng))
        tags.append((torch.rand(CLASSES, generator=rng) > 0.4).float())
    return {"image": torch.stack(images), "tags": torch.stack(tags), "seed": torch.arange(start, start + count)}


@pytest.mark.slow
@pytest.mark.parametrize("progress", [0.0, 0.4, 0.75])
def test_terms_are_the_same_however_the_batch_is_divided(progress: float) -> None:
    whole = check_division(network(), batch_of, progress)
    assert (whole["seg"] != 0) == (progress > 0.25)


def test_one_is_added_to_the_pair_counts_of_a_gpu_s_images() -> None:
    """More than two for MoRe on VOC; a batch of several GPUs' images gets as many ones."""
    recipes = {name: recipe.cam for name, recipe in More.recipes.items()}
    assert recipes["published"].network.images_per_gpu == recipes["published"].fit.batch_size == 4
    assert recipes["published_coco"].network.images_per_gpu == 2
    patches = torch.ones(4, 2, 1, 2)
    label = torch.tensor([[0, 0]]).expand(4, 1, 2)
    counts = torch.tensor(8.0), torch.tensor(0.0)
    for images, added in ((2, 2), (4, 1)):
        assert patch_contrast(patches, label, *counts, images).item() == pytest.approx((1 - 8 / (8 + added)) / 2)
    net, batch = network(replace(SMALL, images_per_gpu=1)), batch_of(0, 4)
    assert mean_terms(net, [batch], 0.4)["ptc"] != pytest.approx(mean_terms(network(), [batch], 0.4)["ptc"], rel=1e-6)


def test_labels_come_from_the_final_maps_after_the_switch() -> None:
    net, batch = network(), batch_of(0, 2)
    before, after = net.prepare(batch, 0.5), net.prepare(batch, 0.51)
    assert torch.equal(before["token_label"], after["token_label"])
    assert not torch.equal(before["certain_label"], after["certain_label"])


def test_what_is_never_used_is_not_trained() -> None:
    net, batch = network(), batch_of(0, 2)
    batch |= net.prepare(batch, 0.0)
    batch |= {f"counts/{k}": v for k, v in net.counts(batch).items()}
    sum(net(batch, 0.0).values()).backward()
    unused = {"encoder.head.weight", "encoder.head.bias", "graph_layer._fc1.0.weight", "graph_layer._fc1.0.bias"}
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad != (name in unused), name
        assert (parameter.grad is None) == (name in unused), name
    listed = {id(p) for group in net.param_groups() for p in group.params}
    assert listed == {id(p) for p in net.parameters() if p.requires_grad}


def first(count: int) -> np.ndarray:
    return np.arange(count)


def test_uncertain_tokens_are_taken_at_the_corner_or_the_centre() -> None:
    label = torch.ones(9, 9, dtype=torch.int64)
    label[4, 5] = 255
    corner, centre = (draw_uncertain(label, first, at) for at in (False, True))
    # the one window whose centre is unknown, and one more whose centre is object
    assert corner[1, 2] == 1 and corner.sum() == 2 and corner[0, 0] == 1
    assert centre[4, 5] == 1 and centre.sum() == 2 and centre[3, 3] == 1
    assert draw_uncertain(torch.full((9, 9), 255), first, False).sum() == 2  # too little object in every window
    assert not draw_uncertain(label[:6], first, False).any()  # a grid without a window: published code fails
    many = torch.full((20, 20), 255)
    many[::2] = 1
    assert draw_uncertain(many, first, True).sum() == 8


def test_certain_patches_do_not_overflow() -> None:
    tokens, patches = torch.randn(2, CLASSES, 16), 1e3 * torch.randn(2, 16, 4, 4)
    value = certain_patches(tokens, patches, torch.ones(2, 4, 4, dtype=torch.int64), torch.ones(2, CLASSES), 0.1)
    assert torch.isfinite(value) and value > 0


def test_either_map_serves_the_cam_steps() -> None:
    images, tags = torch.randn(1, 3, 40, 64), torch.ones(1, CLASSES)
    nets = {name: network(replace(SMALL, map=name)).eval() for name in ("cam", "lam")}
    maps = {name: net.cam(images, tags) for name, net in nets.items()}
    assert maps["cam"].shape == maps["lam"].shape == (1, CLASSES, 5, 8)
    tokens, patches, _ = nets["lam"].encoder(images)
    rebuilt = nets["lam"].class_tokens(tokens, patches)
    torch.testing.assert_close(maps["lam"][0, 1, 2, 3], rebuilt[0, 1] @ patches[0, :, 2, 3])
    assert not torch.allclose(maps["cam"], maps["lam"])


def test_released_checkpoints_load(tmp_path: Path) -> None:
    source = network()
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    torch.save(state, tmp_path / "voc.pth")
    torch.save({"step": 7, "model_state_dict": state, "optimizer_state_dict": {}, "lr": 0.1}, tmp_path / "coco.pth")
    for name in ("voc.pth", "coco.pth"):
        torch.manual_seed(9)
        target = More(SMALL, CLASSES)
        target.load_weights(str(tmp_path / name))
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items()), name


def test_class_tokens_start_alike_from_a_classifier(tmp_path: Path) -> None:
    net = network()
    state = net.encoder.state_dict()
    one = {"cls_token": state["cls_token"][:, :1], "pos_embed": state["pos_embed"][:, CLASSES + 3 :]}
    kept = {k: v for k, v in state.items() if not k.startswith(("head.", "cls_token", "pos_embed"))}
    torch.save({**kept, **one}, tmp_path / "vit.pth")
    net.load_weights(str(tmp_path / "vit.pth"))
    assert torch.equal(net.encoder.cls_token[0, 4:], one["cls_token"][0].expand(CLASSES, -1))
    assert torch.equal(net.encoder.pos_embed[:, CLASSES + 3 :], one["pos_embed"])
    assert net.encoder.pos_embed[:, :4].std() > 0.5
