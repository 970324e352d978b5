"""Multi-scale inference of class maps: sizes of the inputs, merging, normalisation. Knows no method.

Each image is passed through the network once per scale, together with its mirror image. ``input_sizes`` gives the
sizes; the rules that turn a sum of maps into scores are in ``MAP_SCALINGS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from misc.config import CamInference
from misc.image import pixels
from misc.image.cam import Cam

_EPSILON = 1e-5


def input_sizes(size: tuple[int, int], infer: CamInference) -> list[tuple[int, int]]:
    """(h, w) that an image of ``size`` (H, W) is resized to, one per scale, before padding."""
    size = (infer.squash, infer.squash) if infer.squash else size
    scaled = pixels.truncated_size if infer.truncate else pixels.scaled_size
    sizes = [scaled((1, 1) if infer.square else size, scale) for scale in infer.scales]
    return [_rounded_up(s, infer.stretch) for s in sizes]


def _margin(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Number of rows at the bottom and columns on the right that pad (h, w) to multiples."""
    return -size[0] % multiple, -size[1] % multiple


def _rounded_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(h, w) rounded up to multiples."""
    bottom, right = _margin(size, multiple)
    return size[0] + bottom, size[1] + right


def scaled_inputs(image: np.ndarray, infer: CamInference, normalisation: str) -> Iterator[Tensor]:
    """Network inputs of one image, one batch per scale (psa.md section 2.4, seam.md section 5).

    Args:
        image: (H, W, 3) uint8 RGB.
        infer: scales and flip.
        normalisation: a name for misc.image.pixels.find_normalisation.

    Yields:
        (2, 3, h, w) float32, the image and its mirror image, both padded to ``infer.multiple``; (1, 3, h, w) without
        ``infer.flip``.
    """
    whole = pixels.normalise_image(image, normalisation) if infer.resize == "linear" else image
    if infer.squash:
        whole = pixels.squash_values(whole, infer.squash)
    for size in input_sizes(image.shape[:2], infer):
        if infer.resize == "linear":
            values = pixels.to_tensor(whole if size == whole.shape[:2] else pixels.stretch_values(whole, size))
        else:
            resized = pixels.resize_image(whole, size, infer.resize)
            values = pixels.to_tensor(pixels.normalise_image(resized, normalisation))  # (3, h, w)
        bottom, right = _margin(size, infer.multiple)
        padded = F.pad(values, (0, right, 0, bottom))
        mirrored = padded.flip(-1) if infer.pad_first else F.pad(values.flip(-1), (0, right, 0, bottom))
        yield torch.stack([padded, mirrored]) if infer.flip else padded[None]


def unpad_maps(maps: Tensor, size: tuple[int, int], infer: CamInference) -> Tensor:
    """Crop the padding off the maps of padded inputs (aream.md section 9).

    Args:
        maps: (1 or 2, K, h', w'), any h' and w', of an image padded to ``infer.multiple`` and of its mirror image.
        size: (h, w) of the image before it was padded.

    Returns:
        (1 or 2, K, h, w) float32, the second still mirrored. Bilinear with align_corners False.
    """
    (height, width), (bottom, right) = size, _margin(size, infer.multiple)
    maps = F.interpolate(maps.float(), size=(height + bottom, width + right), mode="bilinear", align_corners=False)
    left = [0, right if infer.pad_first else 0]
    return torch.stack([m[:, :height, at : at + width] for m, at in zip(maps, left, strict=False)])


MAP_MERGES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda maps: maps.sum(0),
    "max": lambda maps: maps.amax(0),
    "max_relu": lambda maps: maps.amax(0).relu(),
}
"""How the maps of an image and of its mirror image (turned back), (1 or 2, ...), become one, by the name in
``CamInference.merge``."""


def merge_maps(
    maps: Iterable[Tensor],
    size: tuple[int, int],
    round_up: int = 1,
    mode: Literal["bilinear", "bicubic"] = "bilinear",
    rule: str = "sum",
) -> Tensor:
    """Maps of all passes at image size: an image and its mirror by ``rule``, then the sum over the scales.

    Args:
        maps: one entry per scale, (1, K, h, w), or (2, K, h, w) where the second is of the mirrored image; any h, w.
        size: (H, W) of the result, usually that of the image.
        round_up: maps are added up at sides that are multiples of this, then cropped (irnet.md section 6).
        mode: filter, with align_corners False (bilinear: seam.md section 7.2; bicubic: wsol.md section 8).
        rule: a name of ``MAP_MERGES``.

    Returns:
        (K, H, W) float32.

    Raises:
        ValueError: ``maps`` is empty.
    """
    total = None
    full = _rounded_up(size, round_up)
    for low in maps:
        low = low.float()
        if rule == "sum" and len(low) == 2:  # the resize is linear and symmetric: once for both
            low = low[:1] + low[1:].flip(-1)
        high = F.interpolate(low, size=full, mode=mode, align_corners=False)  # (1 or 2, K, H, W)
        merged = MAP_MERGES[rule](torch.stack([high[0], high[1].flip(-1)]) if len(high) == 2 else high)
        total = merged if total is None else total.add_(merged)
    if total is None:
        raise ValueError("There is no map to merge: the scales are empty.")
    return total[:, : size[0], : size[1]]


def scale_by_maximum(total: Tensor) -> Tensor:
    """(K, H, W) -> each class divided by (its maximum + 1e-5) (psa.md section 2.4)."""
    return total / (total.amax((1, 2), keepdim=True) + _EPSILON)


def scale_shifted(total: Tensor) -> Tensor:
    """(K, H, W) -> each class clipped at 0 and scaled from its minimum m and maximum M to 0 and 1 (seam.md section 5).

    Entries below m + 1e-5 become 0 before m is subtracted, so they end negative, clearly so if m is not small. This is
    published and kept: such pixels never get this class.
    """
    total = total.clamp(min=0)
    high, low = total.amax((1, 2), keepdim=True), total.amin((1, 2), keepdim=True)
    total = total.masked_fill(total < low + _EPSILON, 0)
    return (total - low - _EPSILON) / (high - low + _EPSILON)


def scale_by_range(total: Tensor) -> Tensor:
    """(K, H, W) -> each class scaled from its minimum and maximum to 0 and 1 (mctformer.md section 4)."""
    high, low = total.amax((1, 2), keepdim=True), total.amin((1, 2), keepdim=True)
    return (total - low) / (high - low + 1e-8)


def scale_rectified(total: Tensor) -> Tensor:
    """(..., H, W) -> each class clipped at 0, then scaled from minimum and maximum to 0 and 1 (aream.md section 4).

    The epsilon matters for products of attentions, which are tiny: their maxima become about 0.9997.
    """
    total = total.clamp(min=0)
    total = total - total.amin((-2, -1), keepdim=True)
    return total / (total.amax((-2, -1), keepdim=True) + 1e-6)


def scale_by_span(total: Tensor) -> Tensor:
    """(..., H, W) -> each class from its minimum, which becomes 0, to its maximum (toco.md section 3)."""
    total = total - total.amin((-2, -1), keepdim=True)
    return total / (total.amax((-2, -1), keepdim=True) + _EPSILON)


def keep_scale(total: Tensor) -> Tensor:
    """(..., H, W) -> the same: maps that are in [0, 1] already."""
    return total


MAP_SCALINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": scale_by_maximum, "shifted": scale_shifted, "minmax": scale_by_range, "rectified": scale_rectified,
    "span": scale_by_span, "none": keep_scale,
}  # fmt: skip
"""Scaling rules by their names in ``CamInference.normalise``."""


def normalise_maps(total: Tensor, rule: str) -> Tensor:
    """Merged sums (K, H, W) -> scores of about [0, 1], each class separately, by a rule of ``MAP_SCALINGS``."""
    return MAP_SCALINGS[rule](total)


def infer_raw_maps(
    cam: Callable[[Tensor, Tensor], Tensor],
    image: np.ndarray,
    tags: np.ndarray,
    infer: CamInference,
    normalisation: str,
    device: torch.device | str = "cpu",
    inputs: Iterable[Tensor] | None = None,
) -> Iterator[Tensor]:
    """Raw maps of the present classes, one batch per scale, as ``merge_maps`` takes them: (1, K, h, w), or (2, K, h, w)
    with those of the mirrored image. Arguments as for ``infer_cam``; at least one tag must be set."""
    row = torch.tensor(tags, dtype=torch.float32, device=device)  # (C,)
    inputs = scaled_inputs(image, infer, normalisation) if inputs is None else inputs
    passes = (cam(images.to(device), row.expand(len(images), -1)).detach() for images in inputs)
    return _present_maps(passes, tags, image.shape[:2], infer)  # of (1 or 2, C, h', w') each


def infer_logits(
    classify: Callable[[Tensor, int], Tensor],
    image: np.ndarray,
    num_classes: int,
    infer: CamInference,
    normalisation: str,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Class scores of one image without its tags: the mean logits over the scales and mirrors of CAM inference.

    Args:
        classify: images (B, 3, h, w), C -> logits (B, C): a network's ``classify``.
        num_classes: C.
        image, infer, normalisation, device: as for ``infer_cam``.

    Returns:
        (C,) float32.
    """
    inputs = scaled_inputs(image, infer, normalisation)
    passes = [classify(images.to(device), num_classes).detach().float() for images in inputs]  # (1 or 2, C) each
    return torch.cat(passes).mean(0).cpu().numpy()


def infer_cam(
    cam: Callable[[Tensor, Tensor], Tensor],
    image: np.ndarray,
    tags: np.ndarray,
    infer: CamInference,
    normalisation: str,
    device: torch.device | str = "cpu",
    inputs: Iterable[Tensor] | None = None,
) -> Cam:
    """The CAMs of one image: merged, normalised maps at its size, and on the recipe's coarse grid.

    Only maps of present classes are merged, so the cost of merging does not grow with the number of classes. The
    caller decides on gradients (``inference_mode`` unless the map needs a backward pass) and on mixed precision.

    Args:
        cam: images (B, 3, h, w), tags (B, C) -> maps (B, C, h', w'): a network's ``cam``.
        image: (H, W, 3) uint8 RGB.
        tags: (C,) in {0, 1}.
        infer: scales, flip, rule for scaling maps.
        normalisation: of the network's input images, a name for misc.image.pixels.find_normalisation.
        device: where the network is.
        inputs: what ``scaled_inputs`` gives for this image, if it is there already.

    Returns:
        ``maps`` (K, H, W), present classes in ascending order; the rule ``shifted`` gives values below 0 too.
        ``coarse`` (K, ceil(H / infer.coarse), ceil(W / infer.coarse)), None where the recipe has no such grid.
        For an image without a tag K is 0 and the network does not run.
    """
    maps: Iterable[Tensor] = ()
    if tags.any():
        maps = infer_raw_maps(cam, image, tags, infer, normalisation, device, inputs)
    return _cam_from(maps, tags, image.shape[:2], infer)


def infer_cams(
    cam: Callable[[Tensor, Tensor], Tensor],
    tags: Sequence[np.ndarray],
    size: tuple[int, int],
    infer: CamInference,
    device: torch.device | str,
    inputs: Sequence[Sequence[Tensor]],
) -> list[Cam]:
    """``infer_cam`` of several images of one size, each with a tag, which go through the network as one batch a scale.

    Args:
        cam, infer, device: as for ``infer_cam``; ``cam`` treats the images of a batch apart.
        tags: (C,) in {0, 1} each.
        size: (H, W) of the images.
        inputs: what ``scaled_inputs`` gives for each image.
    """
    rows = torch.tensor(np.stack(tags), dtype=torch.float32, device=device)  # (B, C)
    passes: list[tuple[Tensor, ...]] = []
    for parts in zip(*inputs, strict=True):  # of one scale: (1 or 2, 3, h, w) for each image
        batch = torch.cat(parts).to(device)
        maps = cam(batch, rows.repeat_interleave(len(parts[0]), 0)).detach()  # (B or 2B, C, h', w')
        passes.append(maps.split(len(parts[0])))
    found = []
    for number, present in enumerate(tags):
        maps = _present_maps((maps[number] for maps in passes), present, size, infer)
        found.append(_cam_from(maps, present, size, infer))
    return found


def _present_maps(
    passes: Iterable[Tensor], tags: np.ndarray, size: tuple[int, int], infer: CamInference
) -> Iterator[Tensor]:
    """Maps of an image's present classes without its padding, (1 or 2, K, h, w), from those of all classes, (1 or 2, C,
    h', w'), one entry a scale."""
    keys: Tensor | None = None
    for inner, maps in zip(input_sizes(size, infer), passes, strict=True):
        keys = torch.from_numpy(np.flatnonzero(tags)).to(maps.device) if keys is None else keys
        maps = maps[:, keys]
        yield unpad_maps(maps, inner, infer) if infer.multiple > 1 else maps


def _cam_from(maps: Iterable[Tensor], tags: np.ndarray, size: tuple[int, int], infer: CamInference) -> Cam:
    """The CAM of an image of ``size`` from the raw maps of its present classes, one entry a scale."""
    keys = np.flatnonzero(tags)
    grid = (-(-size[0] // infer.coarse), -(-size[1] // infer.coarse)) if infer.coarse else None
    if not len(keys):
        nothing = np.zeros((0, *size), np.float32)
        return Cam(keys, nothing, size, None if grid is None else np.zeros((0, *grid), np.float32))
    if grid is None:
        full = normalise_maps(merge_maps(maps, size, infer.round_up, rule=infer.merge), infer.normalise)
        return Cam(keys, full.cpu().numpy(), size)
    passes = list(maps)
    full = merge_maps(passes, size, infer.round_up, rule=infer.merge)
    coarse = merge_maps(passes, grid, rule=infer.merge)
    full, coarse = normalise_maps(full, infer.normalise), normalise_maps(coarse, infer.normalise)
    return Cam(keys, full.cpu().numpy(), size, coarse.cpu().numpy())
