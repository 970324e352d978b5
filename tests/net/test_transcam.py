"""net/backbone/conformer.py and net/seed/transcam.py: what the golden cases don't say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.config import CamInference, override
from misc.infer import cams
from net.backbone import conformer, transformer
from net.backbone.conformer import Conformer, ConformerOptions
from net.backbone.transformer import QueryKey
from net.refine.psa import PSA
from net.seed.transcam import TransCam, TransCamOptions, refine_map
from net.segment.deeplabv1 import DeepLabV1

CLASSES = 3
TINY = ConformerOptions(base=8, ratio=2, width=24, depth=3, heads=2, drop_path=0.0)


def network(classes: int = CLASSES, **changes: object) -> TransCam:
    torch.manual_seed(0)
    return override(TransCamOptions(backbone=TINY), changes).build(classes, {})


def randomise(module: nn.Module) -> nn.Module:
    """Larger weights and statistics that are not 0 and 1, so that every part shows in the result."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if name.endswith("var") else torch.randn_like(value) * 0.3)
    return module


def batch(size: tuple[int, int] = (48, 32)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"image": torch.randn(2, 3, *size), "tags": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])}


def heads(tokens: int = 7) -> QueryKey:
    torch.manual_seed(3)
    return QueryKey(*torch.randn(2, 2, 3, tokens, 5))


# ------------------------------------------------------------------------------------------------ Conformer


def test_epsilons() -> None:
    """transcam.md section 8, trap 3: too small to show in a result."""
    found = {n: m.eps for n, m in Conformer(TINY).named_modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)}
    assert found.pop("bn1") == found.pop("trans_norm") == 1e-5
    assert len(found) > 20 and set(found.values()) == {1e-6}


@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize("depth", [3, 6])
def test_map_and_tokens_share_a_grid(patch: int, depth: int) -> None:
    model = Conformer(override(TINY, {"patch": patch, "depth": depth})).eval()
    layers: list[int] = []
    seen: list[tuple[int, ...]] = []

    def visit(layer: int, attention: QueryKey) -> None:
        layers.append(layer)
        seen.append(tuple(attention.products().shape))

    with torch.inference_mode():
        features, token = model.forward_features(batch((64, 48))["image"], visit)
    assert features.shape == (2, model.channels, 64 // patch, 48 // patch) and token.shape == (2, 24)
    tokens = 1 + 64 * 48 // patch**2
    assert layers == list(range(depth)) and set(seen) == {(2, 2, tokens, tokens)}


def test_stride_of_the_last_fusion() -> None:
    """The ImageNet classifier's last map is half as large, of the same weights."""
    stock = Conformer(override(TINY, {"last_stride": 2})).eval()
    model = Conformer(TINY).eval()
    model.load_state_dict(stock.state_dict())
    with torch.inference_mode():
        features, token = stock.forward_features(batch((48, 80))["image"])
        assert features.shape[-2:] == (2, 3)  # of 3 x 5, rounded up
        larger, same = model.forward_features(batch((48, 80))["image"])
    assert torch.equal(token, same)
    # the shortcut samples every other cell, and the 3 x 3 convolution is centred on the same ones
    torch.testing.assert_close(larger[:, :, ::2, ::2], features, rtol=1e-4, atol=1e-5)


def test_visiting_attention_changes_nothing() -> None:
    model = randomise(Conformer(TINY)).eval()
    plain = model.forward_features(batch()["image"])
    seen: list[Tensor] = []
    looked = model.forward_features(batch()["image"], lambda layer, attention: seen.append(attention.mean_weights()))
    assert len(seen) == 3 and all(torch.equal(a, b) for a, b in zip(plain, looked, strict=True))
    for weights in seen:
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 7))


def test_means_over_heads_have_gradients() -> None:
    for kind in ("mean_logits", "mean_weights"):
        attention = heads()
        attention.query.requires_grad_()
        picked = torch.linspace(0, 1, 49).view(7, 7)
        (getattr(attention, kind)() * picked).sum().backward()
        got, attention.query.grad = attention.query.grad, None
        plain = attention.products() if kind == "mean_logits" else attention.products().softmax(-1)
        (plain.mean(1) * picked).sum().backward()
        torch.testing.assert_close(got, attention.query.grad, rtol=1e-4, atol=1e-6)


def test_class_token_is_doubled_only_where_asked() -> None:
    """Doubling on entering blocks 2 to 12 shows in the token; the block's own weights see it through a layer norm."""
    block = conformer.ConvTransBlock(16, 16, TINY, stride=1, cells=1, last_stride=None, drop_path=0.0).eval()
    for parameter in (block.trans_block.attn.proj, block.trans_block.mlp.fc2):
        nn.init.zeros_(parameter.weight)
        nn.init.zeros_(parameter.bias)
    x, tokens = torch.randn(1, 16, 2, 3), torch.randn(1, 7, 24)
    _, doubled = block(x, tokens, (2, 3))
    torch.testing.assert_close(doubled[:, 0], 2 * tokens[:, 0])
    block.doubled = False
    _, plain = block(x, tokens, (2, 3))
    torch.testing.assert_close(plain[:, 0], tokens[:, 0])
    assert torch.equal(plain[:, 1:], doubled[:, 1:])


def test_couplings() -> None:
    """Up: nearest, every cell of a token alike. Down: the mean of the projected cells of a token."""
    up = randomise(conformer.Expand(24, 8, 4)).eval()
    tokens = torch.randn(2, 6, 24)
    spread = up(tokens, (2, 3))
    assert spread.shape == (2, 8, 8, 12) and spread.unique().numel() > 6
    assert torch.equal(spread, spread[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3))
    down = randomise(conformer.Squeeze(8, 24, 4))
    x = torch.randn(2, 8, 8, 12)
    plain = F.avg_pool2d(down.conv_project(x), 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(down(x), F.gelu(down.ln(plain)), rtol=1e-4, atol=1e-5)


def test_drop_path_only_in_training() -> None:
    model = Conformer(override(TINY, {"drop_path": 0.5}))
    chances = [m.drop_path.p for m in model.modules() if isinstance(m, transformer.TransformerBlock)]
    assert chances == [0.0, 0.25, 0.5]
    image = batch()["image"]
    model.eval()
    assert torch.equal(model.forward_features(image)[1], model.forward_features(image)[1])
    model.train()
    assert not torch.equal(model.forward_features(image)[1], model.forward_features(image)[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"patch": 12}, "patch"), ({"depth": 4}, "depth"), ({"heads": 5}, "heads"), ({"base": 3, "ratio": 3}, "base"),
     ({"drop_path": 1.0}, "drop_path"), ({"last_stride": 3}, "last_stride"), ({"mlp_ratio": 0.0}, "mlp_ratio")],
)  # fmt: skip
def test_impossible_backbones(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(TINY, changes)


def test_other_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="multiples of 16, got 48 x 40"):
        Conformer(TINY).forward_features(torch.zeros(1, 3, 48, 40))


# ------------------------------------------------------------------------------------------------ TransCAM


def test_which_way_the_attention_goes() -> None:
    """A single pair: the first patch attends to the last, the class token to the second."""
    attention = torch.zeros(1, 5, 5)
    attention[0, 1, 4], attention[0, 0, 2], attention[0, 3, 0] = 0.5, 0.25, 9.0
    maps = torch.tensor([[[[1.0, 2.0], [3.0, -4.0]]]])
    expected = {
        "convcam": [[1.0, 2.0], [3.0, -4.0]],
        "transcam": [[-2.0, 0.0], [0.0, 0.0]],
        "attnagg": [[0.0, 0.0], [0.0, 0.5]],
        "clsattn": [[0.0, 0.5], [0.0, 0.0]],
    }
    for method, values in expected.items():
        assert refine_map(maps, attention, method).tolist() == [[values]]


@pytest.mark.parametrize("size", [(48, 32), (33, 50)])
def test_maps_of_any_size(size: tuple[int, int]) -> None:
    model, sample = randomise(network()).eval(), batch(size)
    with torch.inference_mode():
        maps = {}
        for method in ("transcam", "convcam", "clsattn", "attnagg"):
            model.method = method
            maps[method] = model.cam(sample["image"], sample["tags"])
    assert all(m.shape == (2, CLASSES, -(-size[0] // 16), -(-size[1] // 16)) for m in maps.values())
    assert all(m.dtype == torch.float32 and torch.isfinite(m).all() for m in maps.values())
    assert maps["convcam"].min() < 0 < maps["convcam"].max()
    for method in ("transcam", "clsattn", "attnagg"):
        assert not torch.allclose(maps[method], maps["convcam"])


def test_images_that_fit_are_left_alone() -> None:
    model, image = network(), batch((48, 32))["image"]
    assert model.whole_patches(image) is image
    stretched = model.whole_patches(image[:, :, :47, :17])
    assert stretched.shape[-2:] == (48, 32)
    torch.testing.assert_close(stretched.mean((2, 3)), image[:, :, :47, :17].mean((2, 3)), rtol=0, atol=0.05)


def test_map_adds_up_the_layers() -> None:
    model, sample = randomise(network()).eval(), batch()
    with torch.inference_mode():
        seen: list[Tensor] = []
        visit = lambda _, a: seen.append(a.products().softmax(-1).mean(1))  # noqa: E731
        features, _ = model.forward_features(sample["image"], visit)
        maps = model.conv_cls_head(features)[:, 1:]
        expected = torch.einsum("bij,bcj->bci", sum(seen)[:, 1:, 1:], maps.flatten(2)).view_as(maps)
        torch.testing.assert_close(model.cam(sample["image"], sample["tags"]), expected, rtol=1e-4, atol=1e-5)


def test_map_in_mixed_precision() -> None:
    model, sample = network().eval(), batch()
    with torch.inference_mode():
        exact = model.cam(sample["image"], sample["tags"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model.cam(sample["image"], sample["tags"])
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05 * exact.abs().max().item())


def test_training_makes_no_attention_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().train()

    def refuse(*args: object) -> None:
        raise AssertionError("attention was asked for")

    monkeypatch.setattr(transformer, "QueryKey", refuse)
    losses = model(batch(), 0.0)
    assert list(losses) == ["cls"]
    losses["cls"].backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(AssertionError, match="attention"):
        model.cam(batch()["image"], batch()["tags"])


def test_background_is_never_supervised() -> None:
    model = network().train()
    model(batch(), 0.0)["cls"].backward()
    for head in (model.conv_cls_head, model.trans_cls_head):
        assert not head.weight.grad[0].any() and not head.bias.grad[0].any()
        assert all(row.any() for row in head.weight.grad[1:])


def test_loss_of_a_batch_is_the_mean_of_its_images() -> None:
    """So that accumulation and several processes train alike (but for batch normalisation)."""
    model, both = network().eval(), batch((40, 52))
    parts = [model({k: v[i : i + 1] for k, v in both.items()}, 0.0)["cls"] for i in range(2)]
    torch.testing.assert_close(model(both, 0.0)["cls"], (parts[0] + parts[1]) / 2)


def test_training_starts_with_small_scores() -> None:
    """New heads on a new body: about the loss of zero scores, ln 2."""
    torch.manual_seed(0)
    model = TransCam.recipes["sample"].cam.network.build(CLASSES, {}).train()
    assert model(batch(), 0.0)["cls"] < 1


def test_everything_is_decayed() -> None:
    """transcam.md section 4: norms and biases too."""
    model = network()
    (group,) = model.param_groups()
    assert group.decay and group.lr_scale == 1 and {*group.params} == {*model.parameters()}


def save(tmp_path: Path, state: dict[str, object]) -> str:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return str(path)


def imagenet() -> dict[str, Tensor]:
    """What the ImageNet file holds: the same body, linear heads of 1000 classes."""
    state = {k: v + 1 for k, v in network().state_dict().items()}
    for name, width in (("conv_cls_head", 64), ("trans_cls_head", 24)):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.zeros(1000, width), torch.zeros(1000)
    return state


@pytest.mark.parametrize("nested", [False, True])
def test_imagenet_weights(tmp_path: Path, nested: bool) -> None:
    model, state = network(), imagenet()
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(model.heads)}
    report = model.load_weights(save(tmp_path, {"model": state, "epoch": 3} if nested else state))
    assert "4 missing" in report and "0 unexpected" in report
    after = model.state_dict()
    assert all(torch.equal(after[k], before.get(k, state[k])) for k in state) and len(before) == 4


def test_imagenet_weights_even_of_the_same_classes_lose_their_heads(tmp_path: Path) -> None:
    """The token's head could fit by its shape; it is dropped with the other."""
    model, state = network(), imagenet()
    before = model.trans_cls_head.weight.clone()
    state["trans_cls_head.weight"], state["trans_cls_head.bias"] = torch.zeros(CLASSES + 1, 24), torch.zeros(4)
    model.load_weights(save(tmp_path, state))
    assert torch.equal(model.trans_cls_head.weight, before)


def test_whole_checkpoint(tmp_path: Path) -> None:
    model, state = network(), {k: v + 1 for k, v in network().state_dict().items()}
    model.load_weights(save(tmp_path, state))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="conv_cls_head"):
        network(CLASSES + 1).load_weights(save(tmp_path, state))
    del state["trans_cls_head.bias"]
    with pytest.raises(ValueError, match="trans_cls_head.bias"):
        network().load_weights(save(tmp_path, state))


def test_other_bodies_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, imagenet())
    with pytest.raises(ValueError, match="another shape"):
        network(**{"backbone.width": 48}).load_weights(path)
    with pytest.raises(ValueError, match="conv_trans_4"):
        network(**{"backbone.depth": 6}).load_weights(path)


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="method"):
        TransCamOptions(method="cam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last_stride"):
        TransCamOptions(backbone=ConformerOptions(last_stride=2))


# ------------------------------------------------------------------------------------------------ recipes


def test_square_inputs() -> None:
    infer = CamInference(scales=(24, 40.0), square=True)
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    assert [x.shape for x in cams.scaled_inputs(image, infer, "imagenet")] == [(2, 3, 24, 24), (2, 3, 40, 40)]
    maps = cams.infer_cam(network().eval().cam, image, np.float32([0, 1, 1]), infer, "imagenet").maps
    assert maps.shape == (2, 30, 50)
    with pytest.raises(ValueError, match="square"):
        CamInference(scales=(0.5, 1.0), square=True)


@pytest.mark.parametrize("preset", ["published", "sample"])
def test_recipes_fit_their_refiner_and_segmenter(preset: str) -> None:
    recipe = TransCam.recipes[preset]
    refine = override(PSA.recipes[preset], recipe.refine)
    segment = override(DeepLabV1.recipes[preset], recipe.segment)
    with torch.device("meta"):
        model = recipe.cam.network.build(20, {})
        if preset == "published":
            assert len(model.state_dict()) == 718
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 36.47
            assert (refine.walk.beta, refine.label.crf.bilateral_sxy, refine.walk.crf.iterations) == (14, 50, 10)
            assert not any(p.requires_grad for n, p in segment.network.build(20, {}).named_parameters() if "bn" in n)
    assert recipe.cam.infer.square and all(side % model.patch == 0 for side in recipe.cam.infer.scales)
    assert recipe.cam.augment.crop % model.patch == 0
