"""The class-aware autoencoder (CAAE) of SemFormer: its first phase, and the frozen judge of its second (semformer.md
section 3).

A DeiT encodes the image; every patch gives one vector per class, and their sum over the patches is the image's class
embedding. A learned table contains a prototype vector per class: the two are trained to be similar if the image shows
the class. A decoder reconstructs the image from the class vectors of its patches.

Background is a class of its own: K = C + 1 classes, background first and always present.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.checked import Count, Weight, check
from misc.precision import full_precision
from net.backbone.transformer import TransformerBlock
from net.backbone.vit import GridViT, ViTOptions
from net.contract import Batch, Network, Options, TagScorer
from net.foreign.loading import load_tensors
from net.foreign.reading import read_tensors
from net.groups import Group, name_groups

_EPS = 1e-5
PRETRAINED_PARTS = ("model", "stage", "backbone")
"""Parts of the names of pre-trained parameters (semformer.md section 7)."""


_NEW = ("mlp", "decoder", "convert", "re_convert", "crs")
"""Layers that an ImageNet classifier does not have."""


def tags_with_background(tags: Tensor) -> Tensor:
    """Tags (B, C) -> labels (B, K) float32 of the classes with the background in front, which is in every image."""
    return F.pad(tags.float(), (1, 0), value=1.0)


def similarity(embeddings: Tensor, semantics: Tensor) -> Tensor:
    """Clamped cosine of two (..., E) tensors that broadcast -> (...), float32, at most 0.9999 (semformer.md 3.2).

    The clamp stops the gradient of a sufficient similarity.
    """
    with full_precision(embeddings.device.type):
        cosine = F.cosine_similarity(embeddings.float(), semantics.float(), dim=-1, eps=1e-8)
    return cosine.clamp(-1 + 1e-4, 1 - 1e-4)


def similarity_loss(similarities: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of similarities (B, K), taken as probabilities, and labels (B, K) -> scalar."""
    with full_precision(similarities.device.type):
        return F.binary_cross_entropy(similarities, labels)


@dataclass(frozen=True)
class CAAEOptions(Options):
    """Class-aware autoencoder; the defaults are the published ones."""

    encoder: ViTOptions = field(
        default_factory=lambda: ViTOptions(
            width=768, heads=12, drop_path=0.0, pretrained="deit_base_distilled_patch16_224"
        )
    )
    """Encoder. SemFormer's masks are judged at its image_size."""
    class_dim: Count = 256
    """Length of a class vector."""
    reduction: Literal["sum", "mean", "max"] = "sum"
    """How the class vectors of all patches are pooled to that of the image."""
    decoder_width: Count = 768
    """Channels of a token in the decoder."""
    decoder_depth: Count = 8
    """Blocks of the decoder."""
    decoder_heads: Count = 12
    """Attention heads of the decoder; must divide its width."""
    similarity_weight: Weight = 1.0
    """Weight of the similarities' cross entropy."""
    reconstruction_weight: Weight = 1.0
    """Weight of the reconstruction's squared error."""

    def cross_check(self) -> None:
        """Raises ValueError for heads that do not divide the width, and patches that do not divide the image."""
        super().cross_check()
        check(self.decoder_width % self.decoder_heads == 0, "decoder_heads", self.decoder_heads,
              f"a divisor of decoder_width = {self.decoder_width}")
        side, patch = self.encoder.image_size, self.encoder.patch
        check(side % patch == 0, "encoder.image_size", side, f"a multiple of the patch, {patch}")

    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> CAAE:
        """The autoencoder for ``num_classes`` foreground classes."""
        return CAAE(self, num_classes)


class CAAEDecoder(nn.Module):
    """Tokens (B, N, width) -> values of the patches (B, N, 3 * patch * patch): blocks without positions."""

    def __init__(self, options: CAAEOptions) -> None:
        super().__init__()
        width = options.decoder_width
        self.blocks = nn.ModuleList(
            # the encoder's norms have 1e-6 (semformer.md section 11, trap 7)
            TransformerBlock(width, options.decoder_heads, options.encoder.mlp_ratio, 0.0, eps=_EPS)
            for _ in range(options.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.mlp = nn.Linear(width, 3 * options.encoder.patch**2)

    def forward(self, x: Tensor) -> Tensor:
        """The forward pass, as described for the class."""
        for block in self.blocks:
            x = block(x)
        return self.mlp(self.norm(x))


class CAAE(TagScorer):
    """Class-aware autoencoder. Names are the official ones; what official files hold beside them (a distillation token
    and its head) is never used and left out. There is no class token. New layers start by PyTorch's default.

    It has no randomness: training and evaluation mode give the same result.
    """

    normalisation = "imagenet"

    def __init__(self, options: CAAEOptions, num_classes: int) -> None:
        super().__init__()
        self.options = options
        self.classes = num_classes + 1
        vectors, width = self.classes * options.class_dim, options.encoder.width
        self.encoder = nn.ModuleDict({"vit_backbone": GridViT(options.encoder)})
        self.mlp = nn.Linear(width, options.decoder_width)
        self.decoder = CAAEDecoder(options)
        self.convert = nn.Sequential(nn.Linear(width, vectors, bias=False), nn.ReLU())
        self.re_convert = nn.Sequential(nn.Linear(vectors, width, bias=False), nn.LayerNorm(width, eps=_EPS))
        self.crs = nn.Sequential(nn.Embedding(self.classes, options.class_dim), nn.ReLU())

    def patch_vectors(self, images: Tensor) -> Tensor:
        """Class vectors of every patch, class-major: (B, 3, H, W) -> (B, N, K * E), 0 or above.

        Raises ValueError if a side is not a multiple of the patch: the reconstruction would have another size.
        """
        patch = self.options.encoder.patch
        if images.shape[2] % patch or images.shape[3] % patch:
            height, width = images.shape[-2:]
            raise ValueError(f"The CAAE takes images with sides in multiples of {patch}, got {height} x {width}.")
        return self.convert(self.encoder["vit_backbone"](images)[0])

    def pool_vectors(self, vectors: Tensor) -> Tensor:
        """Class vectors of the image: (B, N, K * E) -> (B, K, E) float32."""
        vectors = vectors.float()
        match self.options.reduction:
            case "sum":
                reduced = vectors.sum(1)
            case "mean":
                reduced = vectors.mean(1)
            case _:
                reduced = vectors.amax(1)
        return reduced.unflatten(1, (self.classes, -1))

    def embed_classes(self, images: Tensor) -> Tensor:
        """The class embeddings ("CRE") of images: (B, 3, H, W) -> (B, K, E) float32."""
        return self.pool_vectors(self.patch_vectors(images))

    def class_semantics(self) -> Tensor:
        """Prototype vector of each class ("CRS"): (K, E), 0 or above."""
        return self.crs(torch.arange(self.classes, device=self.crs[0].weight.device))

    def score_classes(self, images: Tensor) -> Tensor:
        """Similarities of the images' embeddings with the class semantics: (B, 3, S, S) -> (B, K) in [0, 1]."""
        return similarity(self.embed_classes(images), self.class_semantics())

    def reconstruct(self, vectors: Tensor, size: tuple[int, int]) -> Tensor:
        """Class vectors (B, N, K * E) -> images (B, 3, H, W) of that size, normalised."""
        patch = self.options.encoder.patch
        values = self.decoder(self.mlp(self.re_convert(vectors)))  # (B, N, 3 * patch * patch): channel, row, column
        return F.fold(values.transpose(1, 2).float(), size, kernel_size=patch, stride=patch)

    def class_similarities(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Embeddings (B, K, E), labels (B, K) -> similarities (B, K) that train a class's semantics only by images that
        show it."""
        semantics = self.class_semantics()
        shown = labels[..., None] > 0  # (B, K, 1)
        return similarity(embeddings, torch.where(shown, semantics, semantics.detach()))

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, S, S), tags (B, C) -> {"similarity", "reconstruction"} (semformer.md section 3.3)."""
        images, labels = batch["image"], tags_with_background(batch["tags"])
        vectors = self.patch_vectors(images)
        similarities = self.class_similarities(self.pool_vectors(vectors), labels)
        error = F.mse_loss(self.reconstruct(vectors, images.shape[-2:]), images.float())
        return {
            "similarity": self.options.similarity_weight * similarity_loss(similarities, labels),
            "reconstruction": self.options.reconstruction_weight * error,
        }

    def param_groups(self) -> list[Group]:
        """The encoder at the base rate, the rest at 10 times it; parameters that are not weights at twice that, without
        decay."""
        return name_groups(self, PRETRAINED_PARTS)

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's ImageNet classifier of the backbone."""
        return (self.options.encoder.pretrained,)

    def load_weights(self, weights: str) -> str:
        """A CAAE, or an ImageNet classifier (published: the distilled DeiT-B) for the encoder; 'pretrained': timm's."""
        state = read_tensors(weights)
        if "crs.0.weight" in state:
            return str(load_tensors(self, state, label=weights))
        body = self.encoder["vit_backbone"].from_classifier(state)
        moved = {f"encoder.vit_backbone.{name}": value for name, value in body.items()}
        return str(load_tensors(self, moved, label=weights, allow_missing=_NEW))
