"""The rows of a running batch: their keys and values on the device, and what changes them.

A prompt is read by the prefill of its length bucket, one row at a time, and then put into a slot;
all rows go on together by one decoding step. All of it has static shapes and writes into the cache
in place, each row behind its own last token. What a row computes does not depend on its slot or its
neighbors: every product has the same shape whoever is there.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from xllm_jax.core.types import Params
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.inference.row_sampling import Chosen, Settings, choose_rows
from xllm_jax.inference.whole_runs import permitted
from xllm_jax.models.xllm import LLM, LLM_PREFIX, SIGNALS, XLLM, splice
from xllm_jax.serve.contexts import Context, Contexts
from xllm_jax.serve.entry import Entry, Plan, empty_entry

Array = jax.Array


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


class Slots:
    """The rows of one LLM; for one thread.

    Args:
      model: with the LLM, what it is composed of besides is not used.
      params: {part: parameters}.
      plan: the shapes.
      kept_bytes: of prompts that are remembered when they have been read.
    """

    def __init__(self, model: XLLM, params: Params, plan: Plan, kept_bytes: int = 0):
        self.plan, self.contexts = plan, Contexts(kept_bytes)
        parts = [part for part in (LLM, LLM_PREFIX, SIGNALS) if part in model.networks]
        self._params = jax.tree.map(jnp.asarray, {part: params[part] for part in parts})
        self._no_media: dict[tuple[int, ...], Array] = {}
        where = _whole(self._params)
        new = functools.partial(_new, model, plan)
        self._new = jax.jit(new, out_shardings=where)
        out = (where, where)
        read, enter, step = (functools.partial(f, model, plan) for f in (_read, _enter, _step))
        self._read = jax.jit(read, out_shardings=where)
        self._enter = jax.jit(enter, donate_argnums=0, out_shardings=out)
        self._step = jax.jit(step, donate_argnums=1, out_shardings=out)
        self.reset()

    def reset(self) -> None:
        """Empties all rows."""
        self._state: State = self._new(self._params)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of all rows."""
        return sum(self._state.cache[name].nbytes for name in ("key", "value"))

    def enter(self, slot: int, entry: Entry, key: str = "") -> Chosen:
        """Puts a prompt into a slot; returns the first token of its answer, rows of 1.

        Args:
          slot: whose row ends.
          entry: the prompt.
          key: of it, see `entry.key_of`; under which it is looked for and remembered. '' is none.
        """
        context = self.contexts.get(key) if key else None
        if context is None:
            context = self._read(self._params, self._with_media(entry))
            if key:
                self.contexts.put(key, context)
        last = entry.positions[:, int(entry.size) - 1]
        given = (context, entry.settings, last, np.int32(slot))
        self._state, chosen = self._enter(self._state, *given)
        return chosen

    def _with_media(self, entry: Entry) -> Entry:
        """The entry with zeros where it has no media, so that its program is the same."""
        if entry.media is not None:
            return entry
        shape = (1, entry.ids.shape[1], self.plan.width)
        if shape not in self._no_media:  # kept on the device: prompts without files are many
            self._no_media[shape] = jax.device_put(np.zeros(shape, np.float32))
        return dataclasses.replace(entry, media=self._no_media[shape])

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
                entry = empty_entry(family, self.plan, bucket)
                jax.block_until_ready(self.enter(0, entry))
            jax.block_until_ready(self.step(kept))
        self.reset()


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

    def zeros(dtype: DTypeLike, *shape: int) -> Array:
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


def _read(model: XLLM, plan: Plan, params: Params, entry: Entry) -> Context:
    llm, length = model.llm(params), entry.ids.shape[1]
    x = splice(llm(entry.ids, method="embed"), entry.media, entry.index)
    segments = (jnp.arange(length) < entry.size)[None].astype(jnp.int32)
    empty = llm(1, length, prefix=model.prefix(params), method="init_cache")
    states, cache = llm(x, segments, entry.context, entry.positions, empty)
    return Context(cache, llm(states[:, entry.size - 1], method="logits"))


def _enter(
    model: XLLM,
    plan: Plan,
    state: State,
    context: Context,
    settings: Settings,
    position: Array,
    slot: Array,
) -> tuple[State, Chosen]:
    cache, step = context.cache, jnp.zeros(1, jnp.int32)
    none = step - 1
    chosen, active = _choose(plan, context.logits, (none, none), step, settings, step == 0)
    # The whole book-keeping of the row is new: nothing of the one before it is seen.
    room = state.cache["segments"].shape[1] - cache["segments"].shape[1]
    book = {name: jnp.pad(cache[name], ((0, 0), (0, room))) for name in ("segments", "context")}
    row = State(
        cache=cache | book,
        last=chosen.tokens,
        before=none,
        position=position,
        step=step + 1,
        active=active,
        settings=settings,
    )
    written = jax.tree_util.tree_map_with_path(
        lambda path, whole, new: _written(whole, new, slot, _axis(path)), state, row
    )
    return written, chosen


def _axis(path: jax.tree_util.KeyPath) -> int:
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
