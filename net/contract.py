"""The interfaces of all networks (docs/design.md section 3). net/registry.py finds networks by name.

Networks are single-device code: they know no rank, no file and no data set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from misc.checked import Checked, Range
from misc.config import Augment, BoxInference, CamInference, Fit, Precision, SegInference, View
from misc.image.cam import Cam
from misc.image.labels import IGNORE
from misc.image.picture import Picture
from misc.loop.trainable import Batch, Trainable
from misc.precision import at_least_float32
from misc.score.objects import Instances
from net.start_weights import StartWeights

Preset = str
"""Name of a recipe, a value of ``--preset``."""


class Network(Trainable):
    """A network of a method; ``Trainable`` declares what training requires of it."""

    normalisation: str = "imagenet"
    """How images are normalised for this network: a name of misc.image.pixels.NORMALISATIONS."""
    calibrates: ClassVar[bool] = False
    """Whether ``calibrate`` is called at the end of the training."""

    def calibrate(self, images: Iterable[Tensor]) -> None:
        """Measure values that inference needs with the trained weights; only called if ``calibrates`` is true.

        Args:
            images: the images of the scored list, as batches (b, 3, S, S) on the network's device: not resized, not
                mirrored, cropped or padded at the bottom and right to S = ``augment.crop``. The network is in
                evaluation mode, without gradients.
        """
        raise NotImplementedError(f"{type(self).__name__} measures nothing.")

    def pretrained_names(self) -> tuple[str, ...]:
        """timm's names of the classifiers for the weights 'pretrained', each loaded by ``load_weights("timm:NAME")``;
        empty by default. Weights of another library have its name before theirs (``open_clip:NAME``) and are asked for
        by that."""
        return ()

    def set_class_texts(self, names: Sequence[str], own: Mapping[str, str]) -> None:  # noqa: B027
        """Called once the network is built, before any weights are loaded, for networks that know classes by words.

        Args:
            names: of the C foreground classes.
            own: a text for a class, by its name, where the data set has one.
        """

    def notes(self) -> dict[str, Any]:
        """What its file says of it besides its recipe, as JSON has it: what it was told that no setting holds."""
        return {}

    def load_weights(self, weights: str) -> str:
        """Load a checkpoint of a known format as start weights, a file or ``timm:NAME``; returns a one-line report.

        Raises ValueError if the file does not fit, FileNotFoundError if it does not exist.
        """
        raise ValueError(f"{type(self).__name__} reads no foreign weights: leave the weights option at 'none'.")


@dataclass(frozen=True)
class Options(Checked, ABC):
    """Base of a network's settings (a section of the command line), which also build the network."""

    @abstractmethod
    def build(self, num_classes: int, earlier: Mapping[str, Network]) -> Network:
        """Build the network for ``num_classes`` foreground classes. ``earlier`` holds the trained networks of earlier
        phases by name, in evaluation mode, frozen, on the device of the training."""

    reads_class_texts: ClassVar[bool] = False
    """Whether the network knows classes by words (``Network.set_class_texts``), so that other words are another run."""

    label_limits: ClassVar[tuple[str, ...]] = ()
    """Settings that decide which pixels get which label, by their dotted names in these options, of a network that
    labels its own training images."""

    @property
    def keeps_start_weights(self) -> bool:
        """Whether a part of the network is never trained, so that random start weights make results without
        meaning."""
        return False

    @property
    def wants_saliency(self) -> bool:
        """Whether the training batches must hold ``saliency`` (B, S, S) uint8, 0 where the canvas shows no image."""
        return False


@dataclass(frozen=True)
class Phase(Checked):
    """One training: a network and its training recipe."""

    network: Options
    """Options of the network itself."""
    fit: Fit = field(default_factory=Fit)
    """Optimiser and schedule."""
    augment: Augment = field(default_factory=Augment)
    """Augmentation of the training images."""
    weights: str = "none"
    """Start weights: a checkpoint FILE (FILE,FILE for a network of two parts); 'none' for random ones; 'cam' for the
    CAM network that this run trained (for refiners and segmenters with the same backbone); 'pretrained' for weights
    that timm downloads, if the network has any there (transformers and ResNets)."""
    amp: Precision = "off"
    """Precision of training and inference, unless --machine.amp names another. off: float32 everywhere, without TF32.
    bf16, fp16: mixed precision, fp16 on GPUs only. fast: bf16 on GPUs that support it, and TF32."""
    init: str = ""
    """What the checkpoint FILE was trained on, such as imagenet, or coco for COCO's pixel masks; recorded with every
    score. Empty: only the file's name is recorded."""

    released: str = ""
    """A checkpoint FILE, such as the authors' own, that is used without training; the step counts as done. It must
    contain the whole network (FILE,FILE: together, for a network of two parts). Empty: train."""

    @property
    def released_files(self) -> tuple[str, ...]:
        """The files of ``released``; empty if the network is trained."""
        return tuple(self.released.split(",")) if self.released else ()

    @property
    def is_trained(self) -> bool:
        """Whether there is a training: no released checkpoint is used as it is, and the recipe has updates."""
        return not self.released and self.fit.steps != 0

    @property
    def start(self) -> StartWeights:
        """``weights``, parsed."""
        return StartWeights.parse(self.weights)

    def views(self) -> Mapping[str, View]:
        """Additional views of every training sample, by name: ``view/NAME``, ``box/NAME`` and ``mirrored/NAME`` of the
        batch (voc12.loader.TrainSet). One named ``image`` replaces the image itself. A recipe that needs views
        subclasses this and adds a field for each."""
        return {}


@dataclass(frozen=True)
class TaggedPhase(Phase):
    """An earlier phase of a CAM method, of a ``TagScorer``, whose epoch may be chosen by tags."""

    selection: Literal["last", "train_tags"] = "last"
    """Which weights are kept. last: those after the last update. train_tags: those of the epoch whose class scores,
    thresholded, have the best average precision on the TAGS of the scored list."""


@dataclass(frozen=True)
class SeedRecipe(Phase):
    """Recipe of a CAM method. A method with several phases subclasses this and lists them."""

    infer: CamInference = field(default_factory=CamInference)
    """Inference of the CAMs."""
    boxes: BoxInference = field(default_factory=BoxInference)
    """Boxes from the CAMs, for data sets with boxes."""
    # semformer.md 5.3
    # aream.md section 8, mctformer.md section 6
    selection: Literal["last", "val_tags", "train_miou", "val_boxes"] = "last"
    """Which weights are used. last: those after the last update, which are also kept and scored beside those of a
    selected epoch (weights/cam.last.pt). val_tags: those of the epoch whose class scores have
    the best mAP on the validation list, over the classes of each image; looks at the TAGS of the validation images, as
    the published AReAM on MCTformer does. train_miou: those of the epoch whose CAMs (one scale, no mirror) have the
    best mIoU on the scored list at their best background score; looks at the PIXEL LABELS of the training images, as
    the published SemFormer and Puzzle-CAM do. These two are rated by their own measure: coarse maps of corner crops.
    val_boxes: those of the epoch with the best GT-Known on the validation list; looks at the BOXES of the images that
    are scored, as the published TS-CAM and CRT on CUB do; the epoch of the best Loc Top-1 is kept and scored too."""

    def phases(self) -> tuple[tuple[str, Phase], ...]:
        """The phases in order, each with its name (weights/NAME.pt); the last is the CAM network, named cam.

        Earlier phases are only needed for its training: for inference, the network is built on earlier ones without
            weights.
        """
        return (("cam", self),)

    def needed_phases(self) -> tuple[tuple[str, Phase], ...]:
        """The phases whose files must exist; for a released CAM network only its own."""
        return self.phases()[-1:] if self.released else self.phases()


@dataclass(frozen=True)
class RefineSettings(Checked):
    """How CAMs become pseudo masks: all there is to set of a refiner that is not trained. Subclassed by each refiner,
    which gives ``walk`` its own type."""

    walk: Any = None
    """How scores of background and classes are made of the CAMs: the random walk, of refiners that have one."""
    ignore_below: Annotated[float, Range(least=0)] = 0.0
    """Pixels of a pseudo mask whose largest score is below this become 255, which the segmentation network's loss
    leaves out. 0: none."""


@dataclass(frozen=True)
class RefineRecipe(RefineSettings, Phase):
    """Recipe of a refiner that is trained: labels from CAMs, an affinity network, a random walk. Subclassed by each
    refiner, which gives ``label`` and ``walk`` their own types."""

    label: Any = None
    """How affinity labels are made from CAMs."""


@dataclass(frozen=True, kw_only=True)
class SegmentTest(Checked):
    """How masks are predicted. If the CAM network itself predicts them, these are all the settings."""

    infer: SegInference = field(default_factory=SegInference)
    """Test-time scales, merging and CRF."""


@dataclass(frozen=True)
class SegmentRecipe(Phase, SegmentTest):
    """Recipe of a segmentation network."""


@dataclass(frozen=True)
class Recipe:
    """A method's whole pipeline: its own recipe, and settings of the refiner and the segmenter with which it was
    published.

    ``refine`` and ``segment`` are dotted overrides of the refiner's and the segmenter's own recipe (a method's file
    does not import theirs) with the same preset name, or if they have none of that name, of ``base``.
    """

    cam: SeedRecipe
    refiner: str = "psa"
    refine: Mapping[str, Any] = field(default_factory=dict)
    segmenter: str = "deeplabv1"
    segment: Mapping[str, Any] = field(default_factory=dict)
    base: Preset = "published"
    """Recipe of the refiner and the segmenter to use if they have none of this recipe's name; if they lack this one
    too, it is their first."""
    long_side: int = 0
    """Longest side of the images that are worked on, in pixels; larger ones are shrunk first. 0: any."""
    data: str | None = None
    """Data set of the recipe, a name of ``--data``. None: voc12, or for the preset sample the generated sample set."""
    own: SegmentTest | None = None
    """How the CAM network's own masks are predicted, if it is a ``SingleStage`` (the segmenter named ``OWN``)."""


class TagScorer(Network):
    """A network that scores classes, to be rated by tags (``TaggedPhase``)."""

    @abstractmethod
    def score_classes(self, images: Tensor) -> Tensor:
        """Scores of all classes, background first: (B, 3, S, S) normalised -> (B, C + 1) in [0, 1]."""


class SeedNetwork(Network):
    """A CAM network: trained from tags, gives class maps."""

    recipes: ClassVar[Mapping[Preset, Recipe]]
    """Recipes by their names on ``--preset``: 'published' and its variants, such as 'published_cub', 'sample', and
    'photos' for people's own pictures; at least one. Assigned at the end of the method's file, after its options, with
    literal names: ``Seam.recipes = {"published": ...}``."""
    published_scores: ClassVar[str] = ""
    """What the paper or its public repository reports on VOC 2012 in percent mIoU, CAM / pseudo mask (train) /
    segmentation (val), as the README's table has it (another measure is named; † not confirmed by its source); shown
    beside our own figures, never among them."""
    map_needs_gradient: ClassVar[bool] = False
    """Whether ``cam`` runs a backward pass (then it is called with gradients enabled)."""

    selection_thresholds: ClassVar[tuple[float, ...] | None] = None
    """Background scores of the published selection by pixel labels, which rates ``selection_maps`` of the images' top
    left corners; None where none was published: then single-scale CAMs of whole images are rated."""

    def selection_maps(self, images: Tensor, tags: Tensor) -> Tensor:
        """The maps that the published selection rates; arguments and result as for ``cam``, which it is by default."""
        return self.cam(images, tags)

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
        """Class scores at test time, without tags: (B, 3, H, W) normalised, any H and W -> (B, C) float32, highest for
        the most likely class.

        By default the means of the maps of all ``num_classes`` classes. A network that is trained with logits overrides
        this and returns them.
        """
        return self.cam(images, images.new_ones(len(images), num_classes)).float().mean((2, 3))


class SingleStage(SeedNetwork):
    """A CAM network that also predicts masks: it can be its own segmenter, and then needs no pseudo masks."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """As ``Segmenter.logits``: (B, 3, H, W) normalised -> (B, C + 1, h, w), channel 0 background."""


class Refiner(ABC):
    """Makes pseudo masks of CAMs: an ``AffinityNetwork``, or what needs no training (``PlainRefiner``)."""

    recipes: ClassVar[Mapping[Preset, RefineSettings]]
    """Recipes by their names, see ``Recipe``; at least one."""
    is_trained: ClassVar[bool]
    """Whether it is a network that is trained on labels made from the CAMs (steps 3 and 4)."""
    normalisation: str = "imagenet"
    """How the values of the picture are normalised: a name of misc.image.pixels.NORMALISATIONS."""
    wants_segments: ClassVar[bool] = False
    """Whether the picture must come with ``segments``, which are files of the user's."""

    @abstractmethod
    def refine(self, picture: Picture, cam: Cam, options: Any) -> np.ndarray:
        """Scores after the refinement.

        Args:
            picture: the image, any H and W, its values on the device to compute on.
            cam: its CAMs at image size, K classes (may be 0).
            options: the recipe's ``walk``.

        Returns:
            (K + 1, H, W) float32, background first, then the classes in the order of ``cam.keys``: the arg-max is the
            pseudo mask.
        """

    @classmethod
    def finds_instances(cls, options: Any) -> bool:
        """Whether these settings (the recipe's ``walk``) ask for single objects; then ``find_instances`` is called
        instead of ``refine``."""
        return False

    def find_instances(self, picture: Picture, cam: Cam, options: Any) -> tuple[np.ndarray, Instances]:
        """As ``refine``, and the single objects as second result."""
        raise NotImplementedError(f"{type(self).__name__} does not separate objects.")


class PlainRefiner(Refiner):
    """A refiner without weights: it is made without arguments, and there is nothing to train."""

    is_trained = False


class AffinityNetwork(Network, Refiner):
    """A refiner that makes training labels from CAMs, learns affinities, refines the CAMs by a random walk."""

    recipes: ClassVar[Mapping[Preset, RefineRecipe]]
    """Recipes by their names, see ``Recipe``; at least one."""
    is_trained = True
    plane_fill: ClassVar[float] = 0.0
    """Value of the label planes where a training crop lies outside the image."""

    @classmethod
    @abstractmethod
    def make_label(
        cls, image: np.ndarray, cam: Cam, options: Any, device: torch.device | str = "cpu"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Affinity label of one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            cam: its CAMs.
            options: the recipe's ``label``.
            device: where to compute.

        Returns:
            picture: (H, W) uint8, 0 background, class + 1, 255 ignored: the label for people to look at.
            planes: (P, H, W) float16 or uint8, the label for training; geometric augmentation is applied to it as to
                the image.
        """

    @classmethod
    @abstractmethod
    def make_target(cls, planes: np.ndarray) -> np.ndarray:
        """Training target of one sample from its augmented planes: (P, S, S) -> an array whose shape is the same for
        every image; they are stacked as ``batch["target"]``."""


class Segmenter(Network):
    """A segmentation network trained on (pseudo) masks. Cross entropy over the non-ignored pixels of the batch."""

    recipes: ClassVar[Mapping[Preset, SegmentRecipe]]
    """Recipes by their names, see ``Recipe``; at least one."""
    loss_align_corners: ClassVar[bool] = True
    """align_corners of the bilinear resize of logits to the mask for the loss."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C + 1, h, w), channel 0 background, any resolution."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Number of pixels with a label."""
        return {"pixels": (batch["mask"] != IGNORE).sum()}

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """``batch``: image (B, 3, H, W), mask (B, H, W) int64 with 255 = ignore -> {"ce": cross entropy}."""
        logits = at_least_float32(self.logits(batch["image"]))
        size = batch["mask"].shape[-2:]
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=self.loss_align_corners)
        total = F.cross_entropy(logits, batch["mask"], ignore_index=IGNORE, reduction="sum")
        return {"ce": total / batch["counts/pixels"].clamp(min=1e-5)}
