"""Tokens become text as they come: whole characters, and nothing of a text that stops."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_jax.data.text import signal_runs
from xllm_jax.data.text.llm_family import LLMFamily

BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or not yet
WINDOW = 64  # tokens that are decoded again with every new one, before half of them are let go
BEFORE = 8  # of those that stay, the ones whose own text may differ, as the beginning's does
LEAST = 8  # characters that must be the same behind them, beside those of a stop text


class TextStream:
    """The text of one answer.

    What `push` and `close` return is the answer's text piece by piece: joined, it is
    `Reply.text` of the same tokens, cut before the first stop text. Stop texts are looked for in
    what the LLM wrote and in what users see, which a family's `finish` may have changed.

    A token costs the same however long the answer is: a window of the last tokens is decoded, and
    its front is let go where the rest has the same text without it. The whole is decoded once, in
    the end.

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
        self._inside: list[bool] = []  # each token: whether a run of signal tokens has begun before
        self._left = 0  # tokens of the run that has begun
        self._told: list[str] = []
        self.stopped = False
        # Of the window: its first token, its characters (as decoded, as seen) that are skipped,
        # what was told of the rest, and its length at which some of it is let go.
        self._start, self._skipped, self._tail, self._limit = 0, (0, 0), "", WINDOW

    def push(self, token: int) -> str:
        """What another token lets be known for certain.

        Args:
          token: no end token.
        """
        self._add(token)
        whole = self._decoded(self._start).rstrip(BROKEN)
        if self._ends(whole, self._skipped):
            raw = self._decoded()
            self.stopped = self._ends(raw.rstrip(BROKEN))
            if self.stopped:
                return self._rest(self._final(raw), False)
        held = self._family.settled(whole[: len(whole) - _open(whole, self._stops)])
        seen = held[self._skipped[1] : len(held) - _open(held, self._stops)]
        more = ""
        if seen.startswith(self._tail):  # else a decoder has taken back what it wrote
            more, self._tail = seen[len(self._tail) :], seen
        self._told.append(more)
        if len(self._tokens) - self._start >= self._limit:
            self._let_go(whole)
        return more

    def close(self) -> str:
        """The rest, when no token follows; a stop text may be found only now."""
        if self.stopped:
            return ""
        raw = self._decoded()
        text = self._final(raw)
        self.stopped = text != self._family.finish(raw)
        return self._rest(text, True)

    def _add(self, token: int) -> None:
        self._tokens.append(token)
        self._inside.append(self._left > 0)
        lengths = (
            len(one.ids)
            for one in self._registry.values()
            if one.first <= token < one.first + one.count
        )
        self._left = self._left - 1 if self._left else next(lengths, 1) - 1

    def _decoded(self, start: int = 0, end: int | None = None) -> str:
        runs = signal_runs.split(self._tokens[start:end], self._registry)
        return "".join(self._family.tokenizer.decode(ids) for name, ids in runs if not name)

    def _ends(self, whole: str, skipped: tuple[int, int] = (0, 0)) -> bool:
        """Looks whether a stop text has come, in what can no longer change."""
        if not self._stops:
            return False
        texts = (whole[skipped[0] :], self._family.settled(whole)[skipped[1] :])
        return any(stop in text for stop in self._stops for text in texts)

    def _final(self, raw: str) -> str:
        text = self._family.finish(raw[: _first(raw, self._stops)])
        return text[: _first(text, self._stops)]

    def _rest(self, text: str, last: bool) -> str:
        """What a whole text has behind what was told.

        A decoder may have taken back what it wrote, but what was told stays: then it is what is
        beyond its length, if nothing else follows.
        """
        told = "".join(self._told)
        more = text[len(told) :] if last or text.startswith(told) else ""
        self._told.append(more)
        return more

    def _let_go(self, whole: str) -> None:
        """Makes the window shorter, where what is behind its new front has the text it has now."""
        seen = self._family.settled(whole)
        half = len(self._tokens) - self._limit // 2
        for start in range(half, half + BEFORE):
            if self._inside[start]:
                continue
            front = self._decoded(start, start + BEFORE).rstrip(BROKEN)
            skipped = len(front), len(self._family.settled(front))
            shorter = self._decoded(start).rstrip(BROKEN)
            rest = shorter[skipped[0] :], self._family.settled(shorter)[skipped[1] :]
            same = whole.endswith(rest[0]) and seen.endswith(rest[1])
            gone = len(seen) - len(rest[1]) - self._skipped[1]  # characters
            least = LEAST + max(map(len, self._stops), default=0)
            if same and min(map(len, rest)) >= least and 0 <= gone <= len(self._tail):
                self._start, self._skipped, self._tail = start, skipped, self._tail[gone:]
                self._limit = max(self._limit // 2, WINDOW)
                return
        self._limit *= 2  # tried again with more


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
