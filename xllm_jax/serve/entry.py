"""A prompt as a prefill reads it, in the shape of its length bucket."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.data.text.prompt import Prompt
from xllm_jax.inference.decoding import BUCKETS
from xllm_jax.inference.media_cache import Encoded
from xllm_jax.inference.row_sampling import Settings, stream_of
from xllm_jax.serve.request import Sampling


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static shapes, and what is the same for all rows.

    Attributes:
      slots: S, rows that are decoded at a time.
      length: tokens of a prompt, at most.
      max_tokens: tokens of an answer, at most.
      ends: ids that end a row.
      position_step: what a token adds to the position of the token before it.
      width: D, of the LLM.
      signals: of each kind of signal tokens, see `whole_runs.permitted`.
    """

    slots: int
    length: int
    max_tokens: int
    ends: tuple[int, ...]
    position_step: tuple[int, ...]
    width: int
    signals: tuple[tuple[int, ...], ...] = ()

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths of prompts that a prefill is compiled for, ascending."""
        return (*(bucket for bucket in BUCKETS if bucket < self.length), self.length)

    @property
    def capacity(self) -> int:
        """Tokens of a row: the last one of an answer is never read."""
        return self.length + self.max_tokens - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt in its bucket of T tokens.

    Attributes:
      ids: `[1, T]` int32; positions: `[1, T, P]` int32; context: `[1, T]` bool.
      size: tokens that are not padding, int32.
      media: `[1, T, D]` float32, embeddings of its files in their places; None where it has none.
      index: `[1, T]` int32, which of them stands there, -1 for a word.
      settings: of the row, `[1, ...]`.
    """

    ids: Any
    positions: Any
    context: Any
    size: Any
    media: Any
    index: Any
    settings: Settings


def pack_entry(
    prompt: Prompt,
    files: dict[tuple[str, str], Encoded],
    sampling: Sampling,
    plan: Plan,
    bucket: int = 0,
) -> Entry:
    """A prompt as a prefill reads it, in NumPy.

    Args:
      prompt: open, one segment.
      files: its encoded files, by (modality, path).
      sampling: how it is decoded.
      plan: the shapes.
      bucket: T; the first that holds the prompt when 0.

    Raises:
      UserError: no bucket holds it.
    """
    size = len(prompt.ids)
    length = bucket or next((one for one in plan.buckets if one >= size), 0)
    if size > length:
        what = f"takes {size} tokens, {plan.length} is the most"
        raise UserError(what, field="prompt", hint="Shorten it")
    behind = (0, length - size)
    # As many places for embeddings as tokens, so that the shape depends on the bucket alone.
    media = np.zeros((length, plan.width), np.float32) if prompt.slots else None
    index = np.full(length, -1, np.int32)
    for name, places in prompt.index.items():
        paths = [slot.path for slot in prompt.slots if slot.modality == name]
        table = np.concatenate([files[name, path].embeddings for path in paths])
        at = np.flatnonzero(places >= 0)
        index[at] = at
        if media is not None:
            media[at] = table.reshape(-1, plan.width)[places[at]]
    return Entry(
        ids=np.pad(prompt.ids, behind)[None],
        positions=np.pad(prompt.positions, (behind, (0, 0)))[None],
        context=np.pad(prompt.context, behind)[None],
        size=np.int32(size),
        media=None if media is None else media[None],
        index=index[None],
        settings=settings_of(sampling, plan.max_tokens),
    )


def settings_of(sampling: Sampling, max_tokens: int) -> Settings:
    """Settings of one row, `[1, ...]`, whose answer has at most `max_tokens` tokens."""
    most = min(sampling.max_tokens or max_tokens, max_tokens)
    return Settings(
        stream=stream_of(sampling.seed)[None],
        temperature=np.array([sampling.temperature], np.float32),
        # What is larger than a vocabulary removes nothing.
        top_k=np.array([min(sampling.top_k, 2**31 - 1)], np.int32),
        top_p=np.array([sampling.top_p], np.float32),
        most=np.array([most], np.int32),
        told=np.array([bool(sampling.logprobs)]),
    )


def empty_entry(family: LLMFamily, plan: Plan, bucket: int) -> Entry:
    """A prompt that says nothing, for warm-ups."""
    nothing = Prompt(**vars(family.row(())), index={}, slots=())
    return pack_entry(nothing, {}, Sampling(), plan, bucket)


def key_of(entry: Entry) -> str:
    """Of all that a prefill reads: ids, places and embeddings, to the bit."""
    digest = hashlib.sha256()
    for one in (entry.ids, entry.positions, entry.context, entry.size, entry.index):
        digest.update(np.ascontiguousarray(one).data)
    if entry.media is not None:
        digest.update(np.ascontiguousarray(entry.media).data)
    return digest.hexdigest()
