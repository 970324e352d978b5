"""MoRe: class-patch attention that is regularised (Yang et al., AAAI 2025; more.md).

A vision transformer with one class token a class: class tokens times patch tokens give localisation attention maps
(LAM). A graph module rebuilds every class token from its nearest tokens (GCR); class tokens are pulled to the patches
that the class maps are certain of (cle), uncertain patches to the tokens of present classes (une), and class tokens
pushed apart (mct). Labels, patch contrast and decoder are ToCo's.

    loss = cls + cls_aux + mct + 0.3 ptc + 0.2 cle + 0.1 une + 0.12 seg + 0.05 reg
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Count, Positive, Probability, Range, check
from misc.config import Augment, CamInference, SegInference
from misc.crf.dense import CRFSettings
from misc.crf.energy import DenseOptions
from misc.image.labels import IGNORE
from misc.image.pixels import resize_maps
from misc.infer.online import threshold_label
from misc.loop.trainable import Batch, sample_streams
from misc.precision import full_precision
from net.backbone.auxiliary_vit import AuxiliaryViT
from net.backbone.vit import SAMPLE_VIT, ViTOptions
from net.contract import Network, Recipe, SeedRecipe, SegmentTest
from net.foreign.pytorch import State
from net.groups import Group
from net.losses import multilabel_soft_margin
from net.registry import seed
from net.shared.self_training import (
    PUBLISHED_FIT,
    SAMPLE_FIT,
    SAMPLE_INFER,
    SAMPLE_TEST,
    SelfTrainedOptions,
    SelfTrainedViT,
    Term,
    patch_contrast,
)
from net.start_weights import PRETRAINED

_SPARE = 4
_MCT_TEMPERATURE = 0.07
_WINDOW, _MARGIN, _DRAWN, _LEAST_MEAN = 6, 3, 8, 1.2


@seed("more")
class More(SelfTrainedViT):
    """MoRe. State-dict names are those of the official checkpoints, which load strictly (more.md section 2.3)."""

    published_scores = "– / – / 76.4"
    settings: MoreOptions

    def __init__(self, options: MoreOptions, num_classes: int) -> None:
        super().__init__(options, ClassTokenViT(options.backbone, num_classes, options.aux_layer), num_classes)
        self.graph_layer = GraphModule(options.backbone.width, max(1, int(0.5 * num_classes)))

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C), seed (B,), and what ``prepare`` and the loop add.

        Returns {"cls", "cls_aux": soft margin losses; "mct", "cle", "une": of the class tokens; "ptc": patch contrast;
        "seg", "reg": of the decoder}, weighted.
        """
        options, images, tags = self.settings, batch["image"], batch["tags"]
        tokens, patches, auxiliary = self.encoder(images)
        rebuilt = self.class_tokens(tokens, patches)
        ptc = patch_contrast(
            patches, batch["token_label"], batch["counts/same_pairs"], batch["counts/different_pairs"],
            options.images_per_gpu,
        )
        with full_precision(images.device.type):
            mct = token_contrast(rebuilt)
            if options.mct_with_mean:
                mct = (mct + mean_margin(rebuilt, tags)) / 2
            cle = certain_patches(rebuilt, patches, batch["certain_label"], tags, options.temperature)
            une = uncertain_patches(rebuilt, patches, batch["taken"], tags, batch["counts/taken"])
        everywhere = torch.ones_like(images[:, 0], dtype=torch.bool)  # published: no box anywhere
        weights = options.seg.at(progress), options.reg.at(progress)
        return {
            "cls": multilabel_soft_margin(self.classifier.class_logits(patches), tags),
            "cls_aux": multilabel_soft_margin(self.aux_classifier.class_logits(auxiliary), tags),
            "mct": options.mct.at(progress) * mct,
            "ptc": options.ptc.at(progress) * ptc,
            "cle": options.cle.at(progress) * cle,
            "une": options.une.at(progress) * une,
            **self.segmentation_terms(self.decoder(patches), batch, everywhere, weights),
        }

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """The map that ``options.map`` names, class maps or LAM."""
        return self.attention_maps(images) if self.settings.map == "lam" else super().cam(images, tags)

    def class_tokens(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """The encoder's class tokens (B, 4 + C, D) and patches (B, D, h, w) -> rebuilt class tokens (B, C, D)."""
        return self.graph_layer(tokens[:, _SPARE:], patches.flatten(2).transpose(1, 2))

    def attention_maps(self, images: Tensor) -> Tensor:
        """LAM: products of class tokens and patch tokens, signed, (B, 3, H, W) -> (B, C, h, w) float32."""
        tokens, patches, _ = self.encoder(images)
        return torch.einsum("bcd,bdhw->bchw", self.class_tokens(tokens, patches).float(), patches.float())

    # ----------------------------------------------------------------------------------- training

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """Labels from the class maps of the present weights: ``token_label``, ``certain_label`` (B, h, w) int64 for ptc
        and cle, ``taken`` (B, h, w) float32 for une; with the decoder's terms ``label`` (B, S, S) int64."""
        options = self.settings
        (maps, auxiliary), keys, real = self.online_maps(batch)
        grid = [side // options.backbone.patch for side in maps.shape[-2:]]
        final, early = resize_maps(maps, grid), resize_maps(auxiliary, grid)
        made = {"token_label": threshold_label(early, keys, options.high, options.low)}
        if progress > options.switch:
            made["certain_label"] = uncertain = threshold_label(final, keys, options.late_high, options.late_low)
        else:
            made["certain_label"] = threshold_label(early, keys, options.certain_high, options.low)
            uncertain = made["token_label"]
        made["taken"] = torch.stack([
            draw_uncertain(one, stream.permutation, options.window_centre)
            for one, stream in zip(uncertain, sample_streams(batch), strict=True)
        ])  # fmt: skip
        if options.seg.at(progress) or options.reg.at(progress):
            made["label"] = self.decoder_labels(batch["image"], maps, keys, real)
        return made

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The counts of the base class, and the number of tokens that une takes."""
        return {**super().counts(batch), "taken": batch["taken"].sum()}

    def param_groups(self) -> list[Group]:
        """Encoder but for its norms, its norms, classifiers, graph module, decoder (more.md section 6)."""
        return self.split_groups([self.classifier, self.aux_classifier], [self.graph_layer], [self.decoder])


# ------------------------------------------------------------------------------------ network (more.md section 2)


class ClassTokenViT(AuxiliaryViT):
    """The encoder: four spare class tokens, then one for each class."""

    position_offset = 0.1

    def __init__(self, options: ViTOptions, num_classes: int, aux_layer: int) -> None:
        super().__init__(options, _SPARE + num_classes, aux_layer, _SPARE + num_classes)

    def from_classifier(self, state: State) -> State:
        """As in ``ViT``, but the positions of the spare tokens are random, far larger than the others (section 2.1)."""
        made = super().from_classifier(state)
        spare = nn.init.trunc_normal_(torch.empty_like(made["pos_embed"][:, :_SPARE]))
        return {**made, "pos_embed": torch.cat([spare, made["pos_embed"][:, _SPARE:]], 1)}


class GraphModule(nn.Module):
    """Graph category representation: every class token rebuilt from the tokens that are most like it (section 2.2).

    Args:
        width: D.
        neighbours: number k of nearest tokens from which a class token is rebuilt.
    """

    def __init__(self, width: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self._fc1 = nn.Sequential(nn.Linear(width, width)).requires_grad_(False)  # in the official files, never used
        self.head_proj, self.tail_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.linear1, self.linear2 = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def find_neighbours(self, tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Projected class tokens (B, C, D), projections of all tokens (B, C + N, D), and of each class token's
        neighbours the likeness (B, C, k), largest first, and the places among all tokens (B, C, k)."""
        heads = self.head_proj(tokens)
        tails = self.tail_proj(torch.cat([tokens, patches], 1))
        likeness = heads * heads.shape[-1] ** -0.5 @ tails.transpose(1, 2)  # (B, C, C + N)
        values, places = likeness.topk(self.neighbours, dim=2)
        return heads, tails, values, places

    def forward(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """Class tokens (B, C, D) and patch tokens (B, N, D), which get no gradient -> (B, C, D)."""
        heads, tails, values, places = self.find_neighbours(tokens, patches.detach())
        batch = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        near = tails[batch, places]  # (B, C, k, D)
        share = values.softmax(2)[..., None]
        related = (1 - share) * heads[:, :, None] + share * near
        gate = torch.tanh(heads[:, :, None] + related)
        # published: a product of two sums over the channels, not a sum of products
        weight = (near.sum(3) * gate.sum(3)).softmax(2)[..., None]
        found = (weight * near).sum(2)  # (B, C, D)
        added = F.leaky_relu(self.linear1(0.1 * (heads + found) + tokens))
        multiplied = F.leaky_relu(self.linear2(0.1 * heads * found + tokens))
        return self.norm(added + multiplied)


# ------------------------------------------------------------------------------------ losses (more.md section 4)


def token_contrast(tokens: Tensor) -> Tensor:
    """mct: pushes an image's class tokens (B, C, D) apart, those of absent classes too -> scalar."""
    unit = F.normalize(tokens.float(), dim=2)
    similarity = unit @ unit.transpose(1, 2) / _MCT_TEMPERATURE  # (B, C, C)
    return -similarity.log_softmax(2).diagonal(dim1=1, dim2=2).mean()


def mean_margin(tokens: Tensor, tags: Tensor) -> Tensor:
    """Soft margin loss of the channel means of the normalised class tokens (B, C, D)."""
    return multilabel_soft_margin(F.normalize(tokens.float(), dim=2).mean(2), tags)


def certain_patches(tokens: Tensor, patches: Tensor, label: Tensor, tags: Tensor, temperature: float) -> Tensor:
    """cle: the token of a present class should attend to the patches that have the class.

    Args:
        tokens: (B, C, D); patches: (B, D, h, w), which get no gradient and are not normalised, as published.
        label: (B, h, w) integers of the patches.
        tags: (B, C).
        temperature: divides the products.

    Returns:
        Scalar: of each present class the mean over its patches of minus the logarithm of its softmax over all patches;
        summed over the classes, mean over the images. By a log-softmax, which does not overflow.
    """
    products = F.normalize(tokens.float(), dim=2) @ patches.detach().float().flatten(2) / temperature  # (B, C, N)
    errors = -products.log_softmax(2)
    classes = torch.arange(1, tokens.shape[1] + 1, device=label.device)
    of_class = label.flatten(1)[:, None] == classes[:, None]  # (B, C, N)
    means = (errors * of_class).sum(2) / (of_class.sum(2) + 1e-4)
    return (means * tags).sum(1).mean()


def draw_uncertain(label: Tensor, permutation: Callable[[int], np.ndarray], centre: bool) -> Tensor:
    """How often une takes each token of an image: label (h, w) -> (h, w) float32 counts.

    Candidates are windows of 6 x 6 tokens whose centre is unknown and that hold enough object; at most eight are drawn,
    fewer are filled up from windows whose centre is object (more.md section 4).
    """
    mask = torch.where(label == IGNORE, 1, (label != 0) * 2)
    taken = torch.zeros(label.shape, dtype=torch.float32, device=label.device)
    rows, columns = (side - _WINDOW for side in label.shape)
    if min(rows, columns) < 1:
        return taken  # the published code fails here
    middle = mask[_MARGIN : _MARGIN + rows, _MARGIN : _MARGIN + columns]
    means = F.avg_pool2d(mask[None, None].float(), _WINDOW, 1)[0, 0, :rows, :columns]
    kept = ((middle == 1) & (means >= _LEAST_MEAN)).nonzero()
    if len(kept) > _DRAWN:
        kept = kept[torch.from_numpy(permutation(len(kept))[:_DRAWN]).to(kept.device)]
    else:
        more = (_DRAWN - len(kept)) // 4
        objects = (middle == 2).nonzero()
        objects = objects if len(objects) >= more else torch.ones_like(middle).nonzero()
        kept = torch.cat([kept, objects[torch.from_numpy(permutation(len(objects))[:more]).to(kept.device)]])
    row, column = (kept + (_MARGIN if centre else 0)).unbind(1)
    return taken.index_put_((row, column), taken.new_ones(len(kept)), accumulate=True)


def uncertain_patches(tokens: Tensor, patches: Tensor, taken: Tensor, tags: Tensor, count: Tensor) -> Tensor:
    """une: uncertain patches should be like the tokens of present classes and unlike the others.

    Args:
        tokens: (B, C, D), which get no gradient; patches: (B, D, h, w).
        taken: (B, h, w) of ``draw_uncertain``.
        tags: (B, C).
        count: number of tokens taken in the batch (``Network.counts``).
    """
    unit = F.normalize(tokens.detach().float(), dim=2)
    likeness = (unit @ F.normalize(patches.float().flatten(2), dim=1)).abs()  # (B, C, N)
    present, absent = tags[:, :, None], 1 - tags[:, :, None]
    alike = (likeness * present).sum(1) / (present.sum(1) + 1)
    unlike = (likeness * absent).sum(1) / (absent.sum(1) + 1)  # (B, N)
    return ((1 - alike + unlike) / 2 * taken.flatten(1)).sum() / count.clamp(min=1e-5)


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class MoreOptions(SelfTrainedOptions):
    """Network, map and losses; the defaults are published for VOC."""

    scales: Annotated[tuple[float, ...], Range(above=0, filled=True)] = (1.0, 0.5, 0.75, 1.5)
    """Scales of the maps that labels are made from while it trains."""
    images_per_gpu: Count = 4
    """As in the base. COCO: 2."""
    map: Literal["cam", "lam"] = "cam"
    """Map of the CAM steps. cam: the class maps. lam: class tokens times patch tokens (then infer.merge is max)."""
    temperature: Positive = 0.5
    """Temperature of cle. COCO: 0.1."""
    switch: Probability = 0.5
    """Fraction of the training after which the labels of cle and une come from the final maps, with the thresholds
    late_high and late_low, in place of the auxiliary ones. COCO: 0.625."""
    certain_high: Probability = 0.5
    """Before the switch: map value above which cle takes a token to have a class."""
    late_high: Probability = 0.6
    """After the switch: map value above which cle and une take a token to have a class."""
    late_low: Probability = 0.35
    """After the switch: map value up to which cle and une take a token to be background."""
    mct: Term = field(default_factory=lambda: Term(1.0))
    """The loss that pushes class tokens apart."""
    mct_with_mean: bool = False
    """Half of mct is a soft margin loss on the tokens' means, as COCO's published log was made."""
    ptc: Term = field(default_factory=lambda: Term(0.3))
    """Patch token contrast. COCO: begins after 0.1."""
    cle: Term = field(default_factory=lambda: Term(0.2))
    """The loss that pulls class tokens to certain patches. COCO: 0.1, begins after 0.15."""
    une: Term = field(default_factory=lambda: Term(0.1))
    """The loss that pulls uncertain patches to the tokens of present classes. COCO: 0.01, begins after 0.15."""
    seg: Term = field(default_factory=lambda: Term(0.12, 0.1))
    """Cross entropy of the decoder. COCO: begins after 0.2."""
    reg: Term = field(default_factory=lambda: Term(0.05, 0.1))
    """Dense energy of the decoder's predictions. COCO: begins after 0.2."""
    window_centre: bool = False
    """Which token of an uncertain window une takes. Off, published: its corner. On: its centre, which is uncertain."""

    def cross_check(self) -> None:
        """Raises ValueError for thresholds the wrong way round."""
        super().cross_check()
        check(self.late_low <= self.late_high, "late_low", self.late_low, f"at most late_high = {self.late_high}")
        check(self.low <= self.certain_high, "certain_high", self.certain_high, f"at least low = {self.low}")

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> More:
        """MoRe for ``num_classes`` foreground classes."""
        return More(self, num_classes)


# ------------------------------------------------------------------------------------ recipes (more.md sections 3 to 7)

_CRF = CRFSettings(
    iterations=10, gauss_sxy=1, gauss_weight=3, bilateral_sxy=67, bilateral_srgb=3, bilateral_weight=4
)
_INFER = CamInference(
    scales=(1.0, 0.5, 0.75, 1.25, 1.5, 1.75, 2.0), squash=448, resize="linear", truncate=True, merge="max_relu",
    normalise="span",
)

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=MoreOptions(),
        fit=PUBLISHED_FIT,
        augment=Augment(
            order=("resized_crop", "flip", "jitter", "normalize"), area=(0.32, 1.0), jitter=(0.4, 0.4, 0.2, 0.1),
            jitter_probability=0.5, crop=448,
        ),
        weights=PRETRAINED,
        infer=_INFER,
    ),
    refiner="psa",
    segmenter="own",
    own=SegmentTest(
        infer=SegInference(
            scales=(448, 560, 672), square=True, flip=True, resize="bilinear", merge="sum_max_logits",
            align_corners=False, crf=_CRF,
        )
    ),
)

# the released script; the published log was made with cle 0.05, une 0 and mct_with_mean (section 6). The test rule is
# that of SeCo, MoRe's ancestor: the released one is missing (section 7)
_COCO = replace(
    _PUBLISHED,
    cam=replace(
        _PUBLISHED.cam,
        network=MoreOptions(
            images_per_gpu=2,  # so the released script; the published log was made with 4
            scales=(1.0, 0.5, 0.75, 1.25, 1.5), high=0.65, temperature=0.1, switch=0.625, ptc=Term(0.3, 0.1),
            cle=Term(0.1, 0.15), une=Term(0.01, 0.15), seg=Term(0.12, 0.2), reg=Term(0.05, 0.2),
        ),
        fit=replace(PUBLISHED_FIT, steps=80000, batch_size=8),
        augment=Augment(
            order=("jitter", "scale", "flip", "crop", "normalize"), jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=0.8,
            scale=(0.32, 1.0), scale_filter="bilinear", crop=448,
        ),
    ),
    data="coco14",
    own=SegmentTest(
        infer=SegInference(
            scales=(1.0, 1.25, 1.5), flip=True, resize="bilinear", merge="sum_max_logits", align_corners=False,
            crf=replace(_CRF, gauss_weight=1, bilateral_sxy=121, bilateral_srgb=5),
        )
    ),
)  # fmt: skip


# trained from random weights, everything at one rate
_SAMPLE = Recipe(
    cam=SeedRecipe(
        network=MoreOptions(
            backbone=replace(SAMPLE_VIT, local_start=1.4), aux_layer=-2, fov_channels=64, fov_dilation=2,
            scales=(1.0, 0.5), head_lr=1.0, window_centre=True, iterations=5, dense=DenseOptions(weight=1e-6),
            # as in ToCo's sample recipe: maps that are not clipped, thresholds at the bodies' edges
            map_merge="max", high=0.3, low=0.15, certain_high=0.3, late_high=0.3, late_low=0.15,
            seg=Term(0.3, 0.5), reg=Term(0.05, 0.5), ptc=Term(0.3, 0.5), cle=Term(0.2, 0.5), une=Term(0.1, 0.5),
        ),
        fit=replace(SAMPLE_FIT, epochs=24),
        augment=Augment(
            order=("resized_crop", "flip", "jitter", "normalize"), area=(0.4, 1.0), jitter=(0.2, 0.2, 0.2, 0.02),
            crop=112,
        ),
        amp="fast",
        infer=SAMPLE_INFER,
    ),
    refiner="psa",
    segmenter="own",
    own=SAMPLE_TEST,
)  # fmt: skip

More.recipes = {"published": _PUBLISHED, "published_coco": _COCO, "sample": _SAMPLE}
