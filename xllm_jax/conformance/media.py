"""Checks of an encoder or an interface: items, what lies behind their ends, sections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.conformance.bench import Bench, Outcome
from xllm_jax.conformance.outcome import Check, Failed, NotApplicable, close
from xllm_jax.conformance.subject import INTERFACE, Subject, role
from xllm_jax.core import rules
from xllm_jax.core.types import Array, Params

ROWS = 8
WHOLE, SHORT, FOLLOWED, EMPTY = range(4)  # the named rows; FOLLOWED is SHORT with other padding
PLACES = 16  # of the input, where the network's example has fewer than this half
CLOSE = 2e-5


class MediaBench(Bench):
    """Rows: values, and with them lengths where the network reads them."""

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self.role = role(self.network)
        example = self.network.example()
        self.bounded = len(example) > 1
        self.count = example[0].shape[1]
        if self.bounded and self.count < PLACES // 2 and self.takes(PLACES):
            self.count = PLACES
        self.short = self.count // 2
        self.inputs = self._rows(example[0].shape[2:])

    def takes(self, count: int) -> bool:
        """Whether the network reads inputs of so many places."""
        values = jnp.zeros((1, count, *self.network.example()[0].shape[2:]))
        lengths = jnp.full(1, count, jnp.int32)
        try:
            jax.eval_shape(lambda: self.network.apply({"params": self.params}, values, lengths))
        except Exception:  # whatever a network of one length says to others
            return False
        return True

    def _rows(self, rest: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(1)
        values = rng.normal(0, 1, (ROWS, self.count, *rest)).astype(np.float32)
        if not self.bounded:
            outline = self._outline(values)
            weights = np.zeros(outline.shape[:2], np.float32)
            weights[:2] = 1
            return values, weights
        lengths = np.full(ROWS, self.count, np.int32)
        lengths[[SHORT, FOLLOWED]], lengths[EMPTY] = self.short, 0
        values[SHORT, self.short :] = 0
        values[FOLLOWED, : self.short] = values[SHORT, : self.short]
        outline = self._outline(values, lengths)
        counts = self._counts(values, lengths)
        weights = (np.arange(outline.shape[1]) < counts[:, None]).astype(np.float32)
        return values, lengths, weights

    def _outline(self, *inputs: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(self.call(self.network), self.params, *inputs)[0]

    def _counts(self, *inputs: np.ndarray) -> np.ndarray:
        """The second result, from its own small program: weights depend on it."""
        return np.asarray(jax.jit(lambda *x: self.call(self.network)(*x)[1])(self.params, *inputs))

    def call(self, network: Any) -> Callable[..., tuple[Array, Array]]:
        def run(params, *inputs):
            return network.apply({"params": params}, *inputs)[:2]

        return run

    def valid(self, outcome: Outcome) -> np.ndarray:
        """Places that exist."""
        return np.arange(outcome.states.shape[1]) < outcome.second[:, None]

    def only_bounded(self) -> None:
        """Raises NotApplicable where items have no lengths."""
        if not self.bounded:
            raise NotApplicable("its items have no lengths: each one is whole")

    @functools.cached_property
    def cut(self) -> tuple[np.ndarray, np.ndarray]:
        """Both results for inputs that end with the short items."""
        values, lengths = self.inputs[0][:, : self.short], self.inputs[1].clip(max=self.short)
        call = jax.jit(self.call(self.network))
        states, counts = call(self.params, values, lengths)
        return np.asarray(states), np.asarray(counts)


def shapes(bench: MediaBench) -> str:
    """Shapes, dtypes and counts of both results."""
    states, counts = bench.plain.states, bench.plain.second
    if states.ndim != 3 or len(states) != ROWS:
        raise Failed(f"the first result is {states.shape}, not (batch, places, width)")
    if counts.shape != (ROWS,) or counts.dtype != np.int32:
        raise Failed(f"the second result is {counts.dtype} {counts.shape}, not int32 (batch,)")
    if (counts < 0).any() or (counts > states.shape[1]).any():
        raise Failed(f"counts {counts.tolist()} for {states.shape[1]} places")
    if not np.isfinite(states).all():
        row = int(np.argwhere(~np.isfinite(states))[0][0])
        raise Failed(f"not all finite in row {row}, of length {_length(bench, row)}")
    wanted = getattr(bench.network, "llm_width", None) if bench.role == INTERFACE else None
    if wanted is not None and states.shape[2] != wanted:
        raise Failed(f"embeddings of {states.shape[2]} channels, llm_width is {wanted}")
    if not counts[WHOLE]:
        raise Failed("a whole item gives nothing")
    if bench.bounded and counts[EMPTY]:
        raise Failed(f"an item of length 0 counts {counts[EMPTY]}")
    return ""


def _length(bench: MediaBench, row: int) -> int:
    return int(bench.inputs[1][row]) if bench.bounded else bench.count


def _same(bench: MediaBench, found: tuple[np.ndarray, np.ndarray], row: int, what: str) -> None:
    """Raises Failed unless a row is as in the plain outcome; of `found` (states, counts)."""
    states, counts = bench.plain.states, bench.plain.second
    if found[1][row] != counts[row]:
        raise Failed(f"{what}: counts {found[1][row]} places, not {counts[row]}")
    close(found[0][row, : counts[row]], states[row, : counts[row]], CLOSE, what)


def items(bench: MediaBench) -> str:
    """An item's result does not depend on the others in the batch."""
    values = bench.inputs[0].copy()
    values[SHORT + 1 :] = 5 * np.flip(values[SHORT + 1 :], axis=2)
    moved = bench.run(bench.params, values, *bench.inputs[1:])
    for row in (WHOLE, SHORT):
        _same(bench, moved[:2], row, f"item {row}, with others beside it")
    return ""


def padding(bench: MediaBench) -> str:
    """What lies behind an item's end, and how much of it, changes nothing."""
    bench.only_bounded()
    followed = bench.plain.states[[FOLLOWED] * 2], bench.plain.second[[FOLLOWED] * 2]
    _same(bench, followed, SHORT, f"{bench.short} places with other values behind them")
    if not bench.takes(bench.short):
        return f"inputs of one length alone ({bench.count})"
    what = f"{bench.short} places without {bench.count - bench.short} of padding"
    _same(bench, bench.cut, SHORT, what)
    return ""


def through_places(bench: MediaBench) -> str:
    """Gradients reach the places that an item has, and none behind its end."""
    gradient = np.abs(bench.plain.inputs).reshape(ROWS, bench.count, -1).max(-1)
    if not np.isfinite(gradient).all():
        row, place = np.argwhere(~np.isfinite(gradient))[0]
        length = _length(bench, row)
        raise Failed(f"the gradient in place {place} of an item of length {length} is not finite")
    if not gradient[WHOLE].any():
        raise Failed("no gradient in a whole item")
    for row in (SHORT, FOLLOWED, EMPTY) if bench.bounded else ():
        behind = gradient[row, _length(bench, row) :]
        if (behind > 1e-7 * gradient.max()).any():
            place = _length(bench, row) + int(behind.argmax())
            raise Failed(f"a gradient in place {place} of an item of length {_length(bench, row)}")
    return ""


def sections(bench: MediaBench) -> str:
    """Each parameter is of one section, and sections one by one give what they give at once."""
    names = getattr(bench.network, "SECTIONS", ())
    if not names:
        raise NotApplicable("it has no SECTIONS, and counts as one")
    for path in rules.flatten(bench.params):
        owners = [n for n in names if any(path == x or path.startswith(f"{x}/") for x in n)]
        if len(owners) != 1:
            raise Failed(f"{path} is in {len(owners)} sections")

    def chain(params: Params, x: Array, counts: Array) -> tuple[Array, Array]:
        for number in range(len(names)):
            steps = (number, number + 1)
            x, counts = bench.network.apply({"params": params}, x, counts, sections=steps)
        return x, counts

    states, counts = jax.jit(chain)(bench.params, *bench.inputs[:-1])
    for row in range(ROWS):
        _same(bench, (np.asarray(states), np.asarray(counts)), row, "section by section")
    return f"{len(names)} sections"


def whole(bench: MediaBench) -> str:
    """Of LLMs alone."""
    raise NotApplicable(f"an {bench.role} reads the whole of an item")


def no_cache(bench: MediaBench) -> str:
    """Of LLMs alone."""
    raise NotApplicable(f"an {bench.role} does not decode")


CHECKS: dict[str, Check] = {
    "shapes": shapes,
    "masks": whole,
    "items": items,
    "padding": padding,
    "gradients of inputs": through_places,
    "sections": sections,
    "cached decoding": no_cache,
}
