"""Checks of an LLM: who reads whom, positions, decoding with a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.conformance.bench import Bench, Outcome
from xllm_jax.conformance.outcome import Check, Failed, close
from xllm_jax.conformance.subject import Subject
from xllm_jax.core.types import Array, Params
from xllm_jax.models.decoder_cache import Cache

# Two conversations and padding around them in a row: tokens and context of each.
FIRST, SECOND = (6, 3), (7, 2)
BEFORE, BEHIND = 1, 2
START = BEFORE, BEFORE + FIRST[0]  # of each conversation
TOKENS = BEFORE + FIRST[0] + SECOND[0] + BEHIND
SHIFT = 7  # place to which the first conversation is moved
ROWS = 24  # the packed row; one a changed token; the rows named below; copies up to a multiple of 8
ALONE_FIRST, ALONE_SECOND, SHIFTED, SPREAD, ONE_GIVEN, ONE_SAID = range(1 + TOKENS, 7 + TOKENS)
SEEN = 1e-5  # of the largest state; a smaller difference is rounding
UNSEEN = 1e-8
CLOSE = 2e-5  # of the largest value, for the same computed in another order


class LLMBench(Bench):
    """Rows: `[rows, TOKENS]` words with noise on their embeddings, segments, context, positions."""

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self.axes = self.network.example()[3].shape[-1]
        if self.axes not in (1, 2):
            raise Failed(f"example() has positions of {self.axes} numbers; 1 or 2 are known")
        self.inputs = self._rows()

    def _rows(self) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(1)
        width = self.network.example()[0].shape[-1]
        vocabulary = jax.eval_shape(
            lambda x: self.network.apply({"params": self.params}, x, method="logits"),
            jax.ShapeDtypeStruct((1, 1, width), jnp.float32),
        ).shape[-1]
        packed = self._packed()
        noise = rng.normal(0, 1, (TOKENS, width)).astype(np.float32)
        ids = rng.integers(0, vocabulary, TOKENS).astype(np.int32)
        rows = [[noise, ids, *packed] for _ in range(ROWS)]
        weights = np.zeros((ROWS, TOKENS), np.float32)
        for token in range(TOKENS):
            changed = noise.copy()
            changed[token] += 3 * rng.normal(0, 1, width)
            rows[1 + token][0] = changed
            weights[1 + token, token] = packed[0][token] > 0
        first, second = START
        rows[ALONE_FIRST] = [_moved(x, first, FIRST[0], 0) for x in rows[0]]
        rows[ALONE_SECOND] = [_moved(x, second, SECOND[0], 0) for x in rows[0]]
        rows[SHIFTED] = [_moved(x, first, FIRST[0], SHIFT) for x in rows[0]]
        spread = packed[2].copy()
        spread[first + FIRST[1] : second] += 5
        rows[SPREAD] = [noise, ids, *packed[:2], spread]
        # What follows is no part of the segment, and is not zero.
        one = (np.arange(TOKENS) == 0).astype(np.int32)
        rows[ONE_GIVEN] = [noise, ids, one, one > 0, np.zeros_like(spread)]
        rows[ONE_SAID] = [noise, ids, one, one > 1, np.zeros_like(spread)]
        return *map(np.stack, zip(*rows)), weights

    def _packed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Segments, context and positions `[TOKENS, axes]` of the packed row."""
        segments, context = np.zeros(TOKENS, np.int32), np.zeros(TOKENS, bool)
        positions = np.zeros((TOKENS, self.axes), np.int32)
        for number, (count, given) in enumerate((FIRST, SECOND), 1):
            start = START[number - 1]
            segments[start : start + count] = number
            context[start : start + given] = True
            places = np.arange(count)
            if self.axes == 2:  # as GLM counts: position of the mask, and of the word behind it
                places = np.stack([places.clip(max=given - 1), (places - given + 1).clip(0)], 1)
            positions[start : start + count] = places.reshape(count, -1)
        return segments, context, positions

    def call(self, network: Any) -> Callable[..., tuple[Array, Array]]:
        def run(params, noise, ids, segments, context, positions):
            words = network.apply({"params": params}, ids, method="embed")
            x = words + noise.astype(words.dtype)
            made = network.apply({"params": params}, x, segments, context, positions)
            return made[0], network.apply({"params": params}, made[0], method="logits")

        return run

    def valid(self, outcome: Outcome) -> np.ndarray:
        return self.inputs[2] > 0

    @functools.cached_property
    def readers(self) -> np.ndarray:
        """`[reader, read]` bool of the packed row: who may depend on whom."""
        segments, context = self.inputs[2][0], self.inputs[3][0]
        same = (segments[:, None] == segments) & (segments > 0)
        places = np.arange(TOKENS)
        return same & (context | (places[:, None] >= places))

    @functools.cached_property
    def influence(self) -> np.ndarray:
        """`[reader, changed]`: how far a state moves, in parts of the largest, as padding does not
        count."""
        states = self.plain.states
        moved = np.abs(states[1 : 1 + TOKENS] - states[0]).max(-1).T
        return moved / np.abs(states[0]).max()

    @functools.cached_property
    def gradient(self) -> np.ndarray:
        """`[reader, read]`: the largest gradient of a state's sum in an input token."""
        return np.abs(self.plain.inputs[1 : 1 + TOKENS]).max(-1)


def _moved(x: np.ndarray, start: int, count: int, place: int) -> np.ndarray:
    """Zeros with `count` entries of `x` at another place."""
    moved = np.zeros_like(x)
    moved[place : place + count] = x[start : start + count]
    return moved


def _word(bench: LLMBench, place: int) -> str:
    """How messages call a token."""
    segment = bench.inputs[2][0, place]
    if not segment:
        return f"the padding at {place}"
    context = " of the context" if bench.inputs[3][0, place] else ""
    return f"token {place}{context} of segment {segment}"


def _leak(bench: LLMBench, where: np.ndarray) -> None:
    """Raises Failed for the first pair in `where` that reads and may not."""
    wrong = where & (bench.inputs[2][0] > 0)[:, None] & ~bench.readers
    for reader, read in np.argwhere(wrong & ~(bench.influence <= SEEN)):
        far = bench.influence[reader, read]
        raise Failed(f"{_word(bench, reader)} reads {_word(bench, read)} (moves by {far:.2g})")


def shapes(bench: LLMBench) -> str:
    """Shapes and dtypes of states, scores and cache."""
    states, scores = bench.plain.states, bench.plain.second
    width = bench.network.example()[0].shape[-1]
    if states.shape != (ROWS, TOKENS, width):
        raise Failed(f"the states are {states.shape}, not {(ROWS, TOKENS, width)}")
    for name, x in (("states", states), ("scores", scores)):
        if not np.isfinite(x[bench.valid(bench.plain)]).all():
            raise Failed(f"the {name} of words are not all finite")
    if scores.dtype != np.float32 or bench.half[1].dtype != np.float32:
        raise Failed(f"logits gives {scores.dtype}, {bench.half[1].dtype} in bfloat16, not float32")
    cache = jax.eval_shape(lambda: bench.network.init_cache(2, TOKENS))
    if cache["length"].shape != (2,):
        raise Failed(f"the cache's length is {cache['length'].shape}, not (2,): one a row")
    return ""


def masks(bench: LLMBench) -> str:
    """Within a segment: the context is read by all of it, all else by what comes later."""
    segments = bench.inputs[2][0]
    same = (segments[:, None] == segments) & (segments > 0)
    _leak(bench, same)
    blind = same & bench.readers & ~(bench.influence > UNSEEN)
    for reader, read in np.argwhere(blind):
        raise Failed(f"{_word(bench, reader)} does not read {_word(bench, read)}")
    given, said = bench.plain.states[[ONE_GIVEN, ONE_SAID], 0]
    what = "a token alone reads itself as context, and behind none"
    close(said, given, CLOSE, what)
    return ""


def leaks(bench: LLMBench) -> str:
    """Packed segments do not read each other, and are what they are alone."""
    segments = bench.inputs[2][0]
    _leak(bench, (segments[:, None] != segments) & (segments > 0))
    states = bench.plain.states
    for name, row, place, count in (
        ("the first segment", ALONE_FIRST, START[0], FIRST[0]),
        ("the second segment", ALONE_SECOND, START[1], SECOND[0]),
    ):
        close(states[row, :count], states[0, place : place + count], CLOSE, f"{name} alone")
    return ""


def positions(bench: LLMBench) -> str:
    """The given positions count, and the places in the row do not."""
    states, count = bench.plain.states, FIRST[0]
    there, shifted = slice(START[0], START[1]), states[SHIFTED, SHIFT : SHIFT + count]
    close(shifted, states[0, there], CLOSE, "further to the right, at the same positions")
    if np.abs(states[SPREAD, there] - states[0, there]).max() <= UNSEEN:
        raise Failed("other positions change nothing")
    return ""


def padding(bench: LLMBench) -> str:
    """Words do not read padding, in front of them or behind."""
    _leak(bench, np.broadcast_to(bench.inputs[2][0] == 0, (TOKENS, TOKENS)))
    return ""


def through_tokens(bench: LLMBench) -> str:
    """Gradients reach the tokens that are read, and no others."""
    top, words = bench.gradient.max(), bench.inputs[2][0] > 0
    for reader, read in np.argwhere(~np.isfinite(bench.gradient)):
        raise Failed(
            f"the gradient of {_word(bench, reader)} in {_word(bench, read)} is not finite"
        )
    wrong = words[:, None] & ~bench.readers & (bench.gradient > 1e-7 * top)
    for reader, read in np.argwhere(wrong):
        raise Failed(f"{_word(bench, reader)} has a gradient in {_word(bench, read)}")
    for reader, read in np.argwhere(bench.readers & (bench.gradient == 0)):
        raise Failed(f"{_word(bench, reader)} has no gradient in {_word(bench, read)}")
    return ""


def cached(bench: LLMBench) -> str:
    """The context at once and the rest word by word, with a cache, give the states of all at once.

    Both conversations in one batch, with contexts and lengths of their own.
    """
    network, rows = bench.network, [ALONE_FIRST, ALONE_SECOND]
    counts = np.array([FIRST, SECOND], np.int32)
    noise, ids, _, _, positions = (x[rows] for x in bench.inputs[:-1])
    given, steps = counts[:, 1], int((counts[:, 0] - counts[:, 1]).max())

    def feed(
        params: Params, cache: Cache, places: Array, exist: Array, context: Array
    ) -> tuple[Array, Cache]:
        """Feeds the tokens at `[B, T]` places."""
        pick = lambda x: jnp.take_along_axis(  # noqa: E731
            x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1
        )
        x = network.apply({"params": params}, pick(jnp.asarray(ids)), method="embed")
        x = x + pick(jnp.asarray(noise))
        told = (exist.astype(jnp.int32), context & exist, pick(jnp.asarray(positions)))
        return network.apply({"params": params}, x, *told, cache=cache)[:2]

    def decode(params: Params) -> tuple[Array, Array]:
        cache = network.init_cache(2, int(counts[:, 0].max()))
        places = jnp.broadcast_to(jnp.arange(given.max()), (2, given.max()))
        exist = jnp.asarray(places < given[:, None])
        begun, cache = feed(params, cache, places, exist, exist)

        def step(cache: Cache, number: Array) -> tuple[Cache, Array]:
            place = (given + number)[:, None]
            exist = jnp.asarray(place < counts[:, :1])
            x, cache = feed(params, cache, jnp.minimum(place, TOKENS - 1), exist, exist & False)
            return cache, x[:, 0]

        return begun, jax.lax.scan(step, cache, jnp.arange(steps))[1].swapaxes(0, 1)

    begun, later = map(np.asarray, jax.jit(decode)(bench.params))
    far = 0.0
    for row, (count, context) in enumerate(counts):
        whole = bench.plain.states[rows[row], :count]
        close(begun[row, :context], whole[:context], CLOSE, "the context")
        for place in range(context, count):
            what = f"word {place - context + 1} behind a context of {context}"
            made = later[row, place - context]
            far = max(far, close(made, whole[place], CLOSE, what))
    return f"distance {far:.1g}"


CHECKS: dict[str, Check] = {
    "shapes": shapes,
    "masks": masks,
    "segments": leaks,
    "positions": positions,
    "padding": padding,
    "gradients of tokens": through_tokens,
    "cached decoding": cached,
}
