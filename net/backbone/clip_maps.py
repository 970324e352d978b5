"""A frozen CLIP that knows the texts of classes, and the class maps that its last block's gradients give (CLIP-ES, Lin
et al., 2023; clipes.md section 4). WeCLIP uses the same maps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.precision import full_precision
from misc.propagate.caa import scale_to_unit
from net.backbone.clip import TEXT_TENSORS, ClipOptions, TextTower, VisionTower
from net.backbone.clip_text import Texts, text_features
from net.backbone.transformer import QueryKey
from net.backbone.vit import Grid
from net.foreign.loading import load_tensors
from net.foreign.pytorch import State


@dataclass(frozen=True)
class ClassGradients:
    """What class maps are made of, for a batch of B images, C classes and M background texts."""

    logits: Tensor
    """(B, C + M) float32: cosines of the images with the texts, times CLIP's scale (100)."""
    probabilities: Tensor
    """(B, C + M): their softmax over the present classes and all background texts; 0 for absent classes."""
    patches: Tensor
    """(B, N, D): output of the last block's first layer norm."""
    weights: Tensor
    """(B, C, D): mean over the patches of the gradient of the class's probability with respect to it; 0 for absent
    classes."""

    def raw_maps(self, grid: Grid) -> Tensor:
        """Channels added up by their weights: (B, C, h, w), signed."""
        return (self.weights @ self.patches.transpose(1, 2)).unflatten(2, grid)

    def maps(self, grid: Grid) -> Tensor:
        """(B, C, h, w) in [0, 1), 0 for absent classes. Scaled twice: the second time undoes the epsilon, which is seen
        where a probability is near 0 or 1 and its gradient small (clipes.md section 4)."""
        return scale_to_unit(scale_to_unit(self.raw_maps(grid).clamp(min=0)))


class FrozenClip(nn.Module):
    """CLIP's image tower, which is never trained, and the features of texts: of C classes and of M background words.

    The text tower is needed only to make these (``net.backbone.clip_text``). They are random until they are given.
    """

    def __init__(self, options: ClipOptions, num_classes: int) -> None:
        super().__init__()
        self.visual = VisionTower(options).requires_grad_(False)
        self.register_buffer("logit_scale", torch.tensor(100.0).log())
        self.register_buffer("class_features", torch.zeros(num_classes, options.embed))
        self.register_buffer("background_features", torch.zeros(0, options.embed))

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.visual.transformer.resblocks)

    def set_texts(self, classes: Tensor, background: Tensor) -> None:
        """Take the features of texts: unit rows (C, E) and (M, E)."""
        self.class_features, self.background_features = classes.detach().clone(), background.detach().clone()

    def draw_texts(self, background: int) -> None:
        """Random directions in place of the features of C classes and ``background`` words, for random weights."""
        embed = self.class_features.shape[1]
        features = F.normalize(torch.randn(embed), dim=0) + 0.5 * torch.randn(
            len(self.class_features) + background, embed
        ) / embed**0.5
        self.set_texts(*F.normalize(features, dim=1).split([len(self.class_features), background]))

    def load_clip(self, state: State, texts: Texts, source: str) -> str:
        """Take the image tower of a whole CLIP in official names (``net.foreign.openai.read_clip``), and encode the
        texts with its text tower; returns a one-line report. ValueError where its size is another or parts
        are missing."""
        needed = ("visual.conv1.weight", "visual.positional_embedding", "logit_scale", *TEXT_TENSORS)
        if missing := [name for name in needed if name not in state]:
            raise ValueError(
                f"{source} lacks {', '.join(missing)}: a whole CLIP is needed, with the text tower that encodes the "
                "classes."
            )
        there, here = (tuple(s["visual.conv1.weight"].shape) for s in (state, self.state_dict()))
        layers = 1 + max(int(k.split(".")[3]) for k in state if k.startswith("visual.transformer.resblocks."))
        if there != here or layers != self.layers:
            side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5) * there[2]
            raise ValueError(
                f"{source} is a CLIP of another size: set the network's clip options to image_size {side}, patch "
                f"{there[2]}, width {there[0]}, layers {layers}, embed {state['text_projection'].shape[1]}."
            )
        visual = {name: value for name, value in state.items() if name.startswith("visual.")}
        report = load_tensors(self.visual, {k.removeprefix("visual."): v for k, v in visual.items()}, label=source)
        self.logit_scale.copy_(state["logit_scale"])
        tower = TextTower.like(state)
        self.set_texts(*(text_features(tower, part, texts.templates) for part in (texts.classes, texts.background)))
        return f"{report}; {len(texts.classes)} classes and {len(texts.background)} background words encoded"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load; the file decides the number of background words."""
        features = state_dict.get(f"{prefix}background_features")
        if features is not None and features.shape[1:] == self.background_features.shape[1:]:
            self.background_features = self.background_features.new_zeros(features.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def class_gradients(
        self, tokens: Tensor, tags: Tensor, see: Callable[[QueryKey], object] | None = None
    ) -> ClassGradients:
        """One pass through the last block, and one backward pass through it for the k-th present class of all images.

        The tokens are held fixed where they are added to: gradients reach the layer norm's output through the attention
        only. In full precision: gradients may be below 6e-8, the smallest number of float16.

        Args:
            tokens: (B, 1 + N, D) from ``VisionTower.forward_features``.
            tags: (B, C) in {0, 1}.
            see: gets the last block's queries and keys.
        """
        block, present = self.visual.transformer.resblocks[-1], tags > 0
        classes = present.shape[1]
        texts = torch.cat([self.class_features, self.background_features])  # (C + M, E)
        with torch.enable_grad(), full_precision(tokens.device.type):
            tokens = tokens.detach().float()
            normalised = block.ln_1(tokens).detach().requires_grad_()
            output = block.after_norm(tokens, normalised, see)
            logits = self.logit_scale.exp() * self._feature(output) @ texts.T  # (B, C + M)
            absent = F.pad(~present, (0, len(self.background_features)))
            probabilities = logits.masked_fill(absent, -torch.inf).softmax(1)
            weights = normalised.new_zeros(*present.shape, tokens.shape[2])
            rank = present.cumsum(1) * present  # (B, C): 1 for an image's first present class
            count = int(rank.max()) if rank.numel() else 0
            for k in range(1, count + 1):
                chosen = rank == k
                value = probabilities[:, :classes][chosen].sum()  # an image's depend on its own tokens only
                (gradient,) = torch.autograd.grad(value, normalised, retain_graph=k < count)
                weights[chosen] = gradient[chosen.any(1), 1:].mean(1)
        return ClassGradients(logits.detach(), probabilities.detach(), normalised.detach()[:, 1:], weights)

    def _feature(self, output: Tensor) -> Tensor:
        """Unit image features of the last block's output: (B, 1 + N, D) -> (B, E), of the patches without the class
        token."""
        return F.normalize(self.visual.ln_post(output[:, 1:]).mean(1) @ self.visual.proj, dim=1)

    def text_logits(self, images: Tensor) -> Tensor:
        """Scaled cosines of images with all texts, without gradient: (B, 3, H, W) normalised -> (B, C + M) float32."""
        with torch.no_grad(), full_precision(images.device.type):
            tokens, _ = self.visual.forward_features(images.float())
            texts = torch.cat([self.class_features, self.background_features])
            return self.logit_scale.exp() * self._feature(self.visual.transformer.resblocks[-1](tokens)) @ texts.T
