"""GLM's blank infilling (arXiv 2103.10360, sections 2.1 and 2.2): text to pre-training rows.

Spans are cut out of a text, a mask token stays in each place, and the spans follow behind the
context in random order: `x1 [MASK] x5 x6 <sop> x2 x3 x4 <eop>`. Short spans use [MASK]; a long tail
uses [gMASK], which is how the LLM learns to answer. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.text.glm_layout import Specials, positions_of
from xllm_jax.data.text.token_rows import Row

Span = tuple[int, int]  # first token, one past the last


def example(
    ids: Sequence[int],
    specials: Specials,
    generator: np.random.Generator,
    tail_share: float = 0.5,
    masked_share: float = 0.15,
    mean_span: float = 3.0,
) -> Row:
    """One pre-training row of a text.

    Args:
      ids: `[n]` token ids of the text, n at least 2.
      specials: special ids.
      generator: source of every random choice.
      tail_share: probability of cutting a tail of uniform length ([gMASK]) instead of short spans.
      masked_share: share of the tokens that short spans cover, at least one token.
      mean_span: mean of the Poisson distribution of short spans' lengths.

    Raises:
      UserError: a text of fewer than two tokens.
    """
    if len(ids) < 2:
        raise UserError("a text needs at least two tokens", field="ids")
    if generator.random() < tail_share:
        return infill(
            ids, [(int(generator.integers(1, len(ids))), len(ids))], specials.gmask, specials
        )
    spans = short_spans(len(ids), generator, masked_share, mean_span)
    order = generator.permutation(len(spans))
    return infill(ids, [spans[i] for i in order], specials.mask, specials)


def short_spans(
    length: int, generator: np.random.Generator, masked_share: float, mean_span: float
) -> list[Span]:
    """Draws spans in text order that neither overlap nor touch and cover about `masked_share`."""
    wanted = max(1, round(length * masked_share))
    free = np.ones(length, bool)
    spans: list[Span] = []
    for _ in range(4 * wanted):
        size = int(np.clip(generator.poisson(mean_span), 1, wanted))
        start = int(generator.integers(0, length - size + 1))
        if free[start : start + size].all():
            spans.append((start, start + size))
            free[max(0, start - 1) : start + size + 1] = False
            wanted -= size
        if wanted <= 0:
            break
    return sorted(spans)


def infill(ids: Sequence[int], spans: Sequence[Span], mask: int, specials: Specials) -> Row:
    """Lays out a text whose `spans` are to be filled, in the order given.

    Args:
      ids: `[n]` token ids.
      spans: non-overlapping (first, one past the last).
      mask: token that stands in their place, [MASK] or [gMASK].
      specials: special ids.

    Returns:
      The row. Every span follows as `<sop> span <eop>` at the position of its mask; its tokens and
      <eop> are supervised, and <sop> where it directly follows the mask, as in the answer format.
    """
    context, places = _context(list(ids), spans, mask)
    tokens, positions = list(context), [positions_of(len(context), len(context), 0)]
    answer_index: list[int] = []
    if places[spans[0][0], spans[0][1]] == len(context) - 1:
        answer_index.append(len(context) - 1)
    for span in spans:
        filled = [specials.sop, *ids[span[0] : span[1]], specials.eop]
        answer_index += range(len(tokens), len(tokens) + len(filled) - 1)
        tokens += filled
        positions.append(positions_of(0, len(filled), places[span[0], span[1]]))
    index = np.asarray(answer_index, np.int32)
    row = np.asarray(tokens, np.int32)
    return Row(
        ids=row,
        positions=np.concatenate(positions),
        context=np.arange(len(row)) < len(context),
        segments=np.ones(len(row), np.int32),
        answer_index=index,
        targets=row[index + 1],
    )


def _context(ids: list[int], spans: Sequence[Span], mask: int) -> tuple[list[int], dict[Span, int]]:
    """The text with a mask for every span, and where each span's mask stands."""
    context: list[int] = []
    places: dict[Span, int] = {}
    end = 0
    for start, stop in sorted(tuple(span) for span in spans):
        context += ids[end:start]
        places[start, stop] = len(context)
        context.append(mask)
        end = stop
    return context + ids[end:], places
