"""WeCLIP: a light decoder on a frozen CLIP, which labels its own training crops (Zhang et al., CVPR 2024;
weclip.md).

F = fused tokens of all blocks but the last; the decoder predicts masks from F, and P = sigmoid(F F^T) says which cells
belong together. Class maps are those of CLIP-ES (net/seed/clipes.py), spread by attention that P chooses and weighs:

    R = P * mean of the layers l with d_l <= mean of d,   d_l = sum over i, j of (P_ij - A_l,ij)

and refined by the crop's colours (PAR) they label the crop, with which both are trained:

    loss = (ce over background + ce over foreground) / 2 + 0.1 * affinity
    affinity = sum over same-label neighbours (1 - P) / (2 n_same) + sum over the others P / (2 n_different)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Count, DropProbability, Range, Weight, check
from misc.config import Augment, Fit, SegInference, override
from misc.crf.dense import CRFSettings
from misc.image.labels import IGNORE
from misc.image.pixels import resize_maps
from misc.loop.trainable import Batch
from misc.precision import full_precision
from misc.propagate.caa import refine_by_attention, scale_to_unit
from misc.propagate.par import PAR, PixelAdaptive
from net.backbone.clip import ClipOptions, ClipTransformer
from net.backbone.clip_text import TextOptions
from net.backbone.transformer import QueryKey, Visit
from net.backbone.vit import Grid
from net.contract import Network, Recipe, SeedRecipe, SegmentTest, SingleStage
from net.foreign.loading import load_tensors
from net.foreign.openai import OPEN_CLIP
from net.foreign.reading import read_tensors
from net.groups import Group
from net.losses import balanced_cross_entropy, count_label_kinds
from net.registry import seed
from net.shared.texted import TEXTED_INFER, TextedNetwork, TextedOptions
from net.start_weights import PRETRAINED

SWITCH = {"published": 9144 / 30000, "mended": 0.5}
"""Fraction of the training after which maps are refined with P. The published code counts forward passes; those of its
validations on VOC are counted too, so that it switches long before the middle (weclip.md section 3)."""


@seed("weclip")
class Weclip(TextedNetwork, SingleStage):
    """Frozen CLIP, fusing head and decoder, under the names of the official checkpoints."""

    published_scores = "– / – / 76.4"
    normalisation = "imagenet"  # published, not CLIP's
    options: WeclipOptions

    def __init__(self, options: WeclipOptions, num_classes: int) -> None:
        super().__init__(options, num_classes)
        clip = options.clip
        self.decoder_fts_fuse = FusingHead(clip.layers - 1, clip.width, options.width, options.dropout)
        self.decoder = MaskDecoder(options.width, options.decoder_heads, options.decoder_layers, num_classes + 1)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C), what ``prepare`` made -> {"seg": balanced cross entropy,
        "affinity": weighted affinity loss}."""
        patch = self.options.clip.patch
        grid = (batch["image"].shape[2] // patch, batch["image"].shape[3] // patch)
        fused = self.decoder_fts_fuse(batch["tokens"], grid)
        logits, affinity = self.decoder(fused), cell_affinity(fused)
        counts = [batch[f"counts/{name}"] for name in ("background", "foreground", "same", "different")]
        with full_precision(fused.device.type):
            logits = resize_maps(logits, batch["label"].shape[1:])
            return {
                "seg": balanced_cross_entropy(logits, batch["label"], *counts[:2]),
                "affinity": self.options.affinity_weight * affinity_loss(affinity, batch["pairs"], *counts[2:]),
            }

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """Class maps, spread with P, on the grid of patches: (B, 3, H, W), (B, C) -> (B, C, h, w) float32 in [0, 1), 0
        for absent classes."""
        return self._maps(images, tags, refined=True)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Masks: (B, 3, H, W) -> (B, C + 1, H // 16, W // 16), background first."""
        tokens, _, grid = self._frozen(images)
        return self.decoder(self.decoder_fts_fuse(tokens, grid))

    def load_weights(self, weights: str) -> str:
        """A whole CLIP (a file, or ``open_clip:NAME``) for the frozen part, or a WeCLIP checkpoint.

        The texts are encoded by its text tower.
        """
        state = {} if weights.startswith(OPEN_CLIP) else read_tensors(weights)
        if "decoder.linear_pred.weight" not in state:
            return super().load_weights(weights)
        trained = {name: value for name, value in state.items() if name.startswith("decoder")}
        report = load_tensors(self, trained, allow_missing=["encoder"], label=weights)
        clip = {name.removeprefix("encoder."): v.float() for name, v in state.items() if name.startswith("encoder.")}
        return f"{report}; {self.encoder.load_clip(clip, self.texts, weights)}"

    def param_groups(self) -> list[Group]:
        """Head and decoder at ten times the base rate, all decayed."""
        return [Group([p for p in self.parameters() if p.requires_grad], 10.0)]

    # ---------------------------------------------------------------------------------------------- network

    def _frozen(self, images: Tensor, visit: Visit | None = None) -> tuple[Tensor, Tensor, Grid]:
        """Patch tokens (B, L, N, D) after the L blocks before the last, all tokens (B, T, D) of the last of these, and
        the grid; without gradient, in full precision."""
        outputs: list[Tensor] = []
        with torch.no_grad(), full_precision(images.device.type):
            last, grid = self.encoder.visual.forward_features(
                images.float(), visit, lambda _, x: outputs.append(x[:, 1:])
            )
            return torch.stack(outputs, 1), last, grid

    # ---------------------------------------------------------------------------------------------- map

    def _maps(self, images: Tensor, tags: Tensor, refined: bool) -> tuple[Tensor, Tensor, Grid]:
        """Class maps (B, C, h, w) as ``cam`` gives them, patch tokens (B, L, N, D), and the grid.

        ``refined``: P takes part, from a pass of the head without dropout (published: with; it only weighs the layers).
        """
        layers, options = self.encoder.layers, self.options
        first = layers - (options.candidates if refined else options.blocks)
        seen: list[Tensor] = []

        def visit(layer: int, attention: QueryKey) -> None:
            if layer >= first:
                seen.append(attention.mean_weights()[:, 1:, 1:])  # (B, N, N)

        tokens, last, grid = self._frozen(images, visit)
        maps = self.encoder.class_gradients(last, tags, lambda attention: visit(layers - 1, attention)).maps(grid)
        attention = torch.stack(seen, 1)  # (B, candidates, N, N)
        with torch.no_grad():
            affinity = cell_affinity(self.decoder_fts_fuse.combine(tokens, grid)) if refined else None
        for index, present in enumerate(tags > 0):
            matrix = attention[index].mean(0) if affinity is None else fuse_attention(attention[index], affinity[index])
            spread = refine_by_attention(maps[index, present], matrix, options.cut)
            maps[index, present] = scale_to_unit(spread)
        return maps, tokens, grid

    # ---------------------------------------------------------------------------------------------- training

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """``label`` (B, S, S) int64 from the class maps of the present weights, ``pairs`` (B, N, N) uint8 of
        ``affinity_label``, and CLIP's patch ``tokens`` (B, L, N, D), so that it runs once an update."""
        images, tags, options = batch["image"], batch["tags"], self.options
        maps, tokens, grid = self._maps(images, tags, progress >= SWITCH[options.switch])
        with torch.no_grad():
            label = label_crops(maps, tags, images, options.iterations)
            return {"label": label, "pairs": affinity_label(label, grid, options.radius), "tokens": tokens}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Pixels labelled background and foreground, pairs of cells with the same label and with different ones."""
        pairs = batch["pairs"]
        kinds = count_label_kinds(batch["label"])
        return {**kinds, "same": (pairs == 1).sum(), "different": (pairs == 0).sum()}


# ------------------------------------------------------------------------------ network (weclip.md section 2)


class TokenMlp(nn.Module):
    """Two linear layers with a ReLU between them, for the tokens of one block: (B, N, D) -> (B, N, E)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(tokens, width)
        self.proj_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The tokens after both layers."""
        return self.proj_2(F.relu(self.proj(x)))


class FusingHead(nn.Module):
    """Tokens of several blocks as one map."""

    def __init__(self, blocks: int, tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        self.linears_modulelist = nn.ModuleList(TokenMlp(tokens, width) for _ in range(blocks))
        self.linear_fuse = nn.Conv2d(blocks * width, width, 1)
        self.dropout = nn.Dropout2d(dropout)

    def combine(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Patch tokens (B, L, N, D) of L blocks -> (B, E, h, w), without dropout."""
        parts = [linear(x) for linear, x in zip(self.linears_modulelist, tokens.unbind(1), strict=True)]
        joined = torch.cat(parts, 2).transpose(1, 2)  # (B, L E, N)
        return self.linear_fuse(joined.reshape(joined.shape[0], -1, *grid))  # of (B, L E, h, w)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """``combine``, followed in training by channel dropout."""
        return self.dropout(self.combine(tokens, grid))


class MaskDecoder(nn.Module):
    """Transformer blocks without position embedding and a linear classifier: (B, E, h, w) -> (B, C + 1, h, w)."""

    def __init__(self, width: int, heads: int, layers: int, outputs: int) -> None:
        super().__init__()
        self.transformer = ClipTransformer(width, heads, layers)
        self.linear_pred = nn.Conv2d(width, outputs, 1)

    def forward(self, fused: Tensor) -> Tensor:
        """Logits, background first."""
        x = self.transformer(fused.flatten(2).transpose(1, 2))  # (B, N, E)
        return self.linear_pred(x.transpose(1, 2).reshape(fused.shape))  # of (B, E, h, w)


def cell_affinity(fused: Tensor) -> Tensor:
    """P: sigmoid of the inner products of the cells' vectors, (B, E, h, w) -> (B, N, N) float32."""
    with full_precision(fused.device.type):
        vectors = fused.float().flatten(2)  # (B, E, N)
        return (vectors.transpose(1, 2) @ vectors).sigmoid()


# ------------------------------------------------------------------------------ maps and labels (weclip.md section 3)


def choose_layers(attention: Tensor, affinity: Tensor) -> Tensor:
    """Which attention layers P agrees with: those whose patches attend least to the class token.

    Args:
        attention: (L, N, N) of the candidates, class token cut off.
        affinity: (N, N), P.

    Returns:
        (L,) bool: signed sums of P - A that are not above their mean.
    """
    difference = (affinity - attention).sum((1, 2))
    return difference <= difference.mean()


def fuse_attention(attention: Tensor, affinity: Tensor) -> Tensor:
    """Mean of the chosen layers times P: (L, N, N) and (N, N) -> (N, N)."""
    chosen = choose_layers(attention, affinity)
    return attention[chosen].sum(0) / (chosen.sum() + 1e-5) * affinity


def label_crops(maps: Tensor, tags: Tensor, images: Tensor, iterations: int) -> Tensor:
    """Labels of training crops: background score 1 - largest map, PAR by the colours, arg-max.

    Args:
        maps: (B, C, h, w) in [0, 1], of any grid.
        tags: (B, C) in {0, 1}; without a tag all is background.
        images: (B, 3, H, W) normalised.
        iterations: of PAR.

    Returns:
        (B, H, W) int64, 0 background, class + 1.
    """
    most = int((tags > 0).sum(1).max())
    planes, values = [], []
    for image, present in zip(maps, tags > 0, strict=True):
        keys = present.nonzero()[:, 0]
        high = resize_maps(image[keys], images.shape[2:])
        background = 1 - torch.cat([torch.zeros_like(images[:1, 0]), high]).amax(0, keepdim=True)
        # planes of 0 behind those of fewer classes: PAR leaves them at 0, and the first of equal scores counts
        planes.append(F.pad(torch.cat([background, high]), (0, 0, 0, 0, 0, most - len(keys))))
        values.append(F.pad(keys + 1, (1, most - len(keys))))
    found = PixelAdaptive(images, PAR)(torch.stack(planes), iterations).argmax(1)  # (B, H, W), of most + 1 planes
    return torch.stack(values).gather(1, found.flatten(1)).view_as(found)


# ------------------------------------------------------------------------------ losses (weclip.md section 4)


def affinity_label(label: Tensor, grid: Grid, radius: int) -> Tensor:
    """Which cells have the same label: (B, H, W) int64 -> (B, N, N) uint8, 1 same, 0 different, 255 where they are no
    neighbours (``radius`` rows and columns) or one is unknown (255)."""
    cells = F.interpolate(label[:, None].float(), size=grid, mode="nearest").flatten(1)  # (B, N), upper left pixels
    rows, columns = (x.flatten() for x in torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij"))
    near = ((rows[:, None] - rows).abs() <= radius) & ((columns[:, None] - columns).abs() <= radius)
    known = (cells != IGNORE)[:, :, None] & (cells != IGNORE)[:, None]
    same = (cells[:, :, None] == cells[:, None]).to(torch.uint8)
    return same.masked_fill(~(near.to(label.device) & known), IGNORE)


def affinity_loss(affinity: Tensor, pairs: Tensor, same: Tensor, different: Tensor) -> Tensor:
    """Affinity loss, linear in P: (B, N, N) against ``affinity_label`` (B, N, N); the numbers of pairs, plus 1, divide
    the sums."""
    positive = (1 - affinity)[pairs == 1].sum() / (same + 1)
    return (positive + affinity[pairs == 0].sum() / (different + 1)) / 2


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class WeclipOptions(TextedOptions):
    """CLIP, texts, decoder and labels; the defaults are the published ones for VOC."""

    width: Count = 256
    """Channels of the fused map and the decoder."""
    decoder_layers: Count = 3
    """Blocks of the decoder."""
    decoder_heads: Count = 8
    """Attention heads of the decoder; they divide the width."""
    dropout: DropProbability = 0.1
    """Probability that a channel of the fused map is left out in training."""
    candidates: Count = 6
    """Number of last blocks among which P chooses after the switch. COCO: 10."""
    switch: Literal["published", "mended"] = "published"
    """When P takes part in the maps. published: after 30.5 % of the training, as the published code comes to do on VOC.
    mended: after half of it, as it was meant."""
    iterations: Annotated[int, Range(least=0)] = 20
    """Iterations of PAR that make labels follow the crop's colours."""
    radius: Annotated[int, Range(least=0)] = 8
    """Cells whose rows and columns differ by no more than this are neighbours in the affinity loss."""
    affinity_weight: Weight = 0.1
    """Weight of the affinity loss."""

    def cross_check(self) -> None:
        """Raises ValueError for values that make no network together."""
        super().cross_check()
        check(self.width % self.decoder_heads == 0, "width", self.width, f"a multiple of {self.decoder_heads} heads")
        layers = self.clip.layers
        check(self.candidates <= layers, "candidates", self.candidates, f"at most the network's {layers}")

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> Weclip:
        """WeCLIP for ``num_classes`` foreground classes."""
        return Weclip(self, num_classes)


# ------------------------------------------------------------------------------ recipes (weclip.md sections 5 and 6)

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=WeclipOptions(texts=TextOptions(published=True)),
        fit=Fit(
            steps=30000, batch_size=4, optimiser="adamw", lr=2e-4, weight_decay=0.01, schedule="warmup_poly",
            warmup_steps=50, warmup_ratio=1e-6, power=1.0,
        ),
        # the crop comes before the normalisation: the canvas is black
        augment=Augment(
            order=("scale", "flip", "crop", "normalize"), scale=(0.5, 2.0), scale_filter="bilinear", flip=0.5, crop=320
        ),
        weights=PRETRAINED,
        init="clip",
        infer=TEXTED_INFER,
    ),
    refiner="crf",
    segmenter="own",
    own=SegmentTest(
        infer=SegInference(
            long_side=512, scales=(1.0, 0.75), flip=True, resize="bilinear_factor", merge="mean_grid_logits",
            align_corners=False,
            crf=CRFSettings(
                iterations=10, gauss_sxy=3, gauss_weight=3, bilateral_sxy=64, bilateral_srgb=5, bilateral_weight=4
            ),
        )
    ),
)

# twice the updates and more; the published COCO script switches after half of them (weclip.md section 3)
_COCO = override(
    _PUBLISHED,
    {
        "data": "coco14", "cam.fit.steps": 80000, "cam.network.cut": 0.7, "cam.network.candidates": 10,
        "cam.network.switch": "mended",
    },
)  # fmt: skip

# random weights in the frozen part, because none can be had without the internet: this shows that the pipeline runs
_SAMPLE = Recipe(
    cam=SeedRecipe(
        network=WeclipOptions(
            clip=ClipOptions(image_size=112, width=64, layers=4, embed=32), width=32, decoder_layers=1, decoder_heads=4,
            blocks=3, candidates=2, iterations=10,
        ),
        amp="fast",
        fit=Fit(epochs=2, batch_size=16, optimiser="adamw", lr=2e-4, weight_decay=0.01, power=1.0),
        augment=Augment(
            order=("scale", "flip", "crop", "normalize"), scale=(0.75, 1.25), scale_filter="bilinear", crop=112
        ),
        infer=TEXTED_INFER,
    ),
    refiner="crf",
    segmenter="own",
    own=SegmentTest(
        infer=SegInference(
            scales=(1.0,), flip=True, resize="bilinear_factor", merge="mean_grid_logits", align_corners=False,
            crf=CRFSettings(iterations=5, bilateral_sxy=32),
        )
    ),
)

Weclip.recipes = {"published": _PUBLISHED, "published_coco": _COCO, "sample": _SAMPLE}
