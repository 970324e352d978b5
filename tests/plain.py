"""Plain forms of what the product computes in a faster way: as the publications have it, dense, nothing saved.

Tests compare with them, scripts/bench_cases.py measures against them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.image.picture import Picture
from misc.image.pixels import NORMALISATIONS


def dense_affinity(source: Tensor, target: Tensor, affinity: Tensor, cells: int) -> Tensor:
    """Affinities (E,) of pairs of cells -> (N, N), symmetric, unit diagonal, zero elsewhere (psa.md section 5.2)."""
    dense = torch.eye(cells, dtype=affinity.dtype)
    dense[source, target] = affinity
    dense[target, source] = affinity
    return dense


def dense_transition(dense: Tensor, beta: float, logt: int) -> Tensor:
    """(N, N) affinities -> T^(2^logt), T the columns of the element-wise power divided by their sums, squared logt
    times (psa.md section 6)."""
    power = dense**beta
    result = power / power.sum(dim=0, keepdim=True)
    for _ in range(logt):
        result = result @ result
    return result


def pair_affinity(features: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Affinities of PSA with all pairs gathered at once: (B, C, h, w), two (D, P) -> (B, D, P) (psa.md section 5.2)."""
    flat = features.flatten(2)  # (B, C, N)
    difference = flat[:, :, source] - flat[:, :, target]  # (B, C, D, P)
    return torch.exp(-difference.abs().mean(dim=1))


LATTICE_SCALE = (0.5, 0.65)
"""What the permutohedral lattice's sums are of exact Gaussian ones in the five dimensions of GETAM's energy: the less,
the smaller the picture; about 0.62 at 128 x 128 cells (getam.md section 5)."""


@dataclass(frozen=True)
class Energy:
    """Parts of the dense energy: energy () and the gradient (B, C, h, w) of the small probabilities, both without the
    weight; filtered (B, C, h, w); gate (B, h, w); the kernel's features (B, N, 5) and what it filters (B, N, C)."""

    energy: Tensor
    gradient: Tensor
    filtered: Tensor
    gate: Tensor
    features: Tensor
    values: Tensor


def exact_energy(logits: Tensor, label: Tensor, colours: Tensor, inside: Tensor, options: Any) -> Energy:
    """GETAM's dense energy with every pair of pixels, in double precision (getam.md section 5); arguments as
    ``misc.crf.energy.dense_energy``."""
    small = [side * options.scale for side in logits.shape[-2:]]
    h, w = int(small[0]), int(small[1])
    p = F.interpolate(logits.double().softmax(1), size=(h, w), mode="bilinear", align_corners=False)
    inside, label, colours = (
        F.interpolate(planes.double(), size=(h, w)) for planes in (inside[:, None], label[:, None], colours)
    )
    gate = torch.where(label == 255, 1.0, inside - p.amax(1, keepdim=True)).clamp(min=0)  # (B, 1, h, w)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([x, y]).double().expand(len(p), -1, -1, -1) / (options.sigma_xy * options.scale)
    features = torch.cat([place, colours / options.sigma_rgb], 1).flatten(2).transpose(1, 2)  # (B, N, 5)
    values = (p * inside).flatten(2).transpose(1, 2)  # (B, N, C)
    kernel = torch.exp(-torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / 2)
    filtered = (kernel @ values).transpose(1, 2).unflatten(2, (h, w))
    energy = -(p * inside * gate * filtered).sum() / len(p)
    return Energy(energy, -2 / len(p) * gate * filtered * inside, filtered, gate[:, 0], features, values)


def full_attention_map(network: Any, image: Tensor, c: int) -> Tensor:
    """GETAM's map of one image (1, 3, H, W) and class with every block's whole attention matrix and its gradient:
    (gh, gw), H and W whole multiples (getam.md section 3)."""
    body, seen = network.pretrained.model, []

    def look(attention: Any) -> Tensor:
        seen.append(attention.products().softmax(-1))  # (1, n, T, T)
        return seen[-1]

    x, grid, _ = body.embed_with_stem(image)
    for block in body.blocks:
        x = block(x, look)
    logit = network.cls_head(network.pretrained.act_postprocess4(x, grid).mean((2, 3)))[0, c]
    first, total = network.options.start_layer, torch.zeros(())
    for weights, gradient in zip(seen[first:], torch.autograd.grad(logit, seen[first:]), strict=True):
        total = total + (gradient * weights).clamp(min=0).mean(1) * gradient.clamp(min=0).mean(1)  # (1, T, T)
    return total[0, 0, body.tokens :].detach().clamp(min=0).unflatten(0, grid)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps resized to ``size``, bilinear with align_corners False."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def aream_training_cam(model: Any, images: Tensor, weights: list[float]) -> Tensor:
    """AReAM's maps for labels, with all matrices of all layers and heads at once; ``weights`` of the layers (aream.md
    section 4)."""
    size, c, total = images.shape[-2:], model.tokens, 0
    for scale in model.options.scales:
        for mirrored in (False, True):
            x = resize(images, (int(size[0] * scale), int(size[1] * scale)))
            x = x.flip(-1) if mirrored else x
            seen: list[Tensor] = []
            _, maps = model.forward_maps(x, lambda _, a, seen=seen: seen.append(a.products().softmax(-1)))
            attention = torch.stack(seen).mean(2)  # (L, B, T, T)
            if model.gated:
                maps = maps * attention.mean(0)[:, :c, c:].unflatten(2, maps.shape[-2:])
            affinity = (attention * torch.tensor(weights).view(-1, 1, 1, 1)).sum(0)[:, c:, c:]
            refined = resize(torch.einsum("bij,bcj->bci", affinity, maps.flatten(2)).view_as(maps), size)
            total = total + (refined.flip(-1) if mirrored else refined)
    total = total.relu()
    total = total - total.amin((2, 3), keepdim=True)
    return total / (total.amax((2, 3), keepdim=True) + 1e-6)


def path_affinity(boundary: Tensor, displacements: list[tuple[int, int]], radius: int | None) -> Tensor:
    """1 - the largest value on the thick line between two cells, all cells gathered at once: (B, h, w) -> (B, E)
    (irnet.md sections 9.1 and 9.3)."""
    height, width = boundary.shape[-2:]
    affinity = []
    for dy, dx in displacements:
        edge = 0 if radius is None else radius - 1
        first, last = (max(0, -dx), width - max(0, dx)) if radius is None else (edge, width - edge)
        for y in range(height - (dy if radius is None else edge)):
            for x in range(first, last):
                line = [
                    boundary[:, y + i, x + j]
                    for i in range(dy + 1)
                    for j in range(min(0, dx), max(0, dx) + 1)
                    if (dy * j - dx * i) ** 2 < dy * dy + dx * dx
                ]
                affinity.append(1 - torch.stack(line).amax(0))
    return torch.stack(affinity, dim=1)


def gathered_path_affinity(boundary: Tensor, paths: list[Tensor]) -> Tensor:
    """The published form of it: ``boundary`` (B, h, w) is gathered at the cell numbers of all paths of one length,
    (D_n, n, P) each, and the largest taken -> (B, D, P)."""
    flat = boundary.flatten(1)
    return torch.cat([1 - flat[:, cells].amax(dim=2) for cells in paths], dim=1)


def correlate(values: Tensor, features: Tensor) -> Tensor:
    """SEAM's pixel correlation, values (B, K, h, w) and features (B, D, h, w) -> (B, K, h, w): the whole matrix, its
    columns normalised, then multiplied (seam.md section 3, step 4)."""
    g = features.flatten(2)
    g = g / (g.norm(dim=1, keepdim=True) + 1e-5)
    matrix = F.relu(torch.matmul(g.transpose(1, 2), g))
    matrix = matrix / (matrix.sum(1, keepdim=True) + 1e-5)
    return torch.matmul(values.flatten(2), matrix).view_as(values)


def stacked_neighbours(maps: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """(B, C, H, W) -> (B, C, 8 D, H, W), by a convolution for each dilation, as published (aream.md section 5)."""
    batch, channels, height, width = maps.shape
    kernels = torch.eye(9)[[0, 1, 2, 3, 5, 6, 7, 8]].view(8, 1, 3, 3)
    found = []
    for d in dilations:
        padded = F.pad(maps, (d,) * 4, mode="replicate").flatten(0, 1)[:, None]
        found.append(F.conv2d(padded, kernels, dilation=d).view(batch, channels, 8, height, width))
    return torch.cat(found, 2)


def pixel_weights(images: Tensor, kernel: Any) -> Tensor:
    """aream.md section 5 and getam.md section 4, from the stacked neighbours: (B, 8 D, H, W)."""
    around = stacked_neighbours(images, kernel.dilations)
    apart = (around - images[:, :, None]).abs()
    if kernel.deviation_of_centre:
        centres = images[:, :, None].expand(-1, -1, len(kernel.dilations), -1, -1)
        exponents = -apart / (1e-8 + 0.1 * torch.cat([around, centres], 2).std(2, keepdim=True))
        return exponents.mean(1).softmax(1)
    colour = -((apart / (around.std(2, keepdim=True) + 1e-8) / 0.3) ** 2)
    place = torch.tensor([d * f for d in kernel.dilations for f in (2**0.5, 1, 2**0.5, 1, 1, 2**0.5, 1, 2**0.5)])
    place = -((place / (place.std() + 1e-8) / 0.3) ** 2)
    return colour.mean(1).softmax(1) + 0.01 * place.softmax(0)[:, None, None]


def pixel_adaptive(images: Tensor, maps: Tensor, kernel: Any, iterations: int) -> Tensor:
    """Refined maps, from the stacked neighbours: (B, C, H, W)."""
    weights = pixel_weights(images, kernel)[:, None]
    for _ in range(iterations):
        maps = (stacked_neighbours(maps, kernel.dilations) * weights).sum(2)
    return maps


def picture_of(values: Tensor, normalisation: str = "imagenet") -> Picture:
    """The picture whose network values (3, H, W) these are: its RGB is the nearest there is."""
    norm = NORMALISATIONS[normalisation]
    mean, std = (values.new_tensor(x).view(3, 1, 1) for x in (norm.mean, norm.std))
    grey = ((values * std + mean) * norm.scale).round().clamp(0, 255)
    grey = grey.flip(0) if norm.bgr else grey
    return Picture(grey.permute(1, 2, 0).to(torch.uint8).numpy(), values)
