"""GLM's blank infilling, and the loss that stands on supervised positions alone."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.data.text import blank_infilling, glm_layout
from xllm_jax.data.text.glm_layout import Specials
from xllm_jax.objectives.answer import answer_loss

SPECIALS = Specials(mask=90, gmask=91, sop=92, eop=93, pad=3)


def texts(count):
    generator = np.random.default_rng(1)
    return [list(generator.integers(5, 90, size)) for size in generator.integers(6, 12, count)]


def test_short_spans_cover_about_the_share():
    generator = np.random.default_rng(0)
    for length in (2, 5, 40, 200):
        spans = blank_infilling.short_spans(length, generator, 0.15, 3.0)
        covered = sum(stop - start for start, stop in spans)
        assert 1 <= covered <= max(1, round(0.15 * length))
        assert all(one[1] < two[0] for one, two in itertools.pairwise(spans))


def test_blank_infilling_hides_nothing_else_and_teaches_every_cut_token():
    """Context and spans together are the text; each span is supervised and starts at its mask."""
    generator = np.random.default_rng(3)
    for text in texts(20):
        row = blank_infilling.example(text, SPECIALS, generator)
        context = row.ids[row.context]
        filled = [t for t in row.ids[~row.context] if t not in (SPECIALS.sop, SPECIALS.eop)]
        kept = [t for t in context if t not in (SPECIALS.mask, SPECIALS.gmask)]
        assert sorted(kept + filled) == sorted(text)
        np.testing.assert_array_equal(row.targets, row.ids[row.answer_index + 1])
        taught = set(row.answer_index + 1)
        for place in np.flatnonzero(~row.context & (row.ids != SPECIALS.sop)):
            assert place in taught
        starts = np.flatnonzero(row.ids == SPECIALS.sop)
        assert (row.positions[starts, 1] == 1).all()
        masks = np.isin(row.ids[row.positions[starts, 0]], (SPECIALS.mask, SPECIALS.gmask))
        assert masks.all() and len(set(row.positions[starts, 0])) == len(starts)
    with pytest.raises(UserError, match="two tokens"):
        blank_infilling.example([5], SPECIALS, generator)


def test_tail_row_is_the_answer_format():
    """A cut tail is laid out like prompt and answer."""
    ours = blank_infilling.infill([5, 6, 7, 8], [(2, 4)], SPECIALS.gmask, SPECIALS)
    theirs = glm_layout.sequence([5, 6, 91, 92, 7, 8, 93], SPECIALS)
    for name in ("ids", "positions", "context", "segments", "answer_index", "targets"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunked_loss_is_the_plain_one(chunk):
    """Value and gradients of any chunk length equal a plain weighted mean."""
    generator = np.random.default_rng(0)
    states = jnp.asarray(generator.normal(size=(2, 9, 4)), jnp.float32)
    head = jnp.asarray(generator.normal(size=(4, 11)), jnp.float32)
    index = generator.integers(0, 9, (2, 7))
    targets = generator.integers(0, 11, (2, 7))
    weights = jnp.asarray(generator.integers(0, 2, (2, 7)), jnp.float32)

    def plain(states, head):
        scores = jax.nn.log_softmax(states[np.arange(2)[:, None], index] @ head)
        nll = -scores[np.arange(2)[:, None], np.arange(7), targets]
        return (nll * weights).sum() / weights.sum()

    def ours(states, head):
        loss, metrics = answer_loss(lambda x: x @ head, states, index, targets, weights, chunk)
        return loss, metrics

    differentiated = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))
    (loss, metrics), gradients = differentiated(states, head)
    value, expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(states, head)
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    for one, two in zip(gradients, expected):
        np.testing.assert_allclose(one, two, atol=1e-6)
    best = (states[np.arange(2)[:, None], index] @ head).argmax(-1) == targets
    np.testing.assert_allclose(metrics["accuracy"], (best * weights).sum() / weights.sum())
    assert metrics["count"] == weights.sum()


def test_loss_of_a_batch_without_answers_is_zero():
    states, none = jnp.ones((1, 3, 4)), jnp.zeros((1, 2), jnp.int32)
    loss, metrics = answer_loss(lambda x: x, states, none, none, jnp.zeros((1, 2)))
    assert loss == 0 and metrics["count"] == 0
