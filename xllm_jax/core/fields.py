"""Kinds of fields: what a setting may hold stands where it is declared (`core/limits.py` looks)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

MOST = 10**9  # of what is counted: records, updates, tokens


def limits(least: float, most: float = MOST) -> dict[str, tuple[float, float]]:
    """Between which bounds, both allowed, the numbers of a field lie (`core/limits.py`)."""
    return {"limits": (least, most)}


def within(default: T, least: float, most: float = MOST) -> T:
    """A field with such `limits`."""
    return dataclasses.field(default=default, metadata=limits(least, most))


def one_of(default: str, *others: str) -> str:
    """A field that takes one of some words, `default` the first of them."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


@dataclasses.dataclass(frozen=True)
class Option:
    """What a setting that stands in a dictionary may hold, where it is there.

    Attributes:
      kind: its type; of a tuple, that of its two numbers.
      least, most: bounds of numbers, both allowed.
      choices: words that it may be; () for any.
    """

    kind: type | tuple[type, ...]
    least: float = 0
    most: float = MOST
    choices: tuple[str, ...] = ()


def options(**known: Option) -> dict[str, dict[str, Option]]:
    """What entries of these names may hold in the dictionary of a field."""
    return {"options": known}


def numbers(least: float, known: Mapping[str, Option]) -> dict[str, Any]:
    """Between which bounds the numbers in a dictionary of any settings lie.

    Args:
      least: of all of them; none is larger than MOST.
      known: what entries of these names may hold instead: one such value, several, or None.
    """
    return {"numbers": Option(float, least), "known": known}


def of_patterns(default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A field of regular expressions."""
    return dataclasses.field(default=default, metadata={"patterns": True})
