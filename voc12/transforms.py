"""Augmentation of one training sample, driven by a recipe's Augment (misc/config.py) and a random generator passed in.

Geometric operations are applied to image, mask, label planes and box alike. No global random state is changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import RandomResizedCrop, functional

from misc.config import Augment
from misc.image.labels import IGNORE
from misc.image.pixels import mean_colour, normalise_image, resize_image, resize_mask, to_tensor, truncated_size

Size = tuple[int, int]


@dataclass
class TrainSample:
    """One sample during augmentation.

    image (H, W, 3) uint8 RGB, after ``normalize`` float32; mask and saliency (H, W) uint8 or None; planes (P, H, W) of
    any dtype or None: integer planes are label maps (resized PIL nearest), floating ones scores (OpenCV bilinear).
    ``box`` (top, bottom, left, right), half-open: the part that is the original image; the rest is canvas.
    ``mirrored``: whether it is the mirror image of what it was.

    Raises ValueError where mask, planes or saliency have another size than the image.
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    planes: np.ndarray | None = None
    saliency: np.ndarray | None = None
    box: tuple[int, int, int, int] = field(init=False)
    mirrored: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        height, width = self.image.shape[:2]
        self.box = (0, height, 0, width)
        for name, found in (
            ("mask", self.mask), ("label", self.planes), ("saliency map", self.saliency)
        ):
            if found is not None and found.shape[-2:] != (height, width):
                high, wide = found.shape[-2:]
                raise ValueError(
                    f"its {name} is {high} x {wide} pixels (height x width), the image {height} x {width}: they do not "
                    f"belong together. Make the {name} again."
                )

    def on_masks(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Mask and saliency, where there are any, through a function of (H, W) arrays."""
        self.mask, self.saliency = (None if m is None else change(m) for m in (self.mask, self.saliency))


def resize_long_side(sample: TrainSample, length: int, image_filter: str = "bicubic") -> None:
    """Resize so that the longer side has ``length`` pixels, the other one rounded: image PIL bicubic or OpenCV linear
    (getam.md section 6), mask PIL nearest (seam.md 4.2), or where the image is OpenCV's, that one's too."""
    height, width = sample.image.shape[:2]
    longer = max(height, width)
    size = (max(1, round(height * length / longer)), max(1, round(width * length / longer)))
    if image_filter == "bicubic":
        sample.image = resize_image(sample.image, size)
        sample.on_masks(lambda mask: resize_mask(mask, size))
    else:
        sample.image = cv2.resize(sample.image, size[::-1], interpolation=cv2.INTER_LINEAR)
        sample.on_masks(lambda mask: cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST))
    _resized(sample, size)


def resize_square(sample: TrainSample, side: int) -> None:
    """Stretch to a square of ``side``, whatever the aspect: image PIL bilinear, mask PIL nearest (wsol.md 4)."""
    sample.image = resize_image(np.ascontiguousarray(sample.image), (side, side), "bilinear")
    sample.on_masks(lambda mask: resize_mask(np.ascontiguousarray(mask), (side, side)))
    _resized(sample, (side, side))


def scale_sample(
    sample: TrainSample, factor: float, image_filter: str, mask_filter: str = "opencv", by: str = "size"
) -> None:
    """Multiply both sides by ``factor``, cut to whole pixels: image OpenCV cubic or linear (deeplab.md A.2, B.2) or
    PIL bicubic or bilinear (aream.md section 8, semformer.md section 3.4), mask OpenCV's or PIL's nearest
    (deeplab.md C.3). ``by`` factor: OpenCV alone, sides rounded, samples placed by the factor itself."""
    if by == "factor":
        kind = {"cubic": cv2.INTER_CUBIC, "linear": cv2.INTER_LINEAR}[image_filter]
        sample.image = cv2.resize(sample.image, None, fx=factor, fy=factor, interpolation=kind)
        sample.on_masks(
            lambda mask: cv2.resize(mask, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
        )
        _resized(sample, sample.image.shape[:2])
        return
    size = truncated_size(sample.image.shape[:2], factor)
    if image_filter in ("bicubic", "bilinear"):
        sample.image = resize_image(np.ascontiguousarray(sample.image), size, image_filter)
    else:
        kind = {"cubic": cv2.INTER_CUBIC, "linear": cv2.INTER_LINEAR}[image_filter]
        sample.image = cv2.resize(sample.image, size[::-1], interpolation=kind)
    if mask_filter == "pil":
        sample.on_masks(lambda mask: resize_mask(mask, size))
    else:
        sample.on_masks(lambda mask: cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST))
    _resized(sample, size)


def _resized(sample: TrainSample, size: Size) -> None:
    sample.box = (0, size[0], 0, size[1])
    if sample.planes is None:
        return
    if np.issubdtype(sample.planes.dtype, np.integer):
        planes = [resize_mask(plane, size) for plane in sample.planes]
    else:  # OpenCV has no half precision
        planes = [cv2.resize(plane.astype(np.float32), size[::-1]) for plane in sample.planes]
    sample.planes = np.stack(planes).astype(sample.planes.dtype)  # (P, h, w)


def flip_sample(sample: TrainSample) -> None:
    """Mirror all arrays of the sample left to right."""
    width = sample.image.shape[1]
    sample.image = sample.image[:, ::-1]
    sample.on_masks(lambda mask: mask[:, ::-1])
    if sample.planes is not None:
        sample.planes = sample.planes[..., ::-1]
    top, bottom, left, right = sample.box
    sample.box = (top, bottom, width - right, width - left)
    sample.mirrored = not sample.mirrored


def jitter_colours(sample: TrainSample, strengths: tuple[float, float, float, float], rng: np.random.Generator) -> None:
    """torchvision's ColorJitter on the 8-bit image: brightness, contrast and saturation factors uniform in
    [max(0, 1 - s), 1 + s], hue shift uniform in [-s, s], applied in random order; strength 0 leaves one out."""
    image = Image.fromarray(np.ascontiguousarray(sample.image))
    adjust = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    for number in rng.permutation(4):
        strength = strengths[number]
        if strength:
            centre = 0.0 if number == 3 else 1.0
            low = centre - strength if number == 3 else max(0.0, centre - strength)
            image = adjust[number](image, float(rng.uniform(low, centre + strength)))
    sample.image = np.asarray(image)


def shift_hsv(sample: TrainSample, shifts: tuple[int, int, int]) -> None:
    """Add integers to hue (modulo 180), saturation and value (clipped) in OpenCV's 8-bit HSV (deeplab.md A.2)."""
    values = cv2.cvtColor(np.ascontiguousarray(sample.image), cv2.COLOR_RGB2HSV).astype(np.int16)
    values += np.array(shifts, np.int16)
    values[..., 0] %= 180
    sample.image = cv2.cvtColor(np.clip(values, 0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)


def remove_colours(sample: TrainSample) -> None:
    """Take the colours of the 8-bit image away: PIL's grey in all three channels."""
    image = Image.fromarray(np.ascontiguousarray(sample.image)).convert("L")
    sample.image = np.repeat(np.asarray(image)[:, :, None], 3, 2)


def blur_sample(sample: TrainSample, radius: float) -> None:
    """PIL's Gaussian blur of the 8-bit image (toco.md section 6)."""
    image = Image.fromarray(np.ascontiguousarray(sample.image))
    sample.image = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)))


def solarise_sample(sample: TrainSample) -> None:
    """Invert grey levels of 128 and more of the 8-bit image."""
    sample.image = np.where(sample.image < 128, sample.image, 255 - sample.image)


def crop_sample(
    sample: TrainSample,
    size: int,
    rng: np.random.Generator,
    *,
    place: str = "random",
    mask_fill: int = IGNORE,
    plane_fill: float = 0.0,
) -> None:
    """Cut a square of side ``size``; where the image is smaller, it lies on a canvas: image 0 (the mean colour after
    ``normalize``, black before), mask ``mask_fill``, planes ``plane_fill``, saliency 0.

    An axis longer than the square starts at a uniform offset; a shorter one lands at a uniform place (seam.md 4.2), or
    with another ``place`` (Augment.crop_place) at 0 (deeplab.md B.2, C.3).
    """
    height, width = sample.image.shape[:2]
    rows, high = _place(height, size, rng, place)
    columns, wide = _place(width, size, rng, place)

    def paste(source: np.ndarray, canvas: np.ndarray) -> np.ndarray:
        canvas[..., high, wide] = source[..., rows, columns]
        return canvas

    # the image's channels come last: (H, W, 3) is seen as (3, H, W) for pasting
    image = np.zeros((size, size, 3), sample.image.dtype)
    paste(sample.image.transpose(2, 0, 1), image.transpose(2, 0, 1))
    sample.image = image
    if sample.mask is not None:
        sample.mask = paste(sample.mask, np.full((size, size), mask_fill, sample.mask.dtype))
    if sample.saliency is not None:
        sample.saliency = paste(sample.saliency, np.zeros((size, size), sample.saliency.dtype))
    if sample.planes is not None:
        shape = (len(sample.planes), size, size)
        sample.planes = paste(sample.planes, np.full(shape, plane_fill, sample.planes.dtype))
    sample.box = (high.start, high.stop, wide.start, wide.stop)


def _place(length: int, size: int, rng: np.random.Generator, place: str) -> tuple[slice, slice]:
    """One axis of ``crop``: which part of the image goes where on the canvas."""
    space = length - size
    if space > 0:
        # published for the corner form: int(u * space), u < 1, so that the very last offset never occurs (B.2)
        start = int(rng.random() * space) if place == "corner" else int(rng.integers(space + 1))
        return slice(start, start + size), slice(0, size)
    at = int(rng.integers(-space + 1)) if place == "random" else 0
    return slice(0, length), slice(at, at + length)


# ------------------------------------------------------------------------- operations of torchvision and timm


@contextmanager
def _lent(rng: np.random.Generator) -> Iterator[None]:
    """Context in which the global random states of Python, NumPy and torch (CPU), which timm and torchvision use, are
    seeded from ``rng``; they are restored afterwards."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's stream too
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def crop_and_resize(
    sample: TrainSample, size: int, area: tuple[float, float], rng: np.random.Generator, image_filter: str = "bicubic"
) -> None:
    """Crop a random part, with a fraction of the area in the range ``area`` and an aspect ratio of 3/4 to 4/3, and
    resize it to a square of side ``size``: image PIL bicubic (mctformer.md section 6) or bilinear (semformer.md 3.4),
    mask PIL nearest."""
    with _lent(rng):
        top, left, height, width = RandomResizedCrop.get_params(
            Image.fromarray(np.ascontiguousarray(sample.image)), list(area), [3 / 4, 4 / 3]
        )
    rows, columns = slice(top, top + height), slice(left, left + width)
    sample.image = resize_image(np.ascontiguousarray(sample.image[rows, columns]), (size, size), image_filter)
    sample.on_masks(lambda mask: resize_mask(np.ascontiguousarray(mask[rows, columns]), (size, size)))
    if sample.planes is not None:
        sample.planes = np.ascontiguousarray(sample.planes[:, rows, columns])
    _resized(sample, (size, size))


@lru_cache
def _rand_augment(policy: str, normalisation: str, side: int) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment as its ImageNet training transform sets it up."""
    from timm.data.auto_augment import rand_augment_transform  # slow to import, and few recipes need it

    mean = mean_colour(normalisation)
    options = {"translate_const": int(side * 0.45), "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    return rand_augment_transform(policy, options)


def apply_rand_augment(sample: TrainSample, policy: str, normalisation: str, rng: np.random.Generator) -> None:
    """timm's RandAugment on the 8-bit image; what it uncovers has the mean colour (mctformer.md section 6).

    Raises ValueError where there is a mask, planes or saliency: its rotations and shears would not move them.
    """
    if any(found is not None for found in (sample.mask, sample.planes, sample.saliency)):
        raise ValueError("rand_augment moves the image without its mask: take it out of augment.order.")
    operation = _rand_augment(policy, normalisation, min(sample.image.shape[:2]))
    with _lent(rng):
        sample.image = np.asarray(operation(Image.fromarray(np.ascontiguousarray(sample.image))))


def erase_rectangle(sample: TrainSample, probability: float, rng: np.random.Generator) -> None:
    """timm's random erasing on the normalised image: one box of 2 to 33 % of the area, aspect 0.3 to 3.3, filled with
    standard normal noise (mctformer.md section 6)."""
    from timm.data.random_erasing import RandomErasing

    values = to_tensor(sample.image)  # (3, H, W)
    with _lent(rng):
        values = RandomErasing(probability, mode="pixel", device="cpu")(values)
    sample.image = values.permute(1, 2, 0).numpy()


def augment_sample(
    sample: TrainSample,
    recipe: Augment,
    normalisation: str,
    rng: np.random.Generator,
    batch_rng: np.random.Generator,
    plane_fill: float = 0.0,
    operations: Sequence[str] | None = None,
) -> TrainSample:
    """Apply the operations of a recipe in its order, in place.

    Args:
        sample: with a uint8 image.
        recipe: which operations, and how strong.
        normalisation: a name for misc.image.pixels.find_normalisation.
        rng: random stream of this sample.
        batch_rng: random stream that all samples of the batch have in common (``scale_per_batch``).
        plane_fill: value of the planes on the canvas.
        operations: only these operations, in this order; None: all of the recipe.

    Returns:
        ``sample``; after all operations with image (S, S, 3) float32, mask and saliency (S, S), planes (P, S, S),
        S = ``recipe.crop``.
    """
    for operation in recipe.order if operations is None else operations:
        match operation:
            case "long_side":
                length = int(rng.integers(recipe.long_side[0], recipe.long_side[1] + 1))
                resize_long_side(sample, length, recipe.long_side_filter)
            case "scale":
                source = batch_rng if recipe.scale_per_batch else rng
                factor = source.choice(recipe.scale_set) if recipe.scale_set else source.uniform(*recipe.scale)
                scale_sample(sample, float(factor), recipe.scale_filter, recipe.scale_mask, recipe.scale_by)
            case "square":
                resize_square(sample, recipe.square)
            case "flip":
                if rng.random() < recipe.flip:
                    flip_sample(sample)
            case "jitter":
                # no random number is drawn if it always happens
                if recipe.jitter_probability == 1 or rng.random() < recipe.jitter_probability:
                    jitter_colours(sample, recipe.jitter, rng)
            case "hsv":
                hue, saturation, value = rng.integers(-recipe.hsv, recipe.hsv + 1, 3).tolist()
                shift_hsv(sample, (hue, saturation, value))
            case "grey":
                if rng.random() < recipe.grey:
                    remove_colours(sample)
            case "blur":
                if rng.random() < recipe.blur:
                    blur_sample(sample, float(rng.uniform(*recipe.blur_radius)))
            case "solarise":
                if rng.random() < recipe.solarise:
                    solarise_sample(sample)
            case "resized_crop":
                crop_and_resize(sample, recipe.crop, recipe.area, rng, recipe.area_filter)
            case "rand_augment":
                apply_rand_augment(sample, recipe.policy, normalisation, rng)
            case "erase":
                erase_rectangle(sample, recipe.erase, rng)
            case "normalize":
                sample.image = normalise_image(sample.image, normalisation)
            case "crop":
                crop_sample(
                    sample, recipe.crop, rng, place=recipe.crop_place, mask_fill=recipe.mask_fill, plane_fill=plane_fill
                )
    return sample
