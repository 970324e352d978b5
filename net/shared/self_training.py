"""What ToCo and MoRe share: a vision transformer that makes its own labels during training, and the losses on them
(toco.md sections 2 to 5, more.md sections 2 to 4).

At every update its class maps, merged over scales and mirrors, determine which patch tokens should be alike; refined by
the image's colours, they are the labels of its decoder. CAM network and segmentation network in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Checked, Count, Positive, Probability, Range, Weight, check
from misc.config import CamInference, Fit, SegInference
from misc.crf.dense import CRFSettings
from misc.crf.energy import DenseOptions, dense_energy
from misc.image.labels import IGNORE
from misc.image.picture import restore_values, truncate_values
from misc.image.pixels import resize_maps
from misc.infer.online import merge_batch_maps, present_classes, refined_label
from misc.loop.trainable import Batch
from misc.precision import full_precision
from net.backbone.auxiliary_vit import AuxiliaryViT, LargeFovHead, MaxClassifier
from net.backbone.vit import ViTOptions
from net.contract import Options, SegmentTest, SingleStage
from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors
from net.groups import Group
from net.losses import balanced_cross_entropy, count_label_kinds

VIT_B = ViTOptions(
    width=768, heads=12, drop_path=0.0, pretrained="vit_base_patch16_224.orig_in21k_ft_in1k"
)
"""The published backbone: the ViT of 2020, not today's default weights of that name in timm (toco.md section 2.1)."""


class SelfTrainedViT(SingleStage):
    """Encoder, two classifiers and decoder, their maps and the labels made of them."""

    encoder: AuxiliaryViT

    def __init__(self, options: SelfTrainedOptions, encoder: AuxiliaryViT, num_classes: int) -> None:
        super().__init__()
        self.settings = options
        width = options.backbone.width
        self.encoder = encoder
        self.decoder = LargeFovHead(width, num_classes + 1, options.fov_channels, options.fov_dilation)
        self.classifier = MaxClassifier(width, num_classes)
        self.aux_classifier = MaxClassifier(width, num_classes)

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """The class maps, signed."""
        return self.raw_maps(images)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Segmentation logits: (B, 3, H, W) -> (B, C + 1, h, w)."""
        return self.decoder(self.encoder(images)[1])

    def raw_maps(self, images: Tensor) -> Sequence[Tensor]:
        """Class maps and auxiliary class maps, signed: (B, 3, H, W) -> (B, C, h, w) float32 each."""
        _, patches, auxiliary = self.encoder(images)
        return self.classifier.class_maps(patches), self.aux_classifier.class_maps(auxiliary)

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """The classifier's logits: (B, 3, H, W) -> (B, C)."""
        return self.classifier.class_logits(self.encoder(images)[1])

    # ----------------------------------------------------------------------------------- training

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Context in which the network is in evaluation mode and builds no graph."""
        was = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was)

    def online_maps(self, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor]:
        """Merged maps of the batch's images with the present weights.

        Returns:
            Kinds of maps (B, K, H, W) in [0, 1], 0 where an image has fewer classes; keys (B, K) and real (B, K) as
            ``present_classes`` gives them.
        """
        options, (keys, real) = self.settings, present_classes(batch["tags"])
        with self.measuring():
            kinds = merge_batch_maps(self.raw_maps, batch["image"], keys, options.scales, (options.map_merge,) * 2)
        return [maps * real[:, :, None, None] for maps in kinds], keys, real

    def decoder_labels(self, images: Tensor, maps: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        """Labels of the decoder from maps (B, K, H, W): (B, H, W) int64 (misc.infer.online.refined_label)."""
        options, labels = self.settings, []
        pictures = truncate_values(images, self.normalisation) / 255
        for colours, one, own, present in zip(pictures, maps, keys, real, strict=True):
            labels.append(refined_label(colours, one[present], own[present], options.high, options.low,
                                        options.iterations))  # fmt: skip
        return torch.stack(labels)

    def segmentation_terms(
        self, logits: Tensor, batch: Batch, inside: Tensor, weights: tuple[float, float]
    ) -> dict[str, Tensor]:
        """{"seg", "reg"} of the decoder's logits (B, C + 1, h, w) against ``batch["label"]``, weighted; before they
        begin (there is no label) both are 0 with gradients that are 0, not missing: the decoder's weights decay.

        ``inside`` (B, H, W) bool: where the image is.
        """
        if "label" not in batch:
            nothing = logits.float().sum() * 0.0
            return {"seg": nothing, "reg": nothing.detach()}
        label, images = batch["label"], batch["image"]
        with full_precision(images.device.type):
            logits = resize_maps(logits, label.shape[-2:])
            seg = balanced_cross_entropy(logits, label, batch["counts/background"], batch["counts/foreground"])
            colours = restore_values(images, self.normalisation)
            reg = dense_energy(logits, label, colours, inside, self.settings.dense)
        return {"seg": weights[0] * seg, "reg": weights[1] * reg}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Pairs of tokens, and pixels of the decoder's labels where there are any."""
        pixels = count_label_kinds(batch["label"]) if "label" in batch else {}
        return {**count_token_pairs(batch["token_label"]), **pixels}

    def split_groups(self, *heads: Sequence[nn.Module]) -> list[Group]:
        """Optimiser groups: encoder but for its norms, its norms, and each list of heads at ``head_lr`` times the rate;
        everything is decayed, norms and biases too (toco.md section 7)."""
        groups = [Group([]), Group([])]
        for name, parameter in self.encoder.named_parameters():
            if parameter.requires_grad:
                groups["norm" in name].params.append(parameter)
        for modules in heads:
            params = [p for module in modules for p in module.parameters() if p.requires_grad]
            groups.append(Group(params, self.settings.head_lr))
        return groups

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's classifier for the encoder."""
        return self.encoder.pretrained_names()

    def load_weights(self, weights: str) -> str:
        """A whole checkpoint of this network, strictly, or an ImageNet classifier for the encoder, in timm's naming."""
        if any(name.startswith("encoder.") for name in read_tensors(weights)):
            return str(load_tensors(self, weights))
        return self.encoder.load_weights(weights)


@dataclass(frozen=True)
class Term(Checked):
    """Weight of a loss term and when it starts."""

    weight: Weight
    """Weight of the term. 0: it is not used."""
    start: Annotated[float, Range(least=0, below=1)] = 0.0
    """Fraction of the training after which it counts; before, it is multiplied by 0, so that its parameters decay but
    do not learn. 0: from the first update on."""

    def at(self, progress: float) -> float:
        """Weight at this fraction of the training."""
        return self.weight if not self.start or progress > self.start else 0.0


# ------------------------------------------------------------------------------------ losses (toco.md section 5)


def token_pairs(label: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs of an image's tokens have the same label and which different ones: (B, N) integers ->
    same, different (B, N, N) bool. A token with itself or with an unknown one (255) is neither."""
    known = label != IGNORE
    both = known[:, :, None] & known[:, None]
    equal = label[:, :, None] == label[:, None]
    itself = torch.eye(label.shape[1], dtype=torch.bool, device=label.device)
    return both & equal & ~itself, both & ~equal


def count_token_pairs(label: Tensor) -> dict[str, Tensor]:
    """How many pairs ``token_pairs`` finds in labels (B, h, w), each unordered pair counted twice."""
    same, different = token_pairs(label.flatten(1))
    return {"same_pairs": same.sum(), "different_pairs": different.sum()}


def patch_contrast(
    patches: Tensor, label: Tensor, same_pairs: Tensor, different_pairs: Tensor, images_per_gpu: int = 2
) -> Tensor:
    """Patch token contrast: tokens of one label should be alike, others not.

    1/2 (1 - mean over same pairs of s) + 1/2 mean over different pairs of s, with s the absolute cosine. Published, 1
    is added to the pair counts of a GPU's images: here its share for each image of the batch.

    Args:
        patches: (B, D, h, w).
        label: (B, h, w) integers, 255 unknown.
        same_pairs, different_pairs: counts over the batch (``Network.counts``).
        images_per_gpu: of the published training.

    Returns:
        Scalar in [0, 1]; 1/2 where there is no pair.
    """
    with full_precision(patches.device.type):
        unit = F.normalize(patches.float().flatten(2), dim=1, eps=1e-8)  # (B, D, N)
        similarity = (unit.transpose(1, 2) @ unit).abs()  # (B, N, N)
    same, different = token_pairs(label.flatten(1))
    added = len(patches) / images_per_gpu
    alike = (similarity * same).sum() / (same_pairs + added)
    unlike = (similarity * different).sum() / (different_pairs + added)
    return (1 - alike + unlike) / 2


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class SelfTrainedOptions(Options):
    """Network, maps and labels; the defaults are published for VOC."""

    backbone: ViTOptions = field(default_factory=lambda: VIT_B)
    """Transformer; image_size is the one that its position embedding is made for."""
    aux_layer: int = -3
    """Block of the auxiliary maps, from the end: -3 is the block two before the last."""
    fov_channels: Count = 512
    """Channels of the decoder."""
    fov_dilation: Count = 5
    """Dilation of the decoder's convolutions."""
    scales: Annotated[tuple[float, ...], Range(above=0, filled=True)] = (1.0, 0.5, 1.5)
    """Scales of the maps that labels are made from while it trains."""
    map_merge: Literal["max_relu", "max"] = "max_relu"
    """How these maps are merged with those of the mirror image. max_relu, published: the larger value, clipped at 0.
    max: not clipped, for classifiers trained from random weights, whose maps are above 0 at the most discriminative
    places only."""
    high: Probability = 0.7
    """Map value above which a pixel has its class. COCO: 0.65."""
    low: Probability = 0.25
    """Map value up to which a pixel is background; what lies between is unknown."""
    iterations: Annotated[int, Range(least=0)] = 10
    """Iterations of PAR on the labels of the decoder."""
    images_per_gpu: Count = 2
    """Images of a GPU in the published training, to whose pair counts 1 is added in the patch token contrast."""
    dense: DenseOptions = field(default_factory=DenseOptions)
    """Kernel of the dense energy loss."""
    head_lr: Positive = 10.0
    """Learning rate of everything behind the encoder, relative to the encoder's."""
    label_limits = ("high", "low")

    def cross_check(self) -> None:
        """Raises ValueError for a block that does not exist, and for thresholds in the wrong order."""
        super().cross_check()
        depth = self.backbone.depth
        check(-depth <= self.aux_layer < depth, "aux_layer", self.aux_layer, f"one of {depth} blocks (the depth)")
        check(self.low <= self.high, "low", self.low, f"at most high = {self.high}")


# ------------------------------------------------------------------------------------- recipes

PUBLISHED_FIT = Fit(
    steps=20000, batch_size=4, optimiser="adamw", lr=6e-5, weight_decay=0.01,
    schedule="warmup_poly", warmup_steps=1500, warmup_ratio=1e-6, power=0.9,
)  # fmt: skip
"""Both trainings on VOC (toco.md section 7, more.md section 5)."""
SAMPLE_FIT = Fit(
    batch_size=16, optimiser="adamw", lr=1.5e-3, weight_decay=0.05, schedule="warmup_poly", warmup_steps=30
)
SAMPLE_INFER = CamInference(scales=(0.5, 1.0), merge="max", normalise="span")
"""Not clipped at 0: the maximum is trained on marks, bodies lie below zero but above the background."""
SAMPLE_TEST = SegmentTest(
    infer=SegInference(
        scales=(1.0, 1.25), flip=True, resize="bilinear", merge="sum_max_logits", align_corners=False,
        crf=CRFSettings(iterations=5, bilateral_sxy=32),
    )
)  # fmt: skip
