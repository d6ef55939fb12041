"""Tokens become text as they come: whole characters, and nothing of a text that stops."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_jax.data.text import signal_runs
from xllm_jax.data.text.llm_family import LLMFamily

BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or not yet


class TextStream:
    """The text of one answer.

    What `push` and `close` return is the answer's text piece by piece: joined, it is
    `Reply.text` of the same tokens, cut before the first stop text. Stop texts are looked for in
    what the LLM wrote and in what users see, which a family's `finish` may have changed.

    Args:
      family: decodes and finishes.
      registry: of signal tokens, which are no text.
      stops: texts that end the answer.

    Attributes:
      stopped: whether a stop text has come; what follows is nothing any more.
    """

    def __init__(self, family: LLMFamily, registry: signal_runs.Registry, stops: Sequence[str]):
        self._family, self._registry, self._stops = family, registry, tuple(stops)
        self._tokens: list[int] = []
        self._told = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What another token lets be known for certain.

        Args:
          token: no end token.
        """
        self._tokens.append(token)
        raw = self._decoded()
        whole = raw.rstrip(BROKEN)
        if self._cut(raw):
            return self._more(self._final(raw))
        held = self._family.settled(whole[: len(whole) - _open(whole, self._stops)])
        return self._more(held[: len(held) - _open(held, self._stops)])

    def close(self) -> str:
        """The rest, when no token follows; a stop text may be found only now."""
        if self.stopped:
            return ""
        raw = self._decoded()
        text, told = self._final(raw), len(self._told)
        self.stopped = text != self._family.finish(raw)
        # A decoder may have taken back what it wrote, but what was told stays.
        return self._more(text) if text.startswith(self._told) else text[told:]

    def _decoded(self) -> str:
        runs = signal_runs.split(self._tokens, self._registry)
        return "".join(self._family.tokenizer.decode(ids) for name, ids in runs if not name)

    def _cut(self, raw: str) -> bool:
        """Looks whether a stop text has come, in what can no longer change."""
        whole = raw.rstrip(BROKEN)
        seen = self._family.settled(whole)
        self.stopped = any(stop in text for stop in self._stops for text in (whole, seen))
        return self.stopped

    def _final(self, raw: str) -> str:
        text = self._family.finish(raw[: _first(raw, self._stops)])
        return text[: _first(text, self._stops)]

    def _more(self, text: str) -> str:
        """What a text has behind what was told; nothing while a decoder has taken that back."""
        if not text.startswith(self._told):
            return ""
        more = text[len(self._told) :]
        self._told = text
        return more


def _first(text: str, stops: Sequence[str]) -> int:
    """Where the first stop text begins, or the text's end."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=len(text))


def _open(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of a text that a stop text may begin with."""
    lengths = (
        size
        for stop in stops
        for size in range(min(len(stop) - 1, len(text)), 0, -1)
        if text.endswith(stop[:size])
    )
    return max(lengths, default=0)
