"""The configuration of a run: method, data, folders, and the recipe of every step. It is built from names, presets and
the command line before any work starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from misc import commandline, distributed
from misc import config as settings
from misc.checked import Checked, Count, Range
from misc.config import Machine
from misc.files import store
from misc.files.runfolder import RunFolder
from net import contract, registry
from net.names import OWN
from net.start_weights import StartWeights
from step.lib import sizes
from voc12.catalog import Catalog, load_data_sets, open_catalog
from voc12.generated.sets import LAYOUTS
from voc12.lists import pick_evenly
from voc12.tags import read_texts

SAMPLE_ROOT = Path("data/sample")

REPORT_IMAGES = 12
"""Number of images per list in the report."""


@dataclass(frozen=True)
class GeneratedSet(Checked):
    """The generated sample set (voc12/generated/sets.py)."""

    images: Count = 240
    """Number of training images."""
    val: Count = 80
    """Number of validation images."""
    classes: Count = 5
    """Number of foreground classes."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the generator."""


@dataclass(frozen=True)
class Config(Checked):
    """All settings of a run."""

    method: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="METHOD")] = "seam"
    """CAM method."""
    preset: str = "sample"
    """Recipe, by its name in the method's file. published: the paper's, with its variants (such as published_cub).
    sample: tiny networks from random weights, minutes on two CPU cores. photos: for people's own pictures, the default
    with --data folder of the methods that have it; the others take sample."""
    data: str = "sample"
    """Data set: sample (generated), voc12 (VOC 2012 or any folder in its layout), coco14 (MS-COCO 2014), folder (your
    own images and labels.csv: docs/your_data.md); of boxes, not masks: sample_cub (generated), cub200
    (CUB-200-2011)."""
    root: Annotated[Path | None, tyro.conf.arg(aliases=["--voc12-root"])] = None
    """Folder of the data set. Default for the sample set: data/sample-..., named after its settings."""
    run: Annotated[Path | None, tyro.conf.arg(aliases=["--out"])] = None
    """Run folder for all results. Default: runs/METHOD-DATA. Under torchrun write --out, because torchrun has its own
    option --run."""
    steps: tuple[str, ...] = ()
    """Steps to run: numbers, names and ranges (2-5, make_cam random_walk). Default: all, from the first unfinished."""
    seed: int = 0
    """Seed of initial weights, data order, augmentation and dropout."""
    train_list: str | None = None
    """List of training images: a name in ImageSets/Segmentation (coco14, folder: in splits) or a file. Default:
    train_aug where the data set has it, else train; published recipes on voc12 insist on train_aug."""
    score_list: str = "train"
    """List on which CAMs and pseudo masks are scored, where it has masks."""
    val_list: str = "val"
    """List on which the segmentation network is tested."""
    refiner: str = "psa"
    """Refiner, which makes pseudo masks of the CAMs (steps 3 to 5): an affinity network, or none, crf, par, sam, which
    are not trained and need no steps 3 and 4. sam takes the borders of given --segments."""
    segmenter: str = "deeplabv1"
    """Segmentation network (steps 6 and 7). own: the CAM network itself, for methods that predict masks; steps 3 to 6
    are then not needed."""
    long_side: Annotated[int, Range(least=0)] = 0
    """Images with a longer side are worked on as smaller copies, which are made in the run folder; their masks are also
    written at full size (label_full, seg_full). Pixels. 0: all images as they are. Preset photos: 1024."""
    cams: Path | None = None
    """Run folder whose CAM network and CAMs are used (linked into this run); it must have the same settings of the CAM
    network and the same data. Steps 1 and 2 are then skipped."""
    saliency: Path | None = None
    """Folder of saliency maps ID.png (one 8-bit channel, sizes of the images), for methods that use them in training.
    Default: the folder Saliency of the data set."""
    segments: Path | None = None
    """Folder of class-agnostic segments of the images, for the refiner sam: ID.json, npy, npz or png
    (misc/files/segments.py). python -m voc12.segments makes them. Default: the folder Segments of the data set."""
    texts: Path | None = None
    """CSV file of lines 'class,words', for methods that know classes by words: what to call a class instead of its
    name, synonyms by commas. Default: texts.csv of the data set, where there is one."""
    masks: Literal["pseudo", "truth"] = "pseudo"
    """What the segmentation network is trained on. truth: the data set's own masks, for the upper bound."""
    shard: str = "0/1"
    """i/n: in per-image steps do only the i-th of n parts of the images (independent jobs, i from 0)."""
    overlays: bool = False
    """Also write pseudo masks and predictions drawn over their images: label_overlay/ID.jpg, seg_overlay/ID.jpg."""
    redo: bool = False
    """Run the named steps again though they are finished: their files, and those of all later steps, are removed first.
    Leave it out to continue after an interruption."""
    force: bool = False
    """Continue in a run folder that was made with another configuration."""
    sample: GeneratedSet = field(default_factory=GeneratedSet)
    """The generated sample set."""
    machine: Machine = field(default_factory=Machine)
    """Devices, processes, precision. Does not change the recipe."""
    cam: contract.SeedRecipe = None  # type: ignore[assignment]
    """The CAM network (steps 1 and 2)."""
    aff: contract.RefineSettings = None  # type: ignore[assignment]
    """The refiner (steps 3 to 5)."""
    seg: contract.SegmentTest = None  # type: ignore[assignment]
    """The segmentation network (steps 6 and 7)."""

    def shard_part(self) -> tuple[int, int]:
        """(i, n) from ``shard``. Raises ValueError if it has another form."""
        return distributed.parse_shard(self.shard)

    def data_root(self) -> Path:
        """Folder of the data set. Raises ValueError if it is missing and has no default, or for an unknown data set."""
        known = load_data_sets()
        if self.data not in known:
            raise ValueError(f"--data {self.data}: there is no such data set. There are: {', '.join(known)}.")
        if self.root is not None:
            return self.root
        if self.data in LAYOUTS:
            s = self.sample
            return SAMPLE_ROOT.with_name(f"{self.data}-{s.images}-{s.val}-{s.classes}-seed{s.seed}")
        raise ValueError(f"--data {self.data} needs --root DIR, the folder of the data set.")

    def recorded(self) -> dict[str, Any]:
        """The flat settings that determine the result (run.json), without those that have no effect beside the others
        (``misc.checked.When``): two runs with equal settings make the same files."""
        flat = settings.flatten(dataclasses.replace(self, machine=None))
        effective = {path for path, *_ in commandline.leaves(dataclasses.replace(self, machine=None), effective=True)}
        flat = {name: value for name, value in flat.items() if name in effective}
        free = ("run", "root", "steps", "shard", "overlays", "redo", "force", "machine", "cams", "saliency", "segments")
        for name in free:
            flat.pop(name)
        if self.root is not None or self.data not in LAYOUTS:
            flat = {k: v for k, v in flat.items() if not k.startswith("sample.")}
        return identity({k: str(v) if isinstance(v, Path) else v for k, v in flat.items()})


def identity(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings with the paths of weights files replaced by fingerprints of their content: the same file is the
    same setting in any place. A file that does not exist (any more) keeps its path."""

    def content(name: str, value: Any) -> Any:
        if name == "texts" and value is not None:
            return store.fingerprint(Path(value)) if Path(value).is_file() else value
        field = name.rpartition(".")[2]
        return StartWeights.parse(value).identity() if field in ("weights", "released") and value else value

    return {name: content(name, value) for name, value in flat.items()}


def default_config(method: str, preset: str, refiner: str | None = None, segmenter: str | None = None) -> Config:
    """The configuration of a method and preset before the command line changes it.

    Refiner and segmenter use their recipe of the same name; if they have none, the recipe named by ``base`` in the
    method's recipe. The method's own settings for them apply if they are the ones that it was published with. Raises
    ValueError for unknown names, and for segmenter ``own`` if the method predicts no masks.
    """
    registry.load_methods()
    recipe = registry.find_recipe(registry.find_method(registry.SEEDS, method, "method"), preset)
    refiner, segmenter = refiner or recipe.refiner, segmenter or recipe.segmenter
    aff = registry.find_recipe(registry.find_method(registry.REFINERS, refiner, "refiner"), preset, recipe.base)
    if segmenter == OWN:
        if recipe.own is None:
            names = ", ".join(sorted(registry.SEGMENTERS))
            raise ValueError(f"--segmenter own: {method} predicts no masks itself. There are: {names}.")
        seg: contract.SegmentTest = recipe.own
    else:
        chosen = registry.find_method(registry.SEGMENTERS, segmenter, "segmenter")
        seg = registry.find_recipe(chosen, preset, recipe.base)
    if refiner == recipe.refiner:
        aff = settings.override(aff, recipe.refine)
    if segmenter == recipe.segmenter:
        seg = settings.override(seg, recipe.segment)
    return Config(
        method=method, preset=preset, refiner=refiner, segmenter=segmenter, cam=recipe.cam, aff=aff, seg=seg,
        long_side=recipe.long_side, data=recipe.data or ("sample" if preset == "sample" else "voc12"),
    )


def all_flags() -> dict[str, list[str]]:
    """The flags of every method, with any refiner and segmenter."""
    registry.load_methods()
    base = default_config("seam", "sample")
    common = commandline.flags(dataclasses.replace(base, cam=None, aff=None, seg=None))
    for section, table in (("aff.", registry.REFINERS), ("seg.", registry.SEGMENTERS)):
        for part in table.values():
            for recipe in part.recipes.values():
                common += commandline.flags(recipe, section)
    found = {}
    for name, method in registry.SEEDS.items():
        mine = [flag for recipe in method.recipes.values() for flag in commandline.flags(recipe.cam, "cam.")]
        mine += [flag for r in method.recipes.values() if r.own for flag in commandline.flags(r.own, "seg.")]
        found[name] = list(dict.fromkeys([*mine, *common]))
    return found


def tell_presets() -> dict[str, dict[str, str]]:
    """Method -> preset -> what is trained, and the usual refiner and segmenter, in words."""
    registry.load_methods()
    return {name: {p: _tell_preset(name, p) for p in method.recipes} for name, method in registry.SEEDS.items()}


def _tell_preset(method: str, preset: str) -> str:
    cfg = default_config(method, preset)
    trained = list(cfg.cam.phases())
    if load_data_sets()[cfg.data].aim == "boxes":
        ends = "draws boxes"
    elif cfg.segmenter == OWN:
        ends = f"segmenter {OWN} (cam predicts the masks itself)"
    else:
        ends = f"refiner {cfg.refiner}, segmenter {cfg.segmenter}"
        parts = (("aff", cfg.aff), ("seg", cfg.seg))
        trained += [(name, part) for name, part in parts if isinstance(part, contract.Phase)]
    return f"{', '.join(f'{name} {_tell_length(phase.fit)}' for name, phase in trained)}; {ends}"


def _tell_length(fit: settings.Fit) -> str:
    if fit.steps is None:
        return f"{fit.epochs} epochs"
    return f"{fit.steps} updates" if fit.steps else "not trained (frozen)"


@dataclass(frozen=True)
class Job:
    """The input of a step: the configuration, the data set and the run folder."""

    cfg: Config
    catalog: Catalog
    run: RunFolder
    large: Mapping[str, tuple[Path, Path | None]] = field(default_factory=dict)
    """Images that are worked on as smaller copies (step.lib.sizes): their own files, and those of their masks."""

    @property
    def train_list(self) -> str:
        """Name of the training list, also used for CAMs and pseudo masks."""
        return self.cfg.train_list or self.catalog.default_train_list()

    def listed(self, split: str) -> list[str]:
        """Ids of a list; none if the data set has no such list."""
        return self.catalog.ids(split) if self.catalog.has_list(split) else []

    def train_ids(self) -> list[str]:
        """Ids of the training list."""
        return self.catalog.ids(self.train_list)

    def cam_ids(self) -> list[str]:
        """Ids that get CAMs and pseudo masks: the training list, then images of the scored list that are not in it."""
        ids = self.train_ids()
        if self.catalog.has_list(self.cfg.score_list):
            known = set(ids)
            ids = ids + [i for i in self.catalog.ids(self.cfg.score_list) if i not in known]
        return ids

    def shown_ids(self) -> list[str]:
        """Training images in the report: from the scored list, if there is one."""
        scored = self.catalog.has_list(self.cfg.score_list)
        return pick_evenly(self.catalog.ids(self.cfg.score_list if scored else self.train_list), REPORT_IMAGES)

    def predicted_ids(self) -> list[str]:
        """Ids that the segmentation network predicts: the validation list, then other images of the report."""
        return list(dict.fromkeys([*self.catalog.ids(self.cfg.val_list), *self.shown_ids()]))

    @property
    def further_weights(self) -> tuple[str, ...]:
        """CAM networks weights/cam.KIND.pt that are scored beside the selected one: the last one, and of boxes the one
        with the best Loc Top-1. None where no epoch is selected."""
        cam = self.cfg.cam
        if cam.selection == "last" or cam.released or cam.fit.steps == 0:
            return ()
        return ("last", "loc_top1") if cam.selection == "val_boxes" else ("last",)

    def cam_networks(self) -> list[str]:
        """Names of the CAM method's networks that step 1 makes."""
        return [name for name, _ in self.cfg.cam.needed_phases()] + [f"cam.{kind}" for kind in self.further_weights]

    def further_files(self, path: Callable[[str, str], Path], ids: Iterable[str]) -> list[Path]:
        """The paths ``path(id, kind)`` of the files that ``further_weights`` make of images."""
        return [path(image_id, kind) for kind in self.further_weights for image_id in ids]

    def further_cam_ids(self) -> list[str]:
        """Ids that get CAMs of ``further_weights``: the scored list, where it is scored."""
        split = self.cfg.score_list
        scored = self.catalog.has_list(split) and all(self.catalog.mask_path(i) for i in self.catalog.ids(split))
        return self.catalog.ids(split) if scored else []

    @property
    def single_stage(self) -> bool:
        """Whether the CAM network is also the segmenter."""
        return self.cfg.segmenter == OWN

    @property
    def aim(self) -> str:
        """What the run makes, which determines its steps (step.Aim)."""
        if self.catalog.aim == "masks" and self.single_stage:
            return "single_stage"
        if self.catalog.aim == "masks" and not self.refine_method().is_trained:
            return "plain_masks"
        return self.catalog.aim

    def machine(self, recipe: Checked, device: torch.device) -> settings.Machine:
        """The machine at the precision that a network's recipe asks for; of what is no network, float32."""
        return self.cfg.machine.with_recipe(recipe.amp if isinstance(recipe, contract.Phase) else "off", device)

    def saliency_folder(self) -> Path:
        """Folder of the saliency maps, if the method is trained with any."""
        return self.cfg.saliency or self.catalog.root / "Saliency"

    def segments_folder(self) -> Path:
        """Folder of class-agnostic segments, if the refiner wants any."""
        return self.cfg.segments or self.catalog.root / "Segments"

    def texts(self) -> dict[str, str]:
        """Words for classes by their names, of those that have some of their own; DataError for a damaged file."""
        path = self.cfg.texts or self.catalog.root / "texts.csv"
        return read_texts(path, self.catalog.classes) if self.cfg.texts or path.exists() else {}

    def mask_files(self, mask: Callable[[str], Path], ids: Iterable[str]) -> list[Path]:
        """The paths ``mask(id)`` of the masks that a step makes, and their overlays if requested."""
        masks = [mask(i) for i in ids]
        return masks + [self.run.overlay(path) for path in masks] if self.cfg.overlays else masks

    def refine_method(self) -> type[contract.Refiner]:
        """The refiner's class."""
        return registry.REFINERS[self.cfg.refiner]


def recorded_config(run: RunFolder, root: Path | None = None) -> Config:
    """The configuration of a finished or unfinished run as its run.json has it, to look at the run: start weights and
    released checkpoints, of which it keeps a fingerprint only, are those of the preset.

    ``root``: folder of the data set; None: the one recorded. Raises ValueError for a folder without a run, or one whose
    settings this version does not know.
    """
    record = run.record()
    if not record:
        raise ValueError(f"{run.root} is no run folder: it has no run.json.")
    flat = {k: v for k, v in record["config"].items() if k.rpartition(".")[2] not in ("weights", "released", "texts")}
    if root is None and "data_root" not in record:
        raise ValueError(f"{run.root} does not say where its data set is: give --root DIR.")
    known = ("method", "preset", "refiner", "segmenter")
    if lacking := [name for name in (*known, "data") if not isinstance(flat.get(name), str)]:
        raise ValueError(f"{run.root}/run.json is damaged: its config has no {', '.join(lacking)}.")
    names = (flat.pop(name) for name in known)
    usual = dataclasses.replace(default_config(*names), run=run.root, root=root or Path(record["data_root"]))
    try:
        return settings.restored(usual, flat)
    except ValueError as error:
        raise ValueError(f"{run.root} was made by another version of this code: {error}.") from None


def open_job(cfg: Config) -> Job:
    """Open the data set and name the run folder (nothing is written yet)."""
    run = cfg.run or Path("runs") / f"{cfg.method}-{cfg.data}"
    catalog, folder = open_catalog(cfg.data, cfg.data_root()), RunFolder(run)
    return Job(cfg, catalog, folder, sizes.use_copies(catalog, folder, cfg.long_side) if cfg.long_side else {})
