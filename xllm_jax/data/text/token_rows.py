"""Token sequences as an LLM reads them, and how several are packed into the rows of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xllm_jax.core.batch import ConversationBatch, zeros
from xllm_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence of T tokens, A of them supervised, with P numbers to a position.

    Attributes:
      ids, segments: `[T]` int32. positions: `[T, P]` int32. context: `[T]` bool, the token belongs
        to the bidirectional context.
      answer_index, targets: `[A]` int32, the position that predicts and the token to be predicted.
      start: index of the prompt's first token, behind what the LLM family puts before it.
    """

    ids: np.ndarray
    positions: np.ndarray
    context: np.ndarray
    segments: np.ndarray
    answer_index: np.ndarray
    targets: np.ndarray
    start: int = dataclasses.field(default=0, kw_only=True)


def write(
    batch: ConversationBatch, row: int, segment: int, made: Row, start: int, first: int
) -> None:
    """Writes one sequence into a batch of NumPy arrays.

    Args:
      batch: is changed in place.
      row, segment: number of the row, and of the sequence in it, from 1.
      made: the sequence.
      start, first: tokens and supervised tokens of the row that are taken.
    """
    tokens = slice(start, start + len(made.ids))
    supervised = slice(first, first + len(made.targets))
    batch.ids[row, tokens] = made.ids
    batch.positions[row, tokens] = made.positions
    batch.segments[row, tokens] = np.where(made.segments > 0, segment, 0)
    batch.context[row, tokens] = made.context
    batch.answer_index[row, supervised] = made.answer_index + start
    batch.targets[row, supervised] = made.targets
    batch.weights[row, supervised] = 1.0


def pack(groups: Sequence[Sequence[Row]], length: int, answers: int, pad: int) -> ConversationBatch:
    """Packs sequences into rows: group i becomes row i, its sequences one behind the other.

    Args:
      groups: B lists of sequences, of which one at least has a sequence.
      length, answers: T and A, static sizes of the batch.
      pad: id of the padding.

    Returns:
      NumPy batch without media; sequences of a row are the segments 1, 2, ..

    Raises:
      UserError: a group has more tokens or supervised tokens than fit.
    """
    axes = next(made.positions.shape[1] for group in groups for made in group)
    batch = zeros(len(groups), length, answers, axes)
    batch.ids[:] = pad
    for row, group in enumerate(groups):
        used = sum(len(made.ids) for made in group)
        supervised = sum(len(made.targets) for made in group)
        if used > length or supervised > answers:
            raise UserError(
                f"{used} tokens, {supervised} supervised, in a row of {length} and {answers}",
                field="data.length",
                hint="Enlarge data.length or data.answers",
            )
        start = first = 0
        for segment, made in enumerate(group, start=1):
            write(batch, row, segment, made, start, first)
            start, first = start + len(made.ids), first + len(made.targets)
    return batch
