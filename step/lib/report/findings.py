"""What a run's scores mean, in sentences: headlines, the worst class and why it is the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ScoreFile = Mapping[str, Mapping[str, Any]]
"""Content of scores.json: name -> score with its provenance."""

MIOU_MEANS = (
    "mIoU: for each class, the pixels that are right as a share of all that are the class or are called so; the mean "
    "over the classes, background included. 100 is perfect."
)
_BOX_MEANS = {
    "boxes: Loc Top-1": "Class and box are right: the class with the highest score is the true one, and its box "
    "overlaps a true box by more than half.",
    "boxes: GT-Known": "The box is right if the class is given: it overlaps a true box by half or more.",
    "boxes: MaxBoxAccV2": "Boxes at the best threshold for each of the overlaps 30, 50 and 70 %, the class given; the "
    "threshold is searched on these images.",
}


@dataclass(frozen=True)
class Headline:
    """A score at the top of the page."""

    title: str
    path: tuple[str, ...]
    """Where its number stands in scores.json."""
    unit: str
    provenance: str
    meaning: str


@dataclass(frozen=True)
class Finding:
    """A remark in a frame."""

    title: str
    texts: list[str]
    numbers: list[tuple[str, tuple[str | int, ...]]]
    """Names and places in scores.json of numbers in a row."""
    label: str = ""
    calm: bool = False
    """Whether it is no fault."""


def mask_scores(scores: ScoreFile) -> dict[str, str]:
    """The scores of masks that stand for the stages: title -> name in scores.json. The prediction is that after the
    CRF, the CAM that at the searched background score."""
    found = {}
    for name, score in scores.items():
        if "miou" not in score:
            continue
        title = {"make_cam": "CAM", "random_walk": "pseudo mask", "infer_seg": "prediction"}.get(score.get("step", ""))
        if title is None:
            title = "CAM" if name.startswith("CAM") else "pseudo mask" if name.startswith("pseudo") else "prediction"
        found.setdefault(title, name)
    return found


def find_headlines(scores: ScoreFile) -> list[Headline]:
    """The scores to read first, in the order of the steps."""
    lines = [
        Headline(title, (name, "miou"), "% mIoU", tell_provenance(scores[name]), _meaning(title, scores[name]))
        for title, name in mask_scores(scores).items()
    ]
    lines += [
        Headline("single objects", (name, "ap50"), "% AP50", tell_provenance(s),
                 "Average precision of single objects that overlap a true one by half or more.")
        for name, s in scores.items() if "ap50" in s
    ]  # fmt: skip
    lines += [
        Headline(name.removeprefix("boxes: "), (name, "value"), "%", tell_provenance(scores[name]), meaning)
        for name, meaning in _BOX_MEANS.items() if name in scores
    ]  # fmt: skip
    return lines


def tell_provenance(score: Mapping[str, Any]) -> str:
    """What a score was measured on, and what was known."""
    told = [f"{score['images']} images of {score['split']}", f"tags used: {score['tags']}"]
    if score.get("threshold") is not None:
        told.append(f"background score {score['threshold']:.2f}, {score['threshold_choice']}")
    if score.get("start_weights"):
        told.append(f"start weights: {score['start_weights']}")
    return "; ".join(told)


def _meaning(title: str, score: Mapping[str, Any]) -> str:
    if title == "CAM":
        searched = str(score.get("threshold_choice", "")).startswith("searched")
        hint = ", at the threshold that suits the truth of these images best: slightly optimistic" if searched else ""
        return f"How well the classifier's maps alone cover the objects{hint}."
    if title == "pseudo mask":
        return "How good the masks are that were made from the tags; the segmentation network learns from them."
    seen = score.get("seen_in_training", 0)
    if seen:
        return f"Masks without tags, but {seen} of these images were trained on: slightly optimistic."
    return "Masks of images that no network was trained on, without tags: the figure to compare."


@dataclass(frozen=True)
class ClassFinding:
    """What becomes of a foreground class in a confusion matrix; fractions in [0, 1]."""

    name: str
    number: int
    """Its row in the matrix."""
    recall: float
    """Of its true pixels, those that are found."""
    precision: float
    """Of the pixels called so, those that are right."""
    lost_to: tuple[tuple[str, float], ...]
    """What its missed true pixels are called, with shares of its true pixels, the largest first."""
    taken_from: tuple[tuple[str, float], ...]
    """What the pixels wrongly called so are, with shares of all that are called so, the largest first."""

    @property
    def reason(self) -> str:
        """The largest loss, in words."""
        other = [name for name, _ in self.lost_to[:1] if name not in ("background", "no class")]
        if 1 - self.recall >= 1 - self.precision:
            if other:
                return f"it is taken for {other[0]}"
            return "parts of it are missed" if self.recall > 0.1 else "it is hardly found at all"
        source = self.taken_from[0][0] if self.taken_from else "background"
        return "it spreads over the background" if source == "background" else f"{source} is taken for it"

    def sentence(self) -> str:
        """The figures behind the reason."""
        parts = [f"{100 * self.recall:.0f}\u00a0% of its true pixels are found"]
        parts += [f"{100 * share:.0f}\u00a0% are taken for {name}" for name, share in self.lost_to[:2] if share >= 0.02]
        told = ", ".join(parts)
        wrong = [f"{100 * share:.0f}\u00a0% are {name}" for name, share in self.taken_from[:2] if share >= 0.02]
        if wrong:
            told += f". Of the pixels called {self.name}, {' and '.join(wrong)}"
        return told + "."


def main_number(score: Mapping[str, Any]) -> tuple[str, str]:
    """Key of a score's main number, and the unit that is shown with it; of none "miou"."""
    units = {"miou": "", "ap50": " AP50", "value": " %"}
    key = next((key for key in units if key in score), "miou")
    return key, units[key]


def _tables(score: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Confusion matrix (n, n) of a score and pixels predicted as no class (n,); empty where it has none."""
    matrix = np.array(score["confusion"], float)
    return matrix, np.array(score["predicted_void"] or [0] * len(matrix), float)


def examine_class(score: Mapping[str, Any], number: int) -> ClassFinding:
    """What becomes of the class with this row in a score's confusion matrix (rows: truth)."""
    names = [c["name"] for c in score["classes"]]
    matrix, void = _tables(score)
    true, called = matrix[number].sum() + void[number], matrix[:, number].sum()
    lost = [(names[j], matrix[number, j] / true) for j in range(len(names)) if j != number] if true else []
    lost += [("no class", void[number] / true)] if true else []
    taken = [(names[j], matrix[j, number] / called) for j in range(len(names)) if j != number] if called else []

    def largest(shares: list[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
        return tuple(sorted(((n, float(s)) for n, s in shares if s > 0), key=lambda pair: -pair[1]))

    hits = matrix[number, number]
    recall, precision = float(hits / true) if true else 0.0, float(hits / called) if called else 0.0
    return ClassFinding(names[number], number, recall, precision, largest(lost), largest(taken))


def extreme_classes(score: Mapping[str, Any]) -> tuple[int, int] | None:
    """Numbers of the worst and the best foreground class that occurs in the truth; None if none does, or if there is no
    confusion matrix."""
    matrix, void = _tables(score)
    if not len(matrix):
        return None
    there = (matrix.sum(1) + void)[1:] > 0
    ious = [(c["iou"], n) for n, c in enumerate(score["classes"]) if n and c.get("iou") is not None and there[n - 1]]
    return (min(ious)[1], max(ious)[1]) if ious else None


def row_shares(score: Mapping[str, Any]) -> tuple[list[str], list[list[float]], list[str]]:
    """Names of the classes with true pixels, what share of them is taken for each class in percent, names of what they
    are taken for: all classes, and where a mask left pixels out, "no class"."""
    matrix, void = _tables(score)
    if not len(matrix):
        return [], [], []
    names = [c["name"] for c in score["classes"]]
    full = np.concatenate([matrix, void[:, None]], 1) if void.any() else matrix
    columns = [*names, "no class"] if void.any() else names
    there = full.sum(1) > 0
    shares = 100 * full[there] / full[there].sum(1, keepdims=True)
    used = there if full.shape[1] == len(names) else np.r_[there, True]
    used = used | (full.sum(0) > 0)
    kept = [name for name, use in zip(columns, used, strict=True) if use]
    return [n for n, t in zip(names, there, strict=True) if t], shares[:, used].tolist(), kept


def tell_steps(title_ious: Sequence[tuple[str, float | None]]) -> str:
    """Where a class wins or loses: IoUs of the stages in a row, and the largest change."""
    known = [(title, value) for title, value in title_ious if value is not None]
    if len(known) < 2:
        return ""
    changes = [(b - a, title, before) for (before, a), (title, b) in zip(known, known[1:], strict=False)]
    change, title, before = min(changes)
    if change < -1:
        return f"It loses {-change:.1f} points from {before} to {title}."
    return f"It gains at every step; what is missing is missing in the {known[0][0]} already."
