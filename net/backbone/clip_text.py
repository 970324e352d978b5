"""Texts of classes for CLIP: prompts, synonyms, background words, and their features (clipes.md section 3).

The tokeniser is open_clip's, imported when texts are encoded and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.checked import Checked, check
from net.backbone.clip import TextTower

TEMPLATES = ("a clean origami {}.",)
BACKGROUND = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway",
    "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley",
    "bridge", "sign",
)  # fmt: skip
"""What else may be in an image; a class competes with these for the image's probability."""
PUBLISHED_TEXTS: Mapping[str, str] = {
    "person": "person with clothes,people,human", "bird": "bird avian", "chair": "chair seat",
    "tvmonitor": "tvmonitor screen", "backpack": "backpack,bag", "umbrella": "umbrella,parasol",
    "handbag": "handbag,purse", "tie": "necktie", "snowboard": "sknowboard", "baseball glove": "glove",
    "spoon": "dessertspoon", "remote": "remote control", "hair drier": "hairdrier,blowdrier",
}  # fmt: skip
"""Published texts of VOC's and COCO's classes where they are not the name (sknowboard: as published)."""
# COCO's own names of classes that the published lists have under VOC's
_VOC_NAMES = {
    "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
    "dining table": "diningtable", "tv": "tvmonitor",
}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """The texts that CLIP compares an image with."""

    classes: tuple[str, ...]
    """The text of each class."""
    background: tuple[str, ...]
    """What else may be in an image."""
    templates: tuple[str, ...]
    """Sentences with {} where the text stands; the features of all are averaged."""

    def record(self) -> dict[str, Any]:
        """As an object of a JSON file."""
        return {name: list(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class TextOptions(Checked):
    """Which texts stand for the classes and for the background."""

    published: bool = False
    """Take the published words for classes of VOC and COCO (person: person with clothes,people,human); else the text of
    a class is its name, with spaces for underscores. A text that the data set gives takes precedence."""
    background: tuple[str, ...] = BACKGROUND
    """Words for what else may be in an image. Those that occur in a class's text are left out: a class must not compete
    with itself."""
    templates: tuple[str, ...] = TEMPLATES
    """Sentences with {} where a text stands."""

    def cross_check(self) -> None:
        """Raises ValueError where a template has no place for a text, and where there is no background: a class alone
        would have no gradient."""
        good = bool(self.templates) and all("{}" in template for template in self.templates)
        check(good, "templates", self.templates, "sentences with a {} in each")
        check(bool(self.background), "background", self.background, "a list of words, at least one")

    def choose(self, names: Sequence[str], own: Mapping[str, str]) -> Texts:
        """Texts of the classes ``names``; ``own``: text of a class by its name, where it has one of its own."""
        classes = tuple(own.get(name) or class_text(name, self.published) for name in names)
        background = background_words(self.background, classes)
        if not background:
            raise ValueError("All background words occur in the texts of classes: name others.")
        return Texts(classes, background, self.templates)


def class_text(name: str, published: bool) -> str:
    """Text of a class without one of its own: its name with spaces for underscores; with ``published`` the words that
    CLIP-ES took for it, if it is a class of VOC or COCO."""
    plain = name.replace("_", " ")
    if not published:
        return plain
    plain = _VOC_NAMES.get(plain, plain)
    return PUBLISHED_TEXTS.get(plain, plain)


def background_words(words: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    """The background words that occur in no class's text: a class must not compete with itself (clipes.md section 3).

    Whole words are compared, without regard to case.
    """
    spoken = [f" {' '.join(_words(text))} " for text in texts]
    return tuple(word for word in words if not any(f" {' '.join(_words(word))} " in text for text in spoken))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def tokenise(texts: Sequence[str], context: int) -> Tensor:
    """Token ids of texts by CLIP's byte pair encoding: (n, context) int64, padded with 0.

    Raises:
        ValueError: open_clip is not installed; a text has more than ``context`` tokens, start and end marks
            included.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ValueError(
            "CLIP's tokeniser is not installed: run  pip install -r requirements-clip.txt  (open_clip_torch). It is "
            "needed once, where texts are encoded."
        ) from error
    tokeniser = SimpleTokenizer()
    ids = torch.zeros(len(texts), context, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        tokens = [tokeniser.sot_token_id, *tokeniser.encode(text), tokeniser.eot_token_id]
        if len(tokens) > context:
            raise ValueError(f"A text of {len(tokens)} tokens is too long for CLIP, which reads {context}: {text!r}.")
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


@torch.no_grad()
def text_features(tower: TextTower, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Unit vectors of names: (n, E) float32. Each template's feature is normalised, then their mean is.

    Raises ValueError as ``tokenise``.
    """
    context = len(tower.positional_embedding)
    features = [
        F.normalize(tower(tokenise([template.replace("{}", name) for name in names], context)), dim=1)
        for template in templates
    ]
    return F.normalize(torch.stack(features).mean(0), dim=1)
