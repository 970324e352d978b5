"""GETAM: gradient-weighted attention maps of a transformer, and a decoder that learns from them in the same training
(Sun et al., arXiv 2021; getam.md).

The attention of the class token times its gradient for a class shows where the transformer saw that class. In the
second half of the training, each update makes labels from these maps and a saliency map, and trains a decoder on them:
CAM network and segmentation network in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, Positive, Probability, Range, When, check
from misc.config import Augment, CamInference, Fit, SegInference
from misc.crf.dense import CRFSettings
from misc.crf.energy import DenseOptions, dense_energy
from misc.image.labels import IGNORE
from misc.image.picture import truncate_values
from misc.image.pixels import box_mask
from misc.precision import at_least_float32, full_precision
from misc.propagate.par import PAMR, PixelAdaptive
from net.backbone.dpt import ChannelGate, DPTDecoder, DPTEncoder, DPTOptions
from net.backbone.transformer import QueryKey
from net.contract import Batch, Network, Options, Recipe, SeedRecipe, SegmentTest, SingleStage
from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors
from net.losses import multilabel_soft_margin
from net.registry import seed
from net.start_weights import PRETRAINED


@seed("getam")
class Getam(SingleStage):
    """DPT with a linear classifier on the pooled coarsest map. getam.md section 2.

    State-dict names are those of the official checkpoints.
    """

    published_scores = "– / – / 71.7"
    map_needs_gradient = True
    finds_unused = True  # the decoder in the first phase

    def __init__(self, options: GetamOptions, num_classes: int) -> None:
        super().__init__()
        self.options = options
        dpt = options.dpt
        self.multiple = 2 * dpt.patch
        self.pretrained = DPTEncoder(dpt)
        self.scratch = DPTDecoder(dpt.channels, dpt.features, num_classes + 1, dpt.dropout)
        self.cam_module = ChannelGate(dpt.features)
        self.cls_head = nn.Linear(dpt.channels[-1], num_classes)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C), box (B, 4), saliency (B, S, S) if it is used.

        Returns {"cls": multi-label soft margin loss}, and in the second phase with it {"ce_background",
        "ce_foreground": cross entropies, each over the pixels of its kind; "dense": energy; "saliency": binary cross
        entropy of the background's probability}. Padding counts as background except in the energy, as published.
        """
        images = batch["image"]
        if "label" not in batch:
            return {"cls": multilabel_soft_margin(self.class_logits(images), batch["tags"])}
        classes, logits = self.forward_both(images)
        terms = {"cls": multilabel_soft_margin(classes, batch["tags"])}
        with full_precision(images.device.type):
            return {**terms, **self.segmentation_losses(logits.float(), batch)}

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """Raw maps of the present classes, others 0: (B, 3, H, W) -> (B, C, ceil(H / patch), ceil(W / patch)) float32.

        Sum over blocks of (mean over heads of the positive part of attention times gradient) times (mean over heads of
        the gradient's positive part): two means multiplied, not a mean of products (getam.md section 3).
        """
        attention, gradients, _ = self.attention_gradients(images, tags)
        layers = (gradients * attention).clamp(min=0).mean(3) * gradients.clamp(min=0).mean(3)  # (K, L, B, T)
        values = layers.sum(1)[:, :, self.pretrained.model.tokens :]  # (K, B, N)
        patch, (height, width) = self.options.dpt.patch, images.shape[-2:]
        grid = tuple(-(-side // self.multiple) * 2 for side in (height, width))
        maps = values.new_zeros((*tags.shape, values.shape[2]))  # (B, C, N)
        rank = tags.cumsum(1) * tags
        for k, value in enumerate(values, 1):
            maps += (rank == k)[:, :, None] * value[:, None]
        return maps.unflatten(2, grid)[..., : -(-height // patch), : -(-width // patch)]

    def logits(self, images: Tensor) -> Tensor:
        """Segmentation logits: (B, 3, H, W) -> (B, C + 1, H, W)."""
        return self.forward_both(images)[1]

    # ---------------------------------------------------------------------------------------------- network

    def _whole(self, images: Tensor) -> Tensor:
        """Padded with the mean colour at the bottom and right to sides that the four maps fit."""
        height, width = images.shape[-2:]
        return F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))

    def _classes(self, coarsest: Tensor) -> Tensor:
        return self.cls_head(coarsest.mean((2, 3)))

    def class_logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C)."""
        return self._classes(self.pretrained(self._whole(images))[-1])

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """The classifier's logits: (B, 3, H, W) -> (B, C)."""
        return self.class_logits(images).float()

    def forward_both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, C), and segmentation logits (B, C + 1, H, W), background first, of images (B, 3, H, W)."""
        whole = self._whole(images)
        maps = self.pretrained(whole)
        x = at_least_float32(self.scratch.output_conv(self.cam_module(self.scratch(maps))))
        x = F.interpolate(x, size=whole.shape[-2:], mode="bilinear", align_corners=True)
        return self._classes(maps[-1]), x[..., : images.shape[2], : images.shape[3]]

    # ---------------------------------------------------------------------------------------------- map

    def attention_gradients(self, images: Tensor, tags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention and its gradients, which make the map, for the k-th present class of all images at once.

        Only the class token's row of the attention is kept, and there is no graph before the first block in the map. In
        full precision: magnitudes are about 1e-5 (trap 8).

        Args:
            images: (B, 3, H, W) normalised, any H and W.
            tags: (B, C) in {0, 1}.

        Returns:
            attention: (L, B, n, T) of the class token in the L blocks from ``start_layer`` on, after the softmax.
            gradients: (K, L, B, n, T) of the logit of each image's k-th present class, signed; 0 where it has fewer.
            logits: (B, C).
        """
        rows: list[Tensor] = []

        def look(attention: QueryKey) -> Tensor:
            rows.append(attention.first_weights(1))  # (B, n, 1, T)
            return rows[-1]

        first, body = self.options.start_layer, self.pretrained.model
        last = self.pretrained.act_postprocess4
        with torch.enable_grad(), full_precision(images.device.type):
            with torch.no_grad():
                x, grid, _ = body.embed_with_stem(self._whole(images.float()))
                for block in body.blocks[:first]:
                    x = block(x)
            x.requires_grad_()
            for block in body.blocks[first:]:
                x = block(x, look)
            logits = self._classes(last(x, grid))
            rank = tags.cumsum(1) * tags  # 1 for an image's first class, 2 for its second, ...
            count = int(rank.max())
            gradients = [
                torch.stack(torch.autograd.grad(logits[rank == k].sum(), rows, retain_graph=k < count))
                for k in range(1, count + 1)
            ]  # (L, B, n, 1, T) each
        attention = torch.stack(rows).detach()[:, :, :, 0]
        none = attention.new_zeros((0, *attention.shape))
        return attention, torch.stack(gradients)[:, :, :, :, 0] if gradients else none, logits.detach()

    # ---------------------------------------------------------------------------------------------- training

    def is_segmenting(self, progress: float) -> bool:
        """Whether the second phase has started. Published: one update after its fraction of the training."""
        return progress > self.options.cls_share

    def lr_scale(self, progress: float) -> float:
        """Factor of the learning rate: ``seg_lr`` in the second phase, else 1."""
        return self.options.seg_lr if self.is_segmenting(progress) else 1.0

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """In the second phase ``label`` (B, S, S) int64 and, with saliency, ``salient`` (B, S, S) uint8, from the
        network's present maps, in training mode as published."""
        if not self.is_segmenting(progress):
            return {}
        options, colours = self.options.label, truncate_values(batch["image"], self.normalisation)
        maps = self.cam(batch["image"], batch["tags"])
        labels, salient = [], []
        present = [keys.nonzero()[:, 0].to(maps.device) for keys in batch["tags"].cpu()]  # (K,) of each image
        norms: dict[int, Tensor] = {}
        for number in {len(keys) for keys in present}:  # images with as many classes are refined together
            same = [index for index, keys in enumerate(present) if len(keys) == number]
            stacked = torch.stack([maps[index, present[index]] for index in same])  # (n, K, h, w)
            norms |= dict(zip(same, normalise_label_maps(stacked, colours[same], options), strict=True))
        for index, keys in enumerate(present):
            if options.saliency:
                label, after = label_with_saliency(
                    norms[index], keys, batch["saliency"][index] > options.salient_above, options
                )
                salient.append(after)
            else:
                label = label_without_saliency(norms[index], keys, options)
            labels.append(label)
        made = {"label": torch.stack(labels)}
        return {**made, "salient": torch.stack(salient)} if salient else made

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """In the second phase, the numbers of background and foreground pixels."""
        if "label" not in batch:
            return {}
        background = batch["label"] == 0
        return {"background": background.sum(), "foreground": (~background & (batch["label"] != IGNORE)).sum()}

    def segmentation_losses(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms of logits (B, C + 1, S, S) float32 against the labels of the batch (see ``forward``)."""
        label, options = batch["label"], self.options
        errors = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # (B, S, S), 0 where unknown
        background = label == 0
        # published: 0 / 0 if a batch has no pixel of a kind (section 9, trap 2)
        terms = {
            "ce_background": errors[background].sum() / batch["counts/background"].clamp(min=1e-5),
            "ce_foreground": errors[~background].sum() / batch["counts/foreground"].clamp(min=1e-5),
        }
        if options.dense.weight:
            inside = box_mask(batch["box"], label.shape[-2:])
            colours = truncate_values(batch["image"], self.normalisation)
            terms["dense"] = dense_energy(logits, label, colours, inside, options.dense)
        if options.label.saliency and options.saliency_loss != "none":
            target = saliency_target(batch["salient"], options.saliency_loss)
            terms["saliency"] = F.binary_cross_entropy(logits.softmax(1)[:, 0], target)
        return terms

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifier of the transformer."""
        return self.pretrained.model.pretrained_names()

    def load_weights(self, weights: str) -> str:
        """A whole GETAM checkpoint, strictly, or an ImageNet classifier for the transformer (a file in timm's naming,
        or 'pretrained': timm's own)."""
        if any(name.startswith("pretrained.model.") for name in read_tensors(weights)):
            return str(load_tensors(self, weights))
        return self.pretrained.model.load_weights(weights)


# ------------------------------------------------------------------------------ labels (getam.md section 4)


def normalise_label_maps(maps: Tensor, colours: Tensor, options: GetamLabel) -> Tensor:
    """Raw maps of images, resized, refined and divided by their maxima.

    Args:
        maps: (B, K, h, w) of the classes present in each image, as many in each.
        colours: (B, 3, H, W) RGB of 0 .. 255.
        options: epsilon and iterations.

    Returns:
        (B, K, H, W) float32, with maxima below 1; no minimum is subtracted.
    """
    if not maps.shape[1]:
        return maps.new_zeros((len(maps), 0, *colours.shape[2:]))
    high = F.interpolate(maps.float(), size=colours.shape[2:], mode="bilinear", align_corners=True)
    if options.iterations:
        high = PixelAdaptive(colours, PAMR)(high, options.iterations)  # (B, K, H, W)
    return high / (high.amax((2, 3), keepdim=True) + options.epsilon)


def open_mask(mask: Tensor, side: int) -> Tensor:
    """Morphological opening with a square as OpenCV does it: (H, W) bool -> the same.

    With an even side its anchor is off the centre in the erosion and the dilation alike, so that the result moves by a
    pixel and every region loses its first row and column. Outside the image counts as foreground in the erosion
    (getam.md section 4.7).
    """
    margin = (side // 2, side - 1 - side // 2) * 2
    eroded = -F.max_pool2d(F.pad(-mask.float()[None], margin, value=-1.0), side, 1)
    return F.max_pool2d(F.pad(eroded, margin), side, 1)[0] > 0.5


def argmax_labels(norm: Tensor, background: Tensor, keys: Tensor) -> Tensor:
    """Arg-max over a background score (H, W) and maps (K, H, W) of the classes ``keys`` (K,), ascending: (H, W) int64,
    0 background, class + 1; the first one in a tie."""
    values = torch.cat([keys.new_zeros(1), keys + 1])
    return values[torch.cat([background[None], norm]).argmax(0)]


def label_with_saliency(
    norm: Tensor, keys: Tensor, salient: Tensor, options: GetamLabel
) -> tuple[Tensor, Tensor]:
    """The published rule, in its order (getam.md sections 4.4 to 4.7).

    Args:
        norm: (K, H, W) from ``normalise_label_maps``.
        keys: (K,) int64 classes, ascending.
        salient: (H, W) bool.

    Returns:
        label: (H, W) int64, 0 background, class + 1, 255 unknown.
        salient: (H, W) uint8, 0 not, 1 salient, 255 completed: not salient, but high enough in a class's map.
    """
    background = (1 - norm.amax(0)) ** options.power if len(norm) else torch.ones_like(salient, dtype=torch.float32)
    label = argmax_labels(norm, background, keys)
    # nothing here asks how many pixels there are, which would make a GPU wait
    label = label.masked_fill(label == 0, IGNORE).masked_fill(~salient, 0)
    after = salient.to(torch.uint8)
    for scores, key in zip(norm, keys, strict=True):
        ranked = scores.flatten().sort().values
        positive = (ranked > 0).sum()
        place = (options.cut * positive.double()).long()  # among the positive scores, which come last
        limit = ranked.gather(0, (len(ranked) - positive + place).clamp(max=len(ranked) - 1)[None])
        # a pixel claimed by two classes gets the first: it is no longer 0
        completed = (scores > limit) & (label == 0) & (place > 0)
        label = torch.where(completed, key + 1, label)
        after = after.masked_fill(completed, 255)
    if options.opening:
        label = label.masked_fill(~open_mask(label != 0, options.opening), 0)
    return label, after


def label_without_saliency(norm: Tensor, keys: Tensor, options: GetamLabel) -> Tensor:
    """Our rule without saliency maps: maps (K, H, W) of the classes ``keys`` (K,) -> (H, W) int64.

    Two constant background scores, as for PSA's affinity labels: below the lower one a pixel is background, above the
    higher one it has the class of the largest map, between them it is unknown.
    """
    low, high = (
        argmax_labels(norm, norm.new_full(norm.shape[1:], score), keys) for score in (options.low, options.high)
    )
    return torch.where((high == 0) & (low != 0), IGNORE, high)


def saliency_target(salient: Tensor, rule: str) -> Tensor:
    """Target of the background's probability: (B, H, W) uint8 of ``label_with_saliency`` -> (B, H, W) float32."""
    return 1 - (salient == 255 if rule == "published" else salient > 0).float()


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class GetamLabel(Checked):
    """Labels that the network makes during training."""
    # getam.md section 4

    saliency: bool = True
    """Take the background from saliency maps (--saliency DIR), as published. Without them, labels come from the maps
    alone by two constant background scores; this is our rule, not a published one."""
    salient_above: Annotated[int, Range(least=0, most=254), When("saliency")] = 0
    """Largest saliency value that counts as not salient. Published: 0, so any nonzero value is salient."""
    epsilon: Positive = 1e-5
    """Added to the maximum by which a map is divided. Published oddity: maps have the same order of magnitude, so the
    background score depends on the size of the gradients (section 4.3)."""
    power: Annotated[Positive, When("saliency")] = 32.0
    """With saliency: the background's score is (1 - largest map) to this power."""
    cut: Annotated[float, Range(above=0, below=1), When("saliency")] = 0.9
    """With saliency: quantile of a class's positive scores above which a pixel that is not salient gets the class.
    COCO: 0.95."""
    opening: Annotated[int, Range(least=0), When("saliency")] = 10
    """With saliency: side of the square that opens the foreground. Pixels. 0: none."""
    low: Annotated[Probability, When("saliency", False)] = 0.2
    """Without saliency: pixels whose scores are all below are background."""
    high: Annotated[Probability, When("saliency", False)] = 0.4
    """Without saliency: pixels with a score above have that class; what lies between is unknown."""
    iterations: Annotated[int, Range(least=0)] = 10
    """Iterations of PAMR on the maps. 0: none."""

    def cross_check(self) -> None:
        """Raises ValueError if the lower background score is above the higher one."""
        check(self.low <= self.high, "low", self.low, f"at most high = {self.high}")


@dataclass(frozen=True)
class GetamOptions(Options):
    """Network, map, labels and losses; the defaults are the published ones."""

    dpt: DPTOptions = field(default_factory=DPTOptions)
    """Transformer and decoder."""
    start_layer: Annotated[int, Range(least=0)] = 6
    """First block (from 0) whose attention is in the map."""
    cls_share: Probability = 0.5
    """Fraction of the training in which only the classifier is trained."""
    seg_lr: Positive = 0.1
    """Factor of the learning rate after that."""
    label: GetamLabel = field(default_factory=GetamLabel)
    """Labels made during training."""
    saliency_loss: Literal["published", "intended", "none"] = "published"
    """Target of the background's probability. intended: 0 where salient, else 1. published: 1 everywhere but where a
    label was completed (the published code divides by 255 what it had made 0 and 1: section 9, trap 1)."""
    dense: DenseOptions = field(default_factory=DenseOptions)
    """Dense energy loss."""
    label_limits = ("label.power", "label.cut", "label.high", "label.low")

    def cross_check(self) -> None:
        """Raises ValueError for a layer that does not exist."""
        super().cross_check()
        depth = self.dpt.depth
        check(self.start_layer < depth, "start_layer", self.start_layer, f"in 0 .. {depth - 1} (below the depth)")

    @property
    def wants_saliency(self) -> bool:
        """True if labels are made with saliency maps."""
        return self.label.saliency

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> Getam:
        """GETAM for ``num_classes`` foreground classes."""
        return Getam(self, num_classes)


# ------------------------------------------------------------------------------ recipes (getam.md sections 6 and 7)

_CRF = CRFSettings(
    iterations=20, gauss_sxy=3, gauss_weight=3, bilateral_sxy=83, bilateral_srgb=5, bilateral_weight=4
)

# maps of a single scale, as labels are made of them: no inference of maps alone was published
_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=GetamOptions(),
        # published oddity: the weight decay is passed as momentum, and nothing is decayed (section 9, trap 3)
        fit=Fit(epochs=20, batch_size=4, sample_order="stream", lr=0.04, momentum=5e-4, weight_decay=0.0, power=0.9),
        augment=Augment(
            order=("long_side", "flip", "normalize", "crop"),
            long_side=(230, 292),
            long_side_filter="linear",
            flip=0.5,
            crop=256,
        ),
        weights=PRETRAINED,
        infer=CamInference(scales=(1.0,), flip=True, multiple=32, normalise="minmax"),
    ),
    refiner="psa",
    segmenter="own",
    # squares: the aspect ratio is not kept (the published CRF sees the image as BGR, which its kernels do not tell)
    own=SegmentTest(
        infer=SegInference(
            scales=(256, 320, 480), square=True, resize="linear", merge="mean_logits", align_corners=False, crf=_CRF
        )
    ),
)

# trained from random weights: plain patches behind convolutions, because the hybrid's maps lay around the marks
# (perhaps its group norms spread information over the image); smaller patches, because the images are small
_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        network=GetamOptions(
            dpt=DPTOptions(
                backbone="vitb", image_size=112, patch=8, width=96, depth=4, heads=3, mlp_ratio=2, patch_stem=24,
                local_start=1.0, features=16,
            ),
            start_layer=2,
            seg_lr=1.0,
            label=GetamLabel(salient_above=100, epsilon=1e-8, power=64.0, opening=4),
            saliency_loss="intended",
            dense=DenseOptions(weight=1e-6),
        ),
        fit=Fit(epochs=40, batch_size=16, optimiser="adamw", lr=1.5e-3, weight_decay=0.01),
        augment=Augment(order=("long_side", "flip", "normalize", "crop"), long_side=(112, 160), crop=112),
        infer=CamInference(scales=(0.5, 1.0), flip=True, multiple=16, normalise="minmax"),
    ),
    refiner="psa",
    # products of attention and its gradients are sharper still: one hundredth of the peak is already object
    refine={"label.alpha_low": 100.0, "label.alpha_high": 1000.0, "walk.alpha": 460.0},
    segmenter="own",
    own=SegmentTest(
        infer=SegInference(
            scales=(112, 160), square=True, resize="linear", align_corners=False,
            crf=CRFSettings(iterations=5, bilateral_sxy=32),
        )
    ),
)

Getam.recipes = {"published": _PUBLISHED, "sample": _SAMPLE}
