"""Recorded decoding: cached steps, greedy and beam search, filters, prompts padded on the left."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert.verify.chatglm_model import Reference, layout_of
from xllm_jax.convert.verify.recording import Replay, read_json
from xllm_jax.core.batch import ConversationBatch, Media, zeros
from xllm_jax.core.types import Params
from xllm_jax.data.text import glm_layout
from xllm_jax.data.text.llm_families.glm import Family
from xllm_jax.data.text.token_rows import Row
from xllm_jax.inference.decoding import (
    Decoding,
    feed,
    filter_logits,
    generate,
    prefill,
    prompt_batch,
)
from xllm_jax.models import decoder_cache
from xllm_jax.models.xllm import XLLM

STEP = Family.position_step
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
    batch = prompt_batch(
        rows_of(prompt, reference.specials), reference.specials.pad, (prompt.shape[1],)
    )
    replay.compare("prefill.position_ids", batch.positions.transpose(0, 2, 1))
    llm = functools.partial(model.apply, {"params": params})
    x = llm(batch.ids, method="embed")
    layout = (batch.segments, batch.context, batch.positions)
    state = jax.jit(lambda x: prefill(llm, x, *layout, len(fed)))(x)
    replay.compare("prefill.last_logits", state["logits"])
    step = jax.jit(lambda state, token: feed(llm, state, token, jnp.zeros(1, bool), STEP))
    logits, positions = [], []
    for token in fed:
        state = step(state, token[None])
        logits.append(state["logits"][0])
        positions.append(state["position"][0])
    replay.compare("step.logits", np.stack(logits))
    replay.compare("step.position_ids", np.stack(positions))
    for name in ("key", "value"):
        if f"cache.{name}" in replay:
            tokens = replay.recorded(f"cache.{name}").shape[1]
            replay.compare(f"cache.{name}", state["cache"][name][:, 0, :tokens])


def _answers(replay: Replay, reference: Reference, name: str) -> None:
    prompt, sequences = replay.input("prompt_ids"), replay.recorded(f"{name}.sequences")
    specials, start = reference.specials, prompt.shape[1]
    ended = f"{name}.eos_token_id" in replay
    eos = int(replay.input(f"{name}.eos_token_id")) if ended else specials.eop
    new = _limit(replay, name, eos, start)
    beams = sequences.shape[0] if name.startswith("beam") else 1
    how = Decoding((eos,), specials.pad, STEP, max_new_tokens=new, beams=beams)
    batch = prompt_batch(rows_of(prompt, specials), specials.pad)
    found = generate(*reference.composed, batch, how)
    expected = finished(sequences, start, new, eos, specials.pad)
    tokens = np.asarray(found.tokens).reshape(expected.shape)
    replay.compare(f"{name}.sequences", tokens, expected)
    if beams > 1:
        replay.compare(f"{name}.scores", found.scores[0])


def _limit(replay: Replay, name: str, eos: int, start: int) -> int:
    """Tokens that a recorded search could make at most.

    The search that never meets its end token is recorded up to the limit. Where every row ends and
    nothing tells the limit, the search ended by itself: any longer limit gives the same.
    """
    plain = f"{name.split('_')[0]}.sequences"
    sequences = replay.recorded(f"{name}.sequences")
    own = sequences.shape[1] - start
    if plain in replay and (new := replay.recorded(plain).shape[1] - start) >= own:
        return new
    return 2 * own if (sequences[:, start:] == eos).any(axis=1).all() else own


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
    mask = decoder_cache.visible(layout.segments, slots, layout.segments, layout.context, slots)
    replay.compare("leftpad.attention_mask", ~np.asarray(mask))
    names = ("ids", "positions", "segments", "context")
    parts = {name: getattr(layout, name) for name in names}
    batch = dataclasses.replace(zeros(*ids.shape, 1, len(STEP)), **parts)
    logits = jax.jit(lambda p, b: model.logits(p, model.hidden(p, b)))(params, batch)
    replay.compare("leftpad.logits", logits)
    if "leftpad.greedy_sequences" in replay:
        sequences = replay.recorded("leftpad.greedy_sequences")
        new = sequences.shape[1] - ids.shape[1]
        how = Decoding((specials.eop,), specials.pad, STEP, max_new_tokens=new)
        found = generate(model, params, batch, how)
        replay.compare("leftpad.greedy_sequences", found.tokens, sequences[:, ids.shape[1] :])
        # Padding on the right, in a longer bucket, is the same to every row.
        moved = prompt_batch(rows_of(prompts, specials), specials.pad)
        right = generate(model, params, moved, how)
        replay.compare("leftpad.greedy_sequences", right.tokens, sequences[:, ids.shape[1] :])
        replay.compare("leftpad.greedy_last_scores", found.logits)


def rows_of(prompts: Iterable[Sequence[int]], specials: glm_layout.Specials) -> list[Row]:
    """The reference's layout of recorded prompts."""
    return [glm_layout.sequence(one, specials) for one in prompts]


def behind_media(
    replay: Replay, reference: Reference, model: XLLM, params: Params, name: str
) -> None:
    """An answer behind recorded prefix embeddings: greedy or by beams, as the recording says.

    Args:
      replay: the recording.
      reference: its LLM.
      model, params: X-LLM around that LLM.
      name: of the case.
    """
    batch, specials = _behind_prefix(replay, reference, name), reference.specials
    length, sequences = batch.ids.shape[1], replay.recorded(f"{name}.sequences")
    settings = read_json(replay.folder / "diagnostics.json")["info"][f"{name}_args"]
    new = settings.get("max_new_tokens", sequences.shape[1] - length)
    beams = settings["num_beams"]
    how = Decoding((specials.eop,), specials.pad, STEP, max_new_tokens=new, beams=beams)
    replay.compare(f"{name}.position_ids", batch.positions[:1].transpose(0, 2, 1))
    following = batch.positions[:1, -1] + np.asarray(how.position_step)
    replay.compare(f"{name}.step1_position_ids", following[:, :, None])
    found = generate(model.encoded, params, batch, how)
    best = np.asarray(found.tokens)[:, 0] if beams > 1 else found.tokens
    expected = finished(sequences, length, new, specials.eop, specials.pad)
    replay.compare(f"{name}.sequences", best, expected)
    if beams > 1:
        replay.compare(f"{name}.sequences_scores", found.scores[:, 0])


def _behind_prefix(replay: Replay, reference: Reference, name: str) -> ConversationBatch:
    """Recorded prompt with its recorded prefix embeddings, tags included, as finished media."""
    ids = replay.input(f"{name}.input_ids")
    segments, context, positions = layout_of(ids, reference.specials)
    found, start = {}, 0
    for kind in ("image", "speech"):
        if f"{name}.input_{kind}" in replay:
            prefix = replay.input(f"{name}.input_{kind}")[:, None]
            index = np.full(ids.shape, -1, np.int32)
            index[:, start : start + prefix.shape[2]] = np.arange(prefix.shape[2])
            found[kind] = Media(prefix, np.ones(prefix.shape[:2], np.int32), None, index)
            start += prefix.shape[2]
    parts = dict(ids=ids, segments=segments, context=context, positions=positions, media=found)
    return dataclasses.replace(zeros(*ids.shape, 1, len(STEP)), **parts)
