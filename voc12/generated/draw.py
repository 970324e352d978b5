"""Drawing of the images of the sample set (voc12/generated/sets.py writes them as a data set).

Every object is a large plain *body* (colour and shape family shared by all classes) that carries one small *mark*; only
the mark shows the class. A network trained from tags therefore finds the marks, and whatever follows colour edges finds
the bodies. Backgrounds are textured and hold distractors: lines, patches, and badges that look like marks but belong to
no class.

A third of the pictures (``CLOSE_UP``) show one near object, 60 to 85 % of the long side; a tenth (``EMPTY``) show none,
from picture 2 x classes of a split on; all others hold one to three objects of 20 to 70 %.

Picture number i of a split depends on (seed, split, i), the number of classes and the side lengths alone.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import cv2
import numpy as np

from misc.image.labels import IGNORE
from voc12.generated.marks import DECOYS, MARKS, OUTLINES, Array, draw_badge

SUPER = 2  # pictures are drawn at this multiple of their size, then averaged down
SPLIT_YEARS = {"train": 2025, "val": 2026}  # the year in an image's id
MARK_PIXELS = 16.0  # least diameter of a mark (disc of its area) at long sides of 100 to 130 px; else in proportion
MARK_SHARE = (0.12, 0.26)  # of the body's area
EMPTY = 0.1  # share of pictures without an object: without them, the last class would be there wherever no other is
CLOSE_UP = 0.35  # share of pictures that show one object so near that its mark is large: they are easy to learn from

Rng = np.random.Generator


# -------------------------------------------------------------------------------------------------------------- colours
def _lab(rgb: Array) -> Array:
    """CIE Lab of one RGB colour in [0, 1]."""
    return cv2.cvtColor(np.asarray(rgb, np.float32).reshape(1, 1, 3), cv2.COLOR_RGB2LAB).reshape(3)


def _hsv(hue: float, saturation: float, value: float) -> Array:
    """RGB in [0, 1] of a hue in turns, a saturation and a value."""
    pixel = np.array([[[hue % 1 * 360, np.clip(saturation, 0, 1), np.clip(value, 0, 1)]]], np.float32)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB).reshape(3)


def _colour(rng: Rng) -> Array:
    """A colour for anything that is not a mark: one distribution for bodies and backgrounds."""
    return _hsv(rng.uniform(), rng.beta(2.2, 3.0) * 0.95, rng.uniform(0.35, 0.95))


def _near(rng: Rng, rgb: Array, spread: float) -> Array:
    """A colour at about `spread` (0..1) from `rgb`, by lightness more than by hue."""
    return np.clip(rgb + rng.normal(0, spread) + rng.normal(0, spread / 2, 3), 0.03, 0.97).astype(np.float32)


def _jitter(rng: Rng, rgb: tuple[int, int, int]) -> Array:
    """A mark's colour as it turns out on one object."""
    hue, saturation, value = cv2.cvtColor(np.float32([[rgb]]) / 255, cv2.COLOR_RGB2HSV).reshape(3)
    return _hsv(hue / 360 + rng.normal(0, 0.018), saturation * rng.uniform(0.8, 1.1), value * rng.uniform(0.85, 1.08))


def _body_colour(rng: Rng, around: Array) -> Array:
    """A colour that differs from the mean colour `around`: clearly as a rule, barely in one case of eight."""
    low, high = (14, 24) if rng.uniform() < 0.125 else (32, 200)
    for _ in range(60):
        colour = _colour(rng)
        if low <= np.linalg.norm(_lab(colour) - _lab(around)) <= high:
            break
    return colour


# ----------------------------------------------------------------------------------------------------------- background
def _grid(size: tuple[int, int]) -> tuple[Array, Array]:
    """Row and column of every pixel, (H, W) float32 each."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    return y, x


def _noise(rng: Rng, size: tuple[int, int], cell: float) -> Array:
    """Smooth noise in about [0, 1], (H, W), with blobs of `cell` pixels."""
    grid = rng.random((int(size[0] / cell) + 2, int(size[1] / cell) + 2), dtype=np.float32)
    return cv2.resize(grid, size[::-1], interpolation=cv2.INTER_CUBIC)


def _octaves(rng: Rng, size: tuple[int, int], cell: float) -> Array:
    """Noise of several scales, (H, W) in about [0, 1]."""
    parts = [_noise(rng, size, max(cell / 2**k, 2.0)) * 0.5**k for k in range(4)]
    return sum(parts) / 1.875


def _texture(rng: Rng, size: tuple[int, int]) -> Array:
    """One of six kinds of texture, (H, W) float32 in [0, 1]: grain, stripes, checks, cells, waves, spots."""
    unit = max(size) / 100
    kind, period, turn = rng.integers(6), rng.uniform(7, 16) * unit, rng.uniform(0, np.pi)
    y, x = _grid(size)
    bend = (_noise(rng, size, 40 * unit) - 0.5) * rng.uniform(0, 14) * unit
    a = (x * math.cos(turn) + y * math.sin(turn) + bend) * (2 * math.pi / period)
    b = (y * math.cos(turn) - x * math.sin(turn) + bend) * (2 * math.pi / period)
    if kind == 0:
        return np.clip(_octaves(rng, size, 22 * unit) * 1.8 - 0.4, 0, 1)
    if kind == 1:
        return np.clip(np.sin(a) * 2 + 0.5, 0, 1)
    if kind == 2:
        return np.clip(np.sin(a) * np.sin(b) * 5 + 0.5, 0, 1)
    if kind == 3:
        sites = np.float32(rng.uniform(0, 1, (int(rng.integers(14, 40)), 2)) * size)
        gaps = (y[::2, ::2, None] - sites[:, 0]) ** 2 + (x[::2, ::2, None] - sites[:, 1]) ** 2  # (H/2, W/2, sites)
        shades = rng.random(len(sites), dtype=np.float32)[gaps.argmin(axis=2)]
        return np.clip(cv2.resize(shades, size[::-1], interpolation=cv2.INTER_LINEAR), 0, 1)
    if kind == 4:
        return (np.sin(a + 2.5 * np.sin(b / 2)) + 1) / 2
    return np.clip((np.sin(a) + np.sin(b) - 0.9) * 3, 0, 1)


def _surface(rng: Rng, size: tuple[int, int], base: Array) -> Array:
    """A textured surface around one colour, (H, W, 3) float32."""
    other = _near(rng, base, rng.uniform(0.06, 0.16))
    field = _texture(rng, size)[..., None]
    grain = (_octaves(rng, size, 9.0)[..., None] - 0.5) * rng.uniform(0.05, 0.2)
    return base + (other - base) * field + grain


def _background(rng: Rng, size: tuple[int, int]) -> Array:
    """A cluttered background, (H, W, 3) float32 in [0, 1]: one or two surfaces, a gradient, distractors.

    The surfaces are smooth, so they are made at a picture's own size.
    """
    h, w = small = (size[0] // SUPER, size[1] // SUPER)
    base = _colour(rng)
    image = _surface(rng, small, base)
    y, x = _grid(small)
    if rng.uniform() < 0.6:  # a second surface beyond a wavy horizon, as a floor and a wall
        turn = rng.normal(0, 0.5) if rng.uniform() < 0.7 else rng.uniform(0, math.pi)
        height = (y / h - 0.5) * math.cos(turn) + (x / w - 0.5) * math.sin(turn) - rng.uniform(-0.25, 0.25)
        level = height + (_noise(rng, small, max(small) / 3) - 0.5) * rng.uniform(0, 0.5)
        there = np.clip(level * max(small) / 2 + 0.5, 0, 1)
        _blend(image, there, _surface(rng, small, _near(rng, base, 0.2)))
    turn = rng.uniform(0, 2 * math.pi)
    ramp = (y / h - 0.5) * math.sin(turn) + (x / w - 0.5) * math.cos(turn)
    image *= 1 + rng.uniform(0, 0.35) * ramp[..., None]
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    _distract(rng, image)
    return np.clip(image, 0, 1)


def _blend(image: Array, alpha: Array, rgb: Array) -> None:
    """Paint a colour or picture over `image` (H, W, 3) in place, by `alpha` (H, W)."""
    image += alpha[..., None] * (rgb - image)


def _distract(rng: Rng, image: Array) -> None:
    """Paint thin lines, small textured patches and badges of no class over the background, in place."""
    size, unit = image.shape[:2], max(image.shape) / 100
    for _ in range(rng.integers(1, 6)):
        ends = rng.uniform(-0.1, 1.1, (3, 2)) * size[::-1]
        t = np.linspace(0, 1, 20)[:, None]
        curve = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]  # (20, 2)
        layer = np.zeros(size, np.uint8)
        cv2.polylines(layer, [np.int32(curve * 16)], False, 255, int(rng.integers(2, 5)), cv2.LINE_AA, 4)
        rows, columns = np.nonzero(layer)
        alpha = layer[rows, columns, None] / np.float32(255) * rng.uniform(0.4, 0.9)  # (P, 1)
        image[rows, columns] += alpha * (_colour(rng) - image[rows, columns])
    for number in range(rng.integers(2, 10)):
        where = tuple(rng.uniform(0, 1, 2) * size[::-1])
        pattern = DECOYS[rng.integers(len(DECOYS))]
        outline = OUTLINES[rng.integers(len(OUTLINES))]
        window, cover = draw_badge(outline, pattern, size, where, rng.uniform(2.5, 5.5) * unit, rng.uniform(0, 6.28))
        if number % 4 == 3:  # a badge in two colours, of the kinds that bodies have
            _blend(image[window], cover[..., 0], _colour(rng))
            _blend(image[window], cover[..., 1], _colour(rng))
        else:
            tint = _colour(rng) + (_noise(rng, cover.shape[:2], 2.5 * unit)[..., None] - 0.5) * rng.choice([0, 0.5])
            _blend(image[window], cover[..., 0] * rng.uniform(0.6, 1), tint)


# -------------------------------------------------------------------------------------------------------------- objects
@dataclass
class Thing:
    """One object on the super-sampled canvas, all (H, W): `body` its coverage, `mark` (H, W, 2) those of its mark's
    outline and pattern, `depth` the distance to the body's border, `seen` the body less what is in front; `whole` is
    the body's area."""

    label: int
    body: Array
    mark: Array
    depth: Array
    whole: float
    seen: Array


def _body(rng: Rng, size: tuple[int, int], length: float) -> Array | None:
    """A smooth body `length` pixels long, (H, W) coverage in [0, 1]; None if too much of it lies outside the canvas."""
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    half = np.array([length / 2, length / 2 * rng.uniform(0.62, 0.95)])
    kind = rng.integers(4)
    if kind == 0:
        power = 2 / rng.uniform(1.9, 5)
        points = np.stack([np.sign(f) * np.abs(f) ** power for f in (np.cos(t), np.sin(t))], axis=1)
    elif kind == 1:
        waves = sum(rng.normal(0, 0.22 / k) * np.cos(k * t + rng.uniform(0, 6.28)) for k in (2, 3, 4))
        points = np.stack([np.cos(t), np.sin(t)], axis=1) * np.clip(1 + waves, 0.6, 1.3)[:, None]
    elif kind == 2:
        corners = np.arange(n := int(rng.integers(4, 7))) / n * 2 * np.pi + rng.uniform(-0.25, 0.25, n)
        points = np.stack([np.cos(corners), np.sin(corners)], axis=1) * 1.15
    else:
        points = np.stack([np.cos(t), np.sin(t) * (1 + 0.3 * np.cos(t) * rng.choice([-1, 1]))], axis=1)
    turn, side = rng.uniform(0, 2 * np.pi), int(2 * length)  # its own canvas, large enough for limbs
    spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    layer = np.zeros((side, side), np.uint8)
    cv2.fillPoly(layer, [np.int32((points * half @ spin.T + side / 2) * 16)], 255, cv2.LINE_AA, 4)
    for _ in range(rng.choice([0, 1, 2], p=[0.5, 0.35, 0.15])):
        way = rng.uniform(0, 2 * np.pi)
        tip = side / 2 + half[1] * rng.uniform(1.3, 1.7) * np.array([np.cos(way), np.sin(way)])
        thick = max(2, int(half[1] * rng.uniform(0.35, 0.55)))
        cv2.line(layer, (side * 8, side * 8), np.int32(tip * 16).tolist(), 255, thick, cv2.LINE_AA, 4)
    soft = cv2.GaussianBlur(layer, (0, 0), 0.045 * length).astype(np.float32) / 255  # rounds corners and joints
    full = np.clip((soft - 0.5) * 0.09 * length + 0.5, 0, 1)

    corner = np.int32(rng.uniform(0.14, 0.86, 2) * size - side / 2)  # row and column of `full` on the picture
    low, high = np.maximum(corner, 0), np.minimum(corner + side, size)
    body = np.zeros(size, np.float32)
    body[low[0] : high[0], low[1] : high[1]] = full[tuple(map(slice, low - corner, high - corner))]
    least = 0.8 if length > max(size) * 0.6 else 0.75 if rng.uniform() < 0.3 else 0.97
    return body if body.sum() >= least * full.sum() else None


def _thing(rng: Rng, size: tuple[int, int], label: int, share: float) -> Thing | None:
    """An object of class `label`, `share` of the long side in length; None if the draw gives no room for its mark."""
    body = _body(rng, size, share * max(size))
    if body is None:
        return None
    area = float(body.sum())
    longer = max(size) / SUPER
    floor = MARK_PIXELS / 2 * SUPER * max(longer / 130, min(1.0, longer / 100))
    radius = max(math.sqrt(rng.uniform(*MARK_SHARE) * area / math.pi), floor)
    if math.pi * radius**2 > MARK_SHARE[1] * area:
        return None
    padded = np.pad((body > 0.5).astype(np.uint8), 1)  # the canvas's edge is a border too: marks aren't cut
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    room = np.flatnonzero(depth > 1.1 * radius)
    if not len(room):
        return None
    y, x = divmod(int(rng.choice(room)), size[1])
    look = MARKS[label - 1]
    mark = np.zeros((*size, 2), np.float32)
    window, cover = draw_badge(look.outline, look.pattern, size, (x, y), radius, rng.normal(0, 0.17))
    mark[window] = cover * body[window][..., None]
    return Thing(label, body, mark, depth, area, body)


def _clears(body: Array, things: list[Thing]) -> bool:
    """Whether `body` in front leaves of every thing nine tenths of its mark and half of its body."""
    for thing in things:
        left = thing.seen * (1 - body)
        if left.sum() < 0.5 * thing.whole or (thing.mark[..., 0] * left).sum() < 0.9 * thing.mark[..., 0].sum():
            return False
    return True


def _share(rng: Rng, shares: tuple[float, float]) -> float:
    """An object's length as a share of the picture's, within ``shares``; small ones are rarer."""
    return shares[0] + (shares[1] - shares[0]) * rng.beta(2.0, 1.2)


def _things(rng: Rng, size: tuple[int, int], labels: list[int], shares: tuple[float, float]) -> list[Thing]:
    """Objects of the wished classes, back to front; those that find no place are left out, but never the first."""
    things: list[Thing] = []
    for label in labels:
        share = _share(rng, shares)
        for attempt in itertools.count() if not things else range(12):
            thing = _thing(rng, size, label, share)
            if thing is not None and _clears(thing.body, things):
                for other in things:
                    other.seen = other.seen * (1 - thing.body)
                things.append(thing)
                break
            share = _share(rng, shares) if attempt < 30 else 0.5  # a size that has room for a mark, at last
    return things


def _paint(rng: Rng, image: Array, things: list[Thing]) -> None:
    """Paint objects back to front over `image` (H, W, 3), in place: shadow, shaded body, mark."""
    way = rng.uniform(0, 2 * math.pi)
    for thing in things:
        left, top, width, height = cv2.boundingRect((thing.body > 0).astype(np.uint8))
        window = np.s_[max(0, top - 14) : top + height + 14, max(0, left - 14) : left + width + 14]
        part, body, mark = image[window], thing.body[window], thing.mark[window]
        length = math.sqrt(thing.whole)
        ring = cv2.dilate(body, np.ones((9, 9), np.uint8)) - body
        colour = _body_colour(rng, part[ring > 0.5].mean(axis=0))
        shift = np.float32([[1, 0, -3 * math.cos(way)], [0, 1, -3 * math.sin(way)]])
        shade = cv2.GaussianBlur(cv2.warpAffine(body, shift, body.shape[::-1]), (0, 0), 4)
        part *= 1 - 0.22 * shade[..., None]
        y, x = _grid(body.shape)
        y, x = (float((axis * body).sum() / body.sum()) - axis for axis in (y, x))
        light = (x * math.cos(way) + y * math.sin(way)) / length
        rounding = np.exp(-thing.depth[window] / (0.1 * length))
        tone = 1 + rng.uniform(0.08, 0.2) * light - rng.uniform(0.05, 0.15) * rounding
        tone += (_noise(rng, body.shape, 12) - 0.5) * 0.05
        _blend(part, body, colour * tone[..., None])
        look = MARKS[thing.label - 1]
        _blend(part, mark[..., 0], _jitter(rng, look.ground))
        _blend(part, mark[..., 1], _jitter(rng, look.ink))


# ------------------------------------------------------------------------------------------------------------- pictures
@dataclass
class DrawnPicture:
    """A picture of h x w pixels with its truth.

    rgb (h, w, 3) uint8; instances (h, w) uint8, 0 background, 1..K in the order of `labels`, without a rim;
    rim (h, w) bool, the pixels to ignore; marks (h, w) uint8, the instance whose mark is seen there, else 0;
    labels, K class numbers 1..C; difficult, K flags.
    """

    rgb: Array
    instances: Array
    rim: Array
    marks: Array
    labels: list[int]
    difficult: list[bool]

    def masks(self) -> tuple[Array, Array]:
        """SegmentationClass and SegmentationObject, (h, w) uint8, 0 background, 255 ignore."""
        classes = np.array([0, *self.labels], np.uint8)[self.instances]
        return np.where(self.rim, IGNORE, classes).astype(np.uint8), np.where(self.rim, IGNORE, self.instances).astype(
            np.uint8
        )


def _rng(seed: int, split: str, index: int, stream: int) -> Rng:
    """The generator of one purpose (`stream`) of one picture."""
    return np.random.default_rng([seed, SPLIT_YEARS[split], index, stream])


def _labels(rng: Rng, seed: int, split: str, index: int, classes: int) -> tuple[int, list[int]]:
    """A picture's first class number, by turns in shuffled rounds, so that none is rare; and up to two others."""
    turn, place = divmod(index, classes)
    first = int(_rng(seed, split, turn, 1).permutation(classes)[place])
    others = rng.integers(0, classes, rng.choice(3, p=[0.35, 0.4, 0.25]))
    return first + 1, [int(label) + 1 for label in others]


def draw_picture(
    seed: int,
    split: str,
    index: int,
    classes: int = 5,
    long_side: tuple[int, int] = (100, 160),
    single: bool = False,
) -> DrawnPicture:
    """Draw picture `index` (from 0) of a split, "train" or "val"; it depends on these arguments alone.

    Args:
        seed, split, index: which picture.
        classes: number of classes.
        long_side: least and largest length of the longer side, in pixels.
        single: with exactly one object; otherwise up to three, or none (``EMPTY``).
    """
    rng = _rng(seed, split, index, 0)
    longer = int(rng.integers(long_side[0], long_side[1] + 1))
    shorter = round(longer * rng.uniform(0.6, 0.9))
    h, w = (shorter, longer) if rng.uniform() < 0.6 else (longer, shorter)
    kind = rng.uniform()
    close_up = EMPTY <= kind < EMPTY + CLOSE_UP
    size = (h * SUPER, w * SUPER)
    first, others = _labels(rng, seed, split, index, classes)
    if kind < EMPTY and not single and index >= 2 * classes:  # small sets are left without: every class is needed
        labels = []
    else:
        labels = [first] if single or close_up else [first, *others]
    things = _things(rng, size, labels, (0.6, 0.85) if close_up else (0.2, 0.7 if len(labels) == 1 else 0.6))
    image = _background(rng, size)
    _paint(rng, image, things)

    image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.2, 0.6)) * 255 + rng.normal(0, rng.uniform(1, 4), image.shape)
    instances, marks = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    for number, thing in enumerate(things, 1):
        instances[thing.body > 0.5] = number
        marks[thing.body > 0.5] = 0
        marks[thing.mark[..., 0] > 0.5] = number
    reach = max(3, round(3 * longer / 130))  # of the rim to either side of a border, super-sampled pixels
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    rim = cv2.morphologyEx(instances, cv2.MORPH_GRADIENT, disc) > 0
    difficult = [bool(t.seen.sum() < 0.65 * t.whole or rng.uniform() < 0.03) for t in things]
    step = np.s_[::SUPER, ::SUPER]
    return DrawnPicture(
        np.clip(np.rint(image), 0, 255).astype(np.uint8),
        instances[step],
        rim[step],
        marks[step],
        [t.label for t in things],
        difficult,
    )


def draw_saliency(seed: int, split: str, index: int, picture: DrawnPicture) -> Array:
    """A saliency detector's idea of a picture, (h, w) uint8: uneven strength, blur, missing bits, false blobs."""
    rng = _rng(seed, split, index, 2)
    size = picture.instances.shape
    strength = np.array([0, *rng.uniform(0.6, 1, len(picture.labels))], np.float32)
    found = strength[picture.instances]
    unit = max(size) / 100
    y, x = _grid(size)
    for value, count in ((0.0, rng.integers(0, 3)), (rng.uniform(0.3, 0.9), rng.integers(0, 3))):
        for _ in range(count):
            cy, cx = rng.uniform(0, 1, 2) * size
            a, b = rng.uniform(3, 10, 2) * unit
            found[((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1] = value
    found = cv2.GaussianBlur(found, (0, 0), rng.uniform(1, 2.5) * unit)
    found = found + (_octaves(rng, size, 16) - 0.5) * 0.2 + rng.normal(0, 0.02, size)
    return np.clip(np.rint(found * 255), 0, 255).astype(np.uint8)
