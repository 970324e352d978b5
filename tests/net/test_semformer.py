"""SemFormer and its autoencoder: losses on all kinds of batches, what is frozen, weights, both phases in a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import digests
from torch import Tensor

import run_sample
from misc.infer.cams import infer_cam
from misc.loop import fit as loop
from net.backbone.vit import GridViT, ViTOptions, fit_positions
from net.seed.semformer import (
    ImageClassPairs,
    SemFormer,
    SemFormerOptions,
    complement_error,
    valid_mask,
)
from net.seed.semformer.autoencoder import CAAE, CAAEOptions, similarity, tags_with_background
from step.lib import parsing
from step.lib.config import Config, Job, open_job
from step.train_cam import scored_masks, train_miou

CLASSES, SIDE = 3, 48
VIT = ViTOptions(image_size=32, patch=8, width=24, depth=3, heads=3, drop_path=0.0)
CAAE_TINY = CAAEOptions(encoder=VIT, class_dim=8, decoder_width=16, decoder_depth=1, decoder_heads=2)
TINY = SemFormerOptions(backbone=replace(VIT, image_size=SIDE), map_layers=2)


def autoencoder(classes: int = CLASSES, options: CAAEOptions = CAAE_TINY) -> CAAE:
    torch.manual_seed(0)
    return options.build(classes, {})


def network(classes: int = CLASSES, **options: object) -> SemFormer:
    guide = autoencoder(classes).eval().requires_grad_(False)
    torch.manual_seed(1)
    return replace(TINY, **options).build(classes, {"caae": guide})


def batch(tags: list[list[int]], side: int = SIDE) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    boxes = [[0, side, 0, side], [5, side, 0, side - 7], [0, side - 11, 3, side]]
    return {
        "image": torch.randn(len(tags), 3, side, side, generator=rng),
        "tags": torch.tensor(tags, dtype=torch.float32),
        "box": torch.tensor([boxes[i % 3] for i in range(len(tags))]),
    }


def with_counts(model: SemFormer, *batches: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The batches with the mean of their counts, as the training loop adds them."""
    counts = [model.counts(b) for b in batches]
    mean = {f"counts/{name}": sum(c[name] for c in counts).float() / len(counts) for name in counts[0]}
    return [{**b, **mean} for b in batches]


# ---------------------------------------------------------------------------------------------- autoencoder


def test_a_class_is_learnt_only_from_images_that_show_it() -> None:
    model = autoencoder()
    model(batch([[1, 0, 0], [1, 0, 0]], 32), 0.0)["similarity"].backward()
    moved = model.crs[0].weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [True, True, False, False]


def test_a_reconstruction_is_put_together_patch_by_patch() -> None:
    model = autoencoder().eval()
    vectors = model.patch_vectors(batch([[1, 0, 0]], 32)["image"])[:, :6]  # 2 x 3 patches
    with torch.no_grad():
        values = model.decoder(model.mlp(model.re_convert(vectors)))[0]  # (6, 3 * 8 * 8)
        image = model.reconstruct(vectors, (16, 24))[0]
    for number, patch in enumerate(values):
        row, column = divmod(number, 3)
        part = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert torch.equal(part, patch.unflatten(0, (3, 8, 8)))


@pytest.mark.parametrize("name, reduce", [("sum", Tensor.sum), ("mean", Tensor.mean), ("max", Tensor.amax)])
def test_class_vectors_are_reduced_over_the_patches(name: str, reduce: object) -> None:
    model = autoencoder(options=replace(CAAE_TINY, reduction=name))
    images = batch([[1, 0, 0]], 32)["image"]
    expected = reduce(model.patch_vectors(images), 1).view(1, CLASSES + 1, 8)  # type: ignore[operator]
    torch.testing.assert_close(model.embed_classes(images), expected)


def test_sides_that_are_no_multiple_of_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8, got 32 x 30"):
        autoencoder().embed_classes(torch.zeros(1, 3, 32, 30))


def test_similarities_are_clamped_and_then_have_no_gradient() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    values = similarity(a, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(values, torch.tensor([1 - 1e-4, 0.5**0.5, 0.0]))
    values[:2].sum().backward()
    assert a.grad is not None and not a.grad[0].any() and a.grad[1].any()


# ---------------------------------------------------------------------------------------------- losses

KINDS = {
    "mixed": [[1, 0, 1], [0, 1, 0], [0, 0, 0]],
    "no foreground": [[0, 0, 0], [0, 0, 0]],
    "one image without": [[0, 0, 0]],
    "one class": [[0, 1, 0]],
    "all classes": [[1, 1, 1], [1, 1, 1]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batch_has_finite_losses_and_gradients(kind: str) -> None:
    model = network().train()
    (data,) = with_counts(model, batch(KINDS[kind]))
    terms = model(data, 0.0)
    assert list(terms) == ["similarity", "foreground", "background", "suppression", "complement"]
    sum(terms.values()).backward()
    assert all(torch.isfinite(v) for v in terms.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    if kind in ("no foreground", "one image without"):
        assert terms["complement"] == 0  # nothing to complement, and nothing to push away from
        pairs = ImageClassPairs.of(tags_with_background(data["tags"]))
        assert len(pairs.image) == len(data["tags"]) and not pairs.others.any()


def test_a_batch_in_which_hardly_anything_is_background_or_image_is_finite() -> None:
    model = network().train()
    data = batch([[1, 1, 1], [0, 0, 0]])
    data["box"] = torch.tensor([[21, 22, 21, 22], [0, 1, 0, SIDE]])  # less than a pixel at the CAAE's size
    with torch.no_grad():
        model.segmentor.seg_head[1].bias.copy_(torch.tensor([-40.0, 40, 40, 40]))  # the background's mask is empty
    (data,) = with_counts(model, data)
    assert data["counts/pixels"] == 0
    terms = model(data, 0.0)
    sum(terms.values()).backward()
    assert all(torch.isfinite(v) for v in terms.values()) and terms["complement"] == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_single_foreground_class_in_the_data_set() -> None:
    model = network(classes=1).train()
    (data,) = with_counts(model, batch([[1], [0]]))
    assert all(torch.isfinite(v) for v in model(data, 0.0).values())
    assert model.eval().cam(data["image"], data["tags"]).shape == (2, 1, 6, 6)


def test_terms_do_not_depend_on_how_the_batch_is_divided() -> None:
    model = network(dropout=0.0)
    whole = batch(KINDS["mixed"] + [[1, 1, 1]])
    parts = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(4)]
    (together,) = with_counts(model, whole)
    expected = model(together, 0.0)
    divided = [model(part, 0.0) for part in with_counts(model, *parts)]
    for name, value in expected.items():
        torch.testing.assert_close(sum(d[name] for d in divided) / 4, value, rtol=1e-5, atol=1e-6)


def test_complement_is_zero_where_masks_add_up_to_one() -> None:
    labels, valid = torch.tensor([[1.0, 1, 0], [1, 0, 0]]), torch.ones(2, 1, 4, 4)
    first = torch.rand(4, 4)
    masks = torch.stack([torch.stack([first, 1 - first, torch.ones(4, 4)])] * 2)
    assert complement_error(masks, labels, valid) < 1e-10
    masks[0, 1] += 0.5  # counts for both pairs of the first image
    assert complement_error(masks, labels, valid) == pytest.approx(2 * 16 * 0.25)
    valid[:, :, 2:] = 0
    assert complement_error(masks, labels, valid) == pytest.approx(2 * 8 * 0.25)


def test_the_valid_mask_floors_both_ends() -> None:
    box = torch.tensor([[3, 97, 10, 100]])
    mask = valid_mask(box, (100, 100), (50, 50))[0, 0]
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (1, 47, 5, 49)


def test_dropout_takes_whole_patches_from_the_mask_head() -> None:
    model = network().train()
    torch.manual_seed(0)
    _, logits = model.segmentor(batch(KINDS["mixed"])["image"])
    bias = model.segmentor.seg_head[1].bias[:, None, None]
    dropped = (logits == bias).all(1)  # (B, gh, gw)
    assert 0.3 < dropped.float().mean() < 0.7
    assert torch.equal(dropped, (logits == bias).any(1))  # never a part of a token


def test_the_autoencoder_judges_and_is_not_touched() -> None:
    model = network().train()
    before = {k: v.clone() for k, v in model.guide.state_dict().items()}
    assert not any("guide" in name or "encoder" in name for name in model.state_dict())
    assert not model.guide.training and not any(p is q for p in model.parameters() for q in model.guide.parameters())
    (data,) = with_counts(model, batch(KINDS["mixed"]))
    model(data, 0.0)["foreground"].backward()  # flows through the autoencoder to the masks
    assert model.segmentor.seg_head[1].weight.grad.any()
    assert all(p.grad is None for p in model.guide.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.guide.state_dict().items())


# ---------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("attention", [True, False])
def test_the_map_is_mask_logits_times_attention(attention: bool) -> None:
    model = network(attention=attention).eval()
    images = batch([[1, 0, 1]])["image"][..., :41]  # padded to 48 columns
    seen: list[Tensor] = []
    with torch.no_grad():
        _, logits = model.segmentor(images, lambda _, attention: seen.append(attention.products().softmax(-1)))
        got = model.cam(images, torch.ones(1, CLASSES))
    summed = sum(layer.mean(1)[:, : CLASSES + 1, CLASSES + 1 :] for layer in seen[-2:])  # (1, K, N)
    low, high = summed.amin(2, keepdim=True), summed.amax(2, keepdim=True)
    weight = ((summed - low) / (high - low + 1e-5)).view_as(logits) if attention else 1
    assert got.shape == (1, CLASSES, 6, 6)
    torch.testing.assert_close(got, (logits.relu() * weight)[:, 1:], rtol=1e-4, atol=1e-6)


def test_published_maps_come_at_both_resolutions() -> None:
    infer = SemFormer.recipes["published"].cam.infer
    sizes: list[torch.Size] = []

    def cam(images: Tensor, tags: Tensor) -> Tensor:
        sizes.append(images.shape[2:])
        return F.avg_pool2d(images, 16)[:, :2].abs()

    picture = np.random.default_rng(0).integers(0, 255, (75, 102, 3), dtype=np.uint8)
    found = infer_cam(cam, picture, np.float32([1, 1]), infer, "imagenet")
    assert [tuple(s) for s in sizes] == [(48, 64), (80, 112), (112, 160), (160, 208)]  # stretched to multiples of 16
    assert found.maps.shape == (2, 75, 102) and found.coarse is not None and found.coarse.shape == (2, 19, 26)


# ---------------------------------------------------------------------------------------------- weights


def classifier(distilled: bool, width: int = 24, side: int = 4) -> dict[str, Tensor]:
    """Tensors of a DeiT classifier with a grid of 4 x 4 under timm's names."""
    body = GridViT(replace(VIT, image_size=8 * side, width=width))
    state = {k.removeprefix("model."): torch.randn(v.shape) for k, v in body.state_dict().items()}
    grid = state.pop("grid_posembed")
    tokens = 2 if distilled else 1
    state |= {"cls_token": torch.randn(1, 1, width), "pos_embed": torch.cat([torch.randn(1, tokens, width), grid], 1)}
    if distilled:
        state |= {"dist_token": torch.randn(1, 1, width), "head_dist.weight": torch.randn(10, width)}
    return state | {"head.weight": torch.randn(10, width), "head.bias": torch.randn(10)}


def test_the_autoencoder_starts_from_a_distilled_classifier(tmp_path: Path) -> None:
    state = classifier(distilled=True)
    torch.save({"model": state}, tmp_path / "deit.pth")
    model = autoencoder()
    table, decoder = model.crs[0].weight.clone(), model.decoder.mlp.weight.clone()
    model.load_weights(str(tmp_path / "deit.pth"))
    body = model.encoder["vit_backbone"]
    assert torch.equal(body.grid_posembed, state["pos_embed"][:, 2:])
    assert torch.equal(body.model.blocks[2].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"])
    assert torch.equal(model.crs[0].weight, table) and torch.equal(model.decoder.mlp.weight, decoder)


def test_class_tokens_start_as_the_classifier_s_and_positions_are_resized(tmp_path: Path) -> None:
    state = classifier(distilled=False)
    torch.save(state, tmp_path / "deit.pth")
    model = network()
    model.load_weights(str(tmp_path / "deit.pth"))
    part = model.segmentor
    for token in range(CLASSES + 1):
        assert torch.equal(part.cls_token[0, token], state["cls_token"][0, 0])
        assert torch.equal(part.cls_posembed[0, token], state["pos_embed"][0, 0])
    expected = fit_positions(state["pos_embed"][:, 1:], (6, 6))
    assert torch.equal(part.backbone.grid_posembed, expected) and expected.shape == (1, 36, 24)


def test_whole_checkpoints_load_and_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    model, guide = network(), autoencoder()
    unused = {"ae.crs.0.weight": torch.zeros(1), "segmentor.backbone.model.pos_embed": torch.zeros(1, 17, 24)}
    torch.save({**model.state_dict(), **unused}, tmp_path / "semformer.pth")
    torch.save({**guide.state_dict(), "encoder.vit_backbone.model.dist_token": torch.zeros(1)}, tmp_path / "caae.pth")
    other, other_guide = network(), autoencoder()
    with torch.no_grad():
        for parameter in (*other.parameters(), *other_guide.parameters()):
            if parameter.requires_grad:
                parameter.zero_()
    other.load_weights(str(tmp_path / "semformer.pth"))
    other_guide.load_weights(str(tmp_path / "caae.pth"))
    for mine, theirs in ((other, model), (other_guide, guide)):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.state_dict().items())
    for wrong, file in ((network(classes=2), "semformer.pth"), (autoencoder(2), "caae.pth")):
        with pytest.raises(ValueError, match="have another shape"):
            wrong.load_weights(str(tmp_path / file))


def test_start_values_are_the_published_ones() -> None:
    head = network().segmentor.cls_head  # width 24, class_dim 8
    assert 0.95 * (24 * 8) ** -0.5 < head.weight.abs().max() <= (24 * 8) ** -0.5
    assert 0.8 * 24**-0.5 < head.bias.abs().max() <= 24**-0.5


def test_options_that_make_no_network_are_refused() -> None:
    for make in (
        lambda: replace(CAAE_TINY, decoder_heads=3),
        lambda: replace(CAAE_TINY, class_dim=0),
        lambda: replace(CAAE_TINY, encoder=replace(VIT, image_size=33)),
        lambda: replace(TINY, map_layers=4),
        lambda: replace(TINY, dropout=1.0),
    ):
        with pytest.raises(ValueError):
            make()


# ---------------------------------------------------------------------------------------------- both phases in a run

FLAGS = """
--machine.workers 0 --machine.device cpu --steps 1-2 --machine.checkpoint-every 2
--cam.caae.network.encoder.width 12 --cam.caae.network.encoder.depth 1 --cam.caae.network.encoder.image-size 32
--cam.caae.network.class-dim 8 --cam.caae.network.decoder-width 12
--cam.caae.fit.steps 5 --cam.caae.fit.batch-size 4 --cam.caae.augment.crop 32
--cam.network.backbone.width 12 --cam.network.backbone.depth 2 --cam.network.backbone.image-size 48
--cam.fit.steps 6 --cam.fit.epochs 3 --cam.fit.batch-size 4 --cam.augment.crop 48 --cam.augment.long-side 48 64
""".split()


def arguments(data: Path, out: Path, *flags: str) -> list[str]:
    return ["semformer", "--root", str(data), "--out", str(out), *FLAGS, *flags]


def stop_in(name: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the training of that name before one of its updates."""
    original = loop.set_lr
    seen: list[int] = []

    def deadly(optimiser: object, recipe: object, step: int, total: int, *scale: float) -> None:
        seen.append(step)
        if total == {"caae": 5, "cam": 6}[name] and step == at:
            raise KeyboardInterrupt
        original(optimiser, recipe, step, total, *scale)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "set_lr", deadly)


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["last", "train_miou"])
def test_both_phases_are_trained_and_taken_up_again(
    selection: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--cam.selection", selection)
    assert run_sample.main(arguments(data, tmp_path / "whole", *flags)) == 0
    wanted = digests(tmp_path / "whole", "weights/*", "cam/*")
    assert wanted.keys() >= {"weights/caae.pt", "weights/cam.pt"} and not any("best" in n for n in wanted)
    scores = json.loads((tmp_path / "whole" / "scores.json").read_text())
    assert f'"selection": "{selection}"' in json.dumps(scores)

    for name, at in (("caae", 3), ("cam", 5)):
        with pytest.MonkeyPatch.context() as patch:
            stop_in(name, at, patch)
            assert run_sample.main(arguments(data, tmp_path / "cut", *flags)) != 0
        assert (tmp_path / "cut" / "weights" / f"{name}.resume.pt").exists()
    capsys.readouterr()
    assert run_sample.main(arguments(data, tmp_path / "cut", *flags)) == 0
    said = capsys.readouterr().out
    assert "caae: trained already" in said and "cam: 6 updates" in said and "going on from update 4" in said
    assert digests(tmp_path / "cut", "weights/*", "cam/*") == wanted


@pytest.fixture
def job(data: Path, tmp_path: Path) -> Iterator[Job]:
    yield open_job(replace(open_config(data), run=tmp_path / "run"))


def open_config(data: Path) -> Config:
    return parsing.parse(arguments(data, Path("unused")))


@pytest.mark.slow
def test_an_epoch_is_rated_by_the_best_background_score(job: Job) -> None:
    masks = scored_masks(job)
    rated = train_miou(job, network(classes=2).eval(), masks, torch.device("cpu"))
    assert set(masks) == set(job.catalog.ids("train")) and 0 < rated < 1

    class Empty(SemFormer):
        def selection_maps(self, images: Tensor, tags: Tensor) -> Tensor:
            return super().selection_maps(images, tags) * 0

    guide = autoencoder(2)
    empty = train_miou(job, Empty(TINY, 2, guide).eval(), masks, torch.device("cpu"))
    assert 0 < empty < 1 / 3  # all background: one class of three


@pytest.mark.slow
def test_selection_without_masks_is_refused_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    own = shutil.copytree(data, tmp_path / "own")
    next((own / "SegmentationClass").glob("2025*")).unlink()
    with pytest.raises(ValueError, match="train_miou needs the masks of the list train, but 1 images have none"):
        scored_masks(open_job(replace(open_config(own), run=tmp_path / "run")))
    assert run_sample.main(arguments(own, tmp_path / "run", "--cam.selection", "train_miou")) == 2
    assert not list((tmp_path / "run").glob("weights/*"))
