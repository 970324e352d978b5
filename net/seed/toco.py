"""ToCo: token contrast for single-stage segmentation (Ru et al., CVPR 2023; toco.md).

A vision transformer's last tokens grow alike, so that its class maps cover everything. The maps of an earlier block
say which patch tokens should be alike and which not (patch token contrast, ptc); class tokens of small crops should
resemble that of the whole image unless they show background (class token contrast, ctc). The maps, refined by the
colours, are the labels of a decoder on the same tokens.

    loss = cls + cls_aux + 0.2 ptc + 0.5 ctc + 0.1 seg + 0.05 reg
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from misc.checked import Count, Positive, Range, check
from misc.config import Augment, CamInference, SegInference, View
from misc.crf.dense import CRFSettings
from misc.crf.energy import DenseOptions
from misc.image.labels import IGNORE
from misc.image.pixels import box_mask, resize_maps
from misc.infer.online import region_of_interest, threshold_label
from misc.loop.trainable import Batch, MomentumCopy, sample_streams
from misc.precision import full_precision
from net.backbone.auxiliary_vit import AuxiliaryViT, ProjectionHead
from net.backbone.vit import SAMPLE_VIT
from net.contract import Network, Recipe, SeedRecipe, SegmentTest
from net.groups import Group
from net.losses import multilabel_soft_margin
from net.registry import seed
from net.shared.self_training import (
    PUBLISHED_FIT,
    SAMPLE_FIT,
    SAMPLE_INFER,
    SAMPLE_TEST,
    VIT_B,
    SelfTrainedOptions,
    SelfTrainedViT,
    Term,
    patch_contrast,
)
from net.start_weights import PRETRAINED

_SMOOTHING = 1e-4
_NEGATIVE_MEAN = 0.2


@seed("toco")
class Toco(SelfTrainedViT):
    """ToCo. State-dict names are those of the official checkpoints, which load strictly (toco.md section 2.3)."""

    published_scores = "– / – / 71.1"
    settings: TocoOptions

    def __init__(self, options: TocoOptions, num_classes: int) -> None:
        super().__init__(options, AuxiliaryViT(options.backbone, 1, options.aux_layer, 1000), num_classes)
        self.encoder.pos_embed.requires_grad_(options.train_positions)
        width = options.backbone.width
        self.proj_head = ProjectionHead(width, options.projection)
        self.proj_head_t = ProjectionHead(width, options.projection).requires_grad_(False)
        self.proj_head_t.load_state_dict(self.proj_head.state_dict())

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image, view/global, view/local (B, 3, S, S) each, tags (B, C), box (B, 4), seed (B,), and what
        ``prepare`` and the loop add.

        Returns {"cls", "cls_aux": soft margin losses; "ptc", "ctc": contrasts; "seg", "reg": of the decoder}, weighted.
        """
        options, images, tags = self.settings, batch["image"], batch["tags"]
        # published: five passes; there is no randomness in the encoder, so one over both views gives the same
        tokens, patches, auxiliary = self.encoder(torch.cat([images, batch["view/global"]]))
        patches, auxiliary = patches[: len(images)], auxiliary[: len(images)]
        teacher, student = self.project(tokens[:, 0], batch["crops"])
        ptc = patch_contrast(
            patches, batch["token_label"], batch["counts/same_pairs"], batch["counts/different_pairs"],
            options.images_per_gpu,
        )
        ctc = class_contrast(teacher, student, batch["flags"], options.temperature)
        weights = options.seg.at(progress), options.reg.at(progress)
        return {
            "cls": multilabel_soft_margin(self.classifier.class_logits(patches), tags),
            "cls_aux": multilabel_soft_margin(self.aux_classifier.class_logits(auxiliary), tags),
            "ptc": options.ptc.at(progress) * ptc,
            "ctc": options.ctc.at(progress) * ctc,
            **self.segmentation_terms(self.decoder(patches), batch, self._inside(batch), weights),
        }

    def momentum_copies(self) -> Sequence[MomentumCopy]:
        """The teacher's projection head follows the student's."""
        return [MomentumCopy(self.proj_head_t, self.proj_head, self.settings.momentum)]

    # ----------------------------------------------------------------------------------- labels

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """Labels and crops from the class maps of the present weights.

        ``token_label`` (B, h, w) int64 for ptc; ``crops`` (B, n, 3, c, c) and ``flags`` (B, 2 + n) bool for ctc; with
        the decoder's terms ``label`` (B, S, S) int64.
        """
        options, images = self.settings, batch["image"]
        (maps, auxiliary), keys, real = self.online_maps(batch)
        made = {"token_label": self.token_label(auxiliary, keys, batch)}
        region = region_of_interest(auxiliary, options.high, options.low)
        draws = [stream.permutation for stream in sample_streams(batch)]
        made["crops"], made["flags"] = self.local_crops(self._local_picture(batch), region, draws)
        if options.seg.at(progress) or options.reg.at(progress):
            source = auxiliary if progress <= options.aux_labels_until else maps
            label = self.decoder_labels(images, source, keys, real)
            made["label"] = label.masked_fill(~self._inside(batch), IGNORE)
        return made

    def _box(self, batch: Batch) -> Tensor:
        return batch["box/image"] if self.settings.mirrored_box else batch["box"]

    def _inside(self, batch: Batch) -> Tensor:
        return box_mask(self._box(batch), batch["image"].shape[-2:])

    def token_label(self, maps: Tensor, keys: Tensor, batch: Batch) -> Tensor:
        """(B, K, H, W) -> (B, h, w) int64, 255 unknown or outside the image."""
        patch, box = self.settings.backbone.patch, self._box(batch)
        grid = [side // patch for side in maps.shape[-2:]]
        label = threshold_label(resize_maps(maps, grid), keys, self.settings.high, self.settings.low)
        if self.settings.token_box:  # a patch is inside where its centre is: patch (i + 1/2) in [begin, end)
            box = torch.div(2 * box + patch - 1, 2 * patch, rounding_mode="floor")
        return label.masked_fill(~box_mask(box, grid), IGNORE)

    def _local_picture(self, batch: Batch) -> Tensor:
        """What local crops are cut from: (B, 3, S, S)."""
        local = batch["view/local"]
        if not self.settings.shared_mirror:
            return local
        differs = batch["mirrored/local"] != batch["mirrored/image"]
        return torch.where(differs[:, None, None, None], local.flip(-1), local)

    def local_crops(
        self, pictures: Tensor, region: Tensor, draws: Sequence[Callable[[int], np.ndarray]]
    ) -> tuple[Tensor, Tensor]:
        """Local crops of images (B, 3, S, S) by their regions (B, S, S): crops (B, n, 3, c, c), flags (B, 2 + n) bool.

        ``draws``: for each image a function that permutes so many candidates; the first n are taken.
        """
        side, count = self.settings.crop_side, self.settings.crops
        crops, flags = [], []
        for picture, mask, permutation in zip(pictures, region, draws, strict=True):
            candidates = crop_candidates(mask, side, count)
            corners = candidates[torch.from_numpy(permutation(len(candidates))[:count]).to(candidates.device)]
            crops.append(cut_crops(picture, corners, side))
            flags.append(F.pad(crop_flags(mask, corners, side), (2, 0), value=True))
        return torch.stack(crops), torch.stack(flags)

    # ----------------------------------------------------------------------------------- losses

    def project(self, tokens: Tensor, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens of the global views (2 B, D), view-major, and local crops (B, n, 3, c, c) -> projections of the
        teacher (2 B, P) and the student ((2 + n) B, P), view-major."""
        local, _, _ = self.encoder(crops.transpose(0, 1).flatten(0, 1))  # (n B, 1, D)
        with torch.no_grad():
            teacher = self.proj_head_t(tokens)
        return teacher, self.proj_head(torch.cat([tokens, local[:, 0]]))

    def param_groups(self) -> list[Group]:
        """Encoder but for its norms, its norms, classifiers and projection, decoder (toco.md section 7)."""
        return self.split_groups([self.classifier, self.aux_classifier, self.proj_head], [self.decoder])


# ------------------------------------------------------------------------------------ local crops (toco.md section 4)


def crop_candidates(region: Tensor, side: int, count: int) -> Tensor:
    """Possible top left corners of local crops: those whose centre is not an object, or all where these are too few.

    Args:
        region: (S, S) of ``region_of_interest``.
        side: side of a crop, in pixels.
        count: number of crops wanted.

    Returns:
        (P, 2) int64 rows and columns of top left corners, row-major.

    Raises:
        ValueError: the crop is not smaller than the image.
    """
    rows, columns = (length - side for length in region.shape)
    if min(rows, columns) < 1:
        raise ValueError(f"Local crops of {side} pixels don't fit into images of {tuple(region.shape)} pixels.")
    half = side // 2
    centres = region[half : half + rows, half : half + columns]
    free = (centres <= 1).nonzero()
    return free if len(free) >= count else torch.ones_like(centres).nonzero()


def cut_crops(picture: Tensor, corners: Tensor, side: int) -> Tensor:
    """Cut squares out of an image: (c, S, S), top left corners (n, 2) -> (n, c, side, side)."""
    return torch.stack([picture[..., r : r + side, q : q + side] for r, q in corners.tolist()])


def crop_flags(region: Tensor, corners: Tensor, side: int) -> Tensor:
    """Which crops are positives, (n,) bool: where the mean of the region (objects count 2) is above 0.2."""
    return cut_crops(region[None].float(), corners, side).mean((1, 2, 3)) > _NEGATIVE_MEAN


def class_contrast(teacher: Tensor, student: Tensor, flags: Tensor, temperature: float) -> Tensor:
    """Class token contrast: the positives of an image should resemble its global views, the negatives not.

    Args:
        teacher: (2 B, P) projections of the two global views, view-major.
        student: (V B, P) projections of all views, view-major, the global ones first.
        flags: (B, V) bool, whether a view is a positive.
        temperature: divides the products.

    Returns:
        Scalar, mean over the images; in float32 and by logarithms of sums, which don't overflow (toco.md section 9,
        trap 6).
    """
    with full_precision(teacher.device.type):
        batch = len(flags)
        first = teacher.float().unflatten(0, (-1, batch)).transpose(0, 1)  # (B, 2, P)
        second = student.float().unflatten(0, (-1, batch)).transpose(0, 1)  # (B, V, P)
        products = first @ second.transpose(1, 2) / temperature  # (B, 2, V)
        positive = flags.bool()[:, None]
        negatives = products.masked_fill(positive, -torch.inf)
        smoothing = products.new_full((*products.shape[:2], 1), np.log(_SMOOTHING))
        rest = torch.cat([negatives, smoothing], 2).logsumexp(2, keepdim=True)  # (B, 2, 1)
        errors = torch.logaddexp(products, rest) - products
        # published: once more for every view of the teacher, with a product of 0 (the else branch of a for loop)
        last = torch.logaddexp(torch.zeros_like(rest), rest)
        total = (errors * positive).sum((1, 2)) + last.sum((1, 2))  # (B,)
        return (total / 2 / (flags.sum(1) + _SMOOTHING)).mean()


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class TocoOptions(SelfTrainedOptions):
    """Network and losses; the defaults are published for VOC."""

    temperature: Positive = 0.5
    """Temperature of the class token contrast. COCO: 1."""
    crops: Count = 8
    """Local crops of an image."""
    crop_side: Count = 96
    """Side of a local crop. Pixels."""
    momentum: Annotated[float, Range(least=0, below=1)] = 0.9
    """Momentum of the teacher's projection head: the fraction of its weights that an update keeps."""
    projection: Annotated[int, Range(least=4)] = 1024
    """Outputs of the projection heads, which are twice as wide inside."""
    ptc: Term = field(default_factory=lambda: Term(0.2))
    """Patch token contrast. COCO: begins after 0.15."""
    ctc: Term = field(default_factory=lambda: Term(0.5))
    """Class token contrast. COCO: begins after 0.15."""
    seg: Term = field(default_factory=lambda: Term(0.1, 0.1))
    """Cross entropy of the decoder."""
    reg: Term = field(default_factory=lambda: Term(0.05, 0.1))
    """Dense energy of the decoder's predictions."""
    aux_labels_until: Annotated[float, Range(least=0, below=1)] = 0.0
    """Fraction of the training in which the decoder's labels come from the auxiliary maps. COCO: 0.15."""
    train_positions: bool = False
    """Train the position embedding. Published: it stays as it was loaded."""
    mirrored_box: bool = False
    """Where the image lies in the crop. Off, published: the box before the last mirroring, on the wrong side in half of
    the padded samples. On: the true one."""
    token_box: bool = False
    """Which token labels lie in the image. Off, published: the box in pixels on the grid of patches, which drops images
    that begin far from the top left and keeps padding at the bottom right. On: patches whose centre is inside."""
    shared_mirror: bool = False
    """Where local crops are cut. Off, published: from a picture that is mirrored independently of the one that the maps
    are of, so that half of the samples get the crops of the mirrored place. On: from the same place."""

    def cross_check(self) -> None:
        """Raises ValueError for local crops smaller than a patch."""
        super().cross_check()
        patch = self.backbone.patch
        check(self.crop_side >= patch, "crop_side", self.crop_side, f"at least a patch of {patch} pixels")

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> Toco:
        """ToCo for ``num_classes`` foreground classes."""
        return Toco(self, num_classes)


# ------------------------------------------------------------------------------------ recipes (toco.md sections 6 to 8)

_COLOURS = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_probability": 0.8, "grey": 0.2}


@dataclass(frozen=True)
class TocoRecipe(SeedRecipe):
    """Three views of a sample, two of them of the same crop; the defaults are the published ones."""

    image_view: View = field(
        default_factory=lambda: View(start="shared", order=("flip", "jitter", "grey", "blur", "normalize"), **_COLOURS)
    )
    """The network's input. Published: always blurred."""
    local_view: View = field(
        default_factory=lambda: View(
            start="shared", order=("flip", "jitter", "grey", "blur", "normalize"), blur=0.5, **_COLOURS
        )
    )
    """What the local crops are cut from."""
    global_view: View = field(
        default_factory=lambda: View(
            order=("resized_crop", "flip", "jitter", "grey", "blur", "solarise", "normalize"), area=(0.4, 1.0),
            blur=0.1, **_COLOURS,
        )
    )
    """The second global view."""

    def views(self) -> Mapping[str, View]:
        """The three views, by the names under which the network reads them."""
        return {"image": self.image_view, "local": self.local_view, "global": self.global_view}


_AUGMENT = Augment(
    order=("scale", "flip", "crop", "normalize"), scale=(0.5, 2.0), scale_filter="bilinear", flip=0.5, crop=448
)
_INFER = CamInference(
    scales=(1.0, 0.5, 1.5), squash=448, resize="linear", truncate=True, merge="max_relu", normalise="span"
)
_CRF = CRFSettings(
    iterations=10, gauss_sxy=1, gauss_weight=1, bilateral_sxy=121, bilateral_srgb=5, bilateral_weight=4
)
_TEST = SegInference(
    scales=(1.0, 1.5, 1.25), flip=True, resize="bilinear", merge="sum_max_logits", align_corners=False, crf=_CRF
)

_PUBLISHED = Recipe(
    cam=TocoRecipe(
        network=TocoOptions(), fit=PUBLISHED_FIT, augment=_AUGMENT, weights=PRETRAINED, infer=_INFER,
    ),
    refiner="psa",
    segmenter="own",
    own=SegmentTest(infer=_TEST),
)

_COCO = replace(
    _PUBLISHED,
    cam=replace(
        _PUBLISHED.cam,
        network=TocoOptions(
            high=0.65, temperature=1.0, aux_labels_until=0.15, ptc=Term(0.2, 0.15), ctc=Term(0.5, 0.15),
            seg=Term(0.1, 0.1), reg=Term(0.05, 0.1),
        ),
        fit=replace(PUBLISHED_FIT, steps=80000, batch_size=8),
    ),
    data="coco14",
    # squashed to a square first
    own=SegmentTest(infer=replace(_TEST, scales=(1.0, 1.25, 1.5), squash=448, merge="max_sum_logits")),
)


_SAMPLE_COLOURS = {"start": "shared", "order": ("flip", "jitter", "normalize"), "jitter": (0.2, 0.2, 0.2, 0.02)}

# trained from random weights: the positions too, and everything at one rate
_SAMPLE = Recipe(
    cam=TocoRecipe(
        network=TocoOptions(
            backbone=SAMPLE_VIT, aux_layer=-2, fov_channels=64, fov_dilation=2, scales=(1.0, 0.5), head_lr=1.0,
            crops=4, crop_side=32, projection=128, train_positions=True,
            mirrored_box=True, token_box=True, shared_mirror=True,
            # the maps are not clipped at 0: bodies lie below it, but above the background. The thresholds are those
            # that cut bodies best after half of the training, when the maps are good enough to learn from
            map_merge="max", high=0.3, low=0.15, iterations=5,
            ptc=Term(0.3, 0.5), ctc=Term(0.1, 0.5), seg=Term(0.3, 0.5), reg=Term(0.05, 0.5),
            dense=DenseOptions(weight=1e-6),
        ),
        fit=replace(SAMPLE_FIT, epochs=20),
        augment=Augment(order=("long_side", "flip", "crop", "normalize"), long_side=(112, 160), crop=112),
        image_view=View(**_SAMPLE_COLOURS),
        local_view=View(**_SAMPLE_COLOURS),
        global_view=View(
            order=("resized_crop", "flip", "jitter", "normalize"), area=(0.4, 1.0), crop=112,
            jitter=(0.2, 0.2, 0.2, 0.02),
        ),
        amp="fast",
        infer=SAMPLE_INFER,
    ),
    refiner="psa",
    segmenter="own",
    own=SAMPLE_TEST,
)  # fmt: skip


def _on_deit(recipe: Recipe) -> Recipe:
    """The same recipe, starting from DeiT-B."""
    backbone = replace(VIT_B, pretrained="deit_base_patch16_224.fb_in1k")
    return replace(recipe, cam=replace(recipe.cam, network=replace(recipe.cam.network, backbone=backbone)))


Toco.recipes = {
    "published": _PUBLISHED, "published_deit": _on_deit(_PUBLISHED), "published_coco": _COCO,
    "published_coco_deit": _on_deit(_COCO), "sample": _SAMPLE,
}  # fmt: skip
