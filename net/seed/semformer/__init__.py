"""SemFormer: class masks that are evaluated by a frozen autoencoder of class semantics (Chen et al.,
arXiv 2022; semformer.md).

First the class-aware autoencoder (CAAE, net/seed/semformer/autoencoder.py) is trained: it turns an image into one
vector per class and learns, from the tags, a prototype of each class's vector. Then SemFormer learns a mask for each
class: for the frozen CAAE, the image inside the mask must look like this class and no other, and the image outside the
mask like the other classes.

Background is a class of its own throughout: K = C + 1 classes, background first and always present.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Count, DropProbability, Weight, When, check
from misc.config import Augment, CamInference, Fit
from misc.image.pixels import box_mask
from misc.precision import at_least_float32
from net.backbone.transformer import AttentionSums, Visit
from net.backbone.vit import SAMPLE_VIT, GridViT, ViTOptions
from net.contract import Batch, Network, Options, Phase, Recipe, SeedNetwork, SeedRecipe, TaggedPhase
from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors
from net.groups import Group, name_groups
from net.registry import seed
from net.seed.semformer.autoencoder import (
    CAAE,
    PRETRAINED_PARTS,
    CAAEOptions,
    similarity,
    similarity_loss,
    tags_with_background,
)
from net.start_weights import PRETRAINED

_EPS = 1e-5


@seed("semformer")
class SemFormer(SeedNetwork):
    """SemFormer under its frozen CAAE. Names are those of the official checkpoints; the CAAE is no part of it: it has
    a file of its own. semformer.md sections 4 to 6.

    Args:
        guide: the trained CAAE, frozen, on the device of the training.
    """

    published_scores = "63.7 / 73.2 / 73.7"
    normalisation = "imagenet"
    selection_thresholds = tuple(i / 100 for i in range(1, 100))

    def __init__(self, options: SemFormerOptions, num_classes: int, guide: CAAE) -> None:
        super().__init__()
        self.options = options
        self.segmentor = Segmentor(options, num_classes + 1, guide.options.class_dim)
        self._guide = (guide,)  # in a tuple, so that it is no submodule

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C), box (B, 4) -> the five weighted terms (semformer.md 5.2)."""
        images, labels, options = batch["image"], tags_with_background(batch["tags"]), self.options
        embeddings, logits = self.segmentor(images)
        valid = valid_mask(batch["box"], images.shape[-2:], self.judged_size)
        masks = self.make_masks(logits, valid)
        pairs = ImageClassPairs.of(labels)
        small = F.interpolate(images.float(), size=self.judged_size, mode="bilinear", align_corners=True)
        foreground, background = self.judge_masks(small, masks, pairs)

        def mean(values: Tensor, count: str) -> Tensor:
            return values.sum() / batch[f"counts/{count}"].clamp(min=_EPS)  # over nothing it is 0, as published

        seen = 1 - mean(foreground[pairs.own], "pairs") + 1 + mean(foreground[pairs.others], "others")
        left = 1 - mean(background[pairs.others], "others") + 1 + mean(background[pairs.own], "pairs")
        return {
            "similarity": options.similarity_weight
            * similarity_loss(similarity(embeddings, self.guide.class_semantics()), labels),
            "foreground": options.foreground_weight * seen / 2,
            "background": options.background_weight * left / 2,
            # published: the canvas counts as a part of the masks that is 0
            "suppression": options.suppression_weight * (masks[:, 1:].mean() + 1 - masks[:, 0].mean()),
            "complement": options.complement_weight
            * complement_error(masks, labels, valid) / batch["counts/pixels"].clamp(min=_EPS),
        }

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """Rectified mask logits times attention (semformer.md section 6): (B, 3, H, W) -> (B, C, ceil(H / patch),
        ceil(W / patch)) float32, 0 or above. Of the attention one layer's head mean exists at a time."""
        depth, classes = self.options.backbone.depth, self.segmentor.classes
        sums = None
        if self.options.attention:
            taken = [float(layer >= depth - self.options.map_layers) for layer in range(depth)]
            sums = AttentionSums(classes, taken, [0.0] * depth)
        _, logits = self.segmentor(images, sums)
        maps = F.relu(logits)  # (B, K, h, w)
        if sums is not None:
            low, high = sums.to_patches.aminmax(dim=2, keepdim=True)  # of each class (B, K, 1)
            maps = maps * ((sums.to_patches - low) / (high - low + _EPS)).view_as(maps)
        return maps[:, 1:]

    @property
    def guide(self) -> CAAE:
        """The frozen CAAE."""
        return self._guide[0].to(next(self.parameters()).device)

    @property
    def judged_size(self) -> tuple[int, int]:
        """Size of the images that the CAAE sees."""
        return (self.guide.options.encoder.image_size,) * 2

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Number of pairs, of other classes of pairs, and of valid pixels of the pairs that have other classes."""
        labels = tags_with_background(batch["tags"])
        pairs = ImageClassPairs.of(labels)
        valid = valid_mask(batch["box"], batch["image"].shape[-2:], self.judged_size).sum((1, 2, 3))  # (B,)
        pixels = valid[pairs.image] * pairs.others.any(1)
        return {"pairs": pairs.own.sum(), "others": pairs.others.sum(), "pixels": pixels.sum()}

    def make_masks(self, logits: Tensor, valid: Tensor) -> Tensor:
        """Mask logits (B, K, gh, gw), valid (B, 1, h, w) -> masks (B, K, h, w) in [0, 1], 0 outside the photograph."""
        resized = F.interpolate(at_least_float32(logits), size=valid.shape[-2:], mode="bilinear", align_corners=True)
        return resized.sigmoid() * valid

    def judge_masks(self, images: Tensor, masks: Tensor, pairs: ImageClassPairs) -> tuple[Tensor, Tensor]:
        """Similarities (n, K) of what each pair's mask shows of its image, and of what it hides, with all classes.

        images (B, 3, h, w) and masks (B, K, h, w) are at the CAAE's size.
        """
        image, mask = images[pairs.image], masks[pairs.image, pairs.number][:, None]  # (n, 3, h, w), (n, 1, h, w)
        shown = torch.cat([image * mask, image * (1 - mask)])  # (2 n, 3, h, w)
        similarities = similarity(self.guide.embed_classes(shown), self.guide.class_semantics())  # (2 n, K)
        foreground, background = similarities.chunk(2)
        return foreground, background

    def selection_maps(self, images: Tensor, tags: Tensor) -> Tensor:
        """Rectified mask logits without attention (semformer.md section 5.3); otherwise as ``cam``."""
        return F.relu(self.segmentor(images)[1])[:, 1:]

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """Similarities of the class embeddings with what they are trained towards; see the contract."""
        return similarity(self.segmentor(images)[0], self.guide.class_semantics())[:, 1:]

    def param_groups(self) -> list[Group]:
        """The backbone at the base rate, the rest at 10 times it; what is no weight at twice that, without decay."""
        return name_groups(self, PRETRAINED_PARTS)

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifier of the backbone."""
        return (self.options.backbone.pretrained,)

    def load_weights(self, weights: str) -> str:
        """A SemFormer checkpoint, or an ImageNet classifier (published: DeiT-S), whose class token all class tokens
        start as; 'pretrained': timm's."""
        state = read_tensors(weights)
        if "segmentor.cls_head.weight" in state:
            return str(load_tensors(self, state, label=weights))
        body = self.segmentor.backbone.from_classifier(state)
        moved = {f"segmentor.backbone.{name}": value for name, value in body.items()}
        repeats = (1, self.segmentor.classes, 1)
        moved["segmentor.cls_token"] = state["cls_token"].repeat(repeats)
        moved["segmentor.cls_posembed"] = state["pos_embed"][:, :1].repeat(repeats)
        return str(load_tensors(self, moved, label=weights, allow_missing=("segmentor.cls_head", "segmentor.seg_head")))


class ClassLinear(nn.Module):
    """A linear map for each class: tokens (B, K, D) -> (B, K, E)."""

    def __init__(self, classes: int, width: int, out: int) -> None:
        super().__init__()
        # published: the fan-in of the weights counts as width * out
        bound = (width * out) ** -0.5
        self.weight = nn.Parameter(torch.empty(classes, width, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(classes, out).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, K, D) -> (B, K, E)."""
        return torch.einsum("bkd,kde->bke", tokens, self.weight) + self.bias


class Segmentor(nn.Module):
    """The trained network: one class token per class, and a mask head on the patches (semformer.md section 4)."""

    def __init__(self, options: SemFormerOptions, classes: int, class_dim: int) -> None:
        super().__init__()
        self.patch, width = options.backbone.patch, options.backbone.width
        self.classes = classes
        self.cls_token = nn.Parameter(torch.zeros(1, classes, width))
        self.cls_posembed = nn.Parameter(torch.zeros(1, classes, width))
        self.backbone = GridViT(options.backbone)
        self.cls_head = ClassLinear(classes, width, class_dim)
        # published: Dropout2d, which on (B, N, D) drops whole tokens; of today's names that is Dropout1d's behaviour
        self.seg_head = nn.Sequential(nn.Dropout1d(options.dropout), nn.Linear(width, classes))
        for parameter in (self.cls_token, self.cls_posembed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor, visit: Visit | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), padded with the mean colour to whole patches -> class embeddings (B, K, E), 0 or above,
        and mask logits (B, K, ceil(H / patch), ceil(W / patch)), both float32; ``visit`` sees the attention."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        x, grid = self.backbone(padded, self.cls_token + self.cls_posembed, visit)
        embeddings = F.relu(self.cls_head(x[:, : self.classes]).float())
        logits = self.seg_head(x[:, self.classes :]).float()  # (B, N, K)
        return embeddings, logits.transpose(1, 2).unflatten(2, grid)


def valid_mask(box: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Region of the original image (not padding) in a training image, at another size (semformer.md section 5.1).

    box (B, 4): top, bottom, left, right at the size ``source`` (H, W) -> (B, 1, h, w) float32 in {0, 1} at ``target``.
    """
    (height, width), (h, w) = source, target
    factors = torch.tensor([h, h, w, w], device=box.device)
    sides = torch.tensor([height, height, width, width], device=box.device)
    return box_mask(box * factors // sides, target)[:, None].float()


def complement_error(masks: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Sum of (M_k + largest other mask - 1)^2 over all present classes of images with two or more, and over valid
    pixels: masks (B, K, h, w), labels (B, K), valid (B, 1, h, w) -> scalar (semformer.md section 5.2, act_cplt)."""
    total = masks.new_zeros(())
    for image, present, inside in zip(masks, labels > 0, valid[:, 0], strict=True):
        shown = image[present]  # (P, h, w)
        for index in range(len(shown) if len(shown) > 1 else 0):
            others = torch.cat([shown[:index], shown[index + 1 :]]).amax(0)
            total = total + ((shown[index] + others - 1) ** 2 * inside).sum()
    return total


@dataclass(frozen=True)
class ImageClassPairs:
    """All n pairs of an image and one of its classes, background included, in row-major order."""

    image: Tensor
    """(n,) int64, index of the image."""
    number: Tensor
    """(n,) int64, index of the class."""
    own: Tensor
    """(n, K) bool, true at the class."""
    others: Tensor
    """(n, K) bool, true at the other classes of the image."""

    @classmethod
    def of(cls, labels: Tensor) -> ImageClassPairs:
        """Make the pairs from labels (B, K)."""
        image, number = labels.nonzero(as_tuple=True)
        own = F.one_hot(number, labels.shape[1]).bool()
        return cls(image, number, own, (labels[image] > 0) & ~own)


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class SemFormerOptions(Options):
    """SemFormer: network, loss and map; the defaults are the published ones."""

    backbone: ViTOptions = field(default_factory=lambda: ViTOptions(image_size=448, drop_path=0.0))
    """Options of the transformer."""
    dropout: DropProbability = 0.5
    """Probability, in training, that a patch is dropped before the mask head."""
    similarity_weight: Weight = 1.0
    """Weight of the loss on the class tokens' similarities."""
    foreground_weight: Weight = 1.0
    """Weight of the loss on image parts inside the masks."""
    background_weight: Weight = 1.0
    """Weight of the loss on image parts outside the masks."""
    suppression_weight: Weight = 0.075
    """Weight of the loss on the masks' size."""
    complement_weight: Weight = 1.0
    """Weight of the loss that makes the masks sum to one."""
    attention: bool = True
    """Multiply the maps by the class tokens' attention to the patches ("class-relation attention")."""
    map_layers: Annotated[Count, When("attention")] = 4
    """Number of last layers whose attention is used."""

    def cross_check(self) -> None:
        """Raises ValueError for more layers than exist."""
        super().cross_check()
        depth = self.backbone.depth
        check(self.map_layers <= depth, "map_layers", self.map_layers, f"in 1 .. {depth} (the depth)")

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> SemFormer:
        """SemFormer for ``num_classes`` foreground classes, with the trained network of the phase caae as the judge."""
        guide = earlier["caae"]
        assert isinstance(guide, CAAE)
        return SemFormer(self, num_classes, guide)


# ------------------------------------------------------------------------ recipes (sections 3.4, 5.3, 6 to 9)


@dataclass(frozen=True)
class SemFormerRecipe(SeedRecipe):
    """Recipe of both phases."""

    network: SemFormerOptions = field(default_factory=SemFormerOptions)
    """Options of the network itself."""
    caae: TaggedPhase = field(default_factory=lambda: TaggedPhase(network=CAAEOptions()))
    """The first phase: the autoencoder that judges the masks."""

    def phases(self) -> tuple[tuple[str, Phase], ...]:
        """The CAAE, then SemFormer."""
        return (("caae", self.caae), ("cam", self))


# The momentum is that of the published poly-SGD, which passes its weight decay there; the learning rates depend on it
# (section 11, trap 3). Published checkpoints were chosen by the tags (CAAE, as here) and by pixel labels (SemFormer:
# --cam.selection train_miou; here the last ones are taken). It is not known which segmentation network was published.
_PUBLISHED = Recipe(
    cam=SemFormerRecipe(
        caae=TaggedPhase(
            network=CAAEOptions(),
            selection="train_tags",
            fit=Fit(epochs=200, batch_size=64, lr=0.025, momentum=5e-4, nesterov=True, weight_decay=5e-4),
            augment=Augment(
                order=("jitter", "scale", "resized_crop", "flip", "normalize"),
                jitter=(0.3, 0.3, 0.3, 0.1),
                scale=(1.0, 3.0),
                scale_filter="bilinear",
                area=(0.08, 1.0),
                area_filter="bilinear",
                crop=224,
            ),
            weights=PRETRAINED,
        ),
        network=SemFormerOptions(),
        fit=Fit(epochs=20, batch_size=8, lr=0.005, momentum=5e-4, nesterov=True, weight_decay=5e-4),
        augment=Augment(
            order=("jitter", "long_side", "flip", "normalize", "crop"),
            jitter=(0.3, 0.3, 0.3, 0.1),
            long_side=(224, 896),
            crop=448,
        ),
        weights=PRETRAINED,
        infer=CamInference(scales=(0.5, 1.0, 1.5, 2.0), stretch=16, round_up=16, coarse=4, normalise="max"),
    ),
    refiner="edge",
    segmenter="deeplabv1",
)

# trained from random weights; small patches, because the images are small. The heads of both have ten times the rate:
# with 1.5e-3 the CAAE learns more slowly and SemFormer's class tokens come to nothing, as they do where they attend to
# themselves alone (local_start 2)
_SAMPLE = Recipe(
    cam=SemFormerRecipe(
        amp="fast",
        caae=TaggedPhase(
            amp="fast",
            network=CAAEOptions(
                encoder=replace(SAMPLE_VIT, image_size=80, drop_path=0.0),
                class_dim=32,
                decoder_width=96,
                decoder_depth=1,
                decoder_heads=3,
            ),
            fit=Fit(epochs=40, batch_size=16, optimiser="adamw", lr=6e-4, weight_decay=0.05),
            augment=Augment(order=("resized_crop", "flip", "jitter", "normalize"), area=(0.4, 1.0), crop=80),
        ),
        network=SemFormerOptions(backbone=replace(SAMPLE_VIT, local_start=1.0, drop_path=0.1), map_layers=2),
        fit=Fit(epochs=16, batch_size=16, optimiser="adamw", lr=6e-4, weight_decay=0.05),
        augment=Augment(long_side=(112, 160), crop=112),
        infer=CamInference(scales=(0.5, 1.0), stretch=8, coarse=4, normalise="max"),
    ),
    refiner="edge",
    # its maps end where a mask falls below one half: they are broad there
    refine={"label.threshold_fg": 0.01, "label.threshold_bg": 0.002, "walk.threshold": 0.01},
    segmenter="deeplabv1",
)

SemFormer.recipes = {"published": _PUBLISHED, "sample": _SAMPLE}
