"""The stage-1 ASR model: contexts, search, losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.core import rules
from xllm_jax.core.batch import TranscriptionBatch
from xllm_jax.models import asr, asr_search
from xllm_jax.models.cif import CIF
from xllm_jax.models.conformer import SpeechEncoder
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import asr as objective

SMALL = dict(vocab=12, width=16, hidden=24, heads=2, self_blocks=1)


def small_decoder(**fields):
    decoder = asr.ASRDecoder(**{**SMALL, **fields}, dropout=0.0)
    params = jax.jit(decoder.init)(jax.random.key(0), *decoder.example())["params"]
    return decoder, params


def test_multimodal_blocks_use_their_contexts():
    """Zero vectors stand in for a missing context, and a real one changes the logits."""
    decoder, params = small_decoder(
        visual_blocks=1, linguistic_blocks=1, visual_width=6, linguistic_width=5
    )
    rng = np.random.default_rng(0)
    previous = rng.integers(4, 12, (2, 5))
    embeddings = rng.normal(size=(2, 5, 16)).astype(np.float32)
    visual, linguistic = (
        asr.Context(rng.normal(size=(2, 3, width)).astype(np.float32)) for width in (6, 5)
    )
    run = jax.jit(
        lambda v, t: decoder.apply({"params": params}, previous, embeddings, None, v, t)[0]
    )
    nothing = run(None, None)
    zeros = run(asr.Context(np.zeros((2, 1, 6))), asr.Context(np.zeros((2, 1, 5))))
    np.testing.assert_allclose(nothing, zeros, atol=1e-6)
    for contexts in ((visual, None), (None, linguistic)):
        assert np.abs(run(*contexts) - nothing).max() > 1e-3


@pytest.fixture(scope="module")
def searched():
    """A small multimodal decoder and its greedy and beam search of random embeddings."""
    decoder, params = small_decoder(visual_blocks=1, visual_width=6)
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(3, 6, 16)).astype(np.float32)
    counts = np.array([6, 4, 0])
    visual = asr.Context(rng.normal(size=(3, 2, 6)).astype(np.float32))
    search = jax.jit(asr_search.search, static_argnums=(0, 4))
    greedy = search(decoder, params, embeddings, counts, 1, visual)
    beams = search(decoder, params, embeddings, counts, 3, visual)
    return decoder, params, embeddings, counts, visual, greedy, beams


def test_cached_steps_equal_teacher_forcing(searched):
    """Scores of the search are those of the whole decoder over the found tokens."""
    decoder, params, embeddings, counts, visual, greedy, beams = searched
    for found, rank in ((greedy, 0), (beams, 0), (beams, 2)):
        tokens = found.tokens[:, rank]
        previous = asr.previous_tokens(tokens)
        logits, _ = decoder.apply({"params": params}, previous, embeddings, None, visual)
        logs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0]
        scores = jnp.where(np.arange(6) < counts[:, None], chosen, 0).sum(-1)
        np.testing.assert_allclose(found.scores[:2, rank], scores[:2], atol=1e-4)


def test_beams_are_sorted_distinct_and_as_long_as_their_row(searched):
    *_, counts, _, greedy, beams = searched
    assert np.all(np.diff(beams.scores[:2], axis=1) <= 0)
    assert np.all(beams.scores[:2, 0] >= greedy.scores[:2, 0] - 1e-5)
    assert len({tuple(row) for row in beams.tokens[0].tolist()}) == 3
    assert np.all((beams.tokens != asr.PAD).sum(-1)[:2] <= counts[:2, None])
    assert np.all(beams.tokens[2] == asr.PAD)


def test_hypotheses_are_cut_at_the_first_end():
    tokens = jnp.array([[5, 6, 2, 7, 2], [5, 6, 7, 8, 9], [2, 5, 5, 5, 5]])
    cut, lengths = asr_search.cut_at_end(tokens, jnp.array([5, 3, 5]))
    assert lengths.tolist() == [2, 3, 0]
    assert cut.tolist() == [[5, 6, 1, 1, 1], [5, 6, 7, 1, 1], [1] * 5]


def test_ctc_leaves_impossible_rows_without_gradient():
    logits = jax.random.normal(jax.random.key(0), (3, 6, 5))
    targets = jnp.array([[1, 1, 1, 1], [1, 2, 3, 4], [1, 2, 0, 0]])

    def total(logits):
        losses = objective.ctc_losses(logits, jnp.array([6, 6, 6]), targets, jnp.array([4, 4, 2]))
        return jnp.where(jnp.isinf(losses), 0, losses).sum(), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(logits)
    assert np.isinf(losses).tolist() == [True, False, False]
    assert np.isfinite(gradient).all() and not np.any(gradient[0])


def test_empty_rows_change_nothing():
    """A row without an utterance has no share in the loss, the counts or the gradients."""
    rng = np.random.default_rng(0)
    encoder = SpeechEncoder(
        width=16, hidden=24, heads=2, kernel=3, depth=1, pools=(), channels=2, bins=10, dropout=0.0
    )
    networks = {
        "speech_encoder": encoder,
        "speech_interface": OnlyCIF(max_tokens=4),
        "asr_decoder": asr.ASRDecoder(**SMALL, dropout=0.0),
    }
    model = XLLM(networks=networks)
    batch = TranscriptionBatch(
        features=rng.normal(size=(2, 30, 10)).astype(np.float32),
        lengths=np.array([30, 25]),
        tokens=np.array([[4, 5, 6, 2], [7, 2, 1, 1]]),
        token_lengths=np.array([4, 2]),
    )
    params = {
        name: jax.jit(network.init)(jax.random.key(0), *network.example())["params"]
        for name, network in networks.items()
    }
    empty = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), batch)
    empty.tokens[-1] = 1
    run = jax.jit(lambda p, b: objective.loss(model, p, b, train=True))
    (loss, metrics), (same, others) = run(params, batch), run(params, empty)
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), metrics, others)
    assert float(metrics["count"]) == 6
    known = rules.flatten(params)
    assert metrics["assign"] and all(
        known[path].shape == value.shape for path, value in metrics["assign"].items()
    )


class OnlyCIF(CIF):
    """CIF instead of the whole interface."""

    def example(self):
        return jnp.zeros((1, 2, 16)), jnp.full(1, 2, jnp.int32)

    def fire(self, *inputs, **options):
        return self(*inputs, **options)
