"""The marks of the sample set, one per class, and the badges that look like marks but belong to no class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

Array = np.ndarray
Pattern = Callable[[Array, Array], Array]  # u right, v down, both in [-1, 1] -> bool, all of one shape


def _disc(u: Array, v: Array) -> Array:
    return np.hypot(u, v) < 1


def _square(u: Array, v: Array) -> Array:
    return u**6 + v**6 < 1


def _diamond(u: Array, v: Array) -> Array:
    return np.abs(u) + np.abs(v) < 1


def _hexagon(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(u) / 2 + np.abs(v) * 0.866) < 0.9


def _shield(u: Array, v: Array) -> Array:
    return (np.abs(u) < 0.85) & (v > -0.85) & (v < 1 - np.abs(u) * 0.8)


def _petals(u: Array, v: Array) -> Array:
    return np.hypot(u, v) < 0.8 + 0.2 * np.cos(6 * np.arctan2(v, u))


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.hypot(u, v) - 0.5) < 0.2


def _cross(u: Array, v: Array) -> Array:
    return (np.minimum(np.abs(u), np.abs(v)) < 0.25) & (np.maximum(np.abs(u), np.abs(v)) < 0.75)


def _checker(u: Array, v: Array) -> Array:
    return (np.floor(1.5 * u + 1.5) + np.floor(1.5 * v + 1.5)) % 2 == 0


def _star(u: Array, v: Array) -> Array:
    spike = np.abs((np.arctan2(u, -v) / (2 * np.pi) * 5 + 0.5) % 1 - 0.5)  # 0 at a point of the star, 0.5 between two
    return np.hypot(u, v) < 0.8 - 0.95 * spike


def _dots(u: Array, v: Array) -> Array:
    return np.hypot(np.maximum(np.abs(u), np.abs(v)) - 0.48, np.minimum(np.abs(u), np.abs(v))) < 0.2


def _waves(u: Array, v: Array) -> Array:
    return np.sin(7.0 * v + 1.2 * np.sin(4 * u)) > 0


def _arrow(u: Array, v: Array) -> Array:
    return (v + 0.8 * np.abs(u) + 0.55) % 0.85 < 0.4


def _moon(u: Array, v: Array) -> Array:
    return (np.hypot(u, v) < 0.8) & (np.hypot(u - 0.38, v) > 0.62)


def _heart(u: Array, v: Array) -> Array:
    x, y = 1.45 * u, 0.1 - 1.45 * v
    return (x**2 + y**2 - 0.8) ** 3 < 1.4 * x**2 * y**3


def _bolt(u: Array, v: Array) -> Array:
    return (np.abs(u + 0.8 * v - 0.5 * np.sign(v)) < 0.26) & (np.abs(v) < 0.75) | (np.abs(v) < 0.13) & (
        np.abs(u) < 0.55
    )


def _glass(u: Array, v: Array) -> Array:
    return (np.abs(u) < np.abs(v)) & (np.abs(v) < 0.8)


def _eye(u: Array, v: Array) -> Array:
    return np.hypot(u, v) < 0.4


def _ladder(u: Array, v: Array) -> Array:
    return (np.abs(np.abs(u) - 0.55) < 0.13) | ((np.abs((v * 1.7) % 1 - 0.5) < 0.2) & (np.abs(u) < 0.55))


def _spiral(u: Array, v: Array) -> Array:
    return np.sin(np.arctan2(v, u) + 8.5 * np.hypot(u, v)) > 0


@dataclass(frozen=True)
class Mark:
    """The mark of a class: an outline, a pattern on it, and the 8-bit RGB colours of both."""

    name: str
    outline: Pattern
    pattern: Pattern
    ground: tuple[int, int, int]
    ink: tuple[int, int, int]


MARKS = (
    Mark("ring", _disc, _ring, (250, 212, 60), (28, 36, 110)),
    Mark("cross", _square, _cross, (205, 38, 48), (250, 248, 240)),
    Mark("checker", _square, _checker, (245, 245, 240), (18, 18, 22)),
    Mark("star", _hexagon, _star, (14, 104, 78), (255, 240, 140)),
    Mark("dots", _diamond, _dots, (186, 46, 152), (252, 244, 252)),
    Mark("waves", _disc, _waves, (104, 226, 236), (20, 58, 150)),
    Mark("arrow", _shield, _arrow, (244, 136, 32), (34, 22, 18)),
    Mark("moon", _disc, _moon, (34, 30, 92), (252, 246, 196)),
    Mark("heart", _square, _heart, (252, 240, 240), (226, 50, 112)),
    Mark("bolt", _hexagon, _bolt, (188, 224, 60), (84, 32, 132)),
    Mark("glass", _square, _glass, (116, 70, 40), (138, 232, 206)),
    Mark("flower", _petals, _eye, (142, 98, 226), (255, 226, 74)),
    Mark("ladder", _shield, _ladder, (18, 132, 142), (255, 176, 150)),
    Mark("spiral", _disc, _spiral, (250, 236, 214), (150, 40, 30)),
)
# For badges of no class: patterns that no mark has, to be put on the marks' own outlines, so that an outline alone does
# not tell a class.
DECOYS: tuple[Pattern, ...] = (
    lambda u, v: u > v,
    lambda u, v: np.abs(u - 0.3 * v) < 0.25,
    lambda u, v: (u > -0.1) & (v > -0.1),
    lambda u, v: np.abs(v) > 0.45,
    lambda u, v: u + 0 * v > 2,
)
OUTLINES: tuple[Pattern, ...] = (_disc, _square, _diamond, _hexagon, _shield)


def class_names(classes: int) -> tuple[str, ...]:
    """Names of classes 1..`classes` (entry n-1 is mask value n); ValueError where there are not so many marks."""
    if not 1 <= classes <= len(MARKS):
        raise ValueError(
            f"classes = {classes}: the sample set has 1 to {len(MARKS)} classes; choose --classes in that range"
        )
    return tuple(mark.name for mark in MARKS[:classes])


@functools.cache
def _stamp(outline: Pattern, pattern: Pattern) -> tuple[Array, float]:
    """A badge as (64, 64, 2) float32 coverages of outline and ink, and the outline's share of the square."""
    axis = (np.arange(256) + 0.5) / 128 - 1
    u, v = np.meshgrid(axis, axis)
    solid = outline(u, v)
    layers = np.stack([solid, solid & pattern(u, v)], axis=-1).astype(np.float32)  # (256, 256, 2)
    return cv2.resize(layers, (64, 64), interpolation=cv2.INTER_AREA), float(solid.mean())


def draw_badge(
    outline: Pattern, pattern: Pattern, size: tuple[int, int], centre: tuple[float, float], radius: float, turn: float
) -> tuple[tuple[slice, slice], Array]:
    """One badge on a canvas of `size` (H, W): the window (rows, columns) it lies in, and its (h, w, 2) float32
    coverages there, of the outline and of the pattern on it. Area pi * radius^2, centre (x, y), `turn` in radians."""
    stamp, share = _stamp(outline, pattern)
    reach = radius * np.sqrt(np.pi / (4 * share))  # half the side of the stamp's square
    low = [max(0, int(c - 1.5 * reach)) for c in centre]
    high = [min(n, int(c + 1.5 * reach) + 2) for c, n in zip(centre, size[::-1], strict=True)]
    cos, sin = np.cos(turn) * reach / 32, np.sin(turn) * reach / 32
    x, y = centre[0] - low[0], centre[1] - low[1]
    matrix = np.array([[cos, -sin, x - 31.5 * (cos - sin)], [sin, cos, y - 31.5 * (cos + sin)]])
    cover = cv2.warpAffine(stamp, matrix, (high[0] - low[0], high[1] - low[1]), flags=cv2.INTER_LINEAR)
    return (slice(low[1], high[1]), slice(low[0], high[0])), cover
