"""A config.json of transformers: each field is used, agrees with the tensors, or is refused.

Weights do not tell everything of a network: heads, activations and the epsilons of norms are in
config.json alone, where a field that is left out has the default of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from xllm_jax.convert.files import Checkpoint
from xllm_jax.core import words
from xllm_jax.core.errors import UserError
from xllm_jax.models.layers import ACTIVATIONS

ABSOLUTE = {"position_embedding_type": "absolute", "quantization_config": None}
"""Fields of every model here, and the only value that is converted."""


@dataclasses.dataclass(frozen=True)
class PublishedConfig:
    """What one network's config.json says.

    Attributes:
      values: its fields, those that are left out with transformers' defaults.
      place: of the fields in errors, such as 'config.json: vision_config.'.
      said: names of the fields that stand in the file.
    """

    values: Mapping[str, Any]
    place: str
    said: frozenset[str]

    def refuse(self, name: str, what: str) -> UserError:
        """The error that names a field."""
        what = f"is {words.shown(self.values.get(name))}, {what}"
        hint = "Correct config.json, or give another checkpoint"
        return UserError(what, field=self.place + name, hint=hint)

    def only(self, **known: object) -> None:
        """Refuses what the network cannot be.

        Args:
          known: {field: the one value that it can have}.

        Raises:
          UserError: another value; names the field.
        """
        for name, value in (ABSOLUTE | known).items():
            if self.values.get(name, value) != value:
                raise self.refuse(name, f"this network knows {value!r} only")

    def agree(self, **found: int) -> None:
        """Compares fields with what the tensors show.

        Args:
          found: {field: its value by the tensors}; a pair of equal sides counts as one.

        Raises:
          UserError: they differ; names the field.
        """
        for name, value in found.items():
            told = self.values.get(name)
            if name in self.said and told not in (value, [value, value]):
                raise self.refuse(name, f"and the tensors say {value}")

    def heads(self, width: int, name: str = "num_attention_heads") -> int:
        """The number of heads.

        Args:
          width: of the network.
          name: of the field.

        Raises:
          UserError: it does not divide the width.
        """
        heads = self.values.get(name)
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise self.refuse(name, f"which does not divide the width {width}")
        return heads

    def activation(self, name: str = "hidden_act") -> str:
        """The activation, a row of `layers.ACTIVATIONS`.

        Raises:
          UserError: it is none.
        """
        if self.values.get(name) not in ACTIVATIONS:
            raise self.refuse(name, f"known are {', '.join(ACTIVATIONS)}")
        return self.values[name]

    def epsilon(self, name: str = "layer_norm_eps") -> float:
        """The epsilon of the norms.

        Raises:
          UserError: it is no positive number.
        """
        value = self.values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
            raise self.refuse(name, "an epsilon is a small positive number")
        return float(value)


def read(
    checkpoint: Checkpoint,
    defaults: Mapping[str, Any],
    kinds: Collection[str] = (),
    section: str = "",
) -> PublishedConfig | None:
    """The config.json beside a checkpoint, or the section of it that is about one network.

    Args:
      checkpoint: the opened files.
      defaults: of transformers, by field.
      kinds: what `model_type` may say, of the whole file or of a network alone.
      section: such as 'vision_config'; a file without it is about this network alone.

    Returns:
      None where there is no config.json.

    Raises:
      UserError: it is of another model.
    """
    whole = checkpoint.config()
    if not whole:
        return None
    place = f"{checkpoint.config_file()}: "
    told = whole.get("model_type")
    if kinds and told is not None and told not in kinds:
        what = f"is {words.shown(told)}, and this source reads {', '.join(kinds)}"
        raise UserError(what, field=f"{place}model_type", hint="Give that model's own config.json")
    inner = whole.get(section) if section else None
    if not isinstance(inner, Mapping):
        return PublishedConfig({**defaults, **whole}, place, frozenset(whole))
    values = {**defaults, **inner}
    older = whole.get(f"{section}_dict")  # as files before transformers 4.27 have it, and it wins
    if isinstance(older, Mapping):
        values |= {**defaults, **older}
        inner = {**inner, **older}
    return PublishedConfig(values, f"{place}{section}.", frozenset(inner))


def other_than(defaults: Any, **fields: Any) -> dict[str, Any]:
    """Those fields that are not what a network has by default.

    Args:
      defaults: the network's class.
      fields: its fields.
    """
    return {name: value for name, value in fields.items() if value != getattr(defaults, name)}
