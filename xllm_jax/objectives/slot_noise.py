"""Loss on the answer while what stands between the media's tags is disturbed.

Written media are words exactly, what an interface makes is only near them: an LLM that has read
words alone takes a small shift of all embeddings of a slot for an instruction. A large LLM bears
that; a mini LLM learns to, when the embeddings between tags are turned, shifted, mixed with other
words' and made noisy in its pre-training.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import ConversationBatch
from xllm_jax.core.types import Metrics, Params
from xllm_jax.models.pseudo_interface import PseudoInterfaces
from xllm_jax.models.xllm import LLM, XLLM
from xllm_jax.objectives import answer

Array = jax.Array
NORMALIZERS = ("tokens", "repeated")  # what the terms of the loss are means over
counts = answer.counts
PSEUDO = "pseudo_interfaces"  # the part
PSEUDO_NOISE = 0.3  # of what they give, in relation to its size


def loss(
    model: XLLM,
    params: Params,
    batch: ConversationBatch,
    key: Array | None = None,
    *,
    tags: Sequence[Sequence[int]],
    repeating: Sequence[int] = (),
    pseudo: float = 0.0,
    hidden: int = -1,
    train: bool = False,
    chunk: int = 64,
    **strengths: float,
) -> tuple[Array, Metrics]:
    """`answer.loss` of written media; in training their embeddings are disturbed.

    With a part 'pseudo_interfaces', the last kind of slots is what one of these makes of the words
    in some rows. As in stage 2, they learn from repetition alone, beside an LLM that does not learn
    from it; and the LLM learns to answer what they give, which they do not learn from.

    Args:
      model: its part 'llm' reads the batch.
      params: {part: parameters}.
      batch: without media of its own.
      key: of what is drawn; needed with `train`.
      tags: token ids (opening, closing) of each kind of slot.
      repeating: token ids of which one stands in every instruction to repeat, and in no other.
      pseudo: share of rows with a pseudo interface.
      hidden: id of hidden words of answers; the LLM reads `strange` embeddings there, no token.
      train: disturbs the embeddings.
      chunk: logit vectors per row that exist at once.
      strengths: of `disturbed`.

    Returns:
      (scalar float32, metrics) of `answer.answer_loss`, with `perplexity`; with pseudo interfaces
      the `WeightedMean` 'loss/pseudo' of what the LLM answers them and 'loss/repeated'.
    """
    x = words = model.embed(params, batch)
    kinds = slot_kinds(batch.ids, tags)
    if key is not None:
        unread = (batch.ids == hidden) & ~batch.context & (batch.segments > 0)
        drawn = strange(words, jax.random.fold_in(key, 2))
        x = words = jnp.where(unread[..., None], drawn, words)
    if train and key is not None:
        x = disturbed(words, kinds, key, len(tags), **strengths)
        count = round(pseudo * len(words)) if PSEUDO in model.networks else 0
        if count:
            heard = jnp.where(kinds == 0, batch.ids, -1), kinds == len(tags), count
            own = jax.random.fold_in(key, 1)
            return _with_pseudo(model, params, batch, (words, x), heard, repeating, own, chunk)
    value, metrics = _answered(model, params, batch, x, batch.weights, chunk)
    return value, metrics | {"perplexity": jnp.exp(value)}


def _with_pseudo(
    model: XLLM,
    params: Params,
    batch: ConversationBatch,
    embedded: tuple[Array, Array],
    heard: tuple[Array, Array, int],
    repeating: Sequence[int],
    key: Array,
    chunk: int,
) -> tuple[Array, Metrics]:
    """`loss` with pseudo interfaces in the first rows.

    Args:
      model, params, batch, repeating, chunk: as of `loss`.
      embedded: words, and what the LLM reads where no pseudo interface gives anything, `[B, T, D]`.
      heard: ids outside of slots, else -1, `[B, T]`; which are of speech; rows with an interface.
      key: of what is drawn.
    """
    (words, x), (around, spoken, count) = embedded, heard
    first = jnp.arange(len(words)) < count  # rows with a pseudo interface
    spoken = spoken & first[:, None]
    taught = tasks_with(around, batch.segments, repeating)
    taught = jnp.take_along_axis(taught, batch.answer_index, axis=1) & first[:, None]
    given, noise = _pseudo(model, params, words, key)
    x = jnp.where(spoken[..., None], jax.lax.stop_gradient(given) + noise, x)
    own = {"pseudo": first[:, None] & ~taught}
    value, metrics = _answered(model, params, batch, x, batch.weights * ~taught, chunk, own)
    rows = jax.tree.map(lambda a: a[:count], batch)
    x = jnp.where(spoken[..., None], given, jax.lax.stop_gradient(words))[:count]
    repeated, more = _answered(
        model, jax.lax.stop_gradient(params), rows, x, rows.weights * taught[:count], chunk
    )
    metrics["terms"] |= {"repeated": more["terms"]["tokens"]}
    metrics["loss/repeated"] = more["terms"]["tokens"]
    return value + repeated, metrics | {"perplexity": jnp.exp(value)}


def _answered(
    model: XLLM,
    params: Params,
    batch: ConversationBatch,
    x: Array,
    weights: Array,
    chunk: int,
    kinds: Mapping[str, Array] | None = None,
) -> tuple[Array, Metrics]:
    """`answer.answer_loss` of a batch whose embeddings are `x`, with other weights."""
    states, _ = model.apply(params, LLM, x, batch.segments, batch.context, batch.positions)
    head = functools.partial(model.logits, params)
    targets = (batch.answer_index, batch.targets, weights)
    return answer.answer_loss(head, states, *targets, chunk, kinds)


def _pseudo(model: XLLM, params: Params, words: Array, key: Array) -> tuple[Array, Array]:
    """What pseudo interfaces give, and noise for it: both `[B, T, D]`."""
    which, noise = jax.random.split(key)
    count = cast(PseudoInterfaces, model.networks[PSEUDO]).count
    maps = jax.random.randint(which, words.shape[:1], 0, count)
    given = model.apply(params, PSEUDO, jax.lax.stop_gradient(words), maps)
    size = jax.lax.stop_gradient(jnp.sqrt(jnp.square(given).mean((1, 2), keepdims=True)))
    return given, PSEUDO_NOISE * size * jax.random.normal(noise, given.shape, given.dtype)


def tasks_with(ids: Array, segments: Array, tokens: Sequence[int]) -> Array:
    """Which tokens belong to an example that holds one of `tokens`, `[B, T]` bool.

    Args:
      ids, segments: `[B, T]` int32, as in a batch.
      tokens: ids.
    """
    found = jnp.isin(ids, jnp.asarray(tokens, jnp.int32))
    same = segments[:, :, None] == segments[:, None, :]
    return (same & found[:, None, :]).any(-1)


def slot_kinds(ids: Array, tags: Sequence[Sequence[int]]) -> Array:
    """Which tokens stand between tags: `[B, T]` ids to int32, 0 = none, else 1 + the kind's number.

    Args:
      ids: of rows whose every opening tag is closed behind it.
      tags: token ids (opening, closing) of each kind.
    """
    kinds = jnp.zeros(ids.shape, jnp.int32)
    for number, (opening, closing) in enumerate(tags):
        opened = jnp.cumsum(ids == opening, axis=1) - jnp.cumsum(ids == closing, axis=1)
        kinds = jnp.where((opened > 0) & (ids != opening), number + 1, kinds)
    return kinds


def disturbed(
    x: Array,
    kinds: Array,
    key: Array,
    count: int,
    *,
    clean: float = 0.3,
    turn: float = 0.5,
    shift: float = 0.7,
    mix: float = 0.4,
    noise: float = 0.4,
    stretch: float = 1.0,
) -> Array:
    """Embeddings with those of slots disturbed, all slots of one kind in a row by the same map.

    Args:
      x: `[B, T, D]` embeddings.
      kinds: `[B, T]`, see `slot_kinds`.
      key: random key.
      count: number of kinds.
      clean: share of (row, kind) that stays as it is.
      turn: largest size of a random matrix, added to the identity, in relation to it.
      shift: largest length of a mean of some words, added to all of a slot, in relation to the
        slot's own embeddings.
      mix: largest share of another word in an embedding.
      noise: largest size of what is added to single embeddings, in relation to them.
      stretch: largest factor of a slot's embeddings, behind all else; the smallest is
        1 / sqrt(stretch).
    """
    rows, length, width = x.shape
    words = jax.lax.stop_gradient(x).reshape(-1, width)  # as often as the batch has them
    keys = iter(jax.random.split(key, 13))
    draw = functools.partial(jax.random.uniform, dtype=x.dtype)
    kept = jax.random.bernoulli(next(keys), clean, (rows, count))
    sizes = [draw(next(keys), (rows, count)) * most for most in (turn, shift, mix, noise)]
    turn_, shift_, mix_, noise_ = (_each(jnp.where(kept, 0, size), kinds) for size in sizes)
    scale = jnp.sqrt(jnp.square(words).sum(-1).mean())  # of an embedding's length

    others = words[jax.random.randint(next(keys), (rows, length), 0, len(words))]
    shares = mix_ * draw(next(keys), (rows, length, 1))
    y = (1 - shares) * x + shares * others
    maps = jax.random.normal(next(keys), (rows, count, width, width), x.dtype) * width**-0.5
    turned = jnp.einsum("btd,bkde->bkte", y, maps)
    own = jnp.maximum(kinds - 1, 0)[:, None, :, None]
    y = y + turn_ * jnp.take_along_axis(turned, own, axis=1)[:, 0]
    few = words[jax.random.randint(next(keys), (rows, count, 4), 0, len(words))].sum(2)
    few = few / jnp.maximum(jnp.linalg.norm(few, axis=-1, keepdims=True), 1e-6) * scale
    y = y + shift_ * jnp.take_along_axis(few, own[:, 0], axis=1)
    y = y + noise_ * scale * width**-0.5 * jax.random.normal(next(keys), x.shape, x.dtype)
    powers = jnp.where(kept, 0, draw(next(keys), (rows, count), minval=-0.5, maxval=1.0))
    y = y * stretch ** _each(powers, kinds)
    return jnp.where(kinds[..., None] > 0, y, x)


def strange(x: Array, key: Array) -> Array:
    """Embeddings in the shape of `x` that stand for nothing, as rows of new tokens are at first.

    A row of the batch has them in one size, between a twentieth of and as large as those of `x`.
    """
    size, values = jax.random.split(key)
    powers = jax.random.uniform(size, (len(x), 1, 1), x.dtype)
    scale = jax.lax.stop_gradient(jnp.sqrt(jnp.square(x).mean()))
    return scale * 20.0**-powers * jax.random.normal(values, x.shape, x.dtype)


def _each(sizes: Array, kinds: Array) -> Array:
    """`[B, kinds]` sizes to `[B, T, 1]`, each token's own."""
    return jnp.take_along_axis(sizes, jnp.maximum(kinds - 1, 0), axis=1)[..., None]
