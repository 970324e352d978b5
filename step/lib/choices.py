"""Methods, presets and options of run_sample.py, listed without importing PyTorch.

The names are read from the decorators in the sources (``@seed("seam")``), the presets from the keys of ``recipes``, the
idea of a method from the docstring of its file. The flags of all recipes and what they train are found by importing
them once; both are cached in .cache until a source file changes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from misc import commandline
from net.names import OWN

ROOM = Path(__file__).resolve().parents[2]
INDEX = ROOM / ".cache" / "flags.json"

PHOTOS_DATA = "folder"
"""The data set of people's own pictures."""
PHOTOS_METHOD = "irn_cam"
"""METHOD where none is named and the data are that set."""

OPTIONS = (
    ("--data NAME", "data set; default: the generated sample, or with --preset published VOC 2012"),
    ("--root DIR", "folder of the data set (docs/your_data.md for your own)"),
    ("--out DIR", "run folder, where all files go; default: runs/METHOD-DATA"),
    ("--preset NAME", "recipe: sample (tiny, minutes), published (the paper's), photos (your pictures)"),
    ("--refiner NAME", "how pseudo masks are made from CAMs, steps 3 to 5"),
    ("--segmenter NAME", "segmentation network, steps 6 and 7; own: the method's own masks"),
    ("--steps 2-4 report", "steps to run, by number, name or range; default: all unfinished ones"),
    ("--redo", "run the named steps and all later ones again"),
    ("--force", "continue in a run folder that has other settings"),
    ("--train-list LIST", "training images, a list of the data set or a file"),
    ("--val-list LIST", "images that the segmentation network is tested on"),
    ("--long-side N", "work on smaller copies of larger images; masks come at full size too"),
    ("--masks truth", "train the segmentation network on true masks, for the upper bound"),
    ("--overlays", "also write the masks drawn over their images"),
    ("--cams RUN", "use the CAMs of another run folder"),
    ("--seed N", "seed of weights, order and augmentation"),
    ("--cam.weights FILE", "weights to start from; also none, pretrained; --aff.weights, --seg.weights too: cam"),
    ("--cam.fit.epochs N", "length of the training; --aff.fit..., --seg.fit... likewise"),
    ("--cam.fit.batch-size N", "images per update, over all GPUs"),
    ("--cam.fit.lr RATE", "learning rate"),
    ("--machine.device NAME", "auto, cpu or cuda"),
    ("--machine.amp KIND", "precision: recipe, off (float32), bf16, fp16, fast"),
    ("--machine.workers N", "processes that read images, and on a CPU compute them"),
)
"""Options in the short help; --help-all shows all of them with values and ranges."""


@functools.cache
def _registered(folder: str, decorator: str) -> dict[str, tuple[str, ...]]:
    """Names that a decorator registers in a folder of sources, each with the presets of its class, as far as the source
    shows."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted((ROOM / folder).rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError:
            continue  # importing the file reports the error, with the line
        presets = _recipe_names(tree)
        for node in tree.body:
            for call in getattr(node, "decorator_list", ()):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator:
                    names = [word.value for word in call.args if isinstance(word, ast.Constant)]
                    found |= dict.fromkeys(names, presets.get(node.name, ()))
    return dict(sorted(found.items()))


def _recipe_names(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    """Class -> the keys of the dict in its line ``CLASS.recipes = {...}``."""
    return {
        line.targets[0].value.id: tuple(key.value for key in line.value.keys if isinstance(key, ast.Constant))
        for line in tree.body
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Dict)
        and isinstance(line.targets[0], ast.Attribute) and line.targets[0].attr == "recipes"
        and isinstance(line.targets[0].value, ast.Name)
    }  # fmt: skip


def methods() -> dict[str, tuple[str, ...]]:
    """The CAM methods, each with its presets."""
    return _registered("net/seed", "seed")


def idea_of(method: str) -> str:
    """The first sentence of the docstring of a method's file: its idea, authors, venue and year; "" where the file is
    not one of net/seed."""
    place = ROOM / "net" / "seed"
    path = next((p for p in (place / f"{method}.py", place / method / "__init__.py") if p.is_file()), None)
    if path is None:
        return ""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    # without the places in docs/spec
    return re.sub(r"\((.*?)(?:; [^;()]*\w\.md[^;()]*)+\)", r"(\1)", " ".join(text.partition("\n\n")[0].split()))


def refiners() -> list[str]:
    """Names of ``--refiner``."""
    return list(_registered("net/refine", "refiner"))


def segmenters() -> list[str]:
    """Names of ``--segmenter``."""
    return [*_registered("net/segment", "segmenter"), OWN]


def data_sets() -> list[str]:
    """Names of ``--data``."""
    return list(_registered("voc12/data_sets", "data_set"))


def value(argv: Sequence[str], name: str) -> str | None:
    """The value given to a flag; of several the last one."""
    for i, word in reversed(list(enumerate(argv))):
        flag, equals, given = word.partition("=")
        if flag.replace("_", "-") == name and (equals or i + 1 < len(argv)):
            return given if equals else argv[i + 1]
    return None


def method_of(argv: Sequence[str]) -> str:
    """The METHOD of a command line, its first word, or what is meant without one."""
    if argv and not argv[0].startswith("-"):
        return argv[0]
    return PHOTOS_METHOD if value(argv, "--data") == PHOTOS_DATA else "seam"


def preset_of(argv: Sequence[str], presets: Collection[str]) -> str:
    """The preset of a command line for a method that has these ones: the given one, or photos for people's own
    pictures where there is one, or sample, or the method's first."""
    wanted = ("photos", "sample") if value(argv, "--data") == PHOTOS_DATA else ("sample",)
    found = next((name for name in (*wanted, *presets) if name in presets), "sample")
    return value(argv, "--preset") or found


def default_presets(method: str) -> str:
    """Which preset a method takes where none is named, in words."""
    presets = methods().get(method, ())
    usual, own = (preset_of(words, presets) for words in ((), ("--data", PHOTOS_DATA)))
    return f"default: {usual}" if own == usual else f"default: {usual}, with --data {PHOTOS_DATA}: {own}"


def check_words(argv: Sequence[str]) -> None:
    """Raises WrongCall for the first unknown name or flag."""
    method = method_of(argv)
    if "net.registry" not in sys.modules:  # else the registry is loaded, and may know methods registered elsewhere
        _check_names(method, {name: value(argv, f"--{name}") for name in ("preset", "refiner", "segmenter", "data")})
    known = known_flags(method)
    for flag in commandline.given_flags(argv):
        if known and flag not in (*known, "--help-all"):
            hint = commandline.did_you_mean(flag, known)
            told = f"{method} has no flag {flag}.{hint} All: python run_sample.py {method} --help-all"
            raise commandline.WrongCall(told)


def _check_names(method: str, given: Mapping[str, str | None]) -> None:
    rooms = {"method": "seed", "refiner": "refine", "segmenter": "segment"}
    tables = {"method": (method, list(methods())), "refiner": (given["refiner"], refiners()),
              "segmenter": (given["segmenter"], segmenters()), "data set": (given["data"], data_sets()),
              "preset": (given["preset"], methods().get(method, ()))}  # fmt: skip
    for what, (name, names) in tables.items():
        # a file that can't be read is reported by the registry, with the reason
        if name is None or name in names or not names or (ROOM / "net" / rooms.get(what, "") / f"{name}.py").exists():
            continue
        told = {"preset": f"{method} has no preset {name!r}.", "data set": f"--data {name}: there is no such data set."}
        raise commandline.WrongCall(f"{told.get(what, f'There is no {what} {name!r}.')} There are: {', '.join(names)}.")


def known_flags(method: str) -> list[str]:
    """All flags of a method with any refiner and segmenter; empty if its file does not import."""
    return _index()["flags"].get(method, [])


def told_presets(method: str) -> dict[str, str]:
    """Preset -> what it trains, its refiner and segmenter; empty if the method's file does not import."""
    return _index()["presets"].get(method, {})


def _index() -> dict[str, dict[str, Any]]:
    """What is known of the recipes: "flags" and "presets" by method."""
    key = _sources_key()
    try:
        index = json.loads(INDEX.read_text(encoding="utf-8"))
        if index["key"] == key and {"flags", "presets"} <= index.keys():
            return index
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no cache yet, or from other sources
    from step.lib.config import all_flags, tell_presets  # imports PyTorch: once after a change

    index = {"key": key, "flags": all_flags(), "presets": tell_presets()}
    try:
        INDEX.parent.mkdir(exist_ok=True)
        part = INDEX.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(index), encoding="utf-8")
        part.replace(INDEX)
    except OSError:
        pass  # a read-only checkout: slower, same result
    return index


def _sources_key() -> str:
    digest = hashlib.sha256()
    for folder in ("misc", "net", "step", "voc12"):
        for path in sorted((ROOM / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOM)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def help_text(argv: Sequence[str] = ()) -> str:
    """The short help, one screen; with a METHOD on the command line also its idea and what its presets train. Raises
    WrongCall for a METHOD that there is not."""
    from step import STEPS

    listed = ", ".join(f"{i} {s.name}" for i, s in enumerate(STEPS, 1))
    method = method_of(argv)
    _check_names(method, dict.fromkeys(("preset", "refiner", "segmenter", "data")))
    told = _tell_method(method) if argv and argv[0] == method else []
    default = default_presets(method) + ("" if told else f" (of {method})")
    options = [(name, f"{text}; {default}" if name.startswith("--preset ") else text) for name, text in OPTIONS]
    names = [
        ("METHOD", ", ".join(methods())),
        ("--refiner", ", ".join(refiners())),
        ("--segmenter", ", ".join(segmenters())),
        ("--data", ", ".join(data_sets())),
    ]
    if not told:
        presets = ", ".join(methods().get(method, ()))
        names.append(("--preset", f"of {method}: {presets}; of another: python run_sample.py METHOD --help"))
    return "\n".join(
        [
            "usage: python run_sample.py [METHOD] [--preset NAME] [--data NAME --root DIR] [--out RUN] [options]",
            "",
            *textwrap.wrap(f"Segmentation masks from image-level tags, in nine steps: {listed}.", commandline.WIDTH),
            "",
            *told,
            "Available (any refiner and segmenter for any method; own: for methods that predict masks):",
            commandline.columns(names, width=12),
            "",
            "Common options:",
            commandline.columns(options),
            "",
            "python run_sample.py                  SEAM on the generated sample set: minutes on two CPU cores",
            "python run_sample.py seam --preset published --data voc12 --root VOCdevkit/VOC2012 --cam.weights F",
            "python run_sample.py seam --steps 5-7 --aff.walk.beta 10 --out runs/beta10",
            "python run_sample.py METHOD --help-all   every option that has an effect with METHOD, and its value",
        ]
    )


def _tell_method(method: str) -> list[str]:
    """Lines on one method, and an empty one."""
    told = told_presets(method)
    return [
        *textwrap.wrap(f"{method}: {idea_of(method)}", commandline.WIDTH),
        "Its presets, with the networks that they train (cam, aff, seg), usual refiner and segmenter:",
        commandline.columns(told.items(), width=max(12, *map(len, told))) if told else "  (its file does not import)",
        "",
    ]
