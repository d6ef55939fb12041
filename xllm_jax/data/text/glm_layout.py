"""GLM's rows: where positions, context and supervised tokens lie. Pure NumPy.

A row of the reference is `context mask-token <sop> answer <eop>`: the context (mask token included)
is bidirectional and counted by the first position, what follows is causal, keeps the position of
the mask token, and is counted by the block position from 1 at <sop>.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.text.token_rows import Row


@dataclasses.dataclass(frozen=True)
class Specials:
    """Ids that the layout needs, by the tokenizer's or the checkpoint's word, never by constant."""

    mask: int
    gmask: int
    sop: int
    eop: int
    pad: int


def mask_position(ids: Sequence[int], specials: Specials) -> int:
    """Index of the token to be filled: the first [gMASK] if there is one, else the first [MASK].

    Raises:
      UserError: the sequence has neither.
    """
    ids = list(ids)
    for token in (specials.gmask, specials.mask):
        if token in ids:
            return ids.index(token)
    raise UserError("neither [gMASK] nor [MASK] in the sequence", field="ids")


def positions_of(context: int, total: int, mask: int) -> np.ndarray:
    """`[total, 2]` int32: 0.. over the context, then the mask's index and block positions 1, 2.."""
    positions = np.zeros((total, 2), np.int32)
    positions[:context, 0] = np.arange(context)
    positions[context:, 0] = mask
    positions[context:, 1] = np.arange(1, total - context + 1)
    return positions


def sequence(ids: Sequence[int], specials: Specials, padding_visible: bool = False) -> Row:
    """Lays out one whole sequence that holds a mask token and <sop>, maybe padded on the right.

    Args:
      ids: `[T]`; the context ends before the first <sop>.
      specials: special ids.
      padding_visible: the reference's training layout: padding is one more ordinary token behind
        the answer, hidden by causality alone. It changes nothing at real tokens.

    Returns:
      The row. Its supervised tokens are everything from <sop> on (the mask token predicts <sop>)
      up to the padding.

    Raises:
      UserError: no <sop>, or no mask token before it.
    """
    row = np.asarray(ids, np.int32)
    starts = np.flatnonzero(row == specials.sop)
    if not len(starts):
        raise UserError("no <sop> in the sequence", field="ids")
    context, total = int(starts[0]), len(row)
    mask = mask_position(ids, specials)
    padded = np.flatnonzero(row[context:] == specials.pad)
    end = context + int(padded[0]) if len(padded) else total
    real = np.arange(total) < (total if padding_visible else end)
    index = np.arange(context - 1, end - 1, dtype=np.int32)
    return Row(
        ids=row,
        positions=positions_of(context, total, mask) * real[:, None].astype(np.int32),
        context=np.arange(total) < context,
        segments=real.astype(np.int32),
        answer_index=index,
        targets=row[index + 1],
    )


def left_padded(sequences: Sequence[Sequence[int]], specials: Specials, length: int = 0) -> Row:
    """A batch of prompts as the reference's tokenizer pads them: padding in front.

    Unlike the model, the tokenizer prefers [MASK] over [gMASK] for the position, and counts from
    the first real token.

    Args:
      sequences: token ids of each prompt.
      specials: special ids.
      length: pad to at least so many tokens.

    Returns:
      A row whose arrays have a leading batch axis; nothing is supervised.
    """
    length = max(length, *(len(ids) for ids in sequences))
    rows = [_left_padded(list(ids), length, specials) for ids in sequences]
    ids, positions, context, segments = (np.stack(parts) for parts in zip(*rows))
    none = np.zeros((len(rows), 0), np.int32)
    return Row(ids, positions, context, segments, none, none)


def _left_padded(ids: list[int], length: int, specials: Specials) -> tuple[np.ndarray, ...]:
    context = ids.index(specials.sop) if specials.sop in ids else len(ids)
    token = specials.mask if specials.mask in ids else specials.gmask
    mask = ids.index(token) if token in ids else 0
    pad = length - len(ids)
    positions = np.pad(positions_of(context, len(ids), mask), ((pad, 0), (0, 0)))
    places = np.arange(length)
    return (
        np.asarray([specials.pad] * pad + ids, np.int32),
        positions,
        (places >= pad) & (places < pad + context),
        (places >= pad).astype(np.int32),
    )
