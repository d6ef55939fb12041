"""Recorded decoding: cached steps, greedy and beam search, filters, prompts padded on the left."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert.verify.chatglm_model import Reference, layout_of
from xllm_jax.convert.verify.recording import Replay, read_json
from xllm_jax.core.batch import zeros
from xllm_jax.data.text import glm_layout
from xllm_jax.inference.decoding import (
    Decoding,
    beam_search,
    decode,
    feed,
    filter_logits,
    generate,
    prefill,
    text_prompts,
)
from xllm_jax.models import glm

# The reference's filters of sampling: temperature and top-p are X-LLM's, top-k its library's.
FILTERS = (0.95, 50, 0.7)


def decoding(replay: Replay, reference: Reference) -> None:
    """Cached steps, then whole answers."""
    replay.attempt(_steps, reference)
    for name in ("greedy", "greedy_eos", "beam", "beam_eos"):
        if f"{name}.sequences" in replay:
            replay.attempt(_answers, reference, name)
    if "warp.out" in replay:
        first = jnp.asarray(replay.recorded("step.logits")[:1])
        replay.compare("warp.out", filter_logits(first, *FILTERS))


def _steps(replay: Replay, reference: Reference) -> None:
    model, params = reference.loaded
    prompt, fed = replay.input("prompt_ids"), replay.input("step.token_ids")
    batch = text_prompts(prompt, reference.specials, buckets=(prompt.shape[1],))
    replay.compare("prefill.position_ids", batch.positions.transpose(0, 2, 1))
    llm = functools.partial(model.apply, {"params": params})
    x = llm(batch.ids, method="embed")
    layout = (batch.segments, batch.context, batch.positions)
    state = jax.jit(lambda x: prefill(llm, x, *layout, len(fed)))(x)
    replay.compare("prefill.last_logits", state["logits"])
    step = jax.jit(lambda state, token: feed(llm, state, token, jnp.zeros(1, bool)))
    logits, positions = [], []
    for token in fed:
        state = step(state, token[None])
        logits.append(state["logits"][0])
        positions.append(state["position"][0])
    replay.compare("step.logits", np.stack(logits))
    replay.compare("step.position_ids", np.stack(positions))
    replay.compare("cache.key", state["cache"]["key"][:, 0])
    replay.compare("cache.value", state["cache"]["value"][:, 0])


def _answers(replay: Replay, reference: Reference, name: str) -> None:
    prompt, sequences = replay.input("prompt_ids"), replay.recorded(f"{name}.sequences")
    specials, start = reference.specials, prompt.shape[1]
    ended = f"{name}.eos_token_id" in replay
    eos = int(replay.input(f"{name}.eos_token_id")) if ended else specials.eop
    new = replay.recorded(f"{name.split('_')[0]}.sequences").shape[1] - start
    beams = sequences.shape[0] if name.startswith("beam") else 1
    how = Decoding(eos=eos, pad=specials.pad, max_new_tokens=new, beams=beams)
    found = generate(*reference.composed, text_prompts(prompt, specials), how)
    expected = finished(sequences, start, new, eos, specials.pad)
    tokens = np.asarray(found.tokens).reshape(expected.shape)
    replay.compare(f"{name}.sequences", tokens, expected)
    if beams > 1:
        replay.compare(f"{name}.scores", found.scores[0])


def finished(sequences: np.ndarray, start: int, new: int, eos: int, pad: int) -> np.ndarray:
    """Recorded sequences without the prompt, padded from behind the end token to `new` tokens."""
    answers = sequences[:, start:]
    ended = np.cumsum(answers == eos, axis=1) - (answers == eos)
    answers = np.where(ended > 0, pad, answers)
    return np.pad(answers, ((0, 0), (0, new - answers.shape[1])), constant_values=pad)


def left_padded(replay: Replay, reference: Reference) -> None:
    """The tokenizer's layout: padding in front and hidden."""
    model, params = reference.composed
    specials, ids = reference.specials, replay.input("leftpad.input_ids")
    prompts = [list(row[np.flatnonzero(row != specials.pad)[0] :]) for row in ids]
    layout = glm_layout.left_padded(prompts, specials)
    replay.compare("leftpad.input_ids", layout.ids)
    replay.compare("leftpad.position_ids", layout.positions.transpose(0, 2, 1))
    slots = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    mask = glm.visible(layout.segments, slots, layout.segments, layout.context, slots)
    replay.compare("leftpad.attention_mask", ~np.asarray(mask))
    names = ("ids", "positions", "segments", "context")
    parts = {name: getattr(layout, name) for name in names}
    batch = dataclasses.replace(zeros(*ids.shape, 1), **parts)
    logits = jax.jit(lambda p, b: model.logits(p, model.hidden(p, b)))(params, batch)
    replay.compare("leftpad.logits", logits)
    if "leftpad.greedy_sequences" in replay:
        sequences = replay.recorded("leftpad.greedy_sequences")
        new = sequences.shape[1] - ids.shape[1]
        how = Decoding(eos=specials.eop, pad=specials.pad, max_new_tokens=new)
        found = generate(model, params, batch, how)
        replay.compare("leftpad.greedy_sequences", found.tokens, sequences[:, ids.shape[1] :])
        # Padding on the right, in a longer bucket, is the same to every row.
        right = generate(model, params, text_prompts(prompts, specials), how)
        replay.compare("leftpad.greedy_sequences", right.tokens, sequences[:, ids.shape[1] :])
        replay.compare("leftpad.greedy_last_scores", found.logits)


def behind_media(replay: Replay, reference: Reference, name: str) -> None:
    """An answer behind recorded prefix embeddings: greedy or by beams, as the recording says."""
    model, params = reference.loaded
    specials, llm = reference.specials, functools.partial(model.apply, {"params": params})
    x, layout = _spliced(replay, reference, name)
    length, sequences = x.shape[1], replay.recorded(f"{name}.sequences")
    settings = read_json(replay.folder / "diagnostics.json")["info"][f"{name}_args"]
    new, beams = sequences.shape[1] - length, settings["num_beams"]
    how = Decoding(eos=specials.eop, pad=specials.pad, max_new_tokens=new, beams=beams)

    @jax.jit
    def run(x: jax.Array, layout: tuple):
        state = prefill(llm, x, *layout, new)
        first = feed(llm, state, jnp.zeros(len(x), jnp.int32), jnp.zeros(len(x), bool))
        if beams > 1:
            return first["position"], beam_search(llm, state, how, length)
        return first["position"], decode(llm, state, how, None)

    position, found = run(x, layout)
    replay.compare(f"{name}.step1_position_ids", position[:1, :, None])
    best = np.asarray(found.tokens)[:, 0] if beams > 1 else found.tokens
    expected = finished(sequences, length, new, specials.eop, specials.pad)
    replay.compare(f"{name}.sequences", best, expected)
    if beams > 1:
        replay.compare(f"{name}.sequences_scores", found.scores[:, 0])


def _spliced(replay: Replay, reference: Reference, name: str) -> tuple[jax.Array, tuple]:
    """Recorded prompt with its recorded prefix embeddings: (embeddings, layout)."""
    model, params = reference.loaded
    ids = replay.input(f"{name}.input_ids")
    layout = layout_of(ids, reference.specials)
    replay.compare(f"{name}.position_ids", layout[2][:1].transpose(0, 2, 1))
    x = model.apply({"params": params}, ids, method="embed")
    start = 0
    for given in ("input_image", "input_speech"):
        if f"{name}.{given}" in replay:
            prefix = replay.input(f"{name}.{given}")
            x = x.at[:, start : start + prefix.shape[1]].set(prefix)
            start += prefix.shape[1]
    return x, layout
