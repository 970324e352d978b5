"""Typed settings of a run: recipes are made of them, the command line changes them, ``run.json`` records them.

Every field has a docstring, which the command line (built by tyro) shows in ``--help``.
A method's recipe is a set of instances of these classes, in the method's own file, with the paper's numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch

from misc.checked import Checked, Range, When, check
from misc.crf.dense import CRFSettings
from misc.distributed import usable_cores
from misc.image.labels import IGNORE
from misc.precision import has_fast_bf16, prefers_channels_last

_T = TypeVar("_T")



POLY = When("schedule", "poly", "warmup_poly")
COSINE = When("schedule", "cosine", "timm_cosine")

Precision = Literal["off", "bf16", "fp16", "fast"]
"""off: float32 everywhere, without TF32. bf16, fp16: mixed precision; matrix products and convolutions of the forward
pass in this type (fp16 with loss scaling). fast: bf16 where the hardware is fast at it (GPUs with bf16, processors with
AMX or bf16 in AVX-512), else float32; also TF32 on GPUs, and the channels-last memory format on x86 processors."""


@dataclass(frozen=True)
class Fit(Checked):
    """How one network is trained (read by misc/loop/fit.py)."""

    epochs: Annotated[int, Range(least=1)] = 8
    """Passes over the training list; ignored where ``steps`` is given."""
    steps: Annotated[int | None, Range(least=0)] = None
    """Number of updates. None: epochs x floor(images / batch_size); ceil if the last batch is kept. 0: nothing is
    trained, the network keeps its start weights."""
    batch_size: Annotated[int, Range(least=1)] = 8
    """Global batch size: images per update over ALL processes and accumulation steps together."""
    micro_batch: Annotated[int | None, Range(least=1)] = None
    """Largest number of images that one process handles at a time; the rest of its part of the global batch is handled
    by gradient accumulation. None: the whole part at once."""
    sample_order: Literal["epochs", "stream"] = "epochs"
    """epochs: reshuffled for each epoch. stream: shuffled epochs joined end to end; a batch may span two epochs."""
    last_batch: Annotated[Literal["drop", "keep"], When("sample_order", "epochs")] = "drop"
    """What happens to the images at the end of an epoch that do not fill a batch. keep: they form a smaller last batch
    (CUB), divided over processes and accumulation steps as evenly as possible."""
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """The optimiser: stochastic gradient descent or AdamW."""
    lr: Annotated[float, Range(above=0)] = 0.01
    """Base learning rate; parameter groups have factors of it."""
    momentum: Annotated[float, Range(least=0, below=1), When("optimiser", "sgd")] = 0.0
    """SGD momentum. Published recipes with poly-SGD have tiny values here: the published code passes its weight decay
    as momentum."""
    nesterov: Annotated[bool, When("optimiser", "sgd")] = False
    """Use Nesterov momentum in SGD."""
    weight_decay: Annotated[float, Range(least=0)] = 5e-4
    """Weight decay, for the parameter groups that have any."""
    # toco.md 7, wsol.md 5, aream.md 8, mctformer.md 6
    schedule: Literal["poly", "warmup_poly", "constant", "step", "cosine", "timm_cosine"] = "poly"
    """poly: lr x (1 - step / (steps + schedule_extra)) ^ power, set before each update (see schedule_every).
    warmup_poly: lr x (1 - (1 - step / warmup_steps) x (1 - warmup_ratio)) before warmup_steps, then as poly, which
    counts from 0 on: the rate falls where the warm-up ends.
    constant: lr.
    step: lr is multiplied by step_factor at every epoch (counted from 1) that is a multiple of a value of step_epochs.
    cosine: linear from warmup_lr to lr over the warm-up, both included, then a cosine towards final_lr.
    timm_cosine: set once per epoch, one epoch late: epoch e has f(e - 1), the first f(0). f(t) rises linearly from
    warmup_lr at 0 to lr at warmup_epochs; from there on it is the cosine that goes from lr at 0 to final_lr at the last
    epoch."""
    power: Annotated[float, Range(above=0), POLY] = 0.9
    """Exponent of the poly schedule."""
    schedule_extra: Annotated[int, POLY] = 0
    """Steps added to the training length in the denominator of the poly schedule."""
    # deeplab.md C.3
    schedule_every: Annotated[int, Range(least=1), POLY] = 1
    """The poly schedule sets the rate once every this many updates."""
    step_epochs: Annotated[tuple[int, ...], Range(least=1), When("schedule", "step")] = (30,)
    """step: the rate falls at the start of epochs that are multiples of one of these: (30,) means 30, 60, 90 ..."""
    step_factor: Annotated[float, Range(above=0, most=1), When("schedule", "step")] = 0.1
    """step: factor of the rate at these epochs."""
    warmup_steps: Annotated[int, Range(least=1), When("schedule", "warmup_poly")] = 1500
    """warmup_poly: number of warm-up updates."""
    warmup_ratio: Annotated[float, Range(least=0, most=1), When("schedule", "warmup_poly")] = 1e-6
    """warmup_poly: factor of the rate at the first update."""
    warmup_epochs: Annotated[int, Range(least=0), COSINE] = 5
    """Length of the warm-up of the cosine schedules, in epochs. An epoch is 1 / epochs of the training, also where
    steps is given."""
    warmup_lr: Annotated[float, Range(least=0), COSINE] = 1e-6
    """Learning rate at the start of the cosine schedules."""
    final_lr: Annotated[float, Range(least=0), COSINE] = 1e-5
    """Learning rate at the end of the cosine schedules."""
    clip_norm: Annotated[float, Range(least=0)] = 0.0
    """Gradients are clipped to this norm. 0: no clipping."""

    def cross_check(self) -> None:
        """Raises ValueError for Nesterov without momentum and for a warm-up longer than the training."""
        check(not self.nesterov or self.momentum > 0, "nesterov", self.nesterov, "False where momentum is 0")
        check(self.warmup_epochs <= self.epochs or "cosine" not in self.schedule, "warmup_epochs",
              self.warmup_epochs, "in 0 .. epochs")


AugmentOp = Literal[
    "long_side", "scale", "square", "resized_crop", "flip", "jitter", "hsv", "grey", "blur", "solarise", "rand_augment",
    "normalize", "erase", "crop",
]
_AUGMENT_ORDER = (
    # these act on 8-bit images
    ("long_side", "normalize"), ("resized_crop", "normalize"), ("jitter", "normalize"), ("hsv", "normalize"),
    ("rand_augment", "normalize"), ("square", "normalize"), ("grey", "normalize"), ("blur", "normalize"),
    ("solarise", "normalize"),
    ("normalize", "erase"),  # the noise has the scale of normalised values
    # crop gives the final size
    ("long_side", "crop"), ("scale", "crop"), ("resized_crop", "crop"), ("square", "crop"),
)  # fmt: skip


@dataclass(frozen=True)
class Augment(Checked):
    """Augmentation: how a training image is made from a file (read by voc12/transforms.py)."""

    order: tuple[AugmentOp, ...] = ("long_side", "flip", "jitter", "normalize", "crop")
    """The operations that are applied, in this order; operations not named are not applied."""
    long_side: Annotated[tuple[int, int], Range(above=0, rising=True), When("order", "long_side")] = (448, 768)
    """long_side: the longer side is resized to a random integer in [low, high]. Pixels."""
    long_side_filter: Annotated[Literal["bicubic", "linear"], When("order", "long_side")] = "bicubic"
    """long_side: filter of the image. bicubic: PIL's, antialiased when shrinking. linear: OpenCV's."""
    scale: Annotated[tuple[float, float], Range(above=0, rising=True), When("order", "scale")] = (0.5, 1.5)
    """scale: both sides are multiplied by a random factor in [low, high]; the mask is resized by nearest neighbour."""
    scale_filter: Annotated[Literal["cubic", "linear", "bicubic", "bilinear"], When("order", "scale")] = "cubic"
    """Filter of the image in ``scale``. cubic, linear: OpenCV's. bicubic, bilinear: PIL's, antialiased when
    shrinking."""
    # deeplab.md C.3
    scale_set: Annotated[tuple[float, ...], Range(above=0), When("order", "scale")] = ()
    """scale: the factors to draw from, instead of any one in the range."""
    # deeplab.md C.3
    scale_mask: Annotated[Literal["opencv", "pil"], When("order", "scale")] = "opencv"
    """Nearest-neighbour filter of the mask in ``scale``; PIL's and OpenCV's differ by up to one pixel."""
    scale_by: Annotated[Literal["size", "factor"], When("order", "scale")] = "size"
    """scale: what OpenCV is given. size: the scaled size, truncated to integers. factor: the factor itself; OpenCV then
    rounds the size and places the samples by the factor."""
    scale_per_batch: Annotated[bool, When("order", "scale")] = False
    """scale: one factor per batch instead of one per image."""
    square: Annotated[int, Range(above=0), When("order", "square")] = 256
    """square: side of the square that the image is stretched to, PIL bilinear. Pixels."""
    flip: Annotated[float, Range(least=0, most=1), When("order", "flip")] = 0.5
    """flip: probability of a horizontal mirror."""
    jitter: Annotated[tuple[float, float, float, float], Range(least=0), When("order", "jitter")] = (0.3, 0.3, 0.3, 0.1)
    """jitter: strengths of the colour jitter in brightness, contrast, saturation, hue."""
    jitter_probability: Annotated[float, Range(least=0, most=1), When("order", "jitter")] = 1.0
    """jitter: probability that it is applied to an image."""
    hsv: Annotated[int, Range(least=0, below=90), When("order", "hsv")] = 10
    """hsv: largest integer shift of hue, saturation, value (OpenCV 8-bit HSV)."""
    grey: Annotated[float, Range(least=0, most=1), When("order", "grey")] = 0.2
    """grey: probability that the colours are taken away."""
    blur: Annotated[float, Range(least=0, most=1), When("order", "blur")] = 1.0
    """blur: probability of a Gaussian blur (PIL's)."""
    blur_radius: Annotated[tuple[float, float], Range(least=0, rising=True), When("order", "blur")] = (0.1, 2.0)
    """blur: its radius is drawn from [low, high]. Pixels."""
    solarise: Annotated[float, Range(least=0, most=1), When("order", "solarise")] = 0.2
    """solarise: probability that grey levels of 128 and more are inverted."""
    area: Annotated[
        tuple[float, float], Range(above=0, most=1, rising=True), When("order", "resized_crop")
    ] = (0.08, 1.0)
    """resized_crop: a random part of the image, with this fraction of its area and an aspect ratio of 3/4 to 4/3, is
    resized to a square of side ``crop``."""
    area_filter: Annotated[Literal["bicubic", "bilinear"], When("order", "resized_crop")] = "bicubic"
    """resized_crop: PIL's filter of the image."""
    policy: Annotated[str, When("order", "rand_augment")] = "rand-m9-mstd0.5-inc1"
    """rand_augment: timm's RandAugment, settings in timm's notation. It is applied to the image only, not to a mask."""
    erase: Annotated[float, Range(least=0, most=1), When("order", "erase")] = 0.25
    """erase: probability that a box of 2 to 33 % of the area is replaced by normal noise (timm's random erasing)."""
    crop: Annotated[int, Range(above=0)] = 448
    """crop, resized_crop: side of the square training image. crop cuts it from the image; an image smaller than that is
    placed on a canvas. Pixels."""
    # deeplab.md B.2
    crop_place: Annotated[Literal["random", "corner", "top_left"], When("order", "crop")] = "random"
    """Where an image smaller than the crop is placed on its canvas: at random, or (corner, top_left) in the top left
    corner. corner also uses the published random offset in larger images, int(u x (side - crop)), which never reaches
    the last position."""
    mask_fill: Annotated[int, Range(least=0, most=255), When("order", "crop")] = IGNORE
    """Mask label of the canvas outside the image: 255 ignored, 0 background."""

    def cross_check(self) -> None:
        """Raises ValueError for operations in an impossible order."""
        check("normalize" in self.order, "order", self.order, "a list that contains normalize")
        check(len(set(self.order)) == len(self.order), "order", self.order, "a list without repetition")
        place = {operation: number for number, operation in enumerate(self.order)}
        for first, second in _AUGMENT_ORDER:
            good = place.get(first, -1) < place.get(second, len(place))
            check(good, "order", self.order, f"a list with {first} before {second}")
        check(self.jitter[3] <= 0.5, "jitter", self.jitter, "4 values of 0 or more, the last (hue) at most 0.5")
        check(self.policy.startswith("rand-"), "policy", self.policy, "a name such as rand-m9-mstd0.5-inc1")


@dataclass(frozen=True)
class View(Augment):
    """A further picture of every training sample (read by voc12/loader.py)."""

    start: Literal["file", "shared"] = "file"
    """What its operations start from. file: the image of the file. shared: the crop that the recipe's own operations
    make before they normalise it, so that views show the same place."""

    def cross_check(self) -> None:
        """Raises ValueError for views without a size of their own."""
        super().cross_check()
        sized = bool({"crop", "resized_crop"} & set(self.order))
        check(sized or self.start == "shared", "order", self.order, "a list with crop or resized_crop, from a file")


@dataclass(frozen=True)
class CamInference(Checked):
    """How CAMs are inferred and merged over scales (read by step/make_cam.py)."""

    scales: Annotated[tuple[float, ...], Range(above=0, filled=True)] = (1.0, 0.5, 1.5, 2.0)
    """Factors of the image size; PIL bicubic, sizes rounded half to even."""
    truncate: bool = False
    """Truncate the sizes to integers instead of rounding them."""
    # transcam.md 5
    square: bool = False
    """Scales are not factors but sides in pixels of a square that the image is stretched to."""
    # toco.md 8
    squash: Annotated[int, Range(least=0)] = 0
    """Side of a square to which the normalised image is first stretched (bilinear); scales are then factors of it.
    Pixels. 0: the image keeps its shape."""
    resize: Literal["bicubic", "bilinear", "linear"] = "bicubic"
    """Filter that resizes the image. bicubic, bilinear: PIL's, on the 8-bit image. linear: bilinear on the normalised
    image, without antialiasing."""
    flip: bool = True
    """Also infer the mirrored image."""
    # toco.md 3
    merge: Literal["sum", "max", "max_relu"] = "sum"
    """How the maps of the image and of its mirror image are merged, before the scales are added up. sum: their sum.
    max: the larger value. max_relu: the larger value, clipped at 0."""
    # semformer.md 6
    stretch: Annotated[int, Range(least=1)] = 1
    """Sides of the network's inputs are rounded up to multiples of this: images are stretched, not padded."""
    multiple: Annotated[int, Range(least=1)] = 1
    """Scaled images are padded with the mean colour at the bottom and the right to sides that are multiples of this;
    maps are resized to the padded size and cropped to the image. 1: no padding."""
    pad_first: bool = False
    """Pad before mirroring instead of after it, so that the mirrored image has its margin on the left."""
    # psa.md 2.4, seam.md 5, mctformer.md 4, aream.md 9, toco.md 3
    normalise: Literal["max", "shifted", "minmax", "rectified", "span", "none"] = "max"
    """How the merged maps S are normalised, each class map separately. max: S / (max + 1e-5).
    shifted: clipped at 0, entries below min + 1e-5 set to 0, then (S - min - 1e-5) / (max - min + 1e-5).
    minmax: (S - min) / (max - min + 1e-8).
    rectified: clipped at 0, then D / (max D + 1e-6) with D = S - min.
    span: D / (max D + 1e-5) with D = S - min.
    none: as they are, of networks that scale their maps themselves."""
    # irnet.md 6
    round_up: Annotated[int, Range(least=1)] = 1
    """The maps of all scales are resized to sides that are multiples of this, added up and cropped to the image.
    Published by IRNet (high_res: 16): this misaligns them by up to as many pixels, and the thresholds were tuned with
    it. 1: add up at image size."""
    # irnet.md 6
    search_to: Annotated[float, Range(least=0, most=1)] = 0.59
    """Largest background score in the search for the best mIoU, which starts at 0 in steps of 0.01. Published: 0.59;
    AReAM 0.79."""
    fixed_background: Annotated[float | None, Range(least=0, most=1)] = None
    """Also score the CAMs at this fixed background score, as published by IRNet and CRT: 0.15."""
    coarse: Annotated[int, Range(least=0)] = 0
    """Also keep the maps added up on a grid with cells of this many pixels, for refiners that work on such a grid
    (IRNet: 4). 0: refiners get the maps at image size."""

    def cross_check(self) -> None:
        """Raises ValueError for square sides below 8 pixels, and for ``square`` together with ``squash``."""
        check(not self.square or min(self.scales) >= 8, "scales", self.scales, "sides of 8 pixels or more for square")
        most = 4096 if self.square else 64
        check(max(self.scales) <= most, "scales", self.scales, f"at most {most}")
        check(not (self.squash and self.square), "squash", self.squash, "0 where square is used")
        check(not self.squash or self.resize == "linear", "resize", self.resize, "linear where squash is used")


@dataclass(frozen=True)
class BoxInference(Checked):
    """How boxes are drawn from class maps and scored (read by step/localise.py)."""
    # wsol.md sections 6 to 8

    side: Annotated[int, Range(least=2)] = 224
    """Side of the square grid that maps and true boxes are resized to. Pixels."""
    # wsol.md 6
    threshold: Annotated[float, Range(least=0, below=1)] = 0.1
    """Fraction of a map's maximum above which a pixel is foreground, for Top-1, Top-5 and GT-Known. Tune it for maps of
    other methods than TS-CAM: GT-Known may double."""
    interval: Annotated[float, Range(above=0, most=0.5)] = 0.01
    """Step between the thresholds of MaxBoxAcc and PxAP. The published evaluation uses 0.001."""


@dataclass(frozen=True)
class SegInference(Checked):
    """How a segmentation network is tested (read by step/infer_seg.py)."""

    scales: Annotated[tuple[float, ...], Range(above=0, filled=True)] = (1.0,)
    """Factors of the image size."""
    # getam.md 7
    square: bool = False
    """Scales are not factors but sides in pixels of a square that the image is stretched to."""
    # toco.md 8
    squash: Annotated[int, Range(least=0)] = 0
    """Side of a square to which the normalised image is first stretched (bilinear); scales are then factors of it.
    Pixels. 0: the image keeps its shape."""
    # weclip.md 6
    long_side: Annotated[int, Range(least=0)] = 0
    """The normalised image is resized to this longer side first (bilinear); scales are then factors of that size.
    Pixels. 0: it keeps its size."""
    flip: bool = False
    """Test the mirrored image too."""
    resize: Literal["cubic", "linear", "bilinear", "bilinear_factor", "bicubic"] = "cubic"
    """Filter that scales the image. cubic: OpenCV on the normalised image, sizes rounded. linear: bilinear with aligned
    corners on the normalised image, sizes truncated; for ``square`` OpenCV's. bilinear: the same without aligned
    corners. bilinear_factor: as bilinear, sampled at the scale itself, not at that of the truncated size.
    bicubic: PIL on the 8-bit image, sizes rounded."""
    # deeplab.md A.3, B.3 and D.3, toco.md 8, weclip.md 6
    merge: Literal[
        "mean_logits", "sum_logits", "max_softmax", "sum_max_logits", "max_sum_logits", "mean_grid_logits"
    ] = "mean_logits"
    """How the results of all scales and mirrors are merged. mean_logits: softmax of the mean logits. sum_logits:
    softmax of their sum (same labels, but sharper scores for the CRF). max_softmax: maximum of the softmaxes.
    sum_max_logits: an image and its mirror are added, then the maximum over the scales, then the softmax.
    max_sum_logits: the maximum of an image and its mirror, the scales added, then the softmax. mean_grid_logits: as
    mean_logits, but the mean is taken on the grid of the first scale's logits and resized to the image."""
    align_corners: bool = True
    """align_corners of the bilinear resize of logits to the image."""
    crf_truncates_image: bool = False
    """Give the CRF the image recovered from normalised values by truncation (up to one grey level lower), as
    published."""
    crf: CRFSettings = dataclasses.field(default_factory=CRFSettings)
    """Dense CRF on the merged scores; ``iterations`` 0 switches it off."""

    def cross_check(self) -> None:
        """Raises ValueError for square sides below 8 pixels, and for ``square`` together with ``squash``."""
        check(not self.square or min(self.scales) >= 8, "scales", self.scales, "sides of 8 pixels or more for square")
        most = 4096 if self.square else 64
        check(max(self.scales) <= most, "scales", self.scales, f"at most {most}")
        check(not (self.squash and self.square), "squash", self.squash, "0 where square is used")
        check(not self.squash or self.resize != "bicubic", "resize", self.resize, "another than bicubic with squash")
        check(not self.long_side or not (self.squash or self.square), "long_side", self.long_side, "0 for squares")
        check(not self.long_side or self.resize != "bicubic", "resize", self.resize, "another than bicubic here")
        check(not self.square or self.resize != "bilinear_factor", "resize", self.resize, "another for squares")


@dataclass(frozen=True)
class Machine(Checked):
    """Settings of the machine, which do not belong to the recipe; they may change between two calls on one run
    folder."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where networks run. auto: the (NVIDIA or AMD) GPU if there is one, else the CPU. mps: Apple's GPU, untested."""
    amp: Literal["recipe", "off", "bf16", "fp16", "fast"] = "recipe"
    """Precision of all networks. recipe: as in each network's recipe (--cam.amp, --aff.amp, --seg.amp), which is that
    of the published training. The other values are explained there; use fast where speed matters more than the last
    digit."""
    workers: Annotated[int, Range(least=0)] = dataclasses.field(default_factory=lambda: min(8, usable_cores()))
    """Worker processes for reading training images and for per-image work. On a CPU (Linux), each of them computes
    CAMs, walks and predictions by one thread, as many as there is memory for. 0: none; 1: all threads compute one
    image."""
    images: Annotated[int | None, Range(least=1)] = None
    """Images of equal size that are computed at once in make_cam and infer_seg: better use of a GPU, more of its
    memory; fewer where that is too small. The results are the same to rounding. None: 4 on a GPU, 1 on a CPU."""
    compile: bool = False
    """Compile networks with torch.compile for training. Dropout then draws other random numbers, so that a training
    gives other weights than without; mixing both in one training is harmless."""
    channels_last: bool | None = None
    """Keep the weights of convolutions, and with them all maps, in the channels-last memory format, which is often
    faster. None: on x86 processors, where the precision is fast; not on GPUs."""
    checkpoint_every: Annotated[int | None, Range(least=1)] = None
    """Updates between two resume points. None: twenty resume points per training."""

    def with_recipe(self, amp: Precision, device: torch.device) -> Machine:
        """These settings with the precision of a network's recipe, unless the user has named another one.

        fp16 of a recipe becomes float32 on the CPU, where fp16 is slow.
        """
        if self.amp != "recipe":
            return self
        return dataclasses.replace(self, amp="off" if amp == "fp16" and device.type == "cpu" else amp)

    def amp_dtype(self, device: torch.device) -> torch.dtype | None:
        """The reduced precision to use on a device; None for float32, or before ``with_recipe``."""
        if self.amp == "fast":
            return torch.bfloat16 if has_fast_bf16(device.type) else None
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.amp)

    def images_at_once(self, device: torch.device) -> int:
        """Largest number of images of equal size that per-image inference computes at once on a device."""
        return self.images or (4 if device.type == "cuda" else 1)

    def uses_channels_last(self, device: torch.device) -> bool:
        """Whether networks are in the channels-last memory format on a device."""
        if self.channels_last is not None:
            return self.channels_last
        return self.amp == "fast" and prefers_channels_last(device.type)

    def precision(self, device: torch.device) -> str:
        """The precision to use on a device, in words."""
        kind = {None: "float32", torch.bfloat16: "bfloat16 autocast", torch.float16: "float16 autocast"}
        tf32 = " with TF32" if self.amp == "fast" and device.type == "cuda" else ""
        return f"{kind[self.amp_dtype(device)]}{tf32}"


def override(instance: _T, changes: Mapping[str, Any]) -> _T:
    """A copy of a (nested, frozen) dataclass with dotted fields replaced: ``{"fit.lr": 0.01, "walk.logt": 6}``.

    Raises ValueError for an unknown field, listing the known ones.
    """
    for dotted, value in changes.items():
        head, _, rest = dotted.partition(".")
        names = [f.name for f in dataclasses.fields(instance)]  # type: ignore[arg-type]
        if head not in names:
            raise ValueError(f"{type(instance).__name__} has no field {head!r}; its fields are {', '.join(names)}.")
        inner = override(getattr(instance, head), {rest: value}) if rest else value
        instance = dataclasses.replace(instance, **{head: inner})  # type: ignore[type-var]
    return instance


def flatten(instance: Any, prefix: str = "") -> dict[str, Any]:
    """All leaf fields of a nested dataclass as ``{dotted name: plain value}`` (tuples become lists), for run.json."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{field.name}."))
        else:
            flat[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def restored(instance: _T, flat: Mapping[str, Any]) -> _T:
    """The inverse of ``flatten``: a copy of a (nested, frozen) dataclass with the flat values (lists become tuples).

    Fields missing in ``flat`` keep the instance's value. Raises ValueError for unknown fields and for values that the
    dataclasses refuse.
    """
    unknown = sorted(set(flat) - set(flatten(instance)))
    if unknown:
        raise ValueError(f"{type(instance).__name__} has no field {', '.join(unknown)}")

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    def build(old: Any, prefix: str) -> Any:
        changes = {}
        for field in dataclasses.fields(old):
            name, value = prefix + field.name, getattr(old, field.name)
            if dataclasses.is_dataclass(value):
                changes[field.name] = build(value, f"{name}.")
            elif name in flat:
                changes[field.name] = tuples(flat[name])
        return dataclasses.replace(old, **changes)  # all at once: a single new value may conflict with old ones

    return build(instance, "")
