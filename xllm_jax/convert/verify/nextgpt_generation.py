"""Recorded decoding of NExT-GPT: prompts with media, what is said, what a pipeline receives."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from xllm_jax.convert.verify.nextgpt_llama import layout
from xllm_jax.convert.verify.nextgpt_losses import Recorded, read
from xllm_jax.convert.verify.recording import Replay, read_json
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.data.text import nextgpt_format

HEADS_FILE = "losses"  # which holds the projections and the media, and tells the sizes
ASK = "\n### Assistant:"
CUT = re.compile(r" <|> ")  # where the reference cuts a prompt
MEDIUM = re.compile(r"(\w+)>(\w+)</\1")
MOST = 64  # tokens of an answer
ROOM = 128  # of which a cache's length is a multiple, so that cases share one


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What every case runs, compiled for its shapes once.

    Attributes:
      found: the recorded networks as ours.
    """

    found: Recorded

    @functools.cached_property
    def table(self) -> np.ndarray:
        """`[V, D]`, embeddings of the LLM's words."""
        return np.asarray(self.found.params["llm"]["embedding"])

    @functools.cached_property
    def feed(self) -> Callable[..., tuple[jax.Array, jax.Array, Any]]:
        """(LLM's parameters, embeddings, layout, cache) to (states, next token, cache)."""
        model = self.found.model

        @jax.jit
        def feed(params: Params, x: jax.Array, rows: tuple, cache: Any) -> Any:
            states, cache = model.apply({"params": params}, x, *rows, cache)
            scores = model.apply({"params": params}, states[:, -1], method="logits")
            return states, scores.argmax(-1)[0], cache

        return feed

    @functools.cached_property
    def heads(self) -> dict[str, Callable[..., jax.Array]]:
        """{kind: (its parameters, states, embeddings) to what a pipeline receives}."""
        return {
            kind: jax.jit(lambda params, x, e, head=head: head.apply({"params": params}, x, e))
            for kind, head in self.found.heads.items()
        }


def answers(replay: Replay) -> None:
    """All cases of the file."""
    config = replay.about()["config"]
    sizes = read_json(replay.folder / f"{HEADS_FILE}.json")["config"]["sizes"]
    with np.load(replay.folder / f"{HEADS_FILE}.npz") as file:
        others = {name: file[name] for name in file.files if name.startswith(("w/", "media/"))}
    heads = {name.removeprefix("w/"): x for name, x in others.items()}
    compiled = Compiled(read(replay, sizes, heads))
    media = {name.removeprefix("media/"): x for name, x in others.items()}
    stops = [ids[-1] for ids in config["stop_ids"]]
    for case, (prompt, _) in config["cases"].items():
        told = config["results"][case]
        replay.attempt(_case, case, prompt, compiled, media, stops, told)


def _prompt(
    prompt: str, compiled: Compiled, media: Mapping[str, np.ndarray], told: object
) -> np.ndarray:
    """`[1, P, D]`: each text behind a <s> of its own, each medium between its tags."""
    found = compiled.found
    tokenizer, params = found.cases.tokenizer, found.params["input"]
    parts = [part for part in CUT.split(prompt + ASK) if part]
    if parts != told["prompt_segments"]:
        raise UserError("other segments than were recorded", field="prompt_segments")
    made = []
    for part, ids in zip(parts, told["prompt_segment_ids"], strict=True):
        medium = MEDIUM.fullmatch(part)
        if medium is None and tokenizer.encode(part) != ids:
            raise UserError("other ids than were recorded", field="prompt_segment_ids")
        if medium is None:
            made.append(compiled.table[[*tokenizer.start, *tokenizer.encode(part)]])
            continue
        given = media[medium[2]] @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
        tags = [tokenizer.find(tag) for tag in (nextgpt_format.OPEN, nextgpt_format.CLOSE)]
        before, after = compiled.table[tags]
        made += [np.stack([before, given.ravel(), after])]
    return np.concatenate(made)[None]


def _case(
    replay: Replay,
    case: str,
    prompt: str,
    compiled: Compiled,
    media: Mapping[str, np.ndarray],
    stops: list[int],
    told: Mapping[str, Any],
) -> None:
    """Decodes, finds the runs of signal tokens and projects their states."""
    found = compiled.found
    x = _prompt(prompt, compiled, media, told)
    replay.compare(f"{case}/inputs_embeds", x)
    tokens, states = _decode(compiled, x, stops)
    # The reference puts a <s> before what was said, which the LLM never read.
    sequence = [*found.cases.tokenizer.start, *tokens]
    replay.compare(f"{case}/sequences", np.asarray([sequence], np.int32))
    replay.compare(f"{case}/hidden_states", states)
    if found.cases.tokenizer.decode(tokens) != told["answer_text"]:
        raise UserError("another text than was recorded", field=f"{case}: answer_text")
    for kind, head in compiled.heads.items():
        run = [found.cases.tokenizer.find(name) for name in nextgpt_format.signals(kind).split()]
        if run[0] not in tokens:
            continue
        first = tokens.index(run[0])
        if tokens[first : first + len(run)] != run:
            raise UserError("a run of signal tokens is not whole", field=f"{case}: {kind}")
        raw = states[:, first : first + len(run)]
        made = head(found.params[kind], raw[:, None], compiled.table[None, run])
        replay.compare(f"{case}/{kind}_gen_idx", np.int32(first + 1))
        replay.compare(f"{case}/{kind}_raw", raw)
        replay.compare(f"{case}/{kind}_prompt_embeds", made[:, 0] if kind == "audio" else made)


def _decode(compiled: Compiled, x: np.ndarray, stops: list[int]) -> tuple[list[int], np.ndarray]:
    """(greedy tokens, states `[1, N - 1, D]` at all but the last, which nobody feeds)."""
    params, count = compiled.found.params["llm"], x.shape[1]
    cache = compiled.found.model.init_cache(1, -(-(count + MOST) // ROOM) * ROOM)
    first, one = layout(np.ones((1, count), np.int32)), np.ones((1, 1), np.int32)
    _, token, cache = compiled.feed(params, x, first, cache)
    tokens, states = [int(token)], []
    while tokens[-1] not in stops and len(tokens) < MOST:
        rows = layout(one, np.full((1, 1), count + len(tokens) - 1, np.int32))
        state, token, cache = compiled.feed(params, compiled.table[None, tokens[-1:]], rows, cache)
        states.append(np.asarray(state))
        tokens.append(int(token))
    return tokens, np.concatenate(states, axis=1)
