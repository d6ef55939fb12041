"""Generation: one prefill, one compiled decoding loop; greedy, sampling and beam search.

Rows are independent: each has its own length, its own random stream and stops by itself. The cache
has a static size, so one compilation serves every batch of the same bucket. Beam search and the
order of the filters are those of transformers 4.27.1, which X-LLM runs on, with one row at a time:
in a batch it counts a running beam of row i as i tokens longer than it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import ConversationBatch
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.data.text.token_rows import Row, pack
from xllm_jax.inference.whole_runs import permitted
from xllm_jax.models.xllm import XLLM, BoundLLM

Array = jax.Array
State = dict[str, Any]

BUCKETS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)  # lengths of prompts in tokens


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to decode; every field is static, a new value compiles once more.

    Attributes:
      ends: ids that end a row.
      pad: id that fills what follows.
      position_step: what each token adds to the position of the token before it.
      max_new_tokens: N, length of the answer, the end token included.
      sample: draw tokens instead of taking the best.
      temperature, top_k, top_p: filters of sampling, in this order; top_k 0 and top_p 1 are off.
        X-LLM samples with 0.95, 50 (its library's silent default) and 0.7.
      beams: more than 1 for beam search.
      length_penalty: exponent of the hypothesis length (prompt included) that divides its score.
      early_stopping: a row ends as soon as it has `beams` finished hypotheses.
      signals: (id of the first, tokens of a run, id of what stands between them or -1) of each kind
        of signal tokens. A run that begins is completed, and begins only where the answer has room
        for all of it.
    """

    ends: tuple[int, ...]
    pad: int
    position_step: tuple[int, ...]
    max_new_tokens: int = 64
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    signals: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, family: LLMFamily, **options: Any) -> Decoding:
        """Decoding of one family's LLM; `options` are the other fields."""
        return cls(family.ends, family.pad, family.position_step, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
      tokens: `[B, N]` int32, padded after the end token; `[B, K, N]`, best first, by beam search.
      scores: sum of log-probabilities `[B]`; beam search: divided by length, `[B, K]`. float32.
      logits: `[B, V]` float32 of the last step; None by beam search.
    """

    tokens: Array
    scores: Array
    logits: Array | None = None


def prompt_batch(
    prompts: Sequence[Row], pad: int, buckets: Sequence[int] = BUCKETS
) -> ConversationBatch:
    """Prompts as a batch whose length is a bucket, so that few shapes are ever compiled.

    Args:
      prompts: B open sequences.
      pad: id of the padding.
      buckets: lengths T to choose from, ascending.

    Returns:
      NumPy batch without media.

    Raises:
      UserError: a prompt longer than the last bucket.
    """
    longest = max(len(row.ids) for row in prompts)
    length = next((bucket for bucket in buckets if bucket >= longest), None)
    if length is None:
        raise UserError(f"a prompt of {longest} tokens", field="prompt", hint="Shorten it")
    answers = max(len(row.targets) for row in prompts)
    return pack([[row] for row in prompts], length, answers, pad)


@functools.partial(jax.jit, static_argnames=("model", "decoding"))
def generate(
    model: XLLM,
    params: Params,
    batch: ConversationBatch,
    decoding: Decoding,
    key: Array | None = None,
) -> Generated:
    """Answers every row of a batch.

    Args:
      model: compiled once per object, so keep it.
      params: {part: parameters}; a part 'llm_prefix' goes before every prompt.
      batch: B prompts, one open segment per row, padded on either side, with media.
      decoding: how.
      key: random key of the sampling.
    """
    x = model.embed(params, batch)
    llm = model.llm(params)
    layout = (batch.segments, batch.context, batch.positions)
    state = prefill(llm, x, *layout, decoding.max_new_tokens, model.prefix(params))
    if decoding.beams > 1:
        return beam_search(llm, state, decoding, x.shape[1])
    if decoding.sample and key is None:
        raise UserError("sampling needs a key", field="key")
    return decode(llm, state, decoding, key)


def prefill(
    llm: BoundLLM,
    x: Array,
    segments: Array,
    context: Array,
    positions: Array,
    max_new_tokens: int,
    prefix: Array | None = None,
) -> State:
    """Reads the prompts.

    Args:
      llm: of `XLLM.llm`.
      x: `[B, T, D]` spliced embeddings; segments, context, positions: see `core.batch`.
      max_new_tokens: tokens to reserve in the cache behind the prompts.
      prefix: learned keys and values before the prompts, see `XLLM.prefix`.

    Returns:
      cache; `logits [B, V]` float32 behind each prompt's last token; that token's `position
      [B, P]` and `segment [B]`; and the prompts' `lengths [B]`, padding not counted.
    """
    segments, positions = jnp.asarray(segments), jnp.asarray(positions)
    rows, length = segments.shape
    cache = llm(rows, length + max_new_tokens, prefix=prefix, method="init_cache")
    start = cache["length"]
    states, cache = llm(x, segments, context, positions, cache)
    last = jnp.where(segments > 0, jnp.arange(length), -1).max(axis=1)
    here = jnp.arange(rows)
    return {
        # New tokens start behind the bucket in every row, so that beams share what is before it.
        "cache": cache | {"length": start + length},
        "logits": llm(states[here, last], method="logits"),
        "position": positions[here, last],
        "segment": segments[here, last],
        "lengths": (segments > 0).sum(axis=1),
    }


def feed(
    llm: BoundLLM, state: State, tokens: Array, done: Array, position_step: tuple[int, ...]
) -> State:
    """Feeds one token per row.

    Args:
      llm: of `XLLM.llm`.
      state: of `prefill` or of the step before.
      tokens: `[B]` int32.
      done: `[B]` bool; rows that are done add nothing to the cache.
      position_step: see `Decoding`.

    Returns:
      The state behind these tokens.
    """
    position = state["position"] + jnp.array(position_step)
    segments = jnp.where(done, 0, state["segment"])[:, None]
    context = jnp.zeros(segments.shape, bool)
    x = llm(tokens[:, None], method="embed")
    states, cache = llm(x, segments, context, position[:, None], state["cache"])
    logits = llm(states[:, 0], method="logits")
    return state | {"cache": cache, "position": position, "logits": logits}


def filter_logits(logits: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """Temperature, then top-k, then top-p: `[B, V]` float32, removed tokens at -inf.

    Top-p drops the smallest tokens whose probabilities sum to at most 1 - p, never the best one.
    """
    logits = logits / temperature
    if not top_k and top_p >= 1.0:
        return logits
    count = min(top_k, logits.shape[-1]) if top_k else logits.shape[-1]
    ascending = jax.lax.top_k(logits, count)[0][:, ::-1]
    removed = jnp.cumsum(jax.nn.softmax(ascending), axis=-1) <= (1.0 - top_p)
    removed = removed.at[:, -1].set(False) & (top_p < 1.0)
    smallest = jnp.where(removed, jnp.inf, ascending).min(axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def choose(logits: Array, decoding: Decoding, key: Array | None, step: Array) -> Array:
    """Next token of each row, `[B]` int32. Row i draws from its own stream of the key."""
    if not decoding.sample:
        return logits.argmax(-1).astype(jnp.int32)
    logits = filter_logits(logits, decoding.temperature, decoding.top_k, decoding.top_p)

    assert key is not None, "generate has refused to sample without one"

    def draw(row: Array, logits: Array) -> Array:
        stream = jax.random.fold_in(jax.random.fold_in(key, row), step)
        return jax.random.categorical(stream, logits)

    return jax.vmap(draw)(jnp.arange(logits.shape[0]), logits).astype(jnp.int32)


def decode(llm: BoundLLM, state: State, decoding: Decoding, key: Array | None) -> Generated:
    """Greedy decoding or sampling from `prefill`'s state, until all rows ended or N tokens."""
    rows = state["logits"].shape[0]
    tokens = jnp.full((rows, decoding.max_new_tokens), decoding.pad, jnp.int32)
    state = state | {
        "tokens": tokens,
        "scores": jnp.zeros(rows),
        "done": jnp.zeros(rows, bool),
        "step": jnp.int32(0),
    }

    def emit(state: State) -> State:
        logits = _permitted(state, state["tokens"], state["logits"], decoding)
        chosen = choose(logits, decoding, key, state["step"])
        chosen = jnp.where(state["done"], decoding.pad, chosen)
        gain = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], 1)[:, 0]
        return state | {
            "tokens": state["tokens"].at[:, state["step"]].set(chosen),
            "scores": state["scores"] + jnp.where(state["done"], 0.0, gain),
            "done": state["done"] | _ends(chosen, decoding),
            "step": state["step"] + 1,
        }

    def more(state: State) -> Array:
        return (state["step"] < decoding.max_new_tokens) & ~state["done"].all()

    def advance(state: State) -> State:
        last = state["tokens"][:, state["step"] - 1]
        return emit(feed(llm, state, last, state["done"], decoding.position_step))

    state = jax.lax.while_loop(more, advance, emit(state))
    return Generated(state["tokens"], state["scores"], state["logits"])


def _permitted(state: State, tokens: Array, logits: Array, decoding: Decoding) -> Array:
    """Scores of what may follow the tokens `[rows, N]` of a step, see `whole_runs`."""
    step = state["step"]
    last, before = (jnp.where(step >= n, tokens[:, step - n], -1) for n in (1, 2))
    most = decoding.max_new_tokens
    return permitted(logits, last, step, decoding.signals, most, before)


def _ends(tokens: Array, decoding: Decoding) -> Array:
    """Which tokens end a row, of the tokens' shape, bool."""
    return (tokens[..., None] == jnp.array(decoding.ends)).any(-1)


def beam_search(llm: BoundLLM, state: State, decoding: Decoding, start: int) -> Generated:
    """Beam search from `prefill`'s state.

    Args:
      llm: of `XLLM.llm`.
      state: of B rows.
      decoding: K beams.
      start: first cache slot behind the prompts; beams of a row share everything before it.

    Returns:
      K hypotheses per row, best first.
    """
    state = _widen(state, decoding)

    def more(state: State) -> Array:
        return (state["step"] < decoding.max_new_tokens) & ~state["done"].all()

    def advance(state: State) -> State:
        last = jnp.take(state["tokens"], state["step"] - 1, axis=2)
        done = jnp.repeat(state["done"], decoding.beams)
        fed = feed(llm, state, last.reshape(-1), done, decoding.position_step)
        return _beam_step(fed, decoding, start)

    state = jax.lax.while_loop(more, advance, _beam_step(state, decoding, start))
    # A row that did not end by itself also offers the beams that are still running.
    length = _penalty(state, decoding.max_new_tokens, decoding)
    running = jnp.where(state["done"][:, None], -jnp.inf, state["sums"] / length[:, None])
    ended = _keep_best(state, running, state["tokens"])
    return Generated(ended["ended_tokens"], ended["ended_scores"])


def _widen(state: State, decoding: Decoding) -> State:
    """Repeats every row K times; only its first beam may speak at the first step."""
    rows, beams = state["logits"].shape[0], decoding.beams
    cache = {
        name: jnp.repeat(leaf, beams, axis=1 if name in ("key", "value") else 0)
        for name, leaf in state["cache"].items()
    }
    wide = {
        name: jnp.repeat(state[name], beams, axis=0) for name in ("logits", "position", "segment")
    }
    tokens = jnp.full((rows, beams, decoding.max_new_tokens), decoding.pad, jnp.int32)
    return wide | {
        "cache": cache,
        "lengths": state["lengths"],
        "tokens": tokens,
        "sums": jnp.full((rows, beams), -1e9).at[:, 0].set(0.0),
        "ended_tokens": tokens,
        "ended_scores": jnp.full((rows, beams), -jnp.inf),
        "done": jnp.zeros(rows, bool),
        "step": jnp.int32(0),
    }


def _beam_step(state: State, decoding: Decoding, start: int) -> State:
    """Extends every beam by one token, given the logits behind its last one."""
    beams = decoding.beams
    sums, parents, tokens = _candidates(state, decoding)
    ends = _ends(tokens, decoding)
    length = _penalty(state, state["step"], decoding)
    # Only an end among the best K candidates counts; its own token is not part of the length.
    counts = ends & (jnp.arange(2 * beams) < beams) & ~state["done"][:, None]
    ended = jnp.where(counts, sums / length[:, None], -jnp.inf)
    longer = jnp.take_along_axis(state["tokens"], parents[..., None], axis=1)
    longer = longer.at[:, :, state["step"]].set(tokens)
    state = state | _keep_best(state, ended, longer)
    worst = state["ended_scores"].min(axis=1)
    # What runs on is longer by the new token than what ended, so it is judged by that length.
    beaten = worst >= sums[:, 0] / _penalty(state, state["step"] + 1, decoding)
    full = worst > -jnp.inf
    done = state["done"] | (full if decoding.early_stopping else full & beaten)
    kept = jnp.argsort(ends, axis=1, stable=True)[:, :beams]  # the best K that go on
    parents = jnp.take_along_axis(parents, kept, axis=1)
    return state | {
        "cache": _reorder(state["cache"], parents, start),
        "tokens": jnp.take_along_axis(longer, kept[..., None], axis=1),
        "sums": jnp.take_along_axis(sums, kept, axis=1),
        "done": done,
        "step": state["step"] + 1,
    }


def _candidates(state: State, decoding: Decoding) -> tuple[Array, Array, Array]:
    """Best 2K continuations of each row: (sums, parent beams, tokens), each `[B, 2K]`."""
    beams = decoding.beams
    tokens = state["tokens"].reshape(-1, decoding.max_new_tokens)
    logits = _permitted(state, tokens, state["logits"].astype(jnp.float32), decoding)
    gains = jax.nn.log_softmax(logits)
    width = min(2 * beams, gains.shape[-1])  # no beam can give more of the best 2K
    gains, tokens = jax.lax.top_k(gains, width)
    rows = state["sums"].shape[0]
    sums = (gains.reshape(rows, beams, -1) + state["sums"][..., None]).reshape(rows, -1)
    sums, index = jax.lax.top_k(sums, 2 * beams)
    tokens = jnp.take_along_axis(tokens.reshape(rows, -1), index, axis=1)
    return sums, index // width, tokens.astype(jnp.int32)


def _keep_best(state: State, scores: Array, tokens: Array) -> State:
    """Puts new ended hypotheses among the K best of their row."""
    scores = jnp.concatenate([state["ended_scores"], scores], axis=1)
    tokens = jnp.concatenate([state["ended_tokens"], tokens], axis=1)
    scores, index = jax.lax.top_k(scores, state["ended_scores"].shape[1])
    tokens = jnp.take_along_axis(tokens, index[..., None], axis=1)
    return {"ended_scores": scores, "ended_tokens": tokens}


def _penalty(state: State, generated: Array | int, decoding: Decoding) -> Array:
    """Divisor of a hypothesis' score, `[B]` float32; prompt and media count as its length."""
    return (state["lengths"] + generated).astype(jnp.float32) ** decoding.length_penalty


def _reorder(cache: dict[str, Array], parents: Array, start: int) -> dict[str, Array]:
    """Gives each beam its parent's keys and values; only generated slots can differ."""
    rows, beams = parents.shape
    index = (jnp.arange(rows)[:, None] * beams + parents).reshape(-1)

    def move(memory: Array) -> Array:
        return memory.at[:, :, start:].set(jnp.take(memory[:, :, start:], index, axis=1))

    return cache | {"key": move(cache["key"]), "value": move(cache["value"])}
