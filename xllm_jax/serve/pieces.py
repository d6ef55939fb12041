"""Single tokens as clients see them, with their log-probabilities."""

from __future__ import annotations

import numpy as np

from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.serve.request import Alternative, Token
from xllm_jax.serve.text_stream import BROKEN

ANCHOR = "a"


class Pieces:
    """Texts of single tokens, each decoded once.

    A token is decoded behind another one, since at the start of a text many lose their space.

    Args:
      family: of the LLM.
    """

    def __init__(self, family: LLMFamily):
        self._decode = family.tokenizer.decode
        self._anchor = family.tokenizer.encode(ANCHOR)[-1:]
        self._before = self._decode(self._anchor)
        self._known: dict[int, str] = {}

    def text(self, token: int) -> str:
        """What a token adds to a text; '' for no text, or a part of a character."""
        if token not in self._known:
            text = self._decode([*self._anchor, token])
            own = text[len(self._before) :] if text.startswith(self._before) else ""
            self._known[token] = own.replace(BROKEN, "")
        return self._known[token]

    def token(
        self,
        token: int,
        logprob: float,
        top: tuple[np.ndarray, ...],
        count: int | None,
    ) -> Token:
        """A token of an answer.

        Args:
          token: its id.
          logprob: its log-probability.
          top: the best ids and their log-probabilities, `[A]` both; () where they are not known.
          count: of the alternatives that are wanted; None wants no text either.
        """
        if count is None:
            return Token(token, "", logprob)
        best = zip(*(x[:count].tolist() for x in top)) if top and count else ()
        told = tuple(Alternative(int(other), self.text(int(other)), value) for other, value in best)
        return Token(token, self.text(token), logprob, told)
