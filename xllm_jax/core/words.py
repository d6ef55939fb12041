"""A value that somebody wrote, in words for a message."""

from __future__ import annotations

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
SHOWN = 60  # characters of a wrong value


def shown(value: object) -> str:
    """A wrong value as Python writes it, cut off where that is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integers of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def kind(value: object) -> str:
    """What a value is: 'null', 'a text' …; of kinds that JSON has not, Python's name for it."""
    return KINDS.get(type(value), type(value).__name__)


def wanted(kinds: type | tuple[type, ...]) -> str:
    """What a value should have been: 'a text or a list'."""
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(dict.fromkeys(KINDS.get(one, one.__name__) for one in several))
