"""A small encoder as a user's package would hold it, right and with one fault each; faulty LLMs.

`BUGS` is read by `conformance_check.py` in a process with 8 devices, and by docs/conformance.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from xllm_jax.conformance.subject import Subject
from xllm_jax.convert import Row
from xllm_jax.convert.sources import llama
from xllm_jax.core import checkpoint
from xllm_jax.core.stage import Part
from xllm_jax.models import causal, decoder_cache

CHANNELS, HEADS, WIDTH, STEPS = 6, 2, 10, 12


class Sensor(nn.Module):
    """Heads of a projection, each place beside the mean of all places that exist.

    `mean` is the running mean of the projection. In training the batch's own takes its place.
    """

    bug: str = ""
    dtype: Any = jnp.float32

    def example(self):
        return jnp.zeros((1, STEPS, CHANNELS)), jnp.full(1, STEPS, jnp.int32)

    @nn.compact
    def __call__(self, values, lengths, train=False):
        if self.bug == "no gradient in its input":
            values = jax.lax.stop_gradient(values)
        valid = (jnp.arange(values.shape[1]) < lengths[:, None])[..., None]
        kernel = self.param("project", nn.initializers.lecun_normal(), (CHANNELS, HEADS, 5))
        x = jnp.einsum("btd,dhk->bthk", values.astype(self.dtype), kernel.astype(self.dtype))
        x = x.reshape(*x.shape[:2], WIDTH)
        running = self.param("mean", nn.initializers.zeros_init(), (WIDTH,)).astype(self.dtype)
        running = jax.lax.stop_gradient(x.mean((0, 1))) if self._by_batch(train) else running
        x = x - running
        if self.bug != "reads what lies behind the end":
            x = jnp.where(valid, x, 0)
        count = jnp.maximum(lengths, 1)[:, None]
        if self.bug == "divides by the padded length":
            count = jnp.full_like(count, values.shape[1])
        if self.bug == "divides by an empty item's length":
            count = lengths[:, None]
        mean = x.sum(1) / count.astype(self.dtype)
        if self.bug == "a mean over the batch":
            mean = jnp.broadcast_to(mean.mean(0), mean.shape)
        out = self.param("out", nn.initializers.lecun_normal(), (WIDTH, 7)).astype(self.dtype)
        if self.bug == "a parameter that does not learn":
            out = jax.lax.stop_gradient(out)
        y = jnp.tanh(x + mean[:, None]) @ out
        if self.bug == "scales by the number of devices":
            y = y * max(jax.sharding.get_abstract_mesh().size, 1)
        if self.bug == "counts a place of an empty item":
            lengths = jnp.maximum(lengths, 1)
        return jnp.where(valid, y, 0), lengths

    def _by_batch(self, train):
        return train and self.bug != "a gradient in a frozen parameter"


SIZES = {"tiny": {}}
SHARDING = ((r"project", P("fsdp", "tensor")), (r"out", P(None, None)), (r"mean", P()))
ROWS = (
    Row("proj.weight", "project", "(h k) d -> d h k", sizes=(("h", HEADS),)),
    Row("norm.running_mean", "mean"),
    Row("out.weight", "out", "o i -> i o"),
)


def published(tensors, values, lengths):
    """What the published network computes, from its tensors, in NumPy."""
    valid = np.arange(values.shape[1]) < lengths[:, None]
    x = values @ tensors["proj.weight"].T - tensors["norm.running_mean"]
    x = np.where(valid[..., None], x, 0)
    mean = x.sum(1) / np.maximum(lengths, 1)[:, None]
    return np.tanh(x + mean[:, None]) @ tensors["out.weight"].T


def sensor(bug: str = "", rows: tuple[Row, ...] = ROWS) -> Subject:
    """The encoder, with a fault or without."""
    part = Part("conformance_networks:Sensor", "tiny", {"bug": bug})
    return Subject(part, lambda _: rows, reference=published, still=("mean",))


def faulty() -> Subject:
    return sensor("divides by the padded length")


def _other(name: str, pattern: str) -> tuple[Row, ...]:
    """The converter's rows with another pattern for one leaf."""
    return tuple(dataclasses.replace(r, pattern=pattern) if r.target == name else r for r in ROWS)


def llm() -> Subject:
    """A small LLaMA."""
    fields = dict(vocab=40, width=64, depth=2, heads=4, key_heads=2, hidden=96)
    return Subject(Part("causal.Causal", "tiny", fields), llama.rows)


GROUPED, LOAD = causal.grouped_attention, checkpoint.load_leaves


def _halved(*arguments):
    """A base that was kept in bfloat16."""
    found = LOAD(*arguments)
    return {path: x.astype(jnp.bfloat16).astype(x.dtype) for path, x in found.items()}


# Faults of an LLM, put in the place of a function of models/causal.py.


def _visible(same, later=0, words=True):
    """`decoder_cache.visible` with another rule of who sees whom."""

    def visible(query_segments, query_slots, segments, context, slots):
        alike = same(query_segments[:, :, None], segments[:, None, :])
        alike &= (segments[:, None, :] > 0) | (not words)
        earlier = slots[:, None, :] <= query_slots[:, :, None] + later
        return (alike & (context[:, None, :] | earlier))[:, None]

    return visible


def _equal(query, key):
    return query == key


def _padding_too(query, key):
    return (query == key) | (key == 0)


def _anyone(query, key):
    return (query > 0) & (key > 0)


def _forgetful(memory, layer, slots, new):
    """Leaves the first new token of a call out where several come at once."""
    kept = jnp.where((jnp.arange(new.shape[1]) == 0) & (new.shape[1] > 1), 10**6, slots)
    return decoder_cache.store(memory, layer, kept, new)


class _OwnPositions(causal.Causal):
    """Counts places in the row, whatever positions it is given."""

    def __call__(self, x, segments, context, positions, cache=None, watched=None):
        if cache is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1])[:, None] ** 2, positions.shape)
        return super().__call__(x, segments, context, positions, cache, watched)


class _LatePositions(causal.Causal):
    """A word that is decoded alone takes the position of the one before it."""

    def __call__(self, x, segments, context, positions, cache=None, watched=None):
        positions = positions - (x.shape[1] == 1)
        return super().__call__(x, segments, context, positions, cache, watched)


def _deaf(query, key, value, mask, implementation):
    """Attention whose keys and values get no gradient."""
    key, value = jax.lax.stop_gradient((key, value))
    return GROUPED(query, key, value, mask, implementation)


def _rough(query, key, value, mask, implementation):
    """Scores, exponentials and their sum in the compute dtype."""
    repeat = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeat, axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.asarray(
        query.shape[-1] ** 0.5, query.dtype
    )
    scores = jnp.where(mask, scores, -jnp.asarray(80, query.dtype)) + 80
    weights = jnp.exp(scores)
    total = jnp.cumsum(weights, -1)[..., -1:]
    return jnp.einsum("bhqk,bkhd->bqhd", weights / total, value)


@dataclasses.dataclass(frozen=True)
class Bug:
    """A fault, and the check that catches it.

    Attributes:
      check: its name.
      subject: the faulty network.
      place: (module or class, attribute, value) that make it faulty.
    """

    check: str
    subject: Subject
    place: tuple[Any, str, Any] | None = None

    def planted(self) -> contextlib.AbstractContextManager:
        """While it lasts the fault is there."""
        return (
            mock.patch.object(*self.place, create=True) if self.place else contextlib.nullcontext()
        )


def _llm_bug(check: str, name: str, value: Any) -> Bug:
    return Bug(check, llm(), (causal, name, value))


def _sensor_bug(check: str, bug: str) -> Bug:
    return Bug(check, sensor(bug))


def _rows_bug(*rows: tuple[str, Any]) -> Bug:
    here = __import__("conformance_networks")
    return Bug("sharding rows", sensor(), (here, "SHARDING", rows))


BUGS = {
    "the mask ends one token late": _llm_bug("masks", "visible", _visible(_equal, 1)),
    "the mask ends one token early": _llm_bug("masks", "visible", _visible(_equal, -1)),
    "packed conversations read each other": _llm_bug("segments", "visible", _visible(_anyone)),
    "words read the padding": _llm_bug("padding", "visible", _visible(_padding_too, words=False)),
    "positions are places in the row": _llm_bug("positions", "Causal", _OwnPositions),
    "the position of a decoded word is off by one": _llm_bug(
        "cached decoding", "Causal", _LatePositions
    ),
    "the cache forgets a token": _llm_bug("cached decoding", "store", _forgetful),
    "softmax of large scores in bfloat16": _llm_bug("bfloat16", "grouped_attention", _rough),
    "attention without a gradient": _llm_bug("gradients of tokens", "grouped_attention", _deaf),
    "reads what lies behind the end": _sensor_bug("padding", "reads what lies behind the end"),
    "divides by the padded length": _sensor_bug("padding", "divides by the padded length"),
    "divides by an empty item's length": _sensor_bug(
        "gradients of parameters", "divides by an empty item's length"
    ),
    "counts a place of an empty item": _sensor_bug("shapes", "counts a place of an empty item"),
    "no gradient in its input": _sensor_bug("gradients of inputs", "no gradient in its input"),
    "a mean over the batch": _sensor_bug("items", "a mean over the batch"),
    "a gradient in a frozen parameter": _sensor_bug(
        "gradients of parameters", "a gradient in a frozen parameter"
    ),
    "a parameter that does not learn": _sensor_bug(
        "gradients of parameters", "a parameter that does not learn"
    ),
    "a sharding row is missing": _rows_bug(*SHARDING[:-1]),
    "a sharding row is for nothing": _rows_bug(*SHARDING, (r"adapter/kernel", P())),
    "a sharding row splits an axis that is not there": _rows_bug(
        (r"out", P(None, None, "fsdp")), SHARDING[0], SHARDING[2]
    ),
    "scales by the number of devices": _sensor_bug(
        "sharded = unsharded", "scales by the number of devices"
    ),
    "a base is kept in bfloat16": Bug(
        "restored on another mesh", sensor(), (checkpoint, "load_leaves", _halved)
    ),
    "a parameter in no section": Bug(
        "sections", sensor(), (Sensor, "SECTIONS", (("project", "mean"),))
    ),
    "the converter swaps two axes": Bug(
        "conversion inverse", sensor(rows=_other("project", "(h k) d -> d k h"))
    ),
    "the converter takes heads for channels": Bug(
        "published numbers", sensor(rows=_other("project", "(k h) d -> d h k"))
    ),
}
CLEAN = {"a small LLaMA": llm(), "a sensor's encoder": sensor()}
