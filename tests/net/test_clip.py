"""CLIP-ES and WeCLIP beyond the golden cases: plain forms, texts, files, what is imported, what is refused."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from running import make_set, start

import run_sample
from misc.files.store import read_model
from misc.propagate.caa import doubly_stochastic, rectangle_mask, refine_by_attention, scale_to_unit
from net.backbone.clip import ClipOptions, TextTower
from net.backbone.clip_maps import FrozenClip
from net.backbone.clip_text import BACKGROUND, TextOptions, background_words, class_text, tokenise
from net.backbone.timm_cnn import PHOTOS, TimmCNN
from net.foreign import reading
from net.foreign.openai import read_clip
from net.model import describe_network, load_model
from net.registry import SEEDS, SEGMENTERS, load_methods
from net.seed.clipes import Clipes, ClipesOptions
from net.seed.weclip import Weclip, WeclipOptions, label_crops
from scripts.clip_seconds import plain_maps
from step.lib.config import default_config

load_methods()

TINY = ClipOptions(image_size=64, width=64, layers=4, embed=16)
NAMES = ("potted_plant", "Tür", "tree house")


def clipes(classes: int = 3) -> Clipes:
    torch.manual_seed(0)
    network = Clipes(ClipesOptions(clip=TINY, blocks=3), classes).eval()
    network.set_class_texts([f"class {number}" for number in range(classes)], {})
    return network


def images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_batched_maps_are_those_of_the_plain_form(size: tuple[int, int]) -> None:
    network, batch = clipes(), images(2, *size)
    tags = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    maps = network.cam(batch, tags)
    assert (maps.amax((2, 3)) > 0.9).sum() >= 1  # others may have no rising gradient with random weights
    for index, row in enumerate(tags):
        present = row.nonzero()[:, 0].tolist()
        assert not maps[index][row == 0].any()
        for key in present:
            wanted = plain_maps(network, batch[index], present)[present.index(key)]
            torch.testing.assert_close(maps[index, key], wanted, rtol=1e-3, atol=1e-4)


def test_spreading_is_exact_before_the_last_scaling() -> None:
    """Attention that is alike everywhere, as with random weights, makes a nearly constant map, whose rounding the last
    scaling enlarges: what is compared is the map before it."""
    torch.manual_seed(0)
    attention = (torch.randn(150, 150) * 0.01).softmax(1)
    maps = torch.rand(2, 10, 15)
    matrix = doubly_stochastic(attention.double())
    inside = torch.stack([m.double() * torch.from_numpy(rectangle_mask(m.numpy(), 0.4)) for m in maps]).flatten(1)
    wanted = (inside @ (matrix @ matrix).T).view_as(maps)
    found = refine_by_attention(maps, attention, 0.4)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=0)
    rounding = ((found - wanted).abs() / wanted).max()
    assert (scale_to_unit(found).double() - scale_to_unit(wanted)).abs().max() > 100 * rounding


def test_an_image_without_a_tag_has_no_map_and_is_all_background() -> None:
    network = clipes()
    assert not network.cam(images(1, 48, 48), torch.zeros(1, 3)).any()
    label = label_crops(torch.rand(2, 3, 3, 3), torch.tensor([[0.0, 0, 0], [0, 1, 0]]), images(2, 48, 48), 2)
    assert not label[0].any() and set(label[1].unique().tolist()) == {0, 2}


def test_maps_without_a_class_stay_without_one() -> None:
    assert refine_by_attention(torch.zeros(0, 3, 4), torch.ones(12, 12), 0.4).shape == (0, 3, 4)


def test_all_images_of_any_size_have_a_grid() -> None:
    visual = FrozenClip(TINY, 2).visual
    for size, grid in (((8, 8), (1, 1)), ((17, 40), (1, 2)), ((64, 64), (4, 4)), ((90, 33), (5, 2))):
        assert visual.forward_features(images(1, *size))[1] == grid


# ---------------------------------------------------------------------------------------------- texts


def test_texts_of_classes_and_background() -> None:
    assert class_text("potted_plant", published=False) == "potted plant"
    assert class_text("person", published=False) == "person"
    assert class_text("person", published=True) == "person with clothes,people,human"
    assert class_text("couch", published=True) == "sofa" and class_text("Tür", published=True) == "Tür"
    texts = TextOptions().choose(NAMES, {"Tür": "door, ROAD sign"})
    assert texts.classes == ("potted plant", "door, ROAD sign", "tree house")
    gone = {"tree", "house", "road", "sign"}
    assert set(texts.background) == set(BACKGROUND) - gone
    assert background_words(("sea shore", "sea"), ("by the sea",)) == ("sea shore",)
    with pytest.raises(ValueError, match="All background words"):
        TextOptions(background=("tree",)).choose(("tree",), {})
    for wrong in ({"templates": ("a photo",)}, {"background": ()}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TextOptions(**wrong)


def test_a_class_named_like_a_background_word_competes_with_the_others_only() -> None:
    network = Clipes(ClipesOptions(clip=TINY, blocks=3), 1)
    network.set_class_texts(["building"], {})
    assert "building" not in network.texts.background
    assert len(network.encoder.background_features) == len(BACKGROUND) - 1


def test_names_of_any_letters_have_tokens() -> None:
    pytest.importorskip("open_clip")
    ids = tokenise(["a clean origami Tür.", "a clean origami 猫.", "a clean origami potted plant."], 77)
    assert ids.shape == (3, 77) and (ids[:, 0] == 49406).all() and (ids.amax(1) == 49407).all()
    with pytest.raises(ValueError, match="too long for CLIP, which reads 77"):
        tokenise(["many words " * 40], 77)


def without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("open_clip"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_what_is_missing_is_reported_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without_open_clip(monkeypatch)
    with pytest.raises(ValueError, match="pip install -r requirements-clip.txt"):
        tokenise(["dog"], 77)
    with pytest.raises(ValueError, match="pip install -r requirements-clip.txt"):
        read_clip("open_clip:ViT-B-16-quickgelu")


def test_pretrained_without_internet_says_what_to_do_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")

    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("the hub's client tries again and again")

    monkeypatch.setattr(open_clip, "create_model", fetch)
    monkeypatch.setattr(reading, "_is_cached", lambda repository, files: False)
    monkeypatch.setattr(reading, "_unreachable", lambda address: "no way out")
    with pytest.raises(ValueError, match="can't be reached .no way out.: bring the file https.*ViT-B-16.pt"):
        read_clip("open_clip:ViT-B-16-quickgelu")
    monkeypatch.setattr(reading, "_is_cached", lambda repository, files: "open_clip_model.safetensors" in files)
    with pytest.raises(ValueError, match="tries again and again"):  # it is there: open_clip is asked for it
        read_clip("open_clip:ViT-B-16-quickgelu")


def test_photos_take_the_published_masks_and_the_segmenters_recipe_from_downloaded_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = default_config("clipes", "photos")
    assert cfg.aff == default_config("clipes", "published").aff and cfg.long_side == 1024
    photos = SEGMENTERS["deeplabv3plus"].recipes["photos"]
    assert photos.weights == "cam"  # which is CLIP here
    assert cfg.seg == replace(photos, weights="pretrained", init="imagenet")
    network = cfg.seg.network.build(2, {})
    fetched = timm.create_model(PHOTOS.removeprefix("timm/")).state_dict()
    monkeypatch.setattr(reading, "read_timm", {PHOTOS.removeprefix("timm/"): fetched}.__getitem__)
    cfg.seg.start.load(network, Path("none"))
    backbone = next(m for m in network.modules() if isinstance(m, TimmCNN)).model.state_dict()
    assert backbone and all(torch.equal(value, fetched[key]) for key, value in backbone.items())


@pytest.mark.slow
def test_nothing_of_clip_is_imported_on_the_path_of_other_methods() -> None:
    code = (
        "import sys, predict, run_sample, evaluation; from net import registry; registry.load_methods(); "
        "from step.lib.parsing import parse; parse(['seam']); parse(['clipes']); "
        "print([name for name in ('open_clip', 'transformers', 'segment_anything') if name in sys.modules])"
    )
    result = start(["-c", code])
    assert result.returncode == 0 and result.stdout.strip().endswith("[]"), result.stdout + result.stderr


# ---------------------------------------------------------------------------------------------- files


def whole_clip(options: ClipOptions = TINY) -> dict[str, torch.Tensor]:
    """A CLIP with random weights under the official names, whose text tower knows the real tokens."""
    torch.manual_seed(3)
    visual = FrozenClip(options, 0).visual.state_dict()
    text = TextTower(64, 1, 77, 49408, options.embed).state_dict()
    return {**text, **{f"visual.{name}": value for name, value in visual.items()}}


def test_a_clip_file_gives_tower_and_texts_and_the_run_file_needs_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("open_clip")
    state = whole_clip()
    torch.save({f"module.{name}": value.half() for name, value in state.items()}, tmp_path / "clip.pt")
    network = Clipes(ClipesOptions(clip=TINY, blocks=3), len(NAMES))
    network.set_class_texts(NAMES, {"Tür": "door"})
    told = network.load_weights(str(tmp_path / "clip.pt"))
    assert "3 classes and 23 background words encoded" in told
    torch.testing.assert_close(network.encoder.visual.proj, state["visual.proj"].half().float())
    torch.testing.assert_close(network.encoder.class_features.norm(dim=1), torch.ones(3))
    assert network.notes()["texts"]["classes"] == ["potted plant", "door", "tree house"]
    description = describe_network("cam", "clipes", "sample", {"network.blocks": 3}, NAMES, network)
    assert description["texts"]["background"] == list(network.texts.background)
    # without the tokeniser: another number of background words comes out of the file
    without_open_clip(monkeypatch)
    again = Clipes(ClipesOptions(clip=TINY, blocks=3), len(NAMES)).eval()
    again.load_state_dict(network.state_dict())
    tags = torch.tensor([[1.0, 1, 0]])
    assert torch.equal(again.cam(images(1, 48, 64), tags), network.eval().cam(images(1, 48, 64), tags))


def test_files_that_are_no_such_clip_are_refused(tmp_path: Path) -> None:
    network = Clipes(ClipesOptions(clip=TINY, blocks=3), 3)
    network.set_class_texts(NAMES, {})
    file = str(tmp_path / "clip.pt")
    torch.save(whole_clip(ClipOptions(image_size=32, patch=8, width=128, layers=2, embed=16)), file)
    with pytest.raises(ValueError, match="image_size 32, patch 8, width 128, layers 2, embed 16"):
        network.load_weights(file)
    torch.save({"norm_pre.weight": torch.zeros(3), "patch_embed.proj.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="image tower alone, in timm's names"):
        network.load_weights(file)
    torch.save({"conv1.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="no CLIP with a vision transformer"):
        network.load_weights(file)
    with pytest.raises(ValueError, match="another activation than OpenAI's weights"):
        read_clip("open_clip:ViT-B-16")


def test_a_weclip_checkpoint_is_loaded_with_its_clip(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    options = WeclipOptions(clip=TINY, width=16, decoder_layers=1, decoder_heads=2, blocks=2, candidates=2)
    torch.manual_seed(5)
    source = Weclip(options, 3)
    state = {k: v for k, v in source.state_dict().items() if k.startswith("decoder")}
    state |= {f"encoder.{name}": value for name, value in whole_clip().items()}
    state["par.kernel"] = torch.zeros(8, 1, 3, 3)
    torch.save(state, tmp_path / "weclip.pth")
    network = Weclip(options, 3)
    network.set_class_texts(NAMES, {})
    network.load_weights(str(tmp_path / "weclip.pth"))
    assert all(torch.equal(network.state_dict()[name], state[name]) for name in state if name.startswith("decoder"))
    torch.testing.assert_close(network.encoder.visual.conv1.weight, state["encoder.visual.conv1.weight"])
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("decoder") for name in trained)
    for name in ("encoder.text_projection", "encoder.visual.conv1.weight"):
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path / "part.pth")
        with pytest.raises(ValueError, match=f"part.pth lacks {name.removeprefix('encoder.')}: a whole CLIP is needed"):
            network.load_weights(str(tmp_path / "part.pth"))


def test_the_rectangles_leave_the_last_row_and_column_out() -> None:
    scores = np.zeros((4, 5), np.float32)
    scores[2:, 3:] = 1
    mask = rectangle_mask(scores, 0.4)
    assert mask.sum() == 1 and mask[2, 3] == 1


def test_a_run_file_of_clipes_is_built_from_its_description(tmp_path: Path) -> None:
    from misc.config import flatten
    from misc.files import store

    recipe = Clipes.recipes["sample"].cam
    network = recipe.network.build(2, {})
    network.set_class_texts(["sign", "dog"], {})
    store.write_model(
        tmp_path / "cam.pt", network.state_dict(),
        describe_network("cam", "clipes", "sample", flatten(recipe), ["sign", "dog"], network),
    )  # fmt: skip
    model = load_model(tmp_path / "cam.pt", "cam")
    assert isinstance(model.network, Clipes)
    assert len(model.network.encoder.background_features) == len(BACKGROUND) - 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clipes", "weclip"])
def test_a_released_file_goes_through_a_run(method: str, tmp_path: Path) -> None:
    """CLIP's own file, or WeCLIP's with CLIP inside; the run's file has the features of the texts instead of the text
    tower."""
    pytest.importorskip("open_clip")
    torch.manual_seed(5)
    network = SEEDS[method].recipes["sample"].cam.network.build(2, {})
    trained = {name: value for name, value in network.state_dict().items() if name.startswith("decoder")}
    whole = whole_clip(network.options.clip)
    state = {**trained, **{f"encoder.{name}": value for name, value in whole.items()}} if trained else whole
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "released.pth")
    place = ["--root", str(make_set(tmp_path / "data", images=3, val=2)), "--out", str(tmp_path / "run")]
    flags = ["--machine.device", "cpu", "--machine.workers", "0", "--steps", "1-2"]
    assert run_sample.main([method, *place, *flags, "--cam.released", str(tmp_path / "released.pth")]) == 0
    written, told = read_model(tmp_path / "run" / "weights" / "cam.pt")
    assert all(torch.equal(written[name], value) for name, value in trained.items())
    assert torch.equal(written["encoder.visual.conv1.weight"], whole["visual.conv1.weight"])
    assert not any("token_embedding" in name for name in written)
    torch.testing.assert_close(written["encoder.class_features"].norm(dim=1), torch.ones(2))
    assert len(told["texts"]["classes"]) == 2 and told["precision"] == "not known (released)"
    assert type(load_model(tmp_path / "run" / "weights" / "cam.pt", "cam").network) is SEEDS[method]
