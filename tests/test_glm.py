"""ChatGLM: sizes, packing, the cache, what the backward pass keeps, bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.convert import sizes
from xllm_jax.convert.verify.chatglm_model import Reference, forward, layout_of
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.data.text import blank_infilling, glm_layout, token_rows
from xllm_jax.data.text.glm_layout import Specials
from xllm_jax.models import glm
from xllm_jax.objectives.answer import cross_entropy


def states_of(model, params, ids, layout):
    """Final states of ids `[B, T]` under their layout."""

    @jax.jit
    def run(params, ids, layout):
        x = model.apply({"params": params}, ids, method="embed")
        return model.apply({"params": params}, x, *layout)[0]

    return run(params, ids, layout)


@pytest.mark.parametrize("size", glm.SIZES)
def test_sizes_and_sharding_rows(size):
    model = glm.ChatGLM(**glm.SIZES[size])
    shapes = sizes.shapes_of(model)
    width, hidden = model.width, model.hidden
    layer = 4 * width * (width + 1) + hidden * (2 * width + 1) + width + 4 * width
    expected = model.depth * layer + model.vocab * width + 2 * width
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
    if size == "chatglm_6b":
        assert expected == 6_173_286_400
    specs = rules.assign(glm.SHARDING, shapes)
    for path, spec in rules.flatten(specs).items():
        assert len(spec) == len(rules.flatten(shapes)[path].shape), path


SPECIALS = Specials(mask=90, gmask=91, sop=92, eop=93, pad=3)


@pytest.fixture(scope="module")
def tiny():
    """A small model whose parameters are large enough for every path to matter."""
    model = glm.ChatGLM(vocab=96, width=48, depth=3, heads=3, hidden=96)
    shapes = rules.flatten(sizes.shapes_of(model))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        path: (1.0 if path.endswith("scale") else 0.0) + 0.1 * jax.random.normal(key, leaf.shape)
        for key, (path, leaf) in zip(keys, shapes.items())
    }
    return model, rules.unflatten(params)


def texts(count):
    generator = np.random.default_rng(1)
    return [list(generator.integers(5, 90, size)) for size in generator.integers(6, 12, count)]


def test_packed_sequences_do_not_see_each_other(tiny):
    """Two sequences in one row give the states that each gives alone."""
    model, params = tiny
    generator = np.random.default_rng(2)
    rows = [blank_infilling.example(text, SPECIALS, generator) for text in texts(4)]
    packed = token_rows.pack([rows[:2], rows[2:]], 40, 32, SPECIALS.pad)
    layout = (packed.segments, packed.context, packed.positions)
    states = states_of(model, params, packed.ids, layout)
    alone = token_rows.pack([[row] for row in rows], 40, 32, SPECIALS.pad)
    layout = (alone.segments, alone.context, alone.positions)
    single = states_of(model, params, alone.ids, layout)
    for i, row in enumerate(rows):
        start = 0 if i % 2 == 0 else len(rows[i - 1].ids)
        ours = states[i // 2, start : start + len(row.ids)]
        np.testing.assert_allclose(ours, single[i, : len(row.ids)], atol=1e-5)


def test_pack_refuses_what_does_not_fit():
    row = glm_layout.sequence([5, 6, 91, 92, 7, 93], SPECIALS)
    with pytest.raises(UserError, match="12 tokens"):
        token_rows.pack([[row, row]], 11, 9, SPECIALS.pad)
    with pytest.raises(UserError, match="no <sop>"):
        glm_layout.sequence([5, 6, 91], SPECIALS)
    with pytest.raises(UserError, match="neither"):
        glm_layout.sequence([5, 6, 92], SPECIALS)


def test_cache_equals_full_forward_with_rows_of_different_length(tiny):
    """Prefill of padded prompts, then single tokens: every row continues at its own place."""
    model, params = tiny
    prompts = [[*text, SPECIALS.gmask, SPECIALS.sop] for text in texts(3)]
    answer = np.arange(20, 24)
    rows = [glm_layout.sequence([*prompt, *answer], SPECIALS) for prompt in prompts]
    whole = token_rows.pack([[row] for row in rows], 24, 24, SPECIALS.pad)
    layout = (whole.segments, whole.context, whole.positions)
    expected = states_of(model, params, whole.ids, layout)

    @jax.jit
    def feed(cache, ids, *layout):
        x = model.apply({"params": params}, ids, method="embed")
        return model.apply({"params": params}, x, *layout, cache)

    starts = [glm_layout.sequence(prompt, SPECIALS) for prompt in prompts]
    first = token_rows.pack([[row] for row in starts], 16, 16, SPECIALS.pad)
    cache = model.init_cache(3, 24)
    states, cache = feed(cache, first.ids, first.segments, first.context, first.positions)
    for i, prompt in enumerate(prompts):
        np.testing.assert_allclose(
            states[i, : len(prompt)], expected[i, : len(prompt)], atol=1e-5, err_msg=f"prompt {i}"
        )
    lengths = np.array([len(prompt) for prompt in prompts])
    here = np.arange(3)
    for step, token in enumerate(answer):
        positions = whole.positions[here, lengths + step][:, None]
        states, cache = feed(
            cache,
            np.full((3, 1), token),
            np.ones((3, 1), np.int32),
            np.zeros((3, 1), bool),
            positions,
        )
        np.testing.assert_allclose(states[:, 0], expected[here, lengths + step], atol=1e-5)
    np.testing.assert_array_equal(cache["length"], lengths + len(answer))


def test_remat_and_unroll_change_nothing(tiny):
    model, params = tiny
    row = glm_layout.sequence([5, 6, 91, 92, 7, 93], SPECIALS)
    layout = tuple(x[None] for x in (row.segments, row.context, row.positions))
    x = model.apply({"params": params}, row.ids[None], method="embed")

    def gradient(model):
        return jax.jit(
            jax.grad(lambda x: (model.apply({"params": params}, x, *layout)[0] ** 3).sum())
        )(x)

    expected = gradient(model)
    for other in (model.clone(remat="all"), model.clone(unroll=3)):
        np.testing.assert_allclose(gradient(other), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "all"])
def test_backward_keeps_what_it_says(remat):
    """Elements that the backward pass of a frozen LLM keeps, per token and layer."""
    model = glm.ChatGLM(vocab=40, width=32, depth=5, heads=4, hidden=128, remat=remat)
    rows, length = 2, 7
    layout = (np.ones((rows, length), int), np.ones((rows, length), bool))
    positions = np.zeros((rows, length, 2), int)

    def backward(params, x):
        run = lambda x: model.apply({"params": params}, x, *layout, positions)[0]  # noqa: E731
        return jax.vjp(run, x)[1]

    kept = jax.eval_shape(backward, sizes.shapes_of(model), jnp.zeros((rows, length, model.width)))
    stacked = [leaf for leaf in jax.tree.leaves(kept) if leaf.shape[:3] == (5, rows, length)]
    elements = sum(leaf.size for leaf in stacked) / (5 * rows * length)
    streams, hidden = (1, 0) if remat == "all" else (6, model.hidden)
    assert 0 < elements <= streams * model.width + hidden


@pytest.mark.golden
def test_bfloat16_stays_near_float32(golden):
    """bfloat16 compute, float32 parameters, at supervised positions.

    The yardstick is what rounding the weights alone does, with float32 arithmetic. Measured at the
    recorded weights (3 layers, large on purpose, logits up to 9.4): logits move by 0.84 at most and
    0.037 on average against the yardstick's 0.70 and 0.028, the mean loss by 0.040; float16 stays 5
    times nearer.
    """
    reference = Reference(golden / "chatglm")
    model, params = reference.loaded
    recording = np.load(golden / "chatglm/cases_batch.npz")
    ids, labels = recording["train.input_ids"], recording["train.labels"][:, 1:]
    taught = labels != -100
    exact = recording["train.logits"][:, :-1][taught]

    def error(model, params):
        logits = forward(model, params, ids, layout_of(ids, reference.specials))[2]
        assert logits.dtype == jnp.float32
        rough = np.asarray(logits)[:, :-1][taught]
        loss = cross_entropy(rough, labels[taught]).mean() - recording["train.loss"]
        return np.abs(rough - exact), float(loss)

    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    (weights, _), (whole, loss) = (
        error(model, rounded),
        error(model.clone(dtype=jnp.bfloat16), params),
    )
    print(f"bfloat16: largest {whole.max():.3f}, mean {whole.mean():.4f}, loss {loss:.4f}")
    assert whole.max() < 2.0 * weights.max() and whole.mean() < 1.6 * weights.mean()
    assert abs(loss) < 2.0 * whole.mean()
