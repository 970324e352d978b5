"""IRNet: inter-pixel relations (Ahn, Cho and Kwak, CVPR 2019). irnet.md.

CAMs are spread with the boundary map of net/shared/edge.py. A displacement field, which points from every cell to the
centre of its object, separates the objects of a class. CRT uses the same with other thresholds (crt.md section 2):
``--aff.label.threshold-fg 0.35 --aff.label.threshold-bg 0.15 --aff.walk.no-instances``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Probability, When
from misc.config import Augment, Fit
from misc.crf.dense import CRFSettings
from misc.image.cam import Cam
from misc.image.picture import Picture
from misc.propagate.walk import Displacement, pair_views, source_cells
from misc.score.objects import Instances
from net.backbone.resnet import SAMPLE_RESNET, STAGES
from net.backbone.timm_cnn import PHOTOS
from net.contract import Batch, Network, RefineRecipe
from net.groups import Group
from net.registry import refiner
from net.shared.edge import (
    CELL,
    EdgeLabel,
    EdgeNetwork,
    EdgeOptions,
    EdgeWalk,
    StageMaps,
    check_sizes,
    crop_like,
    enlarge_cells,
    make_projection,
    propagate_scores,
)
from net.shared.photos import PHOTOS_EDGE_AUGMENT, PHOTOS_EDGE_FIT, PHOTOS_EDGE_LABEL
from net.start_weights import CAM, PRETRAINED

_EPS = 1e-5
_SHIFTS = 300
_WEAK = 2.5
"""Displacements shorter than this many cells mark the centre of an object (irnet.md section 10.3)."""
_LEAST_SHARE = 0.01
"""Smallest fraction of the image's pixels; smaller pieces stay in the list with score 0."""


@refiner("irn")
class IRN(EdgeNetwork):
    """Boundary and displacement network (irnet.md section 8); state-dict names are the official ones (each tensor
    once)."""

    heads = ("fc_edge*", "fc_dp*", "mean_shift")
    calibrates = True

    def __init__(self, options: IRNOptions) -> None:
        super().__init__(options)
        self.displacement_lr = options.displacement_lr
        channels, strides = self.resnet50.channels, self.resnet50.strides
        middle = strides["layer2"]
        for number, (stage, cout, groups, stride) in enumerate(
            zip(STAGES, (64, 128, 256, 256, 256), (8, 16, 16, 16, 16), (CELL, CELL, *[middle] * 3), strict=True), 1
        ):
            self.add_module(f"fc_dp{number}", make_projection(channels[stage], cout, groups, strides[stage], stride))
        self.fc_dp6 = make_projection(768, 256, 16, middle, CELL)
        self.fc_dp7 = nn.Sequential(*make_projection(448, 256, 16), nn.Conv2d(256, 2, 1, bias=False))
        self.mean_shift = MeanShift()

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), target (B, S/4, S/4) -> affinity terms, and dp_fg and dp_bg."""
        taps = self.resnet50.forward_stages(batch["image"])
        labels = self.label_pairs(batch["target"])
        counts = {name: batch[f"counts/{name}"] for name in labels}
        displacements, radius = self.pair_geometry(batch["target"].shape[-2:])
        return {
            **self.edge_losses(self.edge_logits(taps), labels, batch),
            **displacement_losses(self.displacement_field(taps), labels, counts, displacements, radius),
        }

    @torch.no_grad()
    def find_instances(self, picture: Picture, cam: Cam, options: IRNWalk) -> tuple[np.ndarray, Instances]:
        """Random walk, and the objects by a second walk of every class over each object of the displacement field
        (irnet.md section 10.3). Raises ValueError if image and CAM differ in size."""
        size = check_sizes(picture, cam)
        if len(cam.keys) == 0:
            return np.ones((1, *size), np.float32), Instances.none(size)
        taps = self.forward_pair(picture.values, options.canvas)
        boundary = self.pair_boundary(taps, size)  # (h, w)
        field = self.displacement_field({stage: tap[:1] for stage, tap in taps.items()})  # (1, 2, h', w')
        objects = self.find_objects(crop_like(field, boundary)[0], boundary, cam, size, options)
        return self.walk_scores(picture, cam, boundary, options), objects

    def displacement_field(self, taps: StageMaps) -> Tensor:
        """Displacement field from the stages' maps: (B, 2, ceil(H/4), ceil(W/4)) float32, (dy, dx) in cells; the mean
        is subtracted in evaluation mode."""
        one, two, *deep = (getattr(self, f"fc_dp{number}")(taps[stage]) for number, stage in enumerate(STAGES, 1))
        six = self.fc_dp6(torch.cat([crop_like(m, deep[0]) for m in deep], dim=1))
        return self.mean_shift(self.fc_dp7(torch.cat([one, two, crop_like(six, two)], dim=1)).float())

    def param_groups(self) -> list[Group]:
        """Boundary layers (and the backbone, if not frozen) at the base rate, displacement layers at
        ``displacement_lr`` times it; everything is decayed (irnet.md section 9.4)."""
        named = [(name.startswith("fc_dp"), p) for name, p in self.named_parameters() if p.requires_grad]
        return [
            Group([p for new, p in named if not new]),
            Group([p for new, p in named if new], self.displacement_lr),
        ]

    @torch.no_grad()
    def calibrate(self, images: Iterable[Tensor]) -> None:
        """Measure the mean displacement (irnet.md section 9.4): the mean over each image's canvas, then over all
        images.

        The published code leaves out the last incomplete batch (24 of 1464 images), and fails if all
        images are fewer than a batch.
        """
        total, count = torch.zeros(2, dtype=torch.float64), 0
        self.mean_shift.running_mean.zero_()
        for batch in images:
            total += self.displacement_field(self.resnet50.forward_stages(batch)).mean((2, 3)).sum(0).double().cpu()
            count += len(batch)
        self.mean_shift.running_mean.copy_(total / max(1, count))

    @classmethod
    def finds_instances(cls, options: IRNWalk) -> bool:
        """Whether the settings ask for single objects."""
        return options.instances

    @staticmethod
    def find_objects(
        field: Tensor, boundary: Tensor, cam: Cam, size: tuple[int, int], options: IRNWalk
    ) -> Instances:
        """Objects of an image of (H, W) from its displacement field (2, h, w), boundary (h, w) and CAMs."""
        numbers = torch.from_numpy(find_clusters(field.cpu().numpy(), find_centroids(field).cpu().numpy()))  # (h, w)
        members = F.one_hot(numbers).permute(2, 0, 1)  # (I, h, w)
        maps = torch.from_numpy(cam.on_grid(tuple(boundary.shape)))  # (K, h, w)
        rows = (maps[:, None] * members[None]).flatten(0, 1)  # (K * I, h, w), by class
        kept = rows.flatten(1).amax(1) > 0  # the others stay zero on the walk
        classes = np.repeat(cam.keys, len(members))[kept.numpy()]
        seeds = rows[kept].to(boundary.device)
        walked = propagate_scores(seeds, boundary, options.radius, options.beta, 2**options.logt)
        return make_instances(walked, classes, size, options.instance_threshold)


# ------------------------------------------------------------------------------------------------ displacement loss


def displacements_together(kind: str) -> int:
    """Displacements whose distances are computed at a time on devices of a type: GPUs would wait for thousands of small
    operations."""
    return 16 if kind == "cuda" else 1


def _add_one(
    field: Tensor, gradient: Tensor, pairs: Tensor, displacements: Sequence[Displacement], goal: Tensor, radius: int
) -> Tensor:
    """Sum of |d_i - d_j - goal| over the pairs (B, 1, P) of one displacement; its gradient is added to ``gradient``."""
    source, target = pair_views(field, displacements[0], radius)  # (B, 2, a, b)
    error = (source - target - goal[0, :, None, None]) * pairs.reshape(len(field), 1, *source.shape[2:])
    total = error.abs().sum()
    to_source, to_target = pair_views(gradient, displacements[0], radius)
    sign = error.sign_()
    to_source.add_(sign)
    to_target.sub_(sign)
    return total


def _add_many(
    field: Tensor, gradient: Tensor, pairs: Tensor, displacements: Sequence[Displacement], goal: Tensor, radius: int
) -> Tensor:
    """The same of several displacements, pairs (B, d, P), in few large operations, for GPUs."""
    source = source_cells(field, radius)  # (P,)
    steps = torch.tensor([dy * field.shape[3] + dx for dy, dx in displacements], device=field.device)
    cells = steps[:, None] + source  # (d, P)
    flat, summed = field.flatten(2), gradient.view(*gradient.shape[:2], -1)  # (B, 2, N)
    error = (flat[:, :, source][:, :, None] - flat[:, :, cells] - goal.t()[:, :, None]) * pairs[:, None]  # (B, 2, d, P)
    total = error.abs().sum()
    sign = error.sign_()
    summed.index_add_(2, source, sign.sum(2))
    summed.index_add_(2, cells.flatten(), sign.flatten(2), alpha=-1)
    return total


class _PairDistances(torch.autograd.Function):
    """Sums of |d_i - d_j - target| over the pairs of two kinds: (B, 2, h, w) -> (2,): foreground pairs, whose target is
    their displacement j - i, and background pairs, whose target is 0.

    The gradient is computed in the same pass, one displacement at a time; the plain form keeps (B, 2, D, P) floats
    twice.
    """

    @staticmethod
    def forward(
        ctx: Any, field: Tensor, labels: Mapping[str, Tensor], displacements: Sequence[Displacement], radius: int
    ) -> Tensor:
        sums = field.new_zeros(2)
        gradients = torch.zeros_like(field), torch.zeros_like(field)
        goals = torch.tensor(displacements, dtype=field.dtype, device=field.device).reshape(-1, 2)  # (D, 2)
        few = displacements_together(field.device.type)
        for begin in range(0, len(displacements), few):
            part = slice(begin, begin + few)
            add = _add_many if few > 1 else _add_one
            for kind, (name, goal) in enumerate((("fg", goals[part]), ("bg", torch.zeros_like(goals[part])))):
                sums[kind] += add(field, gradients[kind], labels[name][:, part], displacements[part], goal, radius)
        ctx.save_for_backward(*gradients)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        foreground, background = ctx.saved_tensors
        return gradient[0] * foreground + gradient[1] * background, None, None, None


def displacement_losses(
    field: Tensor,
    labels: Mapping[str, Tensor],
    counts: Mapping[str, Tensor],
    displacements: Sequence[Displacement],
    radius: int,
) -> dict[str, Tensor]:
    """The two displacement terms (irnet.md section 9.3).

    Args:
        field: (B, 2, h, w), (dy, dx) in cells, without the mean shift.
        labels: of ``misc.propagate.walk.pair_labels``, in the order of ``displacements``.
        counts: number of pairs of each kind; over the whole batch, or its mean over micro-batches.
        displacements, radius: of the pairs.

    Returns:
        {"dp_fg", "dp_bg"}: scalars, weighted 1/2 each.
    """
    sums = _PairDistances.apply(field.float(), labels, displacements, radius)
    return {f"dp_{name}": 0.5 * sums[kind] / (2 * counts[name] + _EPS) for kind, name in enumerate(("fg", "bg"))}


class MeanShift(nn.Module):
    """Subtracts the mean displacement of the training images, in evaluation mode only: (B, 2, h, w) -> the same shape.

    ``running_mean`` (2,) is measured once, after the training (irnet.md sections 8 and 9.4).
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))

    def forward(self, field: Tensor) -> Tensor:
        """The field, shifted in evaluation mode."""
        return field if self.training else field - self.running_mean[:, None, None]


# ------------------------------------------------------------------------------------------------ objects


def find_centroids(field: Tensor) -> Tensor:
    """Where every cell ends when it follows the field: 300 times c += field at c, bilinear, clamped to the grid
    (irnet.md section 10.3).

    (2, h, w) displacements (dy, dx) in cells -> (2, h, w) int64 (y, x).
    """
    _, height, width = field.shape
    flat = field.float().flatten(1)  # (2, N)
    last = field.new_tensor([height - 1, width - 1], dtype=torch.float32)[:, None]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, columns]).flatten(1).to(flat)  # (2, N)
    for _ in range(_SHIFTS):
        low, high = place.floor(), place.ceil()
        part = place - low
        (y0, x0), (y1, x1) = low.long(), high.long()
        upper = flat[:, y0 * width + x0] * (1 - part[1]) + flat[:, y0 * width + x1] * part[1]
        lower = flat[:, y1 * width + x0] * (1 - part[1]) + flat[:, y1 * width + x1] * part[1]
        place = torch.minimum((place + upper * (1 - part[0]) + lower * part[0]).clamp_(min=0), last)
    return place.round().long().view(2, height, width)


def find_clusters(field: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Objects of all classes together: cells whose centroid lies in one patch of short displacements (irnet.md 10.3).

    Args:
        field: (2, h, w) displacements.
        ends: (2, h, w) integers, their ``find_centroids``.

    Returns:
        (h, w) integers 0..I-1; cells whose centroid is in no patch are one object too.
    """
    weak = np.hypot(*field) < _WEAK
    _, patches = cv2.connectedComponents(weak.astype(np.uint8), connectivity=4)
    _, numbers = np.unique(patches[ends[0], ends[1]], return_inverse=True)
    return numbers.reshape(field.shape[1:])


def make_instances(scores: Tensor, classes: np.ndarray, size: tuple[int, int], threshold: float) -> Instances:
    """Objects from the walked score maps of (class, object) pairs: upsampled, cropped, arg-max against the background;
    every connected piece is one object (irnet.md section 10.3).

    Args:
        scores: (R, h, w), one row per pair, sorted by class.
        classes: (R,) 0-based class of each row.
        size: (H, W) of the image.
        threshold: background score, where the largest score of all is 1.

    Returns:
        pieces in the order of the rows; the score of one is its largest, or 0 below 1 % of the image.
    """
    best = scores.new_zeros(size)
    winner = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for row in range(len(scores)):  # one after the other: K x I maps at image size can be large
        high = enlarge_cells(scores[row : row + 1], size)[0]
        better = high > best
        winner[better] = row + 1
        best = torch.maximum(best, high)
    best = best / best.max().clamp(min=torch.finfo(best.dtype).tiny)
    labels = torch.where(best > threshold, winner, 0).cpu().numpy()
    strength = best.cpu().numpy()
    found: list[tuple[np.ndarray, int, float]] = []
    for row in np.unique(labels[labels > 0]):
        count, pieces = cv2.connectedComponents((labels == row).astype(np.uint8), connectivity=4)
        for number in range(1, count):
            mask = pieces == number
            large = mask.sum() >= _LEAST_SHARE * mask.size
            found.append((mask, int(classes[row - 1]), float(strength[mask].max()) if large else 0.0))
    if not found:  # published fails here
        return Instances.none(size)
    masks, kinds, values = zip(*found, strict=True)
    return Instances(np.stack(masks), np.array(kinds, np.int64), np.array(values, np.float32))


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class IRNOptions(EdgeOptions):
    """Boundary and displacement network."""
    # irnet.md section 8

    displacement_lr: float = 10.0
    """Learning rate of the displacement layers relative to that of the boundary layers."""

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> IRN:
        """The network; it depends neither on the classes nor on earlier networks."""
        return IRN(self)


@dataclass(frozen=True)
class IRNWalk(EdgeWalk):
    """Random walk, and the objects of each class."""
    # irnet.md section 10

    instances: bool = True
    """Also separate single objects (instance/ID.npz, instance/ID.png)."""
    instance_threshold: Annotated[Probability, When("instances")] = 0.25
    """Background score of the objects' walk."""


@dataclass(frozen=True)
class IRNRecipe(RefineRecipe):
    """Recipe of IRNet."""

    network: IRNOptions = field(default_factory=IRNOptions)
    """Options of the network itself."""
    label: EdgeLabel = field(default_factory=EdgeLabel)
    """How labels are made from CAMs."""
    walk: IRNWalk = field(default_factory=IRNWalk)
    """The random walk."""


# ------------------------------------------------------------------------------------- recipes

IRN.recipes = {
    # irnet.md sections 7, 9.4 and 10. The momentum is the published poly-SGD's, which passes its weight decay there
    # (section 5). Sizes of the random scaling are cut to whole pixels here, rounded there.
    "published": IRNRecipe(
        fit=Fit(epochs=3, batch_size=32, lr=0.1, momentum=1e-4, weight_decay=1e-4),
        augment=Augment(
            order=("scale", "normalize", "flip", "crop"), scale=(0.5, 1.5), scale_filter="bicubic", crop=512
        ),
        weights=PRETRAINED,
    ),
    # from random weights, so nothing is frozen
    "sample": IRNRecipe(
        amp="fast",
        network=IRNOptions(resnet=SAMPLE_RESNET, radius=5, displacement_lr=1.0),
        fit=Fit(epochs=10, batch_size=16, optimiser="adamw", lr=0.002, weight_decay=1e-4),
        augment=Augment(
            order=("scale", "normalize", "flip", "crop"), scale=(0.75, 1.25), scale_filter="bicubic", crop=112
        ),
        label=EdgeLabel(
            threshold_fg=0.12, threshold_bg=0.03, crf=CRFSettings(bilateral_sxy=30.0, bilateral_srgb=8.0)
        ),
        walk=IRNWalk(logt=6, canvas=112, threshold=0.1, crf=CRFSettings(1)),
    ),
    "photos": IRNRecipe(
        amp="fast",
        network=IRNOptions(backbone=PHOTOS),
        fit=PHOTOS_EDGE_FIT,
        augment=PHOTOS_EDGE_AUGMENT,
        weights=CAM,
        label=PHOTOS_EDGE_LABEL,
        walk=IRNWalk(background="otsu", logt=8, instances=False),
    ),
}
