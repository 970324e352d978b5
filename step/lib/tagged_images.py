"""For masks of new images whose classes are known: the tags of each, a network that needs no training, and how a mask
is made of its maps."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from misc import distributed
from misc.config import flatten, override, restored
from misc.crf.dense import CRFSettings
from misc.files.ids import composed, strip_image_suffix
from misc.files.imagefiles import real_path
from misc.files.runfolder import RunFolder
from net import registry
from net.contract import Phase, Refiner, RefineSettings
from net.model import Model, load_model
from net.start_weights import StartWeights
from step.lib.config import default_config
from step.lib.inference import settle_walk
from voc12.lists import shorten
from voc12.table import read_table
from voc12.tags import read_classes, read_texts

Refinement = Literal["auto", "walk", "crf", "threshold"]
_THRESHOLD = 0.3
"""Background score where no scored list has told a better one."""


@dataclass(frozen=True)
class MaskRule:
    """How a mask is made of the maps of an image: a refiner and its settings."""

    refiner: Refiner
    """On the CPU, in evaluation mode."""
    settings: RefineSettings
    """Its recipe: ``walk`` with the background score filled in, ``ignore_below``."""
    told: str
    """In words."""
    classes: tuple[str, ...] | None = None
    """Those that a trained refiner knows; None for one that needs no training."""
    fingerprint: str = ""
    """Of a trained refiner's weights file."""

    @property
    def precision(self) -> str:
        """That of a trained refiner's recipe; float32 for one without training."""
        return self.settings.amp if isinstance(self.settings, Phase) else "off"

    def record(self) -> dict[str, Any]:
        """What decides the masks, as JSON has it."""
        found = {"refined by": self.told, "ignore_below": self.settings.ignore_below}
        if self.fingerprint:
            found["refiner"] = self.fingerprint
        else:
            found["refiner settings"] = json.loads(json.dumps(flatten(self.settings.walk)))
        return found


def split_tags(text: str, known: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of classes in the words of ``--tags``: separated by semicolons where there is one, else by commas; a text
    that is the name of a ``known`` class is that class, whatever it holds."""
    if text.strip() in known:
        return (text.strip(),)
    parts = (part.strip() for part in text.split(";" if ";" in text else ","))
    return tuple(dict.fromkeys(part for part in parts if part))


def read_image_tags(
    path: Path, images: Mapping[str, Path], known: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Tags of images from a table like labels.csv (voc12/table.py).

    An image is found by its path below the table's folder, or below ``images`` there; or by its name, where only one
    line and only one image have it.

    Args:
        path: of the table. Without ``known`` classes, those of a classes.txt beside it are taken, where there is one.
        images: {id: file}.
        known: the classes that the network knows; None: those of the table.

    Returns:
        The classes, and {id: names of the classes in it} of every image.

    Raises:
        ValueError: a damaged table, a class that is not known, images without a line (the first ten).
    """
    listed = path.parent / "classes.txt"
    if known is None and listed.is_file():
        known = read_classes(listed)
    folder = composed(str(real_path(path.parent)))

    def key(written: str) -> str:
        name = composed(written.strip()).replace("\\", "/").removeprefix(f"{folder}/").removeprefix("./")
        return strip_image_suffix(name).removeprefix("images/")

    table = read_table(path, known, key)
    lines = {composed(line): tags for line, tags in table.tags.items()}
    named = Counter(os.path.basename(line) for line in lines)
    by_name = {os.path.basename(line): line for line in lines if named[os.path.basename(line)] == 1}
    keys = {image_id: key(str(real_path(file))) for image_id, file in images.items()}
    count = Counter(os.path.basename(line) for line in keys.values())
    found: dict[str, tuple[str, ...]] = {}
    for image_id, line in keys.items():
        name = os.path.basename(line)
        if line not in lines and count[name] == 1:
            line = by_name.get(name, line)
        if line in lines:
            found[image_id] = tuple(c for c, there in zip(table.classes, lines[line], strict=True) if there)
    missing = [str(file) for image_id, file in images.items() if image_id not in found]
    if missing:
        raise ValueError(
            f"{path} has no line for {len(missing)} of {len(images)} images ({shorten(missing)}). Add them (no object: "
            "write 'file,'), or leave them out."
        )
    return table.classes, found


def untrained_model(
    method: str, preset: str | None, weights: str | None, classes: Sequence[str], texts: Path | None
) -> tuple[Model, MaskRule]:
    """A CAM network that nothing trains, such as CLIP-ES', and the rule of its recipe for masks; every pixel gets a
    class.

    Args:
        method: its name.
        preset: of the recipe; None: photos where there is one, else published.
        weights: as ``--cam.weights``; None: those of the recipe.
        classes: names of the foreground classes.
        texts: file of words for classes (``--texts``).

    Raises:
        ValueError: the method is trained, or there is no such method, preset or weights; as ``Network.load_weights``.
    """
    registry.load_methods()
    if preset is None:
        known = registry.find_method(registry.SEEDS, method, "method").recipes
        preset = "photos" if "photos" in known else "published"
    cfg = default_config(method, preset)
    recipe = cfg.cam
    if recipe.fit.steps != 0 or len(recipe.phases()) > 1:
        free = [n for n, cls in registry.SEEDS.items() if any(r.cam.fit.steps == 0 for r in cls.recipes.values())]
        raise ValueError(
            f"--method {method}: its network is trained first: make a run (python run_sample.py {method} ...) and give "
            f"--run RUNFOLDER. Without training: {', '.join(sorted(free))}."
        )
    chosen = weights or recipe.weights
    start = StartWeights.parse(chosen)
    start.check("--weights", None)
    torch.manual_seed(0)
    network = recipe.network.build(len(classes), {})
    network.set_class_texts(classes, {} if texts is None else read_texts(texts, classes))
    for line in start.load(network, Path("cam.pt")):
        distributed.say(f"{method}: {line}")
    if start.word == "none":
        distributed.say(f"{method}: random weights, so that these results mean nothing.")
    made_by = {"method": method, "preset": preset, "weights": start.identity(), **network.notes()}
    settings = override(cfg.aff, {"ignore_below": 0.0})
    refiner = registry.REFINERS[cfg.refiner]
    if refiner.is_trained:
        raise ValueError(f"--method {method}: its refiner {cfg.refiner} is trained: make a run, and give --run.")
    rule = MaskRule(refiner(), settings, f"the refiner {cfg.refiner} of {method}'s recipe {preset}")
    return Model(network.eval(), method, tuple(classes), recipe, json.dumps(made_by, ensure_ascii=False)), rule


def run_rule(run: RunFolder, refine: Refinement, threshold: float | None) -> MaskRule:
    """How masks are made of a run's maps.

    Args:
        run: the run folder.
        refine: auto: as the run makes its pseudo masks, or by a CRF where its refiner isn't trained yet. walk: as the
            run makes them. crf, threshold: from a constant background score.
        threshold: that score; None: the best one on the run's scored list, else 0.3.

    Raises ValueError for walk where the run has no trained refiner.
    """
    config = run.record().get("config", {})
    if refine in ("auto", "walk"):
        if run.weights("aff").exists():
            model = load_model(run.weights("aff"), "aff")
            assert isinstance(model.network, Refiner)
            settings = override(model.recipe, {"walk": settle_walk(model.recipe.walk, run)})
            told = f"the random walk of the run's refiner {model.method}"
            return MaskRule(model.network, settings, told, model.classes, model.fingerprint)
        plain = _plain_refiner(run, config)
        if plain is not None:
            return plain
    if refine == "walk":
        raise ValueError(
            "--refine walk: the run has no trained refiner for these classes. Run train_aff, or leave it."
        )
    return constant_rule(refine, run.scores().get("CAM", {}).get("threshold") if threshold is None else threshold)


def constant_rule(refine: Refinement, threshold: float | None) -> MaskRule:
    """How masks are made from a constant background score (None: 0.3): by it alone (``refine`` threshold), or by a
    dense CRF."""
    score = _THRESHOLD if threshold is None else threshold
    background = {"background": "constant", "threshold": score}
    if refine == "threshold":
        return _fixed("none", background, f"the background score {score:g} alone")
    told = f"a dense CRF from the background score {score:g} (no refiner was used)"
    return _fixed("crf", {**background, "crf": CRFSettings()}, told)


def _fixed(name: str, changes: Mapping[str, Any], told: str) -> MaskRule:
    """A refiner without training, and what differs from its published settings."""
    registry.load_methods()
    cls = registry.REFINERS[name]
    recipe = override(cls.recipes["published"], {f"walk.{field}": value for field, value in changes.items()})
    return MaskRule(cls(), recipe, told)


def _plain_refiner(run: RunFolder, config: Mapping[str, Any]) -> MaskRule | None:
    """The run's refiner if it is one without training, with the run's settings."""
    name = config.get("refiner")
    registry.load_methods()
    if name not in registry.REFINERS or registry.REFINERS[name].is_trained:
        return None
    try:
        recipe = default_config(config["method"], config["preset"], name).aff
        given = {k.removeprefix("aff."): v for k, v in config.items() if k.startswith("aff.")}
        settings = restored(recipe, given)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{run.root / 'run.json'} describes the refiner {name} in another version's settings ({error}). Give "
            "--refine crf, or make the run again."
        ) from None
    settings = override(settings, {"walk": settle_walk(settings.walk, run)})
    return MaskRule(registry.REFINERS[name](), settings, f"the run's refiner {name}")
