"""Generation: answers as texts, independence of rows, beams, sampling, buckets, ends."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.convert import sizes
from xllm_jax.core.errors import UserError
from xllm_jax.data.text import glm_layout
from xllm_jax.data.text.glm_layout import Specials
from xllm_jax.data.text.llm_families.glm import XLLM_NAMES, Family, process_response
from xllm_jax.inference.decoding import (
    BUCKETS,
    Decoding,
    feed,
    filter_logits,
    generate,
    prefill,
    prompt_batch,
)
from xllm_jax.inference.replies import answer_tokens
from xllm_jax.models import glm
from xllm_jax.models.xllm import XLLM

STEP = Family.position_step


def decoding(specials, **fields) -> Decoding:
    ends = (fields.pop("eos", specials.eop),)
    return Decoding(ends, specials.pad, STEP, **fields)


def text_prompts(prompts, specials, buckets=BUCKETS):
    return prompt_batch(
        [glm_layout.sequence(ids, specials) for ids in prompts], specials.pad, buckets
    )


@pytest.mark.golden
def test_texts_of_recorded_answers(golden):
    """Responses of the recorded runs, and both ways of finishing an answer."""
    folder = golden / "chatglm"
    cases = json.loads((folder / "tokenizer" / "tokenizer_cases.json").read_text())
    for case in cases["process_response"]:
        assert process_response(case["in"]) == case["chatglm"]
        assert process_response(case["in"], XLLM_NAMES) == case["xllm"]
    family = Family(str(folder / "tokenizer"))
    runs = json.loads((folder / "diagnostics.json").read_text())["info"]
    recording = np.load(folder / "cases_multimodal.npz")
    for name in ("gen_image", "gen_speech", "gen_both", "gen_batch"):
        start = recording[f"{name}.input_ids"].shape[1]
        rows = recording[f"{name}.sequences"][:, start:].tolist()
        found = [family.tokenizer.decode(answer_tokens(row, family)) for row in rows]
        # The reference's wrapper returns the first row alone.
        assert [found[0].strip()] == runs[f"{name}_response"], name


@pytest.fixture(scope="module")
def small():
    """A random small LLM whose answers differ from row to row. Returns (model, parameters)."""
    llm = glm.ChatGLM(vocab=64, width=32, depth=1, heads=2, hidden=64, alpha=1.0)
    shapes = sizes.shapes_of(llm)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    drawn = [0.4 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return XLLM({"llm": llm}), {"llm": jax.tree.unflatten(structure, drawn)}


SPECIALS = Specials(mask=60, gmask=61, sop=62, eop=63, pad=3)


def prompts(count):
    generator = np.random.default_rng(0)
    sizes = generator.integers(3, 12, count)
    return [[*generator.integers(5, 60, size), 61, 62] for size in sizes]


@pytest.mark.parametrize(
    "fields",
    [{}, {"beams": 3}, {"sample": True, "top_k": 20, "top_p": 0.9}],
    ids=["greedy", "beam", "sample"],
)
def test_rows_are_independent(small, fields):
    """A row's answer is the same whatever stands beside it and however long the bucket is."""
    model, params = small
    how = decoding(SPECIALS, max_new_tokens=6, **fields)
    key = jax.random.key(7)
    some = prompts(3)
    together = generate(model, params, text_prompts(some, SPECIALS, (16,)), how, key)
    longer = generate(model, params, text_prompts(some, SPECIALS, (24,)), how, key)
    np.testing.assert_array_equal(together.tokens, longer.tokens)
    np.testing.assert_allclose(together.scores, longer.scores, rtol=1e-4)
    others = [some[0], some[2][::-1][2:] + [61, 62], some[1]]
    beside = generate(model, params, text_prompts(others, SPECIALS, (16,)), how, key)
    np.testing.assert_array_equal(beside.tokens[0], together.tokens[0])
    assert len({tuple(np.ravel(row)) for row in np.asarray(together.tokens)}) > 1


def test_best_of_wide_beams_is_the_best_answer(small):
    """With as many beams as tokens, two steps find the most likely pair of all."""
    model, params = small
    llm = functools.partial(model.networks["llm"].apply, {"params": params["llm"]})
    batch = text_prompts(prompts(1), SPECIALS, (16,))
    how = decoding(SPECIALS, eos=-1, max_new_tokens=2, beams=64, length_penalty=0.0)
    found = generate(model, params, batch, how)

    @jax.jit
    def every_pair(batch):
        x = llm(batch.ids, method="embed")
        state = prefill(llm, x, batch.segments, batch.context, batch.positions, 2)
        first = jax.nn.log_softmax(state["logits"][0])
        wide = {name: jnp.repeat(state[name], 64, axis=0) for name in ("position", "segment")}
        cache = state["cache"]
        cache = {
            k: jnp.repeat(v, 64, axis=1 if k in ("key", "value") else 0) for k, v in cache.items()
        }
        fed = feed(llm, wide | {"cache": cache}, jnp.arange(64), jnp.zeros(64, bool), STEP)
        return first[:, None] + jax.nn.log_softmax(fed["logits"])

    scores = np.asarray(every_pair(batch))
    best = np.unravel_index(scores.argmax(), scores.shape)
    np.testing.assert_array_equal(found.tokens[0, 0], best)
    np.testing.assert_allclose(found.scores[0, 0], scores.max(), rtol=1e-5)
    assert (np.diff(found.scores[0]) <= 0).all()


def test_sampling_follows_the_filtered_distribution(small):
    """Many rows of one prompt: frequencies are the filtered probabilities."""
    model, params = small
    rows = 2000
    batch = text_prompts(prompts(1) * rows, SPECIALS, (16,))
    how = decoding(SPECIALS, max_new_tokens=1, sample=True, temperature=2.0, top_k=8, top_p=0.8)
    tokens = np.asarray(generate(model, params, batch, how, jax.random.key(1)).tokens)[:, 0]
    greedy = generate(
        model,
        params,
        text_prompts(prompts(1), SPECIALS, (16,)),
        decoding(SPECIALS, max_new_tokens=1),
    )
    expected = jax.nn.softmax(filter_logits(greedy.logits, 2.0, 8, 0.8))[0]
    share = np.bincount(tokens, minlength=64) / rows
    assert 1 < (np.asarray(expected) > 0).sum() <= 8
    assert (share[np.asarray(expected) == 0] == 0).all()
    np.testing.assert_allclose(share, expected, atol=4 * 0.5 / rows**0.5)
    with pytest.raises(UserError, match="needs a key"):
        generate(model, params, batch, how)


def test_one_compilation_serves_a_bucket(small):
    model, params = small
    how = decoding(SPECIALS, max_new_tokens=3)
    generate.clear_cache()
    for count in range(3):
        some = [[*range(5, 6 + count), 61, 62], [*range(5, 16 - count), 61, 62]]
        generate(model, params, text_prompts(some, SPECIALS, (16, 32)), how)
    assert generate._cache_size() == 1
    with pytest.raises(UserError, match="a prompt of 33 tokens"):
        text_prompts([list(range(5, 36)) + [61, 62]], SPECIALS, (16, 32))


def test_nothing_follows_the_end_token(small):
    """Each row stops at its own end token, and its score counts what it said alone."""
    model, params = small
    batch = text_prompts(prompts(3), SPECIALS, (16,))
    free = np.asarray(
        generate(model, params, batch, decoding(SPECIALS, eos=-1, max_new_tokens=6)).tokens
    )
    eos = int(free[1, 2])
    found = generate(model, params, batch, decoding(SPECIALS, eos=eos, max_new_tokens=6))
    for row, whole in zip(np.asarray(found.tokens), free):
        end = list(whole).index(eos) + 1 if eos in whole else len(whole)
        np.testing.assert_array_equal(row[:end], whole[:end])
        assert (row[end:] == SPECIALS.pad).all()
    short = generate(model, params, batch, decoding(SPECIALS, eos=-1, max_new_tokens=3))
    end = list(free[1]).index(eos) + 1
    if end == 3:
        np.testing.assert_allclose(found.scores[1], short.scores[1], rtol=1e-5)
