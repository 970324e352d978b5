"""Forms that JSON has to have where it is read: types, ranges and keys are checked before anything is made of them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Number:
    """A finite number in a range; ``whole`` ones are integers, ``none`` says that null may stand for it."""

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    none: bool = False


@dataclass(frozen=True)
class Each:
    """An object of any keys whose values all have one form."""

    form: Any


@dataclass(frozen=True)
class Usual:
    """Of a key that an object may lack: what ``fill`` puts there."""

    form: Any
    value: Any


Schema = Any
"""A type, or several (``str | None``); a Number; [form]: a list of these; {key: form}: an object with these keys
(``?key``, and those of a Usual: it may lack them) and any others; an Each; None: anything."""


def find_fault(value: Any, form: Schema, where: str = "") -> str | None:
    """What is wrong with a value that JSON gave, as "FIELD is ..., not ...", or None."""
    name = where or "the whole"
    if isinstance(form, Usual):
        form = form.form
    if form is None:
        return None
    if isinstance(form, Number):
        if value is None and form.none:
            return None
        kinds = (int,) if form.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not form.least <= value <= form.most:
            bounds = f" from {form.least:g} to {form.most:g}" if math.isfinite(form.least + form.most) else ""
            return f"{name} is {_shown(value)}, not a {'whole ' if form.whole else ''}number{bounds}"
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number larger than any of the others
            finite = False
        return None if finite else f"{name} is {_shown(value)}, not a finite number"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name} is {_shown(value)}, not a list"
        return next((f for i, v in enumerate(value) if (f := find_fault(v, form[0], f"{where}[{i}]"))), None)
    if isinstance(form, dict | Each):
        if not isinstance(value, dict):
            return f"{name} is {_shown(value)}, not an object"
        if isinstance(form, Each):
            pairs = [(key, form.form) for key in value]
        else:
            needed = [key for key, inner in form.items() if not key.startswith("?") and not isinstance(inner, Usual)]
            lacking = [key for key in needed if key not in value]
            if lacking:
                return f"{name} lacks {lacking[0]!r}"
            pairs = [(key.removeprefix("?"), inner) for key, inner in form.items() if key.removeprefix("?") in value]
        return next((f for k, inner in pairs if (f := find_fault(value[k], inner, f"{where}.{k}".lstrip(".")))), None)
    return None if isinstance(value, form) else f"{name} is {_shown(value)}, not {getattr(form, '__name__', form)}"


def fill(value: Any, form: Schema) -> Any:
    """A value without fault, with the usual values of the keys that its objects lack."""
    if isinstance(form, Usual):
        form = form.form
    if isinstance(form, list):
        return [fill(inner, form[0]) for inner in value]
    if isinstance(form, Each):
        return {key: fill(inner, form.form) for key, inner in value.items()}
    if not isinstance(form, dict):
        return value
    filled = {key: fill(inner, form.get(key, form.get(f"?{key}"))) for key, inner in value.items()}
    usual = {key: inner.value for key, inner in form.items() if isinstance(inner, Usual) and key not in value}
    return {**filled, **copy.deepcopy(usual)}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
