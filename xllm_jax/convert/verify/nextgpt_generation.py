"""Recorded decoding of NExT-GPT: prompts with media, what is said, what a pipeline receives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert.verify.nextgpt_llama import layout
from xllm_jax.convert.verify.nextgpt_losses import Recorded, read
from xllm_jax.convert.verify.recording import Replay, read_json
from xllm_jax.core.errors import UserError
from xllm_jax.data.text import nextgpt_format

HEADS_FILE = "losses"  # which holds the projections and the media, and tells the sizes
ASK = "\n### Assistant:"
CUT = re.compile(r" <|> ")  # where the reference cuts a prompt
MEDIUM = re.compile(r"(\w+)>(\w+)</\1")
MOST = 64  # tokens of an answer


def answers(replay: Replay) -> None:
    """All cases of the file."""
    config = replay.about()["config"]
    sizes = read_json(replay.folder / f"{HEADS_FILE}.json")["config"]["sizes"]
    with np.load(replay.folder / f"{HEADS_FILE}.npz") as file:
        others = {name: file[name] for name in file.files if name.startswith(("w/", "media/"))}
    heads = {name.removeprefix("w/"): x for name, x in others.items()}
    found = read(replay, sizes, heads)
    media = {name.removeprefix("media/"): x for name, x in others.items()}
    stops = [ids[-1] for ids in config["stop_ids"]]
    for case, (prompt, _) in config["cases"].items():
        told = config["results"][case]
        replay.attempt(_case, case, prompt, found, media, stops, told)


def _prompt(prompt: str, found: Recorded, media: Mapping[str, np.ndarray], told: Any) -> jax.Array:
    """`[1, P, D]`: each text behind a <s> of its own, each medium between its tags."""
    tokenizer, model = found.cases.tokenizer, found.model
    parts = [part for part in CUT.split(prompt + ASK) if part]
    if parts != told["prompt_segments"]:
        raise UserError("other segments than were recorded", field="prompt_segments")
    made = []
    for part, ids in zip(parts, told["prompt_segment_ids"], strict=True):
        medium = MEDIUM.fullmatch(part)
        if medium is None and tokenizer.encode(part) != ids:
            raise UserError("other ids than were recorded", field="prompt_segment_ids")
        if medium is None:
            made.append(_embed(found, [*tokenizer.start, *tokenizer.encode(part)]))
            continue
        given = media[medium[2]] @ found.params["input"]["kernel"] + found.params["input"]["bias"]
        tags = [tokenizer.find(tag) for tag in (nextgpt_format.OPEN, nextgpt_format.CLOSE)]
        made += [_embed(found, tags[:1]), given.reshape(1, 1, model.width), _embed(found, tags[1:])]
    return jnp.concatenate(made, axis=1)


def _embed(found: Recorded, ids: list[Any]) -> jax.Array:
    table = jnp.asarray(found.params["llm"]["embedding"])
    return table[np.asarray(ids, np.int32)][None]


def _case(
    replay: Replay,
    case: str,
    prompt: str,
    found: Recorded,
    media: Mapping[str, np.ndarray],
    stops: list[int],
    told: Mapping[str, Any],
) -> None:
    """Decodes, finds the runs of signal tokens and projects their states."""
    x = _prompt(prompt, found, media, told)
    replay.compare(f"{case}/inputs_embeds", x)
    tokens, states = _decode(found, x, stops)
    # The reference puts a <s> before what was said, which the LLM never read.
    sequence = [*found.cases.tokenizer.start, *tokens]
    replay.compare(f"{case}/sequences", np.asarray([sequence], np.int32))
    replay.compare(f"{case}/hidden_states", states)
    if found.cases.tokenizer.decode(tokens) != told["answer_text"]:
        raise UserError("another text than was recorded", field=f"{case}: answer_text")
    for kind, head in found.heads.items():
        run = [found.cases.tokenizer.find(name) for name in nextgpt_format.signals(kind).split()]
        if run[0] not in tokens:
            continue
        first = tokens.index(run[0])
        if tokens[first : first + len(run)] != run:
            raise UserError("a run of signal tokens is not whole", field=f"{case}: {kind}")
        raw = states[:, first : first + len(run)]
        made = head.apply({"params": found.params[kind]}, raw[:, None], _embed(found, run))
        replay.compare(f"{case}/{kind}_gen_idx", np.int32(first + 1))
        replay.compare(f"{case}/{kind}_raw", raw)
        replay.compare(f"{case}/{kind}_prompt_embeds", made[:, 0] if kind == "audio" else made)


def _decode(found: Recorded, x: jax.Array, stops: list[int]) -> tuple[list[int], jax.Array]:
    """(greedy tokens, states `[1, N - 1, D]` at all but the last, which nobody feeds)."""
    model, variables = found.model, {"params": found.params["llm"]}

    @jax.jit
    def feed(x: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, jax.Array, Any]:
        rows = layout(np.ones(x.shape[:2], np.int32))[:2]
        states, cache = model.apply(variables, x, *rows, positions[..., None], cache)
        scores = model.apply(variables, states[:, -1], method="logits")
        return states, scores.argmax(-1)[0], cache

    count = x.shape[1]
    cache = model.init_cache(1, count + MOST)
    _, token, cache = feed(x, jnp.arange(count)[None], cache)
    tokens, states = [int(token)], []
    while tokens[-1] not in stops and len(tokens) < MOST:
        place = jnp.full((1, 1), count + len(tokens) - 1)
        state, token, cache = feed(_embed(found, tokens[-1:]), place, cache)
        states.append(state)
        tokens.append(int(token))
    return tokens, jnp.concatenate(states, axis=1)
