"""Flags of fields whose names are open: a reader's options, weights of sources, `init`, `fields`.

The configuration flags of ml_collections override what a configuration has. These fields are
dictionaries that may get a name more: `--config.data.mix.cc3m=0` where the weights are empty,
`--config.data.sources.captions.options.media=DIR`, `--config.init.llm/layers=DIR`; and
`--config.parts.llm.fields.alpha=None` takes away a field that another network does not have.
So do the options of images, videos and speech, as far as there are any of that name.
Everything else stays with the usual flags, and is refused there when it does not exist.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xllm_jax.core.errors import UserError

MIX = re.compile(r"(data|validation)\.mix")
FIELDS = re.compile(r"parts\.[^.]+\.fields")
OPEN = re.compile(
    r"init|(data|validation)\.(mix|sources\.[^.]+\.options)|parts\.[^.]+\.fields|options|"
    r"sets\.[^.]+\.options|titles|speakers"
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A name and its value in a dictionary of a configuration.

    Attributes:
      flag: the configuration's flag.
      path: from the configuration to the dictionary.
      name, value: what is set there.
    """

    flag: str
    path: tuple[str, ...]
    name: str
    value: Any

    def apply(self, config: Any) -> None:
        """Sets it in the configuration; None takes a network's field away."""
        there = holder(config, self.path)
        if self.value is None and FIELDS.fullmatch(".".join(self.path)):
            there.pop(self.name, None)
        else:
            there[self.name] = self.value


def holder(config: Any, path: Sequence[str]) -> Any:
    """What lies at a path of fields and keys; None where there is nothing."""
    for step in path:
        config = config.get(step) if isinstance(config, dict) else getattr(config, step, None)
    return config


def options(config: Any, path: Sequence[str]) -> Mapping[str, Any]:
    """{name: what it may be} of the options that a dictionary is declared to take."""
    above = holder(config, path[:-1]) if path else None
    if not dataclasses.is_dataclass(above):
        return {}
    known = {field.name: field.metadata for field in dataclasses.fields(above)}
    return known.get(path[-1], {}).get("options", {})


def take(argv: Sequence[str], configs: dict[str, Any]) -> tuple[list[str], list[Setting]]:
    """Parts the command line into what goes the usual way, and settings of open fields.

    Args:
      argv: the command line.
      configs: {configuration flag: its configuration, before any override}.

    Raises:
      UserError: a weight of something that is no source, or is not a number.
    """
    rest, settings = [], []
    for token in argv:
        found = _setting(token, configs)
        settings.append(found) if found else rest.append(token)
    return rest, settings


def _setting(token: str, configs: dict[str, Any]) -> Setting | None:
    name, given, text = token.lstrip("-").partition("=")
    flag, *path = name.split(".")
    if not (token.startswith("-") and given and flag in configs and path):
        return None
    *path, key = path
    config = configs[flag]
    if not OPEN.fullmatch(".".join(path)) and key not in options(config, path):
        return None
    there = holder(config, path)
    away = text == "None" and FIELDS.fullmatch(".".join(path))
    if not isinstance(there, dict) or (key in there and "/" not in key and not away):
        return None
    value = text if path == ["init"] else _value(text)
    if MIX.fullmatch(".".join(path)):
        value = _weight(token, text, key, holder(config, [*path[:-1], "sources"]))
    return Setting(flag, tuple(path), key, value)


def _value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def _weight(token: str, text: str, key: str, sources: dict[str, Any]) -> float:
    field = token.partition("=")[0]
    if key not in sources:
        near = difflib.get_close_matches(key, sources, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Choices: {', '.join(sorted(sources))}"
        raise UserError("no such source", field=field, hint=hint)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{text!r} is no weight", field=field, hint="Give a number") from None
