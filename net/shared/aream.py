"""AReAM: adaptive re-activation of a transformer's attention (arXiv 2305.03112; aream.md), on MCTformer-V2 and on
Conformer.

Deep layers attend to a few tokens only, and a map spread by their attention covers the background. During training,
maps are therefore made with the attention of the shallow layers; pixel-adaptive refinement turns them into labels; and
the deep layers' attention is trained to be high for pairs of patches with the same label. At inference the attention of
all layers spreads the map.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.checked import Probability, Range, Weight, When, check
from misc.image.labels import IGNORE
from misc.image.pixels import box_mask, find_normalisation, resize_maps, truncated_size
from misc.infer.cams import scale_rectified
from misc.precision import full_precision
from misc.propagate.par import PixelAdaptive
from net.backbone.conformer import ConformerOptions
from net.backbone.transformer import AttentionSums, QueryKey, Visit, spread_maps
from net.backbone.vit import ViTOptions
from net.contract import Batch, Options, SeedNetwork
from net.losses import multilabel_soft_margin


class Aream(SeedNetwork):
    """Training and maps of AReAM on a backbone with two classifiers and accessible attention."""

    options: AreamOptions
    tokens: int
    """Number of class tokens, which come first."""
    names: tuple[str, str]
    """Names of the losses of the two classifiers."""
    gated: bool
    """Whether maps are multiplied by the class tokens' attention, averaged over all layers, in training too."""
    entropy_epsilon = 0.0
    """See ``map_entropy``."""

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C), box (B, 4) -> a multi-label soft margin loss for each classifier
        and, from ``warmup`` on, {"pair": the weighted mean of the deep layers' ``patch_pair_losses``}."""
        pairs = self.options.pair_weight > 0 and progress >= self.options.warmup
        label = self.make_labels(batch) if pairs else None
        deep: list[Tensor] = []

        def visit(layer: int, attention: QueryKey) -> None:
            if layer >= self.options.split:
                deep.append(patch_logits(attention, self.tokens))

        logits, maps = self.forward_maps(batch["image"], visit if pairs else None)
        terms = {n: multilabel_soft_margin(z, batch["tags"]) for n, z in zip(self.names, logits, strict=True)}
        if label is not None:
            losses = patch_pair_losses(deep, patch_pair_labels(label, maps.shape[-2:]))  # (L - split,)
            weights = losses.new_tensor(self.options.deep_weights())
            terms["pair"] = self.options.pair_weight * (losses * weights).mean()
        return terms

    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """The map of one scale, spread by all layers alike: (B, 3, H, W) -> (B, C, h, w) float32 (aream.md section 9).

        A Conformer's map is signed and is rectified after the merging; before it the result would differ.
        """
        depth = self.options.backbone.depth
        return self._spread_map(images, [1 / depth] * depth)

    @abstractmethod
    def forward_maps(self, images: Tensor, visit: Visit | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Normalised images (B, 3, H, W) -> logits of both classifiers, (B, C) each, and the map (B, C, h, w) without
        gradient; all float32. ``visit`` gets every layer's queries and keys."""

    def _spread_map(self, images: Tensor, weights: Sequence[float]) -> Tensor:
        """The map after the weighted sum of the layers' patch-to-patch attention: (B, 3, H, W) -> (B, C, h, w)."""
        depth = len(weights)
        sums = AttentionSums(self.tokens, [self.gated / depth] * depth, weights)
        _, maps = self.forward_maps(images, sums)
        if self.gated:
            maps = maps * sums.to_patches.unflatten(2, maps.shape[-2:])
        return spread_maps(sums.affinity, maps)

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """The mean of both classifiers' logits: (B, 3, H, W) -> (B, C)."""
        return torch.stack(self.forward_maps(images)[0]).mean(0)

    @torch.no_grad()
    def training_cam(self, images: Tensor) -> Tensor:
        """Maps of the shallow layers for labels: (B, 3, H, W) -> (B, C, H, W) in [0, 1), all classes (aream.md 4).

        Published oddity, kept: the network is left in training mode. Drop path is active, and a Conformer's batch
        norms use the statistics of these images and move their running averages, once a scale.
        """
        size, weights = images.shape[-2:], self.options.shallow_weights()
        total = 0
        for scale in self.options.scales:
            scaled = truncated_size(size, scale)
            x = images if scaled == size else resize_maps(images, scaled)
            plain, mirrored = resize_maps(self._spread_map(torch.cat([x, x.flip(-1)]), weights), size).chunk(2)
            total = total + plain + mirrored.flip(-1)
        return scale_rectified(total)

    @torch.no_grad()
    def make_labels(self, batch: Batch) -> Tensor:
        """Labels that the network makes for a training batch: (B, H, W) uint8, 255 unknown (aream.md section 6)."""
        images, tags = batch["image"], batch["tags"]
        kind = images.device.type
        # autocast would cache the weights cast here, without gradients, for the training pass
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            cams = self.training_cam(images)
        norm = find_normalisation(self.normalisation)
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (norm.mean, norm.std))
        backgrounds = (self.options.low, self.options.high)
        low, high = pseudo_labels(images * std + mean, cams, tags, backgrounds, batch.get("box")).unbind(1)
        return merge_score_labels(low, high)

    @torch.no_grad()
    def layer_entropy(self, images: Tensor, tags: Tensor) -> Tensor:
        """``map_entropy`` of every layer, of the map without the class tokens' attention: (B, 3, H, W), tags (B, C)
        -> (B, L). Small images and batches: all layers' head means exist at a time."""
        layers: list[Tensor] = []
        patches = self.tokens
        _, maps = self.forward_maps(images, lambda _, seen: layers.append(seen.mean_weights()[:, patches:, patches:]))
        maps = maps * tags[:, :, None, None]
        return torch.stack([map_entropy(affinity, maps, self.entropy_epsilon) for affinity in layers], 1)


# ------------------------------------------------------------------------------------- entropy (aream.md section 3)


def map_entropy(affinity: Tensor, maps: Tensor, epsilon: float = 0.0) -> Tensor:
    """Entropy of a map after it is spread by an attention: (B, N, N), (B, C, h, w), h w = N -> (B,) float32, bits.

    Maps of absent classes are to be zero. The softmax over the patches is of the sum over the classes; ``epsilon`` is
    added inside the logarithm.
    """
    share = spread_maps(affinity, maps).sum(1).flatten(1).softmax(1)  # (B, N)
    # published: 0 log 0 is NaN there, and spoils (MCTformer) or is left out of (Conformer) a layer's mean; here it is 0
    return -torch.special.xlogy(share, share + epsilon).sum(1) / torch.tensor(2.0).log()


def scale_entropy(entropy: Sequence[float]) -> list[float]:
    """Entropies of the layers, scaled from minimum and maximum to 0 and 1."""
    low, high = min(entropy), max(entropy)
    return [(e - low) / (high - low) for e in entropy]


# ------------------------------------------------------------------------------------- labels (aream.md section 6)


@torch.compiler.disable  # as many planes as an image has classes
@torch.no_grad()
def pseudo_labels(
    colours: Tensor, cams: Tensor, tags: Tensor, backgrounds: Sequence[float], box: Tensor | None = None
) -> Tensor:
    """Labels of the pixels for some background scores, refined at half size; the image's kernel is made once.

    The softmax over background and present classes is of values in [0, 1], so it is nearly uniform, as published.

    Args:
        colours: (B, 3, H, W), of about [0, 1].
        cams: (B, C, H, W) in [0, 1]; those of absent classes don't matter.
        tags: (B, C) in {0, 1}.
        backgrounds: S scores.
        box: (B, 4) top, bottom, left, right, half-open: pixels outside are unknown.

    Returns:
        (B, S, H, W) uint8, 0 background, class + 1, 255 outside the box.
    """
    size = cams.shape[-2:]
    half = [side // 2 for side in size]
    count = (tags > 0).sum(1)  # (B,)
    most = max(1, int(count.max()))
    # the present classes of each image, ascending, then absent ones up to a common number
    classes = (tags > 0).float().argsort(stable=True, dim=1, descending=True)[:, :most]  # (B, K)
    absent = torch.arange(most, device=tags.device) >= count[:, None]  # (B, K)
    planes = cams.gather(1, classes[:, :, None, None].expand(-1, -1, *size))
    planes = resize_maps(planes, half).masked_fill(absent[:, :, None, None], -torch.inf)  # (B, K, H/2, W/2)
    stacks = [F.pad(planes, (0, 0, 0, 0, 1, 0), value=score).softmax(1) for score in backgrounds]
    refined = PixelAdaptive(resize_maps(colours, half))(torch.cat(stacks, 1))  # (B, S (K + 1), H/2, W/2)
    place = resize_maps(refined, size).unflatten(1, (len(backgrounds), most + 1)).argmax(2)  # (B, S, H, W)
    labels = F.pad(classes + 1, (1, 0)).gather(1, place.flatten(1)).view_as(place)
    if box is not None:
        labels = labels.masked_fill(~box_mask(box, size)[:, None], IGNORE)
    return labels.to(torch.uint8)


def merge_score_labels(low: Tensor, high: Tensor) -> Tensor:
    """Two label maps of any shape -> ``high``'s classes, background where even ``low`` says so, 255 elsewhere."""
    return high.masked_fill((high == 0) & (low != 0), IGNORE)


def patch_pair_labels(label: Tensor, grid: Sequence[int]) -> Tensor:
    """Labels of all pairs of patches: (B, H, W), 255 unknown -> (B, N, N) uint8, N = h w of the ``grid``.

    1 same label (background too), 0 another one, 255 unknown. A patch has the label of its top left pixel.
    """
    cells = F.interpolate(label[:, None].float(), size=tuple(grid), mode="nearest").flatten(1)  # (B, N)
    unknown = cells == IGNORE
    same = (cells[:, :, None] == cells[:, None]).to(torch.uint8)
    return same.masked_fill(unknown[:, :, None] | unknown[:, None], IGNORE)


# ------------------------------------------------------------------------------------- loss (aream.md section 7)


def patch_logits(attention: QueryKey, tokens: int) -> Tensor:
    """Mean over heads of the patches' logits: -> (B, N, N) float32, with gradient; ``tokens`` class tokens are left
    out. One product, in which no head has a matrix of its own."""
    query, key = (x[:, :, tokens:].float() for x in (attention.query, attention.key))
    with full_precision(query.device.type):
        return QueryKey(query, key).mean_logits()


def patch_pair_losses(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Loss of each layer, linear in the sigmoid g of the mean logits: (sum over same of (1 - g) / (n + 1) + sum over
    different of g / (n + 1)) / 2, where n is the number of such pairs of the batch.

    The labels are the network's own, so where the batch is divided, n is that of the micro-batch.

    Args:
        logits: L times (B, N, N), before the sigmoid.
        target: (B, N, N) of ``patch_pair_labels``.

    Returns:
        (L,) float32.
    """
    same, different = (target == 1), (target == 0)
    count = same.sum().float()
    # written as a constant plus one weighted sum, so that only g is kept per layer
    weights = different / (different.sum() + 1.0) - same / (count + 1)  # (B, N, N)
    return torch.stack([(count / (count + 1) + (z.float().sigmoid() * weights).sum()) / 2 for z in logits])


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class AreamOptions(Options):
    """Loss and map of both networks; the defaults are the published ones of MCTformer."""

    split: Annotated[int, Range(least=1)] = 7
    """Layers before this one (from 0) make the maps that labels come from; the others are trained on these."""
    scales: Annotated[tuple[float, ...], Range(above=0, filled=True)] = (1.0,)
    """Scales of the training image, each mirrored too, of the maps that labels come from."""
    low: float = 0.35
    """Low background score; pixels where it wins are labelled background."""
    high: float = 0.55
    """High background score; pixels where a class wins over it get this class. The others have no label."""
    pair_weight: Weight = 0.1
    """Weight of the pair loss. 0: classification only."""
    warmup: Annotated[Probability, When("pair_weight")] = 1 / 6
    """Fraction of the training before the pair loss starts (10 of 60 epochs, 2 of 12)."""
    entropy: tuple[float, ...] = ()
    """Entropy of the map after each layer, as scripts.layer_entropy measures it on a trained network: layers of
    high entropy count less in the maps and more in the loss. Empty: equal weights, as in the released models."""

    backbone: ViTOptions | ConformerOptions = field(default_factory=ViTOptions)
    """Options of the backbone."""

    def cross_check(self) -> None:
        """Raises ValueError for layers that do not exist or have no weight, and for scores in the wrong order."""
        super().cross_check()
        depth = self.backbone.depth
        check(self.split < depth, "split", self.split, f"in 1 .. {depth - 1} (below the depth)")
        check(self.low <= self.high, "low", self.low, f"at most high = {self.high}")
        if self.entropy and (len(self.entropy) != depth or len(set(self.entropy)) == 1):
            raise ValueError(f"entropy must be {depth} numbers, one per layer, and not all the same: {self.entropy}.")
        if not any(self.shallow_weights()):
            raise ValueError(f"entropy leaves no layer before {self.split} any weight: {self.entropy}.")

    def shallow_weights(self) -> list[float]:
        """Weight of each layer in the maps for labels: 0 from ``split`` on; divided by the number of layers, not
        by the sum (aream.md section 4)."""
        weights = 1 - torch.tensor(scale_entropy(self.entropy)) if self.entropy else torch.ones(self.backbone.depth)
        return [w / self.split if layer < self.split else 0.0 for layer, w in enumerate(weights.tolist())]

    def deep_weights(self) -> list[float]:
        """Weights in the loss of the layers from ``split`` on; the loss is a mean over the layers (aream.md section
        7)."""
        return (scale_entropy(self.entropy) if self.entropy else [1.0] * self.backbone.depth)[self.split :]


# ------------------------------------------------------------------------------------- recipes

PUBLISHED_REFINE = {
    "label.alpha_low": 1.0,
    "label.alpha_high": 12.0,
    "walk.background": "constant",
    "walk.threshold": None,  # the best one found by step 2; the authors' network had 0.39
    "walk.beta": 8.0,
    "walk.logt": 6,
    "fit.lr": 0.01,
    "fit.epochs": 5,
}
"""Settings of the refiner psa in both recipes (aream.md section 11)."""
