"""The rows of a running batch: their keys and values on the device, and what changes them.

A row enters by the prefill of its length bucket, one row at a time, and all rows go on together by
one decoding step. Both have static shapes and write into the cache in place, each row behind its
own last token. What a row computes does not depend on its slot or its neighbors: every product has
the same shape whoever is there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.data.text.prompt import Prompt
from xllm_jax.inference.decoding import BUCKETS
from xllm_jax.inference.media_cache import Encoded
from xllm_jax.inference.row_sampling import Chosen, Settings, choose_rows, stream_of
from xllm_jax.inference.whole_runs import permitted
from xllm_jax.models.xllm import LLM, LLM_PREFIX, SIGNALS, XLLM, splice
from xllm_jax.serve.request import Sampling

Array = jax.Array


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
class State:
    """What S rows remember.

    Attributes:
      cache: see `models/decoder_cache.py`.
      last: `[S]` int32, the token that a row has chosen and not read; `before`: the one before it.
      position: `[S, P]` int32, of the token before it.
      step: `[S]` int32, tokens chosen so far.
      active: `[S]` bool, the row goes on.
      settings: of the rows.
    """

    cache: dict[str, Array]
    last: Array
    before: Array
    position: Array
    step: Array
    active: Array
    settings: Settings


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


class Slots:
    """The rows of one LLM; for one thread.

    Args:
      model: with the LLM, what it is composed of besides is not used.
      params: {part: parameters}.
      plan: the shapes.
    """

    def __init__(self, model: XLLM, params: Params, plan: Plan):
        self.plan = plan
        parts = [part for part in (LLM, LLM_PREFIX, SIGNALS) if part in model.networks]
        self._params = jax.tree.map(jnp.asarray, {part: params[part] for part in parts})
        self._no_media: dict[tuple[int, ...], Array] = {}
        where = _whole(self._params)
        new = functools.partial(_new, model, plan)
        self._new = jax.jit(new, out_shardings=where)
        out = (where, where)
        enter, step = (functools.partial(f, model, plan) for f in (_enter, _step))
        self._enter = jax.jit(enter, donate_argnums=1, out_shardings=out)
        self._step = jax.jit(step, donate_argnums=1, out_shardings=out)
        self.reset()

    def reset(self) -> None:
        """Empties all rows."""
        self._state: State = self._new(self._params)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of all rows."""
        return sum(self._state.cache[name].nbytes for name in ("key", "value"))

    def enter(self, slot: int, entry: Entry) -> Chosen:
        """Reads a prompt into a slot; returns the first token of its answer, rows of 1."""
        if entry.media is None:
            shape = (1, entry.ids.shape[1], self.plan.width)
            if shape not in self._no_media:  # kept on the device: prompts without files are many
                self._no_media[shape] = jax.device_put(np.zeros(shape, np.float32))
            entry = dataclasses.replace(entry, media=self._no_media[shape])
        self._state, chosen = self._enter(self._params, self._state, entry, np.int32(slot))
        return chosen

    def step(self, kept: np.ndarray) -> Chosen:
        """One more token of all rows that have not ended.

        Args:
          kept: `[S]` bool; the other rows end here.

        Returns:
          Rows of S; what stands in rows that had ended before means nothing.
        """
        self._state, chosen = self._step(self._params, self._state, kept)
        return chosen

    def warm_up(self, family: LLMFamily) -> None:
        """Compiles every bucket and the step, on rows that are forgotten again."""
        kept = np.ones(self.plan.slots, bool)
        for _ in range(2):  # the second time on what the steps themselves have made
            for bucket in self.plan.buckets:
                empty = Prompt(**vars(family.row(())), index={}, slots=())
                entry = pack_entry(empty, {}, Sampling(), self.plan, bucket)
                jax.block_until_ready(self.enter(0, entry))
            jax.block_until_ready(self.step(kept))
        self.reset()


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


def _whole(params: Params) -> Sharding | None:
    """Where rows live: on every device that holds the parameters, or wherever there is one.

    Said also of a mesh of one device: else new rows would lie nowhere in particular, and programs
    that read them are other ones than those that read what a step has made.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    meshed = isinstance(sharding, NamedSharding)
    return NamedSharding(sharding.mesh, PartitionSpec()) if meshed else None


def _new(model: XLLM, plan: Plan, params: Params) -> State:
    rows, axes = plan.slots, len(plan.position_step)

    def zeros(dtype: Any, *shape: int) -> Array:
        return jnp.zeros((rows, *shape), dtype)

    prefix = model.prefix(params)
    cache = model.llm(params)(rows, plan.capacity, prefix=prefix, method="init_cache")
    return State(
        cache=cache,
        last=zeros(jnp.int32),
        before=zeros(jnp.int32),
        position=zeros(jnp.int32, axes),
        step=zeros(jnp.int32),
        active=zeros(bool),
        settings=Settings(
            stream=zeros(jnp.uint32, 2),
            temperature=zeros(jnp.float32),
            top_k=zeros(jnp.int32),
            top_p=zeros(jnp.float32),
            most=zeros(jnp.int32),
            told=zeros(bool),
        ),
    )


def _enter(
    model: XLLM, plan: Plan, params: Params, state: State, entry: Entry, slot: Array
) -> tuple[State, Chosen]:
    llm, length = model.llm(params), entry.ids.shape[1]
    x = splice(llm(entry.ids, method="embed"), entry.media, entry.index)
    segments = (jnp.arange(length) < entry.size)[None].astype(jnp.int32)
    empty = llm(1, length, prefix=model.prefix(params), method="init_cache")
    states, cache = llm(x, segments, entry.context, entry.positions, empty)
    logits = llm(states[:, entry.size - 1], method="logits")
    step = jnp.zeros(1, jnp.int32)
    none = step - 1
    chosen, active = _choose(plan, logits, (none, none), step, entry.settings, step == 0)
    # The whole book-keeping of the row is new: nothing of the one before it is seen.
    room = state.cache["segments"].shape[1] - cache["segments"].shape[1]
    cache |= {name: jnp.pad(cache[name], ((0, 0), (0, room))) for name in ("segments", "context")}
    row = State(
        cache=cache,
        last=chosen.tokens,
        before=none,
        position=entry.positions[:, entry.size - 1],
        step=step + 1,
        active=active,
        settings=entry.settings,
    )
    written = jax.tree_util.tree_map_with_path(
        lambda path, whole, new: _written(whole, new, slot, _axis(path)), state, row
    )
    return written, chosen


def _axis(path: Sequence[Any]) -> int:
    """Axis of the rows of a leaf of `State`: keys and values have layers before it."""
    return int(getattr(path[-1], "key", "") in ("key", "value"))


def _written(whole: Array, new: Array, slot: Array, axis: int) -> Array:
    start = [slot if n == axis else 0 for n in range(whole.ndim)]
    return jax.lax.dynamic_update_slice(whole, new.astype(whole.dtype), start)


def _step(
    model: XLLM, plan: Plan, params: Params, state: State, kept: Array
) -> tuple[State, Chosen]:
    llm = model.llm(params)
    going = state.active & kept
    position = state.position + jnp.array(plan.position_step)
    segments = going.astype(jnp.int32)[:, None]  # padding takes no room
    context = jnp.zeros(segments.shape, bool)
    x = llm(state.last[:, None], method="embed")
    states, cache = llm(x, segments, context, position[:, None], state.cache)
    logits = llm(states[:, 0], method="logits")
    chosen, active = _choose(
        plan, logits, (state.last, state.before), state.step, state.settings, going
    )
    after = State(
        cache, chosen.tokens, state.last, position, state.step + 1, active, state.settings
    )
    return after, chosen


def _choose(
    plan: Plan,
    logits: Array,
    last: tuple[Array, Array],
    step: Array,
    settings: Settings,
    going: Array,
) -> tuple[Chosen, Array]:
    """The next tokens behind the last one and the one before, and which rows go on then."""
    logits = permitted(logits, last[0], step, plan.signals, settings.most, last[1])
    chosen = choose_rows(logits, settings, step, going)
    ended = (chosen.tokens[:, None] == jnp.array(plan.ends)).any(-1)
    return chosen, going & ~ended & (step + 1 < settings.most)
