"""LLMFamily: all that the project must know of an LLM besides its network.

A family is one file of `llm_families/` with a class `Family`; `data.llm_family` names it. Prompts,
batches and decoding ask it alone, so nothing else depends on the kind of the LLM.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import ClassVar, Protocol

import numpy as np

from xllm_jax.core import damage, lookup
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.text.token_rows import Row

FAMILIES = "xllm_jax.data.text.llm_families"


class Tokenizer(Protocol):
    """Text to ids and back."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the tokens that a family puts around it."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; those that stand for no text are left out."""
        ...

    def piece(self, token: int) -> str:
        """Name of one id."""
        ...


class LLMFamily(abc.ABC):
    """How one kind of LLM reads and continues a conversation.

    The defaults are those of a causal LLM with one number to a position.

    Args:
      folder: of the LLM's tokenizer.

    Attributes:
      position_step: what a generated token adds to the position of the token before it, as many
        numbers as a position has.
      files: names of the files in the folder that the tokenizer depends on.
      tokenizer: text to ids and back.
      ends: ids that end an answer.
      pad: id that fills the places behind it.
      mask: id of a word that is hidden.
      specials: ids that stand for no text.
      spare: ids that the tokenizer never gives and that the LLM has rows for.
    """

    position_step: ClassVar[tuple[int, ...]] = (1,)
    files: ClassVar[tuple[str, ...]] = ()

    tokenizer: Tokenizer
    ends: tuple[int, ...]
    pad: int
    mask: int
    specials: frozenset[int]
    spare: range = range(0)

    @abc.abstractmethod
    def __init__(self, folder: str): ...

    @abc.abstractmethod
    def row(self, prompt: Sequence[int], answer: Sequence[int] | None = None) -> Row:
        """Lays a conversation out, with the family's own tokens around it.

        Args:
          prompt: ids of the prompt, media slots included.
          answer: ids of the answer, which is supervised together with its end; None leaves the
            sequence open, ready to generate.
        """

    def text_capacity(self, length: int, answers: int) -> int:
        """Tokens of a text that `text_row` fits into `length` tokens, `answers` of them learnt."""
        frame = self.row((), ())
        return min(length - len(frame.ids), answers - len(frame.targets))

    def text_row(self, ids: Sequence[int], generator: np.random.Generator) -> Row:
        """Lays a text out for text-only training, which here learns all of it.

        Args:
          ids: of the text, at most `text_capacity`.
          generator: of what the objective draws.
        """
        return self.row((), ids)

    def finish(self, text: str) -> str:
        """The text of an answer as users see it."""
        return text.strip()

    def settled(self, text: str) -> str:
        """How `finish` begins for every text that begins so: what may be shown before the end.

        A family with a `finish` of its own tells it too, or shows answers at their end.
        """
        return text.strip() if type(self).finish is LLMFamily.finish else ""


def find(data: Data) -> type[LLMFamily]:
    """The family that the data names: a file of `llm_families/`, or 'package.module:Class'.

    Raises:
      UserError: no such family; names the nearest one.
    """
    name, field = data.llm_family, "data.llm_family"
    if ":" not in name:
        return lookup.module(FAMILIES, name, field).Family
    _, found = lookup.imported(name, field)
    if not (isinstance(found, type) and issubclass(found, LLMFamily)):
        raise UserError(f"{name} is no LLMFamily", field=field, hint=f"See {__name__}")
    return found


def load(data: Data) -> LLMFamily:
    """The family that the data names, with the tokenizer that it names.

    Raises:
      UserError: no such family or tokenizer.
    """
    family = find(data)
    if family.__module__.partition(".")[0] != __name__.partition(".")[0]:
        return family(data.tokenizer)  # whose mistakes its author wants to see
    with damage.given_to_library(data.tokenizer, *family.files):
        return family(data.tokenizer)
