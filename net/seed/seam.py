"""SEAM: self-supervised equivariant attention (Wang et al., CVPR 2020; seam.md).

One network sees an image and its 0.3x copy. Both class maps should agree after rescaling (ER). A pixel correlation
module (PCM) spreads each map along pixel similarity; its output is supervised by the other branch's plain map (ECR).
The map used afterwards is the PCM's. In all maps here channel 0 is the background.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import DropProbability, Names, Positive, Probability, Range, When
from misc.config import Augment, CamInference, Fit
from misc.precision import full_precision
from net.backbone.resnet38 import SAMPLE_RESNET38, ResNet38, ResNet38Options
from net.backbone.timm_cnn import ON_TIMM, PHOTOS, PREFIX, TimmCNN, TimmOptions, load_timm, to_stride
from net.contract import Batch, Network, Options, Recipe, SeedNetwork, SeedRecipe
from net.foreign.loading import load_tensors
from net.groups import Group, conv_groups
from net.losses import multilabel_soft_margin
from net.registry import seed
from net.shared.photos import PHOTOS_CAMS, PHOTOS_TIMM, make_photos_recipe
from net.start_weights import REQUIRED

_EPSILON = 1e-5
_BLOCK = 512
"""Side of the blocks of the similarity matrix on the CPU. A matrix of one such block is kept for the backward pass."""


@seed("seam")
class Seam(SeedNetwork):
    """A backbone with a classifier ``fc8`` (C + 1 maps) and the PCM's layers ``f8_3``, ``f8_4``, ``f9``;
    ``SeamOptions.build`` creates one of its subclasses.

    State-dict names are those of the official checkpoints. seam.md section 3.
    """

    published_scores = "55.4 / 63.6 / 64.5"
    head = ("fc8", "f8_3", "f8_4", "f9")

    @abstractmethod
    def forward_taps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features under ``f8_3``, ``f8_4`` and ``fc8`` on one grid: (B, 3, H, W) -> (B, channels, h, w) each."""

    def _add_layers(self, options: SeamOptions, num_classes: int, channels: tuple[int, int, int]) -> None:
        """Create the layers on top of a backbone whose taps have these channels."""
        self.second_scale = options.second_scale
        self.hardest = options.hardest
        self.plain_share = options.plain_share
        self.finds_unused = options.plain_share > 0  # the PCM's layers are only used in the second part
        self.head_lr = options.head_lr
        self.dropout7 = nn.Dropout2d(options.dropout)
        self.fc8 = nn.Conv2d(channels[2], num_classes + 1, 1, bias=False)
        self.f8_3 = nn.Conv2d(channels[0], 64, 1, bias=False)
        self.f8_4 = nn.Conv2d(channels[1], 128, 1, bias=False)
        self.f9 = nn.Conv2d(3 + 64 + 128, 192, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)
        nn.init.kaiming_normal_(self.f8_3.weight)
        nn.init.kaiming_normal_(self.f8_4.weight)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C) -> the terms of ``seam_losses``; in the first,
        plain part of the training the class term alone."""
        image = batch["image"]
        if progress < self.plain_share:
            cam = self.fc8(self.dropout7(self.forward_taps(image)[2]))
            return {"cls": pooled_class_loss(cam, batch["tags"])}
        size = image.shape[-2:]
        small_size = tuple(int(side * self.second_scale) for side in size)
        small = _resize(image, small_size)
        first = [self.enlarge(m, size) for m in self.forward_both_maps(image)]
        second = [self.enlarge(m, small_size) for m in self.forward_both_maps(small)]
        return seam_losses(*first, *second, batch["tags"], self.hardest)

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """The spread maps of all classes at the size of the images: (B, 3, H, W) -> (B, C, H, W) in [0, 1].

        They are resized to the input's size here, with aligned corners, and to the image's size by the merging,
        without: the published two steps (seam.md sections 3.5 and 5).
        """
        _, revised = self.forward_both_maps(images)
        return self.enlarge(revised[:, 1:], images.shape[-2:])

    def enlarge(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps at the size of the images: (B, K, h, w) -> (B, K, H, W)."""
        return _resize(maps, size)

    def cell_colours(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """The images on the feature grid: (B, 3, H, W) -> (B, 3, h, w) float32."""
        return _resize(images.float(), size)

    def forward_both_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Plain and spread maps on the feature grid: (B, 3, H, W) -> two (B, C + 1, h, w) float32.

        The plain map is raw and signed, the spread one in [0, 1]; h = ceil(H/8), w = ceil(W/8).
        """
        third, fourth, last = self.forward_taps(images)
        cam = self.fc8(self.dropout7(last)).float()
        features = torch.cat(
            [
                self.cell_colours(images, cam.shape[-2:]),
                F.relu(self.f8_3(third.detach())).float(),
                F.relu(self.f8_4(fourth.detach())).float(),
            ],
            1,
        )  # (B, 195, h, w)
        return cam, correlate(attention_values(cam), self.f9(features))

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """The pooled raw map, which the class loss trains: (B, 3, H, W) -> (B, C)."""
        return self.fc8(self.forward_taps(images)[2]).float().mean((2, 3))[:, 1:]

    def param_groups(self) -> list[Group]:
        """The published four groups; the head's layers are the new ones."""
        return conv_groups(self, self.head, self.head_lr)

    def load_weights(self, weights: str) -> str:
        """ImageNet weights (``.params``) or a PSA classifier without their heads, or a whole SEAM checkpoint.

        PSA's ``fc8`` has another shape (no background) and is left out. Raises ValueError for a checkpoint that has the
        PCM's layers but does not fit completely.
        """
        report = load_tensors(self, weights, allow_missing=self.head)
        if "f9.weight" not in report.missing and (report.missing or report.wrong_shape):
            raise ValueError(
                f"{report}. It has the pixel correlation layers of SEAM, so everything must fit: is it SEAM's "
                "checkpoint, and for this number of classes?"
            )
        return str(report)


class SeamResNet38(Seam, ResNet38):
    """The published network. seam.md section 3."""

    normalisation = ResNet38.normalisation

    def __init__(self, options: SeamOptions, num_classes: int) -> None:
        ResNet38.__init__(self, options.resnet38)
        self._add_layers(options, num_classes, tuple(self.channels[tap] for tap in ("conv4", "conv5", "conv6")))

    def forward_taps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the base says; h = ceil(H/8), w = ceil(W/8)."""
        taps = self.forward_stages(images)
        return taps["conv4"], taps["conv5"], taps["conv6"]


class SeamTimm(Seam):
    """SEAM on a CNN of timm: its stages of strides 8 and 16 are under the PCM, on the grid of the last map."""

    _stages = ("layer2", "layer3", "layer4")

    def __init__(self, options: SeamOptions, num_classes: int) -> None:
        super().__init__()
        self.backbone = TimmCNN(options.backbone, options.timm)
        self.normalisation = self.backbone.normalisation
        self._add_layers(options, num_classes, tuple(self.backbone.channels[stage] for stage in self._stages))

    def forward_taps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the base says; h = ceil(H / stride)."""
        third, fourth, last = self.backbone.maps_at(images, self._stages, self.backbone.strides["layer4"])
        return third, fourth, last

    def enlarge(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Every cell in its place: (B, K, h, w) -> (B, K, H, W)."""
        return self.backbone.enlarge(maps, size)

    def cell_colours(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Mean colours of the cells: (B, 3, H, W) -> (B, 3, h, w) float32."""
        return to_stride(images.float(), 1, self.backbone.strides["layer4"])

    def pretrained_names(self) -> tuple[str, ...]:
        """The backbone, by timm's name."""
        return (self.backbone.name,)

    def load_weights(self, weights: str) -> str:
        """timm's weights of the backbone, or a network here with the same one."""
        return load_timm(self, weights, heads=self.head, owner="backbone")


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with aligned corners, as everywhere inside SEAM (seam.md section 7.2)."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def _keep_strongest(maps: Tensor) -> Tensor:
    """(B, C + 1, h, w) -> foreground values below their pixel's foreground maximum set to 0; ties keep several
    classes."""
    foreground = maps[:, 1:]
    strongest = foreground.amax(1, keepdim=True)
    return torch.cat([maps[:, :1], foreground.masked_fill(foreground < strongest, 0)], 1)


# ------------------------------------------------------------------------------------- pixel correlation module


@torch.no_grad()
def attention_values(cam: Tensor) -> Tensor:
    """Input of the PCM: plain maps (B, C + 1, h, w), raw -> (B, C + 1, h, w) float32 in [0, 1], without gradient.

    Every class is divided by its maximum over the pixels; background is one minus the strongest class; in the
    foreground only the strongest class of each pixel is kept. Tags are not used. seam.md section 3, step 2.
    """
    scores = F.relu(cam.float())
    scores = F.relu(scores - _EPSILON) / (scores.amax((2, 3), keepdim=True) + _EPSILON)
    background = 1 - scores[:, 1:].amax(1, keepdim=True)
    return _keep_strongest(torch.cat([background, scores[:, 1:]], 1))


def correlate(values: Tensor, features: Tensor) -> Tensor:
    """PCM: each pixel gets the mean of all pixels' values, weighted by the positive cosine of their features.

    The similarity matrix has N x N entries, N = h x w: 0.55 GB for one image of 1000 x 750 (seam.md section 7.11). It
    is symmetric and, but for grids of at most 512 pixels, never held: half of its blocks are computed, each used twice,
    in the backward pass again. Always in float32.

    Args:
        values: (B, K, h, w); they get no gradient.
        features: (B, D, h, w).

    Returns:
        (B, K, h, w) float32, a convex combination of ``values`` at every pixel. seam.md section 3, step 4.
    """
    with full_precision(values.device.type):
        vectors = features.float().flatten(2)  # (B, D, N)
        vectors = vectors / (vectors.norm(dim=1, keepdim=True) + _EPSILON)
        revised = _Correlation.apply(vectors, values.detach().float().flatten(2))
    return revised.unflatten(2, values.shape[-2:])  # (B, K, h, w)


class _Correlation(torch.autograd.Function):
    """V S divided by the column sums of S = relu(R^T R): vectors R (B, D, N), values V (B, K, N) -> (B, K, N).

    The sums divide the small product instead of the matrix, which gives the same numbers.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, values: Tensor) -> Tensor:
        stacked = torch.cat([values, torch.ones_like(values[:, :1])], 1)  # the last row gives the column sums
        total = torch.zeros_like(stacked)
        for here, there in _block_pairs(vectors):
            similarity = F.relu(vectors[:, :, here].transpose(1, 2) @ vectors[:, :, there], inplace=True)  # (B, m, n)
            total[:, :, there] += stacked[:, :, here] @ similarity
            if here != there:
                total[:, :, here] += stacked[:, :, there] @ similarity.transpose(1, 2)
        weight = total[:, -1:] + _EPSILON  # (B, 1, N)
        revised = total[:, :-1] / weight
        whole = similarity if vectors.shape[2] <= _BLOCK else None
        ctx.save_for_backward(vectors, values, revised, weight, whole)
        return revised

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        vectors, values, revised, weight, whole = ctx.saved_tensors
        gradient = gradient / weight
        # of the similarity of i and j: values_i gradient_j - revised_j gradient_j, here as one product of two factors
        left = torch.cat([values, torch.ones_like(weight)], 1)  # (B, K + 1, N)
        right = torch.cat([gradient, -(gradient * revised).sum(1, keepdim=True)], 1)
        total = torch.zeros_like(vectors)
        for here, there in _block_pairs(vectors):
            similarity = vectors[:, :, here].transpose(1, 2) @ vectors[:, :, there] if whole is None else whole
            change = left[:, :, here].transpose(1, 2) @ right[:, :, there]  # (B, m, n)
            change += right[:, :, here].transpose(1, 2) @ left[:, :, there]  # the same entry, mirrored
            change.mul_(similarity > 0)
            total[:, :, there] += vectors[:, :, here] @ change
            if here != there:
                total[:, :, here] += vectors[:, :, there] @ change.transpose(1, 2)
        return total, None


def _block_pairs(vectors: Tensor) -> Iterator[tuple[slice, slice]]:
    """The blocks on and above the diagonal of the matrix of all pairs of the N vectors: rows and columns. On the CPU a
    block stays in the cache."""
    side = _BLOCK if vectors.device.type == "cpu" else 8 * _BLOCK
    parts = [slice(begin, begin + side) for begin in range(0, vectors.shape[2], side)]
    return ((here, there) for number, here in enumerate(parts) for there in parts[number:])


# ------------------------------------------------------------------------------------- losses (seam.md section 4.1)


def _with_background(tags: Tensor) -> Tensor:
    """(B, C) -> (B, C + 1, 1, 1) float32 with a background that is always present."""
    return F.pad(tags.float(), (1, 0), value=1.0)[:, :, None, None]


def pooled_class_loss(cam: Tensor, tags: Tensor) -> Tensor:
    """Multi-label soft margin loss of the pooled raw map: cam (B, C + 1, H, W), tags (B, C) -> scalar."""
    return multilabel_soft_margin(cam.float().mean((2, 3))[:, 1:], tags)


def min_pooling_loss(revised: Tensor, tags: Tensor) -> Tensor:
    """Mean of the weakest quarter of the pixels' foreground maxima: revised (B, C + 1, H, W), tags (B, C) -> scalar.

    The authors remark that it moves the best background score, not the best mIoU.
    """
    strongest = (revised.float() * _with_background(tags))[:, 1:].amax(1).flatten(1)  # (B, H * W)
    weakest = strongest.topk(strongest.shape[1] // 4, dim=1, largest=False, sorted=False).values
    return F.relu(weakest).mean()


def max_norm(maps: Tensor) -> Tensor:
    """(B, C + 1, H, W) -> the same in [0, 1), each channel from its minimum to its maximum, differentiable."""
    maps = F.relu(maps.float())
    flat = maps.flatten(2)  # (B, C + 1, H * W)
    high = flat.max(2).values[:, :, None, None]
    low = flat.min(2).values[:, :, None, None]
    return F.relu(maps - low - _EPSILON) / (high - low + _EPSILON)


def _hardest(target: Tensor, revised: Tensor, share: float) -> Tensor:
    """Mean over each image's largest differences, all channels and pixels together: two (B, C + 1, h, w) -> scalar."""
    errors = (target - revised).abs().flatten(1)  # (B, (C + 1) * h * w)
    return errors.topk(int(errors.shape[1] * share), dim=1, sorted=False).values.mean()


def equivariance_losses(
    cam1: Tensor, revised1: Tensor, cam2: Tensor, revised2: Tensor, tags: Tensor, hardest: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """ER, and ECR in both directions, of the maps of both branches; arguments as ``seam_losses``.

    ECR trains only the PCM's own layers, because its input maps and features carry no gradient.
    """
    size, labels = cam2.shape[-2:], _with_background(tags)
    plain1, plain2 = _resize(max_norm(cam1), size) * labels, max_norm(cam2) * labels
    spread1, spread2 = _resize(max_norm(revised1), size) * labels, max_norm(revised2) * labels
    er = (plain1[:, 1:] - plain2[:, 1:]).abs().mean()  # absent classes count as zeros in the mean
    # the plain maps get a background computed from their foreground, the spread ones keep their own
    target1, target2 = (
        _keep_strongest(torch.cat([1 - plain[:, 1:].amax(1, keepdim=True), plain[:, 1:]], 1))
        for plain in (plain1.detach(), plain2.detach())
    )
    return er, _hardest(target2, spread1, hardest), _hardest(target1, spread2, hardest)


def seam_losses(
    cam1: Tensor, revised1: Tensor, cam2: Tensor, revised2: Tensor, tags: Tensor, hardest: float = 0.2
) -> dict[str, Tensor]:
    """The four terms whose sum is SEAM's loss.

    Args:
        cam1, revised1: (B, C + 1, H, W), plain and spread map of the image, at its size, raw.
        cam2, revised2: (B, C + 1, h, w), those of its small copy.
        tags: (B, C) in {0, 1}.
        hardest: fraction of the entries that ECR uses.

    Returns:
        Scalars cls, min, er and ecr. (The published log shows cls and min as one number, "loss_cls".)
    """
    er, ecr1, ecr2 = equivariance_losses(cam1, revised1, cam2, revised2, tags, hardest)
    return {
        "cls": (pooled_class_loss(cam1, tags) + pooled_class_loss(cam2, tags)) / 2,
        "min": (min_pooling_loss(revised1, tags) + min_pooling_loss(revised2, tags)) / 2,
        "er": er,
        "ecr": ecr1 + ecr2,
    }


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class SeamOptions(Options):
    """Options of network and loss; the defaults are the published ones."""

    backbone: Annotated[str, Names(("resnet38",), PREFIX)] = "resnet38"
    """Backbone; only the section with this name is used. timm/NAME: a CNN of timm."""
    resnet38: Annotated[ResNet38Options, When("backbone", "resnet38")] = field(
        default_factory=lambda: ResNet38Options(frozen="b2")
    )
    """Options of the ResNet38 backbone."""
    timm: Annotated[TimmOptions, ON_TIMM] = field(default_factory=TimmOptions)
    """CNN of timm."""
    dropout: DropProbability = 0.5
    """Channel dropout probability before the classifier."""
    head_lr: Positive = 10.0
    """Learning rate of the new layers relative to the pre-trained ones."""
    second_scale: Annotated[float, Range(above=0, most=1)] = 0.3
    """Size of the second branch's image relative to the first's."""
    hardest: Annotated[float, Range(above=0, most=1)] = 0.2
    """Fraction of a map's entries, those with the largest differences, that ECR uses."""
    plain_share: Probability = 0.0
    """Fraction of the training, at its start, in which only the classifier is trained, on one scale. Published: 0, from
    ImageNet weights. From random weights there is nothing yet for the scales to agree on, and a plain step costs
    half."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> Seam:
        """SEAM for ``num_classes`` foreground classes."""
        return (SeamResNet38 if self.backbone == "resnet38" else SeamTimm)(self, num_classes)


# ------------------------------------------------------------------------------------- recipes (seam.md section 4.2)

_PUBLISHED = Recipe(
    cam=SeedRecipe(
        network=SeamOptions(),
        # momentum: the published optimiser uses the weight decay as momentum, so there is practically none (seam.md
        # 7.1)
        fit=Fit(epochs=8, batch_size=8, lr=0.01, momentum=5e-4, weight_decay=5e-4, schedule="poly", power=0.9),
        augment=Augment(
            order=("long_side", "flip", "jitter", "normalize", "crop"),
            long_side=(448, 768),
            flip=0.5,
            jitter=(0.3, 0.3, 0.3, 0.1),
            crop=448,
        ),
        weights=REQUIRED,
        infer=CamInference(scales=(0.5, 1.0, 1.5, 2.0), flip=True, normalise="shifted"),
    ),
    # psa.md sections 4 to 6, the rows of SEAM
    refiner="psa",
    refine={
        "label.alpha_low": 4.0,
        "label.alpha_high": 24.0,
        "walk.background": "power",
        "walk.alpha": 6.0,
        "walk.beta": 8.0,
        "walk.logt": 6,
        "walk.shrink_early": True,
        "fit.lr": 0.01,
        "fit.epochs": 8,
    },
    segmenter="deeplabv1",
)

# trained from random weights: nothing frozen, and no dropout, which only adds noise in so few steps
_SAMPLE = Recipe(
    cam=SeedRecipe(
        amp="fast",
        network=SeamOptions(
            resnet38=SAMPLE_RESNET38, dropout=0.0, second_scale=0.6, head_lr=4.0, plain_share=0.6
        ),
        fit=Fit(epochs=26, batch_size=16, optimiser="adamw", lr=0.0015, weight_decay=0.01),
        augment=Augment(long_side=(112, 160), jitter=(0.2, 0.2, 0.2, 0.02), crop=112),
        infer=CamInference(scales=(0.5, 1.0, 1.5, 2.0), flip=True, normalise="shifted"),
    ),
    refiner="psa",
    refine={"weights": "cam"},
    segmenter="deeplabv1",
    segment={"weights": "cam"},
)

Seam.recipes = {
    "published": _PUBLISHED,
    "sample": _SAMPLE,
    "photos": make_photos_recipe(
        SeamOptions(backbone=PHOTOS, timm=PHOTOS_TIMM, dropout=0.2, second_scale=0.5),
        replace(PHOTOS_CAMS, normalise="shifted"),
    ),
}
