"""Generation against the recorded sequences, scores and logits, and the independence of rows."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recording import Recording

from xllm_jax.convert.sources import chatglm
from xllm_jax.core.batch import zeros
from xllm_jax.core.errors import UserError
from xllm_jax.data.text import glm_layout
from xllm_jax.data.text.chatglm_tokenizer import ChatGLMTokenizer
from xllm_jax.data.text.glm_layout import Specials
from xllm_jax.inference.decoding import (
    XLLM_NAMES,
    Decoding,
    beam_search,
    decode,
    feed,
    filter_logits,
    generate,
    prefill,
    process_response,
    text_prompts,
    texts,
)
from xllm_jax.models import glm
from xllm_jax.models.xllm import XLLM

LOGITS, INNER, SCORES = 5e-4, 1e-3, 5e-5


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "chatglm"


@pytest.fixture(scope="module")
def reference(folder):
    """(model, parameters, special ids)."""
    llm, params, _ = chatglm.load(folder / "weights")
    config = chatglm.read_config(folder / "weights")
    specials = Specials(
        mask=config["mask_token_id"],
        gmask=config["gmask_token_id"],
        sop=config["bos_token_id"],
        eop=config["eos_token_id"],
        pad=config["pad_token_id"],
    )
    return XLLM({"llm": llm}), {"llm": jax.tree.map(jnp.asarray, params)}, specials


def decoding(specials, **fields) -> Decoding:
    return Decoding(**({"eos": specials.eop, "pad": specials.pad} | fields))


def finished(sequences, prompt, specials, eos):
    """Recorded sequences without the prompt, up to the end token, padding after it."""
    answers = np.asarray(sequences)[:, prompt:]
    ended = np.cumsum(answers == eos, axis=1) - (answers == eos)
    return np.where(ended > 0, specials.pad, answers)


@pytest.mark.golden
def test_cached_steps(folder, reference):
    """Prefill and steps: logits, positions, and the cache itself."""
    model, params, specials = reference
    recording = Recording(folder / "cases_decode.npz")
    prompt = recording.input("prompt_ids")
    fed = recording.input("step.token_ids")
    batch = text_prompts(prompt, specials, buckets=(prompt.shape[1],))
    recording.equal("prefill.position_ids", batch.positions.transpose(0, 2, 1))
    llm = functools.partial(model.networks["llm"].apply, {"params": params["llm"]})
    x = llm(batch.ids, method="embed")
    layout = (batch.segments, batch.context, batch.positions)
    state = jax.jit(lambda x: prefill(llm, x, *layout, len(fed)))(x)
    recording.close("prefill.last_logits", state["logits"], LOGITS)
    step = jax.jit(lambda state, token: feed(llm, state, token, jnp.zeros(1, bool)))
    logits, positions = [], []
    for token in fed:
        state = step(state, token[None])
        logits.append(state["logits"][0])
        positions.append(state["position"][0])
    recording.close("step.logits", np.stack(logits), LOGITS)
    recording.equal("step.position_ids", np.stack(positions))
    recording.close("cache.key", state["cache"]["key"][:, 0], INNER)
    recording.close("cache.value", state["cache"]["value"][:, 0], INNER)
    recording.assert_all_used(except_=["greedy*", "beam*", "warp*"])


@pytest.mark.golden
def test_greedy_and_beams(folder, reference):
    model, params, specials = reference
    recording = Recording(folder / "cases_decode.npz")
    prompt = recording.input("prompt_ids")
    start = prompt.shape[1]
    batch = text_prompts(prompt, specials)
    for name in ("greedy", "greedy_eos", "beam", "beam_eos"):
        expected = recording.input(f"{name}.sequences")
        eos = specials.eop
        if f"{name}.eos_token_id" in recording.arrays:
            eos = int(recording.input(f"{name}.eos_token_id"))
        full = recording.arrays[f"{name.split('_')[0]}.sequences"].shape[1] - start
        beams = expected.shape[0] if name.startswith("beam") else 1
        how = decoding(specials, eos=eos, max_new_tokens=full, beams=beams)
        found = generate(model, params, batch, how)
        tokens = np.asarray(found.tokens).reshape(beams, full)
        expected = finished(expected, start, specials, eos)
        np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected, err_msg=name)
        assert (tokens[:, expected.shape[1] :] == specials.pad).all(), name
        if beams > 1:
            recording.close(f"{name}.scores", found.scores[0], SCORES)
    recording.assert_all_used(except_=["prefill*", "step*", "cache*", "warp*"])


@pytest.mark.golden
def test_filters(folder):
    """Temperature 0.95, top-k 50, top-p 0.7, in this order, as the reference samples."""
    recording = Recording(folder / "cases_decode.npz")
    expected = recording.arrays["warp.out"]
    found = np.asarray(
        filter_logits(jnp.asarray(recording.arrays["step.logits"][:1]), 0.95, 50, 0.7)
    )
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    kept = np.isfinite(expected)
    np.testing.assert_allclose(found[kept], expected[kept], atol=LOGITS)
    assert 0 < kept.sum() <= 50


@pytest.mark.golden
def test_left_padded_batch(folder, reference):
    """The tokenizer's layout: padding in front, hidden, three prompts of different length."""
    model, params, specials = reference
    recording = Recording(folder / "cases_batch.npz")
    ids = recording.input("leftpad.input_ids")
    prompts = [list(row[np.flatnonzero(row != specials.pad)[0] :]) for row in ids]
    layout = glm_layout.left_padded(prompts, specials)
    recording.equal("leftpad.input_ids", layout.ids)
    recording.equal("leftpad.position_ids", layout.positions.transpose(0, 2, 1))
    slots = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    mask = glm.visible(layout.segments, slots, layout.segments, layout.context, slots)
    recording.equal("leftpad.attention_mask", ~np.asarray(mask))
    batch = dataclasses.replace(
        zeros(*ids.shape, 1),
        ids=layout.ids,
        positions=layout.positions,
        segments=layout.segments,
        context=layout.context,
    )
    logits = jax.jit(lambda p, b: model.logits(p, model.hidden(p, b)))(params, batch)
    recording.close("leftpad.logits", logits, LOGITS)
    expected = recording.input("leftpad.greedy_sequences")
    new = expected.shape[1] - ids.shape[1]
    found = generate(model, params, batch, decoding(specials, max_new_tokens=new))
    np.testing.assert_array_equal(found.tokens, expected[:, ids.shape[1] :])
    recording.close("leftpad.greedy_last_scores", found.logits, LOGITS)
    # Padding on the right, in a longer bucket, is the same to every row.
    right = generate(
        model, params, text_prompts(prompts, specials), decoding(specials, max_new_tokens=new)
    )
    np.testing.assert_array_equal(right.tokens, found.tokens)
    recording.assert_all_used(except_=["train.*"])


def spliced_start(recording, name, model, params, specials):
    """Recorded prompt with its recorded prefix embeddings: (embeddings, row layout)."""
    ids = recording.input(f"{name}.input_ids")
    rows = [glm_layout.sequence(row, specials, padding_visible=True) for row in ids]
    layout = [np.stack([getattr(r, n) for r in rows]) for n in ("segments", "context", "positions")]
    recording.equal(f"{name}.position_ids", layout[2][:1].transpose(0, 2, 1))
    x = model.networks["llm"].apply({"params": params["llm"]}, ids, method="embed")
    start = 0
    for given in ("input_image", "input_speech"):
        if f"{name}.{given}" in recording.arrays:
            prefix = recording.input(f"{name}.{given}")
            x = x.at[:, start : start + prefix.shape[1]].set(prefix)
            start += prefix.shape[1]
    return x, layout


@pytest.mark.golden
def test_generation_behind_media(folder, reference):
    """Image by greedy decoding; speech, both, and a batch of two by ten beams."""
    model, params, specials = reference
    recording = Recording(folder / "cases_multimodal.npz")
    llm = functools.partial(model.networks["llm"].apply, {"params": params["llm"]})
    runs = json.loads((folder / "diagnostics.json").read_text())["info"]
    for name in ("gen_image", "gen_speech", "gen_both", "gen_batch"):
        x, layout = spliced_start(recording, name, model, params, specials)
        length = x.shape[1]
        expected = recording.input(f"{name}.sequences")
        beams = runs[f"{name}_args"]["num_beams"]
        new = expected.shape[1] - length
        how = decoding(specials, max_new_tokens=new, beams=beams)

        @jax.jit
        def run(x, layout, how=how, length=length):
            state = prefill(llm, x, *layout, how.max_new_tokens)
            first = feed(llm, state, jnp.zeros(len(x), jnp.int32), jnp.zeros(len(x), bool))
            if how.beams > 1:
                return first["position"], beam_search(llm, state, how, length)
            return first["position"], decode(llm, state, how, None)

        position, found = run(x, layout)
        recording.equal(f"{name}.step1_position_ids", position[:1, :, None])
        tokens = np.asarray(found.tokens)
        best = tokens[:, 0] if beams > 1 else tokens
        expected = finished(expected, length, specials, specials.eop)
        np.testing.assert_array_equal(best, expected, err_msg=name)
        if beams > 1:
            recording.close(f"{name}.sequences_scores", found.scores[:, 0], SCORES)
    recording.assert_all_used(except_=["image.*", "video.*", "speech.*", "both.*"])


@pytest.mark.golden
def test_texts_of_recorded_answers(folder):
    """Responses of the recorded runs, and both ways of finishing an answer."""
    cases = json.loads((folder / "tokenizer" / "tokenizer_cases.json").read_text())
    for case in cases["process_response"]:
        assert process_response(case["in"]) == case["chatglm"]
        assert process_response(case["in"], XLLM_NAMES) == case["xllm"]
    tokenizer = ChatGLMTokenizer(folder / "tokenizer")
    runs = json.loads((folder / "diagnostics.json").read_text())["info"]
    recording = Recording(folder / "cases_multimodal.npz")
    for name in ("gen_image", "gen_speech", "gen_both", "gen_batch"):
        start = recording.arrays[f"{name}.input_ids"].shape[1]
        found = texts(recording.arrays[f"{name}.sequences"][:, start:], tokenizer)
        # The reference's wrapper returns the first row alone.
        assert [found[0].strip()] == runs[f"{name}_response"], name


@pytest.fixture(scope="module")
def small():
    """A random small LLM whose answers differ from row to row. Returns (model, parameters)."""
    llm = glm.ChatGLM(vocab=64, width=32, depth=1, heads=2, hidden=64, alpha=1.0)
    shapes = chatglm.shapes(llm)
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
        fed = feed(llm, wide | {"cache": cache}, jnp.arange(64), jnp.zeros(64, bool))
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
