"""The settings of a stage or suite, checked once, before anything heavy is imported.

What a field may hold stands at the field: its type, and its limits or choices (`core/stage.py`).
What only other parts can know, such as the names of readers or the shape of a mesh, they check.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from xllm_jax.core import words
from xllm_jax.core.errors import UserError
from xllm_jax.core.fields import MOST, Option
from xllm_jax.core.stage import Part, Stage
from xllm_jax.core.suite import Suite

NUMBER = (int, float)


def check(stage: Stage | Suite) -> None:
    """Looks at every field of a stage or suite.

    Raises:
      UserError: the first value that its field cannot hold; names the field.
    """
    for problem in _problems(stage, ""):
        raise problem
    if isinstance(stage, Suite):
        return
    data = stage.data
    if list(data.frames) != sorted(set(data.frames)) or not data.frames:
        raise _wrong("data.frames", data.frames, "Give lengths in ascending order")
    if stage.profile and (len(stage.profile) != 2 or stage.profile[0] > stage.profile[1]):
        what = f"{words.shown(stage.profile)} is no range of micro-batches"
        raise UserError(what, field="profile", hint="Write --config.profile='(10,12)'")


def check_network(record: Mapping[str, Any], path: str) -> None:
    """Looks at what a file says of networks, before any is made: at every number, however deep.

    Args:
      record: fields of networks, or dictionaries of them.
      path: of the file or folder.

    Raises:
      UserError: a size that no network has; names it.
    """
    known = Part.__dataclass_fields__["fields"].metadata["known"]

    def problems(name: str, value: object) -> Iterator[UserError]:
        if isinstance(value, dict):
            for inner, one in value.items():
                yield from problems(str(inner), one)
        elif isinstance(value, list | tuple):
            for one in value:
                yield from problems(name, one)
        elif isinstance(value, NUMBER) and not isinstance(value, bool):
            option = known.get(name, Option(float, -MOST))
            fault = _misfit(value, option.kind)
            where = f"{path}: {name}"
            yield from [_wrong(where, value, fault)] if fault else _number(option, where, value)

    for problem in problems("", record):
        raise problem


def _problems(holder: Any, path: str) -> Iterator[UserError]:
    kinds = typing.get_type_hints(type(holder))
    for field in dataclasses.fields(holder):
        where, value = f"{path}{field.name}", getattr(holder, field.name)
        if dataclasses.is_dataclass(value):
            yield from _problems(value, f"{where}.")
            continue
        fault = _misfit(value, kinds[field.name])
        if fault:
            yield _wrong(where, value, fault)
        elif isinstance(value, dict):
            yield from _entries(field, where, value, kinds[field.name])
        else:
            for inner in value if isinstance(value, tuple) else (value,):
                yield from _limits(field.metadata, where, inner)


def _entries(
    field: dataclasses.Field, path: str, value: Mapping[str, Any], kind: object
) -> Iterator[UserError]:
    """Problems of what a dictionary holds, by its names."""
    for name, inner in value.items():
        fault = _misfit(inner, typing.get_args(kind)[1])
        if not name or not isinstance(name, str):
            yield UserError(f"a name is {name!r}", field=path, hint="Names are words")
        elif dataclasses.is_dataclass(inner):
            yield from _problems(inner, f"{path}.{name}.")
        elif fault:
            yield _wrong(f"{path}.{name}", inner, fault)
        else:
            yield from _limits(field.metadata, f"{path}.{name}", inner)
            yield from _options(field.metadata, f"{path}.{name}", name, inner)


def _options(metadata: Mapping[str, Any], path: str, name: str, value: Any) -> Iterator[UserError]:
    """Problems of an entry whose name says what it may hold, or of any number."""
    if "numbers" in metadata:
        bounds, known = metadata["numbers"], metadata["known"].get(name)
        for one in value if isinstance(value, list | tuple) else (value,):
            fault = _misfit(one, known.kind) if known and one is not None else ""
            if fault:
                yield _wrong(path, value, fault)
            elif isinstance(one, NUMBER):
                yield from _number(known or bounds, path, one)
    option = metadata.get("options", {}).get(name)
    if option is None:
        return
    kind = option.kind
    pair = kind == (float, float)
    if pair and not (isinstance(value, list | tuple) and len(value) == 2 and _ordered(*value)):
        yield _wrong(path, value, "Give the lowest and the highest of it as '(a,b)'")
        return
    for one in value if pair else (value,):
        if all(_misfit(one, single) for single in (kind if isinstance(kind, tuple) else (kind,))):
            yield _wrong(path, value, _misfit(one, kind[0] if isinstance(kind, tuple) else kind))
        elif option.choices:
            yield from _limits({"choices": option.choices}, path, one)
        elif isinstance(one, NUMBER):
            yield from _number(option, path, one)


def _ordered(low: object, high: object) -> bool:
    return isinstance(low, NUMBER) and isinstance(high, NUMBER) and low <= high


def _number(option: Option, path: str, value: object) -> Iterator[UserError]:
    yield from _limits({"limits": (option.least, option.most)}, path, value)


def _limits(metadata: Mapping[str, Any], path: str, value: Any) -> Iterator[UserError]:
    if "limits" in metadata:
        least, most = metadata["limits"]
        if not least <= value <= most:  # as NaN is not
            yield _wrong(path, value, f"Give {_range(least, most)}")
    choices = metadata.get("choices", ())
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        told = ", ".join(repr(choice) for choice in choices)
        yield _wrong(path, value, f"Did you mean {near[0]!r}?" if near else f"Choices: {told}")
    if metadata.get("patterns"):
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            yield _wrong(path, value, f"It is no regular expression: {error}")


def _misfit(value: Any, kind: Any) -> str:
    """Why a value is not of a field's type, as a hint; '' when it is."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Any:
        return ""
    if origin is dict:
        fits = isinstance(value, dict)
        return "" if fits else "It holds names with a value each: set one by its name"
    if origin is tuple:
        if not isinstance(value, tuple):
            return "Write several as '(a,b)', one as '(a,)'"
        return next(filter(None, (_misfit(entry, inner[0]) for entry in value)), "")
    if origin in (types.UnionType, typing.Union):
        return "" if any(not _misfit(value, one) for one in inner) else "It is of another type"
    if origin is float:
        real = isinstance(value, NUMBER) and not isinstance(value, bool)
        return "" if real and math.isfinite(value) else "Give a number"
    if origin is int:
        return "" if isinstance(value, int) and not isinstance(value, bool) else "Give an integer"
    named = {str: "a text", bool: "true or false"}.get(origin, origin.__name__)
    return "" if isinstance(value, origin) else f"Give {named}"


def _range(least: float, most: float) -> str:
    return f"{least:,} up to {most:,}".replace(",", "_") if most < 1e15 else f"{least} or more"


def _wrong(path: str, value: object, hint: str) -> UserError:
    return UserError(f"cannot be {words.shown(value)}", field=path, hint=hint)
