"""GETAM: official names, maps against a plain form, labels, losses, both phases, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from plain import LATTICE_SCALE, exact_energy, full_attention_map
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from misc.config import override
from misc.crf.energy import DenseOptions, dense_energy
from misc.files import store
from net.backbone.dpt import _TIMM, DPTOptions, DPTViT
from net.contract import Batch
from net.seed.getam import (
    Getam,
    GetamLabel,
    GetamOptions,
    argmax_labels,
    label_with_saliency,
    label_without_saliency,
    normalise_label_maps,
    open_mask,
    saliency_target,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CLASSES = 3
KINDS = sorted(_TIMM)


def tiny(kind: str = "vitb", **changes: object) -> GetamOptions:
    """Options of a network of some thousand parameters."""
    dpt = DPTOptions(
        backbone=kind, image_size=32, patch=8, width=32, depth=4, heads=2, mlp_ratio=2, stem=8, stem_depth=(1, 1, 1),
        features=8,
    )  # fmt: skip
    return override(GetamOptions(dpt=dpt, start_layer=1, label=GetamLabel(epsilon=1e-9, opening=3)), changes)


def built(kind: str = "vitb", **changes: object) -> Getam:
    """A tiny network whose attention is far from uniform."""
    torch.manual_seed(0)
    net = tiny(kind, **changes).build(CLASSES, {})
    for block in net.pretrained.model.blocks:
        block.attn.qkv.weight.data.mul_(8)
    return net


def pictures(count: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- network


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_the_official_ones(kind: str) -> None:
    with torch.device("meta"):
        net = GetamOptions(dpt=DPTOptions(backbone=kind)).build(20, {})
        classifier = timm.create_model(_TIMM[kind])
    own = {name: list(value.shape) for name, value in net.state_dict().items()}
    part = "pretrained.model."
    body = {name.removeprefix(part): shape for name, shape in own.items() if name.startswith(part)}
    assert body == {name: list(value.shape) for name, value in classifier.state_dict().items()}
    case = "vitb_hybrid" if kind == "vitb_hybrid" else "deit_distilled"
    listed = json.loads((GOLDEN / f"getam_forward_{case}.json").read_text())["keys"]
    rest = {name: shape for name, shape in own.items() if not name.startswith(part)}
    assert rest == {name: shape for name, shape in listed.items() if not name.startswith(part)}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_classifier_gives_is_what_timm_gives(kind: str) -> None:
    torch.manual_seed(0)
    arguments = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}
    if kind == "vitb_hybrid":
        pytest.skip("timm standardises the stem's weights with another epsilon (getam.md section 2.1)")
    theirs = timm.create_model(_TIMM[kind], **arguments).eval()
    ours = DPTViT(DPTOptions(backbone=kind, image_size=64, width=48, depth=4, heads=3)).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.inference_mode():
        x, _, _ = ours.embed_with_stem(pictures(2, 64, 64))
        torch.testing.assert_close(ours.norm(ours.forward_blocks(x)), theirs.forward_features(pictures(2, 64, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_map_fits_at_any_size(kind: str) -> None:
    net = built(kind).eval()
    for size in ((32, 48), (33, 47), (9, 70)):
        with torch.inference_mode():
            classes, logits = net.forward_both(pictures(2, *size))
        assert classes.shape == (2, CLASSES) and logits.shape == (2, CLASSES + 1, *size)
        maps = net.cam(pictures(2, *size), torch.ones(2, CLASSES))
        assert maps.shape == (2, CLASSES, -(-size[0] // 8), -(-size[1] // 8)) and maps.min() >= 0


def test_what_is_never_used_is_never_trained() -> None:
    net = built("deitb_distilled").train()
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    parts = ("pretrained.model.norm.", "pretrained.model.head", "scratch.refinenet4.resConfUnit1.")
    assert frozen == {name for name, _ in net.named_parameters() if name.startswith(parts)} and len(frozen) == 12


@pytest.mark.parametrize("wrong, told", [
    ({"depth": 6}, "depth = 6 .* a multiple of 4"), ({"backbone": "vitl"}, "must be one of vitb_hybrid"),
    ({"patch": 12}, "8 or 16 for vitb_hybrid"), ({"heads": 5}, "multiple of heads"),
    ({"stem": 12}, "stem = 12 .* a multiple of 8"),
    ({"patch_stem": 8}, "patch_stem must be 0 for vitb_hybrid"),
])  # fmt: skip
def test_impossible_networks_are_refused(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DPTOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("field, value", [
    ("start_layer", 4), ("cls_share", 1.5), ("saliency_loss", "both"), ("label.cut", 1.0), ("label.low", 0.9),
    ("label.salient_above", 255), ("dense.scale", 2.0), ("dense.weight", -1.0),
])  # fmt: skip
def test_impossible_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field.split(".")[-1]):
        tiny(**{field: value})


# ---------------------------------------------------------------------------------------------- map


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_that_of_whole_attention_matrices_and_of_each_image_alone(kind: str) -> None:
    net = built(kind).train()
    images, tags = pictures(3, 48, 32), torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])
    maps = net.cam(images, tags)
    assert not maps.requires_grad and all(p.grad is None for p in net.parameters())
    assert not maps[2].any() and not maps[0, 1].any() and maps[0, 0].max() > 0
    for image, c in ((0, 0), (0, 2), (1, 1)):
        plain = full_attention_map(net, images[image : image + 1], c)
        torch.testing.assert_close(maps[image, c], plain, rtol=1e-4, atol=1e-5 * plain.max().item())


def test_visiting_attention_changes_no_result() -> None:
    net = built().eval()
    images = pictures(2, 32, 32)
    _, _, logits = net.attention_gradients(images, torch.ones(2, CLASSES))
    torch.testing.assert_close(logits, net.class_logits(images))


def test_maps_need_full_precision_and_have_it() -> None:
    net = built().eval()
    images, tags = pictures(1, 32, 32), torch.ones(1, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        maps = net.cam(images, tags)
    assert maps.dtype == torch.float32 and torch.equal(maps, net.cam(images, tags))


# ---------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("side", [10, 4, 3, 1])
def test_opening_is_that_of_opencv(side: int) -> None:
    rng = np.random.default_rng(side)
    masks = [cv2.blur(rng.random((40, 53)), (5, 5)) > 0.45, np.ones((20, 20), bool), np.zeros((20, 20), bool)]
    for patch in (4, 5):
        masks.append(np.zeros((30, 30), bool))
        masks[-1][:patch, :patch] = True
    for mask in masks:
        plain = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
        np.testing.assert_array_equal(open_mask(torch.from_numpy(mask), side).numpy(), plain > 0)


def test_the_label_rule_goes_in_its_order() -> None:
    options = GetamLabel(opening=0, cut=0.5)
    norm = torch.tensor([[[0.9, 0.0, 0.8, 0.01, 0.95]], [[0.2, 0.0, 0.9, 0.02, 0.1]]])  # (2, 1, 5)
    salient = torch.tensor([[True, True, True, False, False]])
    label, after = label_with_saliency(norm, torch.tensor([1, 4]), salient, options)
    # a class, unknown (salient without a class), the other class, background, completed by the first class
    assert label.tolist() == [[2, 255, 5, 0, 2]] and after.tolist() == [[1, 1, 1, 0, 255]]
    assert saliency_target(after, "published").tolist() == [[1, 1, 1, 1, 0]]
    assert saliency_target(after, "intended").tolist() == [[0, 0, 0, 1, 0]]
    # the first of two classes that claim a pixel gets it
    twice = torch.tensor([[[0.1, 0.2, 0.95]], [[0.1, 0.2, 0.96]]])
    keys, nowhere = torch.tensor([0, 1]), torch.zeros(1, 3, dtype=torch.bool)
    assert label_with_saliency(twice, keys, nowhere, options)[0].tolist() == [[0, 0, 1]]
    published = GetamLabel(opening=0)  # int(0.9 x 3) = 2: nothing is above the largest score
    assert label_with_saliency(twice, keys, nowhere, published)[0].tolist() == [[0, 0, 0]]
    label, after = label_with_saliency(norm[:0], torch.tensor([], dtype=torch.int64), salient, options)
    assert label.tolist() == [[255, 255, 255, 0, 0]] and after.tolist() == [[1, 1, 1, 0, 0]]


def test_without_saliency_two_constant_scores_decide() -> None:
    norm = torch.tensor([[[0.1, 0.3, 0.5, 0.2]], [[0.0, 0.1, 0.6, 0.45]]])
    label = label_without_saliency(norm, torch.tensor([0, 2]), GetamLabel(low=0.2, high=0.4))
    assert label.tolist() == [[0, 255, 3, 3]]
    assert argmax_labels(norm, torch.full((1, 4), 0.5), torch.tensor([0, 2])).tolist() == [[0, 0, 3, 0]]


def test_the_epsilon_and_no_minimum_is_in_the_normalised_maps() -> None:
    maps = torch.tensor([[[1e-5, 3e-5], [1e-5, 1e-5]]])
    norm = normalise_label_maps(maps[None], torch.zeros(1, 3, 2, 2), GetamLabel(iterations=0))[0]
    torch.testing.assert_close(norm, maps / 4e-5)
    assert normalise_label_maps(maps[None, :0], torch.zeros(1, 3, 5, 6), GetamLabel()).shape == (1, 0, 5, 6)


# ---------------------------------------------------------------------------------------------- losses


def energy_inputs(height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, label, smooth colours and the valid part of two crops."""
    torch.manual_seed(3)
    logits = 2 * torch.randn(2, CLASSES + 1, height, width)
    label = torch.randint(0, CLASSES + 1, (2, height, width))
    label[:, : height // 4] = 255
    colours = F.interpolate(255 * torch.rand(2, 3, 5, 4), size=(height, width), mode="bilinear").round()
    inside = torch.ones(2, height, width, dtype=torch.bool)
    inside[1, :, : width // 3] = False
    return logits, label, colours, inside


def test_the_dense_energy_is_the_exact_one_times_the_lattices_scale() -> None:
    logits, label, colours, inside = energy_inputs(96, 80)
    logits.requires_grad_()
    options = DenseOptions(weight=1.0)
    energy = dense_energy(logits, label, colours, inside, options)
    exact = exact_energy(logits.detach(), label, colours, inside, options)
    share = energy.item() / exact.energy.item()
    assert LATTICE_SCALE[0] < share < LATTICE_SCALE[1] and energy < 0
    # the gradient with respect to the logits, from the exact one of the small probabilities
    gradient = torch.autograd.grad(energy, logits)[0]
    again = logits.detach().requires_grad_()
    small = F.interpolate(again.softmax(1), scale_factor=0.5, mode="bilinear", align_corners=False)
    small.backward(exact.gradient.float())
    both = torch.stack([gradient.flatten(), again.grad.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.97
    assert (both[0] @ both[1] / (both[1] @ both[1])).item() == pytest.approx(share, rel=0.1)
    assert not gradient[1, :, :, : 80 // 3 - 1].any()  # padding


class _Largest(TorchFunctionMode):
    """Notes the number of entries of the largest tensor that an operation gives."""

    size = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.size = max(self.size, value.numel())
        return result


def test_the_dense_energys_memory_is_linear_in_the_pixels() -> None:
    sizes = []
    for side in (32, 64, 128):
        with _Largest() as seen:
            dense_energy(*energy_inputs(side, side), DenseOptions())
        sizes.append(seen.size / side**2)
    assert max(sizes) < 32 and sizes[2] < 1.5 * sizes[0], sizes  # all pairs: 64, 256, 1024 a pixel


def batch_of(kind: str) -> Batch:
    """A batch of one sort, with its saliency."""
    size = 32
    tags = {"plain": [[1.0, 0, 1], [0, 1, 0]], "one class": [[0.0, 1, 0]] * 2, "no class": [[0.0] * 3] * 2}
    salient = torch.zeros(2, size, size, dtype=torch.uint8)
    salient[:, 8:24, 8:24] = 255
    if kind == "no background":
        salient[:] = 255
    if kind in ("nothing salient", "no foreground"):
        salient[:] = 0
    rows = tags["no class"] if kind == "no foreground" else tags.get(kind, tags["plain"])
    box = torch.tensor([[0, size, 0, size], [4, size, 0, size]])
    return {"image": pictures(2, size, size), "tags": torch.tensor(rows), "box": box, "saliency": salient}


def losses(net: Getam, batch: Batch, progress: float, **labels: Tensor) -> dict[str, Tensor]:
    """Terms as the training loop gets them; ``labels`` replace those that the network makes."""
    batch = {**batch, **net.prepare(batch, progress), **labels}
    counts = {f"counts/{k}": v.float() for k, v in net.counts(batch).items()}
    return net({**batch, **counts}, progress)


KINDS_OF_BATCH = ["plain", "one class", "no class", "no background", "nothing salient", "no foreground"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_BATCH)
@pytest.mark.parametrize("saliency", [True, False])
def test_losses_are_finite_whatever_the_batch_holds(kind: str, saliency: bool) -> None:
    net = built(**{"label.saliency": saliency, "dense.weight": 1e-5}).train()
    batch = batch_of(kind)
    assert losses(net, batch, 0.5).keys() == {"cls"}
    for label in (None, 0, 1, 255):
        forced = {} if label is None else {"label": torch.full((2, 32, 32), label)}
        terms = losses(net, batch, 0.51, **forced)
        names = {"cls", "ce_background", "ce_foreground", "dense"} | ({"saliency"} if saliency else set())
        assert terms.keys() == names and all(torch.isfinite(v) and v.shape == () for v in terms.values())
        assert label in (None, 0) or terms["ce_background"] == 0
        assert label in (None, 1) or terms["ce_foreground"] == 0
        net.zero_grad()
        sum(terms.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_both_kinds_of_batch_without_a_kind_of_pixel_really_occur() -> None:
    net = built(**{"label.opening": 0}).train()
    held = {kind: set(net.prepare(batch_of(kind), 0.9)["label"].unique().tolist())
            for kind in ("no foreground", "no background", "no class", "nothing salient")}  # fmt: skip
    assert held["no foreground"] == {0}
    assert 0 not in held["no background"] and held["no background"] & {1, 2, 3}
    assert held["no class"] == {0, 255}
    # what is not salient is background, but where a class's map is high it is completed
    assert held["nothing salient"] == {0, 1, 2, 3}


def test_the_phases_share_one_training() -> None:
    net = built(cls_share=0.25, seg_lr=0.5)
    assert [net.lr_scale(p) for p in (0, 0.25, 0.26, 0.99)] == [1, 1, 0.5, 0.5]
    assert net.prepare(batch_of("plain"), 0.25) == {}
    without = built(saliency_loss="none", **{"dense.weight": 0.0})
    assert losses(without, batch_of("plain"), 0.9).keys() == {"cls", "ce_background", "ce_foreground"}
    assert not tiny(**{"label.saliency": False}).wants_saliency and tiny().wants_saliency


def test_cross_entropies_are_means_over_the_whole_global_batch() -> None:
    net = built(saliency_loss="none", **{"dense.weight": 0.0}).eval()
    batch = batch_of("plain")
    batch |= net.prepare(batch, 0.9)
    whole = losses(net, batch, 0.9, label=batch["label"])
    counts = {f"counts/{k}": v / 2 for k, v in net.counts(batch).items()}  # as the loop shares them out
    halves = [net({**{k: v[i : i + 1] for k, v in batch.items()}, **counts}, 0.9) for i in range(2)]
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value)


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.slow
def test_a_whole_checkpoint_loads_strictly(tmp_path: Path) -> None:
    saved, net = built("vitb_hybrid"), built("vitb_hybrid")
    for parameter in saved.parameters():
        nn.init.normal_(parameter)
    torch.save({f"module.{k}": v for k, v in saved.state_dict().items()}, tmp_path / "getam_last.pth")
    assert "0 missing" in net.load_weights(str(tmp_path / "getam_last.pth"))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), saved.state_dict().values(), strict=True))
    state = saved.state_dict()
    del state["scratch.output_conv.4.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="1 tensors are missing: scratch.output_conv.4.bias"):
        net.load_weights(str(tmp_path / "cut.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_imagenet_classifier_fills_the_transformer(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    larger = DPTViT(override(tiny(kind).dpt, {"image_size": 48}))
    nn.init.normal_(larger.pos_embed)
    torch.save({"model": larger.state_dict()}, tmp_path / "classifier.pth")
    net = built(kind)
    before = net.cls_head.weight.clone()
    assert "0 missing, 0 unexpected" in net.load_weights(str(tmp_path / "classifier.pth"))
    body = net.pretrained.model
    assert torch.equal(body.blocks[3].mlp.fc2.weight, larger.blocks[3].mlp.fc2.weight)
    assert torch.equal(net.cls_head.weight, before)
    tokens = body.tokens
    assert torch.equal(body.pos_embed[:, :tokens], larger.pos_embed[:, :tokens]) and body.grid == (4, 4)
    table = larger.pos_embed[:, tokens:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(4, 4), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(body.pos_embed[:, tokens:], expected)
    other = "vitb" if kind != "vitb" else "vitb_hybrid"
    with pytest.raises(ValueError, match="missing|shape"):
        if kind in ("vitb", "deitb"):
            built("vitb_hybrid").load_weights(str(tmp_path / "classifier.pth"))
        else:
            store.write_weights(tmp_path / "none.pt", {"pos_embed": larger.pos_embed, "cls_token": larger.cls_token})
            built(other).load_weights(str(tmp_path / "none.pt"))
