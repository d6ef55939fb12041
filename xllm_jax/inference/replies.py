"""Answers as pieces: text, and in its places what is to be drawn.

Whatever chose the tokens, the LLM reads its prompt and answer once more, and a projection reads its
states at the signal tokens, the last of them too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from xllm_jax.core.batch import ConversationBatch
from xllm_jax.core.types import Params
from xllm_jax.data.text import signal_runs
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.inference.decoding import Decoding
from xllm_jax.models.xllm import XLLM


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """What a run of signal tokens says.

    Attributes:
      modality: what it is to become.
      embeddings: `[q, width]` float32, in the place of a caption's embeddings.
    """

    modality: str
    embeddings: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Reply:
    """An answer: text and pictures in order."""

    pieces: tuple[str | Picture, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pieces that are no text."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Picture))

    def text(self, family: LLMFamily) -> str:
        """The words alone, finished as the LLM's family does."""
        return family.finish("".join(piece for piece in self.pieces if isinstance(piece, str)))


def answer_tokens(tokens: Sequence[int], family: LLMFamily) -> list[int]:
    """Generated tokens up to the end token."""
    end = next((n for n, token in enumerate(tokens) if token in family.ends), len(tokens))
    return list(tokens[:end])


def extended(
    batch: ConversationBatch, answers: Sequence[Sequence[int]], step: Sequence[int], room: int
) -> tuple[ConversationBatch, list[int]]:
    """Prompts with their answers behind them, as decoding has fed them.

    Args:
      batch: B prompts, one segment per row, NumPy.
      answers: tokens of each row, N of them at most.
      step: what each token adds to the position of the token before it.
      room: N.

    Returns:
      (rows of T + N tokens; where each answer begins).
    """

    def wider(x: np.ndarray, fill: int = 0) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)

    ids, positions = wider(batch.ids), wider(batch.positions)
    segments, context = wider(batch.segments), wider(batch.context)
    starts = [int(np.flatnonzero(row > 0)[-1]) + 1 for row in np.asarray(batch.segments)]
    for row, (tokens, start) in enumerate(zip(answers, starts)):
        at = slice(start, start + len(tokens))
        ids[row, at], segments[row, at] = tokens, segments[row, start - 1]
        number = np.arange(1, len(tokens) + 1)[:, None]
        positions[row, at] = positions[row, start - 1] + number * np.asarray(step)
    media = {
        name: dataclasses.replace(one, index=wider(one.index, -1))
        for name, one in batch.media.items()
    }
    changed = dict(ids=ids, positions=positions, segments=segments, context=context, media=media)
    return dataclasses.replace(batch, **changed), starts


def read(
    model: XLLM,
    params: Params,
    batch: ConversationBatch,
    answers: Sequence[Sequence[int]],
    registry: signal_runs.Registry,
    how: Decoding,
    runs: int = 1,
) -> dict[str, list[list[np.ndarray]]]:
    """What projections make of the signal tokens of some answers.

    Args:
      model: reads media as `batch` holds them.
      params: {part: parameters}.
      batch: the prompts, as in `extended`.
      answers: tokens of each row.
      registry: of the signal tokens.
      how: they were decoded.
      runs: of a row that a program has places for, at least, so that fewer programs occur.

    Returns:
      {modality: for each row the embeddings `[q, width]` of its runs, in order}.
    """
    found = [signal_runs.split(tokens, registry) for tokens in answers]
    found = [[run for run in row if run[0]] for row in found]
    names = sorted({name for row in found for name, _ in row})
    if not names:
        return {}
    whole, starts = extended(batch, answers, how.position_step, how.max_new_tokens)
    made: dict[str, list[list[np.ndarray]]] = {}
    for name in names:
        count = len(registry[name].ids)
        named = [[places for other, places in row if other == name] for row in found]
        # Rounded up, so that few sizes occur.
        most = 2 ** (max(runs, *map(len, named)) - 1).bit_length()
        places = np.zeros((len(named), most * count), np.int32)
        for row, own in enumerate(named):
            flat = [starts[row] + place for run in own for place in run]
            places[row, : len(flat)] = flat
        drawn = np.asarray(_project(model, params, whole, name, places, count))
        made[name] = [[drawn[row, n] for n in range(len(own))] for row, own in enumerate(named)]
    return made


@functools.partial(jax.jit, static_argnames=("model", "name", "count"))
def _project(
    model: XLLM,
    params: Params,
    batch: ConversationBatch,
    name: str,
    places: jax.Array,
    count: int,
) -> jax.Array:
    found = model.read(params, batch, {name: places}, prefix=True)[1]
    return model.project(params, name, found[name], count)


def assemble(
    tokens: Sequence[int],
    registry: signal_runs.Registry,
    drawn: Mapping[str, Sequence[np.ndarray]],
    family: LLMFamily,
) -> Reply:
    """The reply of one row.

    Args:
      tokens: of the answer.
      registry: of the signal tokens.
      drawn: {modality: embeddings of its runs, in order}; runs of others are left out.
      family: decodes the text.
    """
    left = {name: iter(runs) for name, runs in drawn.items()}
    pieces: list[str | Picture] = []
    for name, inside in signal_runs.split(tokens, registry):
        if name in left:
            pieces.append(Picture(name, next(left[name])))
        elif not name:
            pieces.append(family.tokenizer.decode(inside))
    return Reply(tuple(pieces))
