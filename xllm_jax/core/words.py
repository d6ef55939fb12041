"""What kind of value somebody wrote, in words that do not need Python."""

from __future__ import annotations

from typing import Any

KINDS = {
    type(None): "null",
    bool: "true or false",
    str: "a text",
    int: "a number",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    bytes: "bytes",
}


def kind(value: Any) -> str:
    """What a value is: 'null', 'a text' …; of kinds that JSON has not, Python's name for it."""
    return KINDS.get(type(value), type(value).__name__)


def wanted(kinds: type | tuple[type, ...]) -> str:
    """What a value should have been: 'a text or a list'."""
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(dict.fromkeys(KINDS.get(one, one.__name__) for one in several))
