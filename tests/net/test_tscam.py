"""TS-CAM: both backbones, logits, coupled maps, groups, weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from misc.config import override
from net.seed.tscam import TsCam, TsCamOptions

SMALL = override(
    TsCam.recipes["sample"].cam.network,
    {"deit.image_size": 32, "deit.width": 24, "deit.depth": 2, "conformer.width": 24, "conformer.depth": 3},
)
BACKBONES = ("deit", "conformer")


def network(backbone: str, **changes: object) -> TsCam:
    torch.manual_seed(0)
    return override(SMALL, {"backbone": backbone, **changes}).build(4, {}).eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_map_is_the_semantic_one_times_what_the_class_token_attends_to(backbone: str) -> None:
    net, x = network(backbone), images(32, 32)
    semantic = net.semantic_maps(x) if backbone == "deit" else net.forward_heads(x)[0]
    factor = net.cam(x, torch.ones(2, 4)) / semantic  # (2, 4, 4, 4): the same for all classes
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-3, atol=1e-4)
    depth = len(net.blocks) if backbone == "deit" else net.depth
    # of each layer the class token spends a part of its attention, which sums to one, on the patches
    spent = factor[:, 0].sum((1, 2))
    assert (spent > 0.05 * depth).all() and (spent < depth).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_scores_are_the_same_in_training_and_test_and_trained_by_the_recipes_loss(backbone: str) -> None:
    net, x = network(backbone), images(32, 32)
    tags = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]])
    logits = net.classify(x, 4)
    loss = net({"image": x, "tags": tags}, 0.0)["cls"]
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([1, 3])))
    soft = network(backbone, loss="soft_margin")({"image": x, "tags": tags}, 0.0)["cls"]
    torch.testing.assert_close(soft, F.multilabel_soft_margin_loss(logits, tags))


def test_conformers_score_has_both_branches_and_its_map_one() -> None:
    net, x = network("conformer"), images(32, 32)
    before, maps = net.classify(x, 4), net.cam(x, torch.ones(2, 4))
    with torch.no_grad():
        net.conv_cls_head.bias += torch.arange(4.0)
    torch.testing.assert_close(net.classify(x, 4), before + torch.arange(4.0))
    torch.testing.assert_close(net.cam(x, torch.ones(2, 4)), maps)


def test_vectors_and_positions_are_not_decayed() -> None:
    net = network("deit")
    names = {p: n for n, p in net.named_parameters()}
    plain, decayed = ({names[p] for p in group.params} for group in net.param_groups())
    assert {"pos_embed", "cls_token", "head.bias", "norm.weight"} <= plain
    assert {"head.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decayed


def test_it_starts_from_a_classifier_without_its_head_and_from_its_own_checkpoint(tmp_path: Path) -> None:
    source, net = network("deit"), network("deit")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 1
    state = source.state_dict()
    head = net.head.weight.clone()
    classifier = {k: v for k, v in state.items() if not k.startswith("head.")}
    torch.save({"model": {**classifier, "head.weight": torch.zeros(9, 24)}}, tmp_path / "deit.pth")
    net.load_weights(str(tmp_path / "deit.pth"))
    torch.testing.assert_close(net.norm.bias, source.norm.bias)
    torch.testing.assert_close(net.head.weight, head)
    # as the public training saves it
    saved = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}, "best_map": 0.5}
    torch.save(saved, tmp_path / "model_best.pth")
    net.load_weights(str(tmp_path / "model_best.pth"))
    torch.testing.assert_close(net.head.weight, source.head.weight)
    del state["norm.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"missing: norm\.bias"):
        net.load_weights(str(tmp_path / "part.pth"))


def test_conformer_starts_from_its_classifier_and_from_its_own_checkpoint(tmp_path: Path) -> None:
    source, net = network("conformer"), network("conformer")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 1
    state = source.state_dict()
    head = net.trans_cls_head.weight.clone()
    linear = {"trans_cls_head.weight": torch.zeros(9, 24), "conv_cls_head.weight": torch.zeros(9, net.channels)}
    torch.save({**{k: v for k, v in state.items() if "cls_head" not in k}, **linear}, tmp_path / "classifier.pth")
    net.load_weights(str(tmp_path / "classifier.pth"))
    torch.testing.assert_close(net.trans_norm.bias, source.trans_norm.bias)
    torch.testing.assert_close(net.trans_cls_head.weight, head)
    torch.save(state, tmp_path / "whole.pth")
    net.load_weights(str(tmp_path / "whole.pth"))
    torch.testing.assert_close(net.trans_cls_head.weight, source.trans_cls_head.weight)


@pytest.mark.parametrize("wrong", [{"backbone": "resnet"}, {"loss": "l2"}])
def test_impossible_options_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TsCamOptions(**wrong)  # type: ignore[arg-type]
