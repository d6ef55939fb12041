"""What a stranger may write into a JSON file instead of what stands there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xllm_jax.core.errors import UserError

VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 10**6, 10**9, -(10**9), 2**63, 10**400, 1.5, -0.5, 0.0),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "8", "\u2028\x1b[31m", "a" * 100_000),
    *([], [1], [0, 0], [-1, 8], [10**9] * 4, [None], ["x"], [[8]], [1.5, 2.5], [[]] * 1000),
    *({}, {"a": 1}, {"x": {"y": [1]}}),
)
TEXTS = (
    *("", "[", "null", "3", '"x"', "[]", "{}", "[" * 100_000, '{"a":' * 100_000, "9" * 5000),
    *("\x00", '{"a": NaN}', '{"a":1,"a":2}', "\ufeff{}"),
)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """Every place in a JSON value, of a list the first three."""
    inner: list[tuple] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value[:3]))
    return [at] * bool(at) + [p for key, one in inner for p in places(one, (*at, key))]


def values(good: str, rng: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    """(what was changed, the value) of so many changes of a JSON text; one in thirty lacks it."""
    for _ in range(count if places(json.loads(good)) else 0):
        value = json.loads(good)
        *path, last = place = rng.choice(places(value))
        holder = value
        for key in path:
            holder = holder[key]
        odd = rng.choice((*VALUES, del_))
        if odd is del_:
            del holder[last]
        else:
            holder[last] = odd
        yield f"{place} = {str(odd)[:30]}", value


def del_() -> None:
    """Stands for a field that is not there."""


def texts(good: str, rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """The same as texts, and texts of another form."""
    yield from ((text[:30], text) for text in TEXTS)
    yield from ((what, json.dumps(value)) for what, value in values(good, rng, count))


def outcome(call: Callable[[], Any]) -> str:
    """'taken' or 'refused' in one line; whatever else is raised, is."""
    try:
        call()
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return "refused"
    return "taken"


def try_file(file: Path, call: Callable[[], Any], rng: random.Random, count: int) -> list[str]:
    """Outcomes of a call for such texts in a file, which has its own content in the end."""
    good, found = file.read_text("utf-8"), []
    assert outcome(call) == "taken"
    for what, text in texts(good, rng, count):
        file.write_text(text, "utf-8")
        try:
            found.append(outcome(call))
        except BaseException as error:
            raise AssertionError(f"{file.name}: {what}") from error
    file.write_text(good, "utf-8")
    return found
