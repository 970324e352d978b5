"""Settings refuse impossible values, and say what they want."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from misc.checked import Checked, Count, Probability, Range, When, check, hints, marks, wanted
from net import registry
from step.lib.config import default_config


@dataclass(frozen=True)
class Inner(Checked):
    share: Probability = 0.5


@dataclass(frozen=True)
class Some(Checked):
    rate: Annotated[float, Range(above=0)] = 0.1
    count: Count | None = 1
    steps: Annotated[int | None, Range(least=1)] = None
    even: Annotated[int, Range(least=2, multiple=2)] = 2
    kind: Literal["a", "b"] = "a"
    kinds: tuple[Literal["a", "b"], ...] = ()
    pair: Annotated[tuple[int, int], Range(above=0, rising=True)] = (1, 2)
    sizes: Annotated[tuple[float, ...], Range(above=0, filled=True)] = (1.0,)
    warm: Annotated[int, When("kind", "b")] = 0
    many: Annotated[int, When("kinds", "b")] = 0
    inner: Inner = field(default_factory=Inner)

    def cross_check(self) -> None:
        check(self.warm < 10 or self.rate < 1, "warm", self.warm, "below 10 where the rate is large")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "border": ({"rate": 0}, "rate = 0 is not possible: it must be above 0."),
    "nan": ({"rate": float("nan")}, "rate = nan"),
    "infinite": ({"rate": float("inf")}, "rate = inf"),
    "text": ({"rate": "1"}, "rate = '1'"),
    "optional": ({"steps": 0}, "steps = 0 is not possible: it must be at least 1, or None."),
    "multiple": ({"even": 3}, "even = 3 is not possible: it must be at least 2 and a multiple of 2."),
    "choice": ({"kind": "c"}, "kind = 'c' is not possible: it must be one of a, b."),
    "choices": ({"kinds": ("a", "c")}, "must be values, each one of a, b"),
    "length": ({"pair": (1, 2, 3)}, "must be 2 rising values, each above 0"),
    "falling": ({"pair": (3, 2)}, "pair = (3, 2)"),
    "one of many": ({"sizes": (1.0, -1.0)}, "sizes = (1.0, -1.0)"),
    "empty": ({"sizes": ()}, "must be at least one value, each above 0"),
    "cross": ({"warm": 10, "rate": 1.0}, "warm = 10 is not possible: it must be below 10 where"),
}


@pytest.mark.parametrize("values, told", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_reported(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as error:
        Some(**values)
    assert told in str(error.value)


def test_borders_are_possible() -> None:
    Some(steps=1, even=2, pair=(2, 2), kinds=("b", "a"), inner=Inner(share=1))
    with pytest.raises(ValueError, match=r"share = 1.1 .* in \[0, 1\]"):
        Inner(share=1.1)


def test_a_field_has_an_effect_where_its_condition_holds() -> None:
    (warm,), (many,) = (marks(hints(Some)[name], When) for name in ("warm", "many"))
    assert [warm.holds(Some(kind=kind)) for kind in ("a", "b")] == [False, True]
    assert [many.holds(Some(kinds=kinds)) for kinds in ((), ("a",), ("a", "b"))] == [False, False, True]
    assert [When("warm").holds(Some(warm=value)) for value in (0, 3)] == [False, True]


def every_section(settings: Any) -> dict[type, Any]:
    """The classes of a nested dataclass, each with an instance."""
    found = {type(settings): settings}
    for part in dataclasses.fields(settings):
        value = getattr(settings, part.name)
        if dataclasses.is_dataclass(value):
            found |= every_section(value)
    return found


registry.load_methods()
SECTIONS = {
    cls: instance
    for name, method in registry.SEEDS.items() for preset in method.recipes
    for cls, instance in every_section(default_config(name, preset)).items()
} | {
    cls: instance
    for table in (registry.REFINERS, registry.SEGMENTERS) for part in table.values()
    for recipe in part.recipes.values() for cls, instance in every_section(recipe).items()
}  # fmt: skip


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_setting_of_every_method_is_checked(cls: type) -> None:
    """Ranges only act where the class is a ``Checked``, and ``When`` only where it names a field."""
    instance = SECTIONS[cls]
    assert isinstance(instance, Checked)
    for name, hint in hints(cls).items():
        for when in marks(hint, When):
            when.holds(instance)
        if marks(hint, Range):
            assert wanted(hint)
            with pytest.raises(ValueError, match=f"{name} = "):
                dataclasses.replace(instance, **{name: float("nan")})
