"""Parsing of run_sample.py's command line into a configuration, and its full help."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from misc import commandline
from net import registry
from net.names import OWN
from net.start_weights import NONE, PRETRAINED
from step.lib import choices
from step.lib.config import Config, default_config
from voc12.catalog import load_data_sets
from voc12.generated.sets import LAYOUTS


def parse(argv: Sequence[str]) -> Config:
    """The configuration of a command line. METHOD, if given, comes first; --preset, --refiner and --segmenter determine
    the defaults of the other flags. Raises ValueError for unknown names and impossible values."""
    choices.check_words(argv)
    method = choices.method_of(argv)
    registry.load_methods()
    presets = registry.find_method(registry.SEEDS, method, "method").recipes
    refiner, segmenter = (choices.value(argv, name) for name in ("--refiner", "--segmenter"))
    base = default_config(method, choices.preset_of(argv, presets), refiner, segmenter)
    if choices.value(argv, "--voc12-root") and not choices.value(argv, "--data"):
        base = dataclasses.replace(base, data="voc12")
    cfg = commandline.parse_options(Config, argv, default=base, prog="run_sample.py", add_help=False)
    if not cfg.steps and "--steps" in argv:
        raise ValueError("--steps needs numbers, names or ranges: --steps 2-4 report. Without it, all steps run.")
    if cfg.method != method:
        raise ValueError(f"METHOD comes first: python run_sample.py {cfg.method} ...")
    return cfg


def tell_preset(cfg: Config) -> list[str]:
    """The preset of a run in a line, and where its tiny networks are asked for real images, what that means."""
    told = [f"{cfg.method}, preset {cfg.preset}"]
    if cfg.preset != "sample" or cfg.data in LAYOUTS or cfg.cam.released:
        return told
    real = next((name for name in ("photos", "published") if name in registry.SEEDS[cfg.method].recipes), None)
    random = cfg.cam.start.word == NONE
    told[0] += f": tiny networks{' from random weights' * random}, to show that all steps work; no masks to use"
    if real is not None:
        word = default_config(cfg.method, real).cam.start.word
        start = "its start weights are fetched" if word == PRETRAINED else "with its start weights, --cam.weights FILE"
        told.append(f"Note: for real masks give --preset {real} ({start}).")
    return told


def help_all(argv: Sequence[str]) -> str:
    """The full help: every option that has an effect with this command line (which contains --help-all)."""
    cfg = parse([word for word in argv if word != "--help-all"])
    boxes = load_data_sets()[cfg.data].aim == "boxes"
    hidden = ["method"] + ([] if boxes else ["cam.boxes."])
    if boxes or cfg.segmenter == OWN:
        hidden += ["aff."] + (["seg.", "cam.infer.coarse"] if boxes else [])
    if cfg.data not in LAYOUTS or cfg.root is not None:
        hidden += ["sample."]
    if not any(phase.network.wants_saliency for _, phase in cfg.cam.phases()):
        hidden += ["saliency"]
    return (
        f"Every option that has an effect with {cfg.method}, preset {cfg.preset}, refiner {cfg.refiner}, segmenter "
        f"{cfg.segmenter}, data {cfg.data}, and its value there.\nOther options appear once their setting is chosen "
        f"(python run_sample.py {cfg.method} --cam.fit.schedule cosine --help-all).\n\n"
        + commandline.describe(cfg, hidden)
    )
