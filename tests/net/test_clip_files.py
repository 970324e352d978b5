"""The files that CLIP's real weights come in, made here at a tiny size: both are read and give CLIP's own features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from net.backbone.clip import ClipOptions
from net.backbone.clip_text import BACKGROUND, PUBLISHED_TEXTS
from net.foreign.openai import read_clip
from net.seed.clipes import Clipes, ClipesOptions
from net.seed.weclip import Weclip

open_clip = pytest.importorskip("open_clip")
TINY = ClipOptions(image_size=64, width=64, layers=3, embed=16)
NAMES = ("potted_plant", "Tür")


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    """open_clip's own CLIP with QuickGELU and random weights."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=3, width=64, head_width=64, patch_size=16, image_size=64)
    text = CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=1, layers=2)
    return CLIP(16, vision, text, quick_gelu=True).eval()


def check(clip: nn.Module, file: Path, tolerance: float) -> None:
    """CLIP-ES that read a file has the features that open_clip's network gives."""
    network = Clipes(ClipesOptions(clip=TINY, blocks=2), len(NAMES)).eval()
    network.set_class_texts(NAMES, {"Tür": "door"})
    assert "2 classes and 25 background words encoded" in network.load_weights(str(file))
    prompts = open_clip.get_tokenizer("ViT-B-16")(["a clean origami potted plant.", "a clean origami door."])
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        texts = clip.encode_text(prompts, normalize=True)
        wanted = clip.encode_image(images)
        found = network.encoder.visual(images)
    torch.testing.assert_close(network.encoder.class_features, texts, rtol=0, atol=tolerance)
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    torch.testing.assert_close(network.encoder.logit_scale, clip.logit_scale.detach())


def test_open_clips_safetensors(clip: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in clip.state_dict().items() if name != "attn_mask"}
    save_file(state, tmp_path / "open_clip.safetensors")
    assert set(read_clip(str(tmp_path / "open_clip.safetensors"))) >= {"visual.proj", "text_projection", "logit_scale"}
    check(clip, tmp_path / "open_clip.safetensors", 1e-5)


class _Tree(nn.Module):
    """Tensors under dotted names, as a module that can be scripted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def archive(state: dict[str, torch.Tensor], file: Path) -> None:
    """Write OpenAI's form: a TorchScript archive with matrices in half precision and three integers."""
    root = _Tree()
    for name, value in state.items():
        *path, last = name.split(".")
        here: Any = root
        for part in path:
            if part not in dict(here.named_children()):
                here.add_module(part, _Tree())
            here = here.get_submodule(part)
        here.register_parameter(last, nn.Parameter(value.half() if value.ndim >= 2 else value))
    for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(value))
    torch.jit.save(torch.jit.script(root), str(file))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_archive(clip: nn.Module, tmp_path: Path) -> None:
    archive({k: v for k, v in clip.state_dict().items() if k != "attn_mask"}, tmp_path / "ViT-B-16.pt")
    state = read_clip(str(tmp_path / "ViT-B-16.pt"))
    assert "input_resolution" not in state and all(value.dtype == torch.float32 for value in state.values())
    check(clip, tmp_path / "ViT-B-16.pt", 5e-3)
    # cut short: refused by name
    (tmp_path / "cut.pt").write_bytes((tmp_path / "ViT-B-16.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.pt"):
        read_clip(str(tmp_path / "cut.pt"))


def test_recipes_for_coco_are_the_published_ones() -> None:
    coco = Clipes.recipes["published_coco"]
    assert coco.data == "coco14" and coco.cam.network.cut == 0.7 and coco.refine == {"ignore_below": 0.95}
    texts = coco.cam.network.texts.choose(("stop_sign", "keyboard", "person", "couch"), {})
    assert texts.classes == ("stop sign", "keyboard", PUBLISHED_TEXTS["person"], "sofa")
    assert set(BACKGROUND) - set(texts.background) == {"keyboard", "sign"} and len(texts.background) == 23
    coco = Weclip.recipes["published_coco"]
    assert coco.data == "coco14" and coco.segmenter == "own" and coco.cam.fit.steps == 80000
    options = coco.cam.network
    assert (options.cut, options.candidates, options.switch) == (0.7, 10, "mended")
    assert coco.cam.fit.lr == Weclip.recipes["published"].cam.fit.lr


def test_photographs_need_no_flag() -> None:
    photos = Clipes.recipes["photos"]
    assert photos.data == "folder" and photos.refiner == "crf"
    assert photos.cam.weights == "pretrained" and photos.segment["weights"] == "pretrained"
