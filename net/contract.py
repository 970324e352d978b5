"""What every network promises, and the registries that the command line reads (DESIGN.md section 3).

Adding a method is one new file in net/seed, net/refine or net/segment: its class is registered by a decorator and
found by name. Networks are single-device code: they know no rank, no file and no data set.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.config import Augment, BoxInference, CamInference, Fit, SegInference
from misc.loop.fit import Batch
from misc.score.objects import Instances

Preset = str


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate: ``lr_scale`` times the base rate, decayed or not.

    ``rule``: optimiser, rate, decay and schedule of these parameters where they are not the training's own.
    """

    params: list[nn.Parameter]
    lr_scale: float = 1.0
    decay: bool = True
    rule: Fit | None = None


class Network(nn.Module, ABC):
    """Anything that misc/loop/fit.py trains.

    ``forward(batch, progress)`` returns the named loss terms; their sum is minimised and each is logged.
    """

    normalisation: str = "imagenet"
    """How images are normalised for this network: a name of misc.image.pixels.NORMALISATIONS."""
    finds_unused: bool = False
    """Whether some trainable parameters get no gradient in some steps (DistributedDataParallel must then search)."""
    calibrates: ClassVar[bool] = False
    """Whether ``calibrate`` is called when the training ends."""

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss terms (scalars) of a batch; ``progress`` in [0, 1) is the share of training that is done."""

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """Entries that are added to a batch before ``counts`` and ``forward`` see it: labels that the network makes
        itself while it trains. Called on the bare network in full precision, with gradients enabled; what it gives
        carries none, and no random number is drawn."""
        return {}

    def lr_scale(self, progress: float) -> float:
        """Factor of all learning rates at this share of the training, on top of the recipe's schedule."""
        return 1.0

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Denominators of loss terms that are means over more than images (valid pixels, pairs), from the batch alone.

        The loop averages each over all micro-batches and processes of the update and hands them back as
        ``batch["counts/NAME"]``, so that a term ``sum / count`` is the same number however the batch is divided.
        """
        return {}

    def calibrate(self, images: Iterable[Tensor]) -> None:
        """Measure with the trained weights what inference needs; only called where ``calibrates`` says so.

        Args:
            images: the images that CAMs are scored on, as batches (b, 3, S, S), on the network's device: neither
                resized nor mirrored, the top left part of S = ``augment.crop`` pixels a side, on a canvas where they
                are smaller. The network is in evaluation mode, without gradients.
        """
        raise NotImplementedError(f"{type(self).__name__} measures nothing.")

    def param_groups(self) -> list[Group]:
        """Parameter groups; by default one of everything that is trained."""
        return [Group([p for p in self.parameters() if p.requires_grad])]

    def load_weights(self, weights: str) -> str:
        """Start from a checkpoint file in one of the field's formats; returns a one-line report.

        Raises ValueError where the file does not fit, FileNotFoundError where there is none.
        """
        raise ValueError(f"{type(self).__name__} reads no foreign weights: leave the weights option at 'none'.")


@dataclass(frozen=True)
class Options(ABC):
    """Base of a network's own settings (a section of the command line), which also build the network."""

    @abstractmethod
    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> Network:
        """The network for ``num_classes`` foreground classes; ``earlier`` holds the trained networks of the phases
        before this one, by phase name, in evaluation mode and frozen, on the device of the training."""

    @property
    def wants_saliency(self) -> bool:
        """Whether the training batches must hold ``saliency`` (B, S, S) uint8, 0 where the canvas shows no image."""
        return False


@dataclass(frozen=True)
class Phase:
    """One training: a network and how it is trained."""

    network: Options
    """Options of the network itself."""
    fit: Fit = field(default_factory=Fit)
    """Training loop."""
    augment: Augment = field(default_factory=Augment)
    """Training images."""
    weights: str = "none"
    """Weights to start from: a checkpoint FILE (FILE,FILE for a network of two parts); 'none' for random ones; 'cam'
    for the CAM network that this run trained (refiners and segmenters of the same backbone); 'pretrained' for those
    that timm fetches from the internet, in networks that have some there (transformers and ResNets)."""
    init: str = ""
    """What the checkpoint FILE was trained on, such as imagenet, or coco for COCO's pixel masks: said with every score.
    Empty: only the file's name is."""


@dataclass(frozen=True)
class SeedRecipe(Phase):
    """Recipe of a CAM method. A method trained in several phases subclasses this and lists them."""

    infer: CamInference = field(default_factory=CamInference)
    """Inference of the CAMs."""
    boxes: BoxInference = field(default_factory=BoxInference)
    """Boxes from the CAMs, on data sets that ask for boxes."""
    selection: Literal["last", "train_miou"] = "last"
    """Which weights are kept. last: those after the last update. train_miou: those of the epoch whose CAMs (one scale,
    no mirror) have the best mIoU on the scored list at their best background score. It looks at the PIXEL LABELS of the
    training images, as the published SemFormer and Puzzle-CAM do (semformer.md 5.3); they do so on coarser maps."""

    def phases(self) -> tuple[tuple[str, Phase], ...]:
        """The trainings in order, each with its name (weights/NAME.pt); the last is the CAM network, named cam."""
        return (("cam", self),)


@dataclass(frozen=True)
class RefineRecipe(Phase):
    """Recipe of a refiner: labels from CAMs, an affinity network, a random walk. Subclassed by each refiner, which
    gives ``label`` and ``walk`` their own types."""

    label: Any = None
    """How affinity labels are made from CAMs."""
    walk: Any = None
    """The random walk."""


@dataclass(frozen=True, kw_only=True)
class SegmentTest:
    """How masks are predicted: all there is to set where the CAM network itself predicts them."""

    infer: SegInference = field(default_factory=SegInference)
    """Test-time scales, merging and CRF."""


@dataclass(frozen=True)
class SegmentRecipe(Phase, SegmentTest):
    """Recipe of a segmentation network."""


@dataclass(frozen=True)
class Recipe:
    """A method's whole pipeline: its own part, and what it asks of the refiner and the segmenter it was published with.

    ``refine`` and ``segment`` are dotted overrides of the named refiner's and segmenter's own recipe of the same
    preset (a method's file does not import theirs).
    """

    cam: SeedRecipe
    refiner: str = "psa"
    refine: Mapping[str, Any] = field(default_factory=dict)
    segmenter: str = "deeplabv1"
    segment: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    """Data set of the recipe, a name of ``--data``. None: voc12, or the generated sample set."""
    own: SegmentTest | None = None
    """How the CAM network's own masks are predicted, where it is a ``SingleStage`` (the segmenter named ``OWN``)."""


OWN = "own"
"""On the command line: the segmenter is the CAM network itself."""


class SeedNetwork(Network):
    """A CAM network: trained from tags, gives class maps."""

    recipes: ClassVar[Mapping[Preset, Recipe]]
    """'published' and 'sample'."""
    map_needs_gradient: ClassVar[bool] = False
    """Whether ``cam`` runs a backward pass (then it is called with gradients enabled)."""

    @abstractmethod
    def cam(self, images: Tensor, tags: Tensor) -> Tensor:
        """Class maps of one scale.

        Args:
            images: (B, 3, H, W) normalised, any H and W.
            tags: (B, C) in {0, 1}.

        Returns:
            (B, C, h, w), C foreground classes, any resolution; the merging recipe resizes and adds them up.
        """

    def classify(self, images: Tensor, num_classes: int) -> Tensor:
        """Class scores at test time, tags unseen: (B, 3, H, W) normalised, any H and W -> (B, C) float32, the highest
        for the class that the network believes in most.

        By default the means of the maps of all ``num_classes`` classes. A network that is trained by logits gives
        these.
        """
        return self.cam(images, images.new_ones(len(images), num_classes)).float().mean((2, 3))


class SingleStage(SeedNetwork):
    """A CAM network that predicts masks too: it can be its own segmenter, and then needs no pseudo masks."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """As ``Segmenter.logits``: (B, 3, H, W) normalised -> (B, C + 1, h, w), channel 0 background."""


@dataclass(frozen=True)
class SoftCam:
    """The CAMs of one image as a refiner gets them.

    keys (K,) int64, present classes, 0-based, ascending; maps (K, H, W) float32 in [0, 1] at image size; coarse
    (K, h, w) float32, the same merged on a grid of cells, where the CAM method's recipe asks for it
    (``infer.coarse``). K is 0 for an image without a tag.
    """

    keys: np.ndarray
    maps: np.ndarray
    coarse: np.ndarray | None = None

    def on_grid(self, size: tuple[int, int]) -> np.ndarray:
        """The maps on a grid of (h, w) cells: ``coarse`` where that is its size, else the maps resized to it.

        Returns (K, h, w) float32.
        """
        if self.coarse is not None and self.coarse.shape[1:] == tuple(size):
            return self.coarse
        if len(self.keys) == 0:
            return np.zeros((0, *size), np.float32)
        maps = torch.from_numpy(np.asarray(self.maps, np.float32))[None]
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0].numpy()


class AffinityNetwork(Network):
    """A refiner: makes training labels from CAMs, learns affinities, refines the CAMs by a random walk."""

    recipes: ClassVar[Mapping[Preset, RefineRecipe]]
    """'published' and 'sample'."""
    plane_fill: ClassVar[float] = 0.0
    """What the label planes hold where a training crop shows no image."""

    @classmethod
    @abstractmethod
    def make_label(cls, image: np.ndarray, cam: SoftCam, options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Affinity label of one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            cam: its CAMs.
            options: the recipe's ``label``.

        Returns:
            picture: (H, W) uint8, 0 background, class + 1, 255 ignore: what a person looks at.
            planes: (P, H, W) float16 or uint8, what training reads; geometric augmentation acts on it as on the image.
        """

    @classmethod
    @abstractmethod
    def target(cls, planes: np.ndarray) -> np.ndarray:
        """Training target of one sample from its augmented planes: (P, S, S) -> an array of the same shape for every
        image (it becomes ``batch["target"]`` with the batch in front)."""

    @abstractmethod
    def refine(self, image: Tensor, cam: SoftCam, options: Any) -> np.ndarray:
        """Scores after the random walk.

        Args:
            image: (3, H, W) normalised, any H and W.
            cam: its CAMs, K classes (may be 0).
            options: the recipe's ``walk``.

        Returns:
            (K + 1, H, W) float32, background first, then the classes in the order of ``cam.keys``: the arg-max is the
            pseudo mask.
        """

    @classmethod
    def finds_instances(cls, options: Any) -> bool:
        """Whether single objects are told apart with these settings (the recipe's ``walk``): then ``find_instances``
        is called in place of ``refine``."""
        return False

    def find_instances(self, image: Tensor, cam: SoftCam, options: Any) -> tuple[np.ndarray, Instances]:
        """``refine``, and besides the single objects: arguments and first result as there."""
        raise NotImplementedError(f"{type(self).__name__} tells no objects apart.")


class Segmenter(Network):
    """A segmentation network trained on (pseudo) masks. Cross entropy over the non-ignored pixels of the batch."""

    recipes: ClassVar[Mapping[Preset, SegmentRecipe]]
    """'published' and 'sample'."""
    loss_align_corners: ClassVar[bool] = True
    """Bilinear convention when logits are resized to the mask for the loss."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C + 1, h, w), channel 0 background, any resolution."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Number of pixels with a label."""
        return {"pixels": (batch["mask"] != 255).sum()}

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, H, W), mask (B, H, W) int64 with 255 = ignore -> {"ce": cross entropy}."""
        logits = self.logits(batch["image"])
        size = batch["mask"].shape[-2:]
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=self.loss_align_corners)
        total = F.cross_entropy(logits.float(), batch["mask"], ignore_index=255, reduction="sum")
        return {"ce": total / batch["counts/pixels"].clamp(min=1e-5)}


SEEDS: dict[str, type[SeedNetwork]] = {}
REFINERS: dict[str, type[AffinityNetwork]] = {}
SEGMENTERS: dict[str, type[Segmenter]] = {}

C = TypeVar("C", bound=type)


def _register(table: dict[str, Any], name: str) -> Callable[[C], C]:
    def add(cls: C) -> C:
        if name in table:
            raise ValueError(f"Two classes are registered as {name!r}: {table[name].__name__} and {cls.__name__}.")
        cls.name = name  # type: ignore[attr-defined]
        table[name] = cls
        return cls

    return add


def seed(name: str) -> Callable[[C], C]:
    """Register a CAM network under the name it has on the command line."""
    return _register(SEEDS, name)


def refiner(name: str) -> Callable[[C], C]:
    """Register an affinity network under the name it has on the command line."""
    return _register(REFINERS, name)


def segmenter(name: str) -> Callable[[C], C]:
    """Register a segmentation network under the name it has on the command line."""
    return _register(SEGMENTERS, name)


def load_methods() -> None:
    """Import every file of net/seed, net/refine and net/segment, which fills the registries."""
    for room in ("seed", "refine", "segment"):
        for module in pkgutil.iter_modules([str(Path(__file__).parent / room)]):
            importlib.import_module(f"net.{room}.{module.name}")


def multilabel_soft_margin(logits: Tensor, tags: Tensor) -> Tensor:
    """Mean over batch and classes of the binary cross entropy with logits: logits and tags (B, C) -> scalar."""
    return F.binary_cross_entropy_with_logits(logits.float(), tags.to(torch.float32))


ClassLoss = Literal["soft_margin", "cross_entropy"]
"""How a classifier is trained: by each class for itself, or (one class an image) by all against each other."""


def class_loss(logits: Tensor, tags: Tensor, kind: ClassLoss) -> Tensor:
    """Classification loss: logits and tags (B, C) -> scalar.

    soft_margin: ``multilabel_soft_margin``. cross_entropy: of the softmax, mean over the batch (wsol.md section 5); an
    image with several tags shares its weight among them, one without a tag adds nothing.
    """
    if kind == "soft_margin":
        return multilabel_soft_margin(logits, tags)
    tags = tags.to(torch.float32)
    return F.cross_entropy(logits.float(), tags / tags.sum(1, keepdim=True).clamp(min=1))


def decay_groups(
    network: nn.Module, no_decay: Collection[str], heads: Collection[str] = (), head_lr: float = 10.0
) -> list[Group]:
    """The groups of timm's AdamW trainings (mctformer.md section 6, aream.md section 8).

    First what is not decayed: one-dimensional parameters, biases and those named exactly as one of ``no_decay``; then
    the rest; both at the base rate. The same two again for the layers ``heads``, if there are any, at ``head_lr``
    times that. Only what is trained is in them.
    """
    groups = [Group([], decay=False), Group([])]
    if heads:
        groups += [Group([], head_lr, False), Group([], head_lr)]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim > 1 and not name.endswith(".bias") and name not in no_decay
            groups[plain + 2 * (name.rpartition(".")[0] in heads)].params.append(parameter)
    return groups


def conv_groups(network: nn.Module, new: Collection[str], head_lr: float = 10.0) -> list[Group]:
    """The four groups of the published ResNet38 and VGG16 trainings (seam.md section 4.2, psa.md section 2.3).

    In this order: weights of the pre-trained layers (base rate, decayed), their biases (twice the rate, not decayed),
    weights of the new layers (``head_lr`` times, decayed), their biases (twice that, not decayed); a group may be
    empty. Only what is trained is in them. Batch normalisation is frozen in the published trainings; where it is
    trained, its parameters are a fifth group (base rate, not decayed).

    Args:
        network: its layers are sorted, in the order of its modules.
        new: names of the layers (or of modules that hold them) that are not pre-trained.
        head_lr: their learning rate relative to the base rate.
    """
    slow = [Group([]), Group([], 2.0, False)]
    groups = [*slow, Group([], head_lr), Group([], 2 * head_lr, False), Group([], 1.0, False)]
    for name, module in network.named_modules():
        is_new = any(name == n or name.startswith(f"{n}.") for n in new)
        for kind, parameter in module.named_parameters(recurse=False):
            place = 4 if isinstance(module, nn.BatchNorm2d) else 2 * is_new + (kind == "bias")
            if parameter.requires_grad:
                groups[place].params.append(parameter)
    return groups if groups[4].params else groups[:4]


def name_groups(network: nn.Module, pretrained: Collection[str], head_lr: float = 10.0) -> list[Group]:
    """The four groups of the published SemFormer and Puzzle-CAM trainings, sorted by names (semformer.md section 7).

    In this order: pre-trained parameters whose name contains "weight" (base rate, decayed), the other pre-trained ones
    (twice the rate, not decayed: biases, tokens and positions too), and the same two of the rest at ``head_lr`` times
    that. Only what is trained is in them; a group may be empty.

    Args:
        network: its parameters are sorted.
        pretrained: a parameter is pre-trained where its name contains one of these.
        head_lr: learning rate of the rest relative to the base rate.
    """
    groups = [Group([]), Group([], 2.0, False), Group([], head_lr), Group([], 2 * head_lr, False)]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            is_new = not any(part in name for part in pretrained)
            groups[2 * is_new + ("weight" not in name)].params.append(parameter)
    return groups
