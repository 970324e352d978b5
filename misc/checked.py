"""Settings that check themselves: the allowed values are annotated beside the type, and one checker enforces them.

    lr: Annotated[float, Range(above=0), When("optimiser", "sgd")] = 0.01

``Literal`` types and the lengths of ``tuple[int, int]`` are checked too; rules between fields are in ``cross_check``.
The command line (misc/commandline.py) shows the ranges. Its help leaves out fields that, according to ``When``, have no
effect.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The range of a number, or of every number in a tuple. Infinity and NaN are never allowed.

    ``above`` and ``below`` are exclusive bounds, ``least`` and ``most`` inclusive. ``multiple``: only multiples of
    this. ``rising``: the numbers of a tuple must not decrease. ``filled``: a tuple must not be empty.
    """

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    multiple: int | None = None
    rising: bool = False
    filled: bool = False

    def holds(self, number: Any) -> bool:
        """Whether one number lies in the range."""
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            return False
        return (
            (self.above is None or number > self.above)
            and (self.least is None or number >= self.least)
            and (self.below is None or number < self.below)
            and (self.most is None or number <= self.most)
            and (self.multiple is None or number % self.multiple == 0)
        )

    def words(self) -> str:
        """The range as shown in help texts and errors: "above 0", "in [0, 1)", "at least 1 and a multiple of 8"."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        said = []
        if low is not None and high is not None:
            said = [f"in {'[' if self.above is None else '('}{low:g}, {high:g}{']' if self.below is None else ')'}"]
        elif low is not None:
            said = [f"at least {low:g}" if self.above is None else f"above {low:g}"]
        elif high is not None:
            said = [f"at most {high:g}" if self.below is None else f"below {high:g}"]
        said += [f"a multiple of {self.multiple}"] if self.multiple else []
        return " and ".join(said) or "finite"


@dataclass(frozen=True)
class Names:
    """The allowed values of a text: one of ``names``, or anything after ``prefix``."""

    names: tuple[str, ...]
    prefix: str

    def holds(self, value: Any) -> bool:
        """Whether a value is allowed."""
        given = isinstance(value, str) and value.startswith(self.prefix) and value != self.prefix
        return given or value in self.names

    def words(self) -> str:
        """The values as shown in help texts and errors."""
        return f"one of {', '.join((*self.names, f'{self.prefix}NAME'))}"


class When:
    """The annotated field has an effect only if the field ``name`` of the same settings has one of ``values``.

    A tuple matches if it contains one of them, a text also if it begins with one of them that ends in a slash. Without
    values: only if ``name`` is neither zero nor empty.
    """

    def __init__(self, name: str, *values: Any):
        self.name, self.values = name, values

    def holds(self, settings: Any) -> bool:
        """Whether the field has an effect in these settings."""
        value = getattr(settings, self.name)
        if not self.values:
            return bool(value)
        if isinstance(value, str) and value.startswith(tuple(v for v in self.values if str(v).endswith("/"))):
            return True
        return any(one in self.values for one in (value if isinstance(value, tuple) else (value,)))


Count = Annotated[int, Range(least=1)]
Positive = Annotated[float, Range(above=0)]
Weight = Annotated[float, Range(least=0)]
Probability = Annotated[float, Range(least=0, most=1)]
DropProbability = Annotated[float, Range(least=0, below=1)]
"""Below 1, because 1 would drop everything."""
Fraction = Annotated[float, Range(least=0, below=1)]


def check(good: bool, name: str, value: object, wanted: str) -> None:
    """Raise a ValueError that says what the value must be, unless it is ``good``."""
    if not good:
        raise ValueError(f"{name} = {value!r} is not possible: it must be {wanted}.")


@dataclass(frozen=True)
class Checked:
    """Base of dataclasses that check their values on construction.

    A ValueError names the field, its value and what it must be.
    """

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            value = getattr(self, name)
            check(_possible(value, hint), name, value, wanted(hint))
        self.cross_check()

    def cross_check(self) -> None:
        """Check rules between fields; raises ValueError if one is broken. Subclasses call the base's method."""


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, with their annotations."""
    found = get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def marks(hint: Any, kind: type) -> list[Any]:
    """The annotations of a kind that a type carries: ``marks(Annotated[int, Range(above=0)], Range)``."""
    return [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, kind)]


def bare(hint: Any) -> Any:
    """A type without its annotations."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def choices(hint: Any) -> tuple[Any, ...]:
    """The values of a ``Literal`` type, or of a tuple of them; empty for any other type."""
    hint = bare(hint)
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) is tuple:
        return choices(get_args(hint)[0])
    return ()


def _optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _length(hint: Any) -> int | None:
    """Length of a tuple type of fixed length, else None."""
    inner = get_args(hint)
    return len(inner) if get_origin(hint) is tuple and inner[-1] is not Ellipsis else None


def _possible(value: Any, hint: Any) -> bool:
    kind, ranges, among = bare(hint), marks(hint, Range) + marks(hint, Names), choices(hint)
    if value is None and (_optional(kind) or not (ranges or among)):
        return True
    if get_origin(kind) is not tuple:
        return all(r.holds(value) for r in ranges) and (not among or value in among)
    if not isinstance(value, tuple) or _length(kind) not in (None, len(value)):
        return False
    return all(one in among for one in value if among) and all(
        all(map(r.holds, value)) and (not r.rising or list(value) == sorted(value)) and (not r.filled or bool(value))
        for r in ranges
    )


def wanted(hint: Any) -> str:
    """What a value must be, in words; empty if the type has no annotation that restricts it."""
    kind, ranges, among = bare(hint), marks(hint, Range) + marks(hint, Names), choices(hint)
    said = [f"one of {', '.join(map(str, among))}"] if among else []
    said += [r.words() for r in ranges]
    words = " and ".join(said)
    if get_origin(kind) is tuple:
        length = _length(kind)
        rising = any(r.rising for r in ranges)
        least = "at least one value" if any(r.filled for r in ranges) else "values"
        many = "rising values" if rising and length is None else least if length is None else f"{length} values"
        many = f"{length} rising values" if rising and length else many
        words = f"{many}, each {words}" if words else many if length else ""
    return f"{words}, or None" if words and _optional(kind) else words
