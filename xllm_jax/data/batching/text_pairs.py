"""The format of text pairs: two texts that belong together, for the BERT of the interfaces.

The first text is the prefix, the second is what is to be written after it; joined, both are read
with some of their pieces hidden. The first text of a record is its written media (or its
instruction), the second its answer, with the question before it where there is one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from xllm_jax.core.batch import TextPairs
from xllm_jax.core.errors import UserError
from xllm_jax.core.media_names import is_written
from xllm_jax.data.batching.batch_format import BatchPlan, Entry, RowPerRecord
from xllm_jax.data.media import modalities
from xllm_jax.data.record import MEDIA, Mode, Record, Skipped
from xllm_jax.data.text import blip_captions
from xllm_jax.data.text.wordpiece import WordPiece

HIDDEN_SHARE = 0.15  # of the joined pieces, as in BERT (arXiv 1810.04805, section 3.1)
MASK = "[MASK]"


@dataclasses.dataclass(frozen=True)
class Pair(Entry):
    """A record and its two texts."""

    first: str
    second: str


class Format(RowPerRecord[Pair, TextPairs, WordPiece]):
    """Pairs of texts, apart and joined."""

    def load_resources(self) -> WordPiece:
        """Loads the WordPiece vocabulary that the data names."""
        return WordPiece(self.data.vocabulary)

    @property
    def row_tokens(self) -> int:
        """Word pieces of both texts."""
        return 2 * self.data.text_length

    def zeros(self, rows: int, bucket: int = -1) -> TextPairs:
        """An empty batch, see `BatchFormat.zeros`."""
        apart, joined = (rows, self.data.text_length), (rows, 2 * self.data.text_length)
        return TextPairs(
            first=np.zeros(apart, np.int32),
            first_mask=np.zeros(apart, bool),
            second=np.zeros(apart, np.int32),
            second_mask=np.zeros(apart, bool),
            joined=np.zeros(joined, np.int32),
            joined_mask=np.zeros(joined, bool),
            targets=np.zeros(joined, np.int32),
            hidden=np.zeros(joined, np.float32),
        )

    def entry(self, record: Record, mode: Mode) -> Pair:
        """The row of one record.

        Raises:
          UserError: one of the texts is empty.
        """
        example = record.example
        written = [words for kind, words in example.media if is_written(kind)]
        first = "".join(written) or example.instruction
        second = (example.instruction if written else "") + example.answer
        if not first or not second:
            raise UserError("has no two texts", field=example.key)
        return Pair(record, blip_captions.caption(first), blip_captions.caption(second))

    def fill(
        self,
        plan: BatchPlan[Pair],
        rows: slice,
        mode: Mode,
        load: modalities.Load = modalities.load,
    ) -> tuple[TextPairs, list[Skipped]]:
        """Tokenizes some rows, see `BatchFormat.fill`; nothing is opened.

        Returns:
          ({'first', 'second': `[B, L]` int32 as [CLS] … [SEP] [PAD]*; 'first_mask', 'second_mask';
          'joined' `[B, 2L]` int32, the first and then the second without its [CLS], pieces hidden;
          'joined_mask'; 'targets' `[B, 2L]` int32; 'hidden' `[B, 2L]` float32, 1 where a piece was
          hidden}, nothing skipped).
        """
        mine, length, pieces = plan.rows[rows], self.data.text_length, self.resources
        texts = [(row[0].first, row[0].second) if row else ("", "") for row in mine]
        first, first_mask = pieces.rows([text for text, _ in texts], length)
        second, second_mask = pieces.rows([text for _, text in texts], length)
        empty = [not row for row in mine]
        first_mask[empty] = second_mask[empty] = False
        batch = self.zeros(len(mine))
        targets, joined_mask, hidden = batch.targets, batch.joined_mask, batch.hidden
        targets[:] = pieces.pad
        for number, pair in ((n, entry) for n, row in enumerate(mine) for entry in row):
            both = [*first[number, first_mask[number]], *second[number, second_mask[number]][1:]]
            targets[number, : len(both)] = both
            joined_mask[number, : len(both)] = True
            chosen = pair.record.generator(MEDIA).random(len(both)) < HIDDEN_SHARE
            special = np.isin(both, [pieces.begin, pieces.end])
            hidden[number, : len(both)] = chosen & ~special
        joined = np.where(hidden > 0, pieces.encode_special(MASK), targets).astype(np.int32)
        texts = {"first": first, "first_mask": first_mask}
        texts |= {"second": second, "second_mask": second_mask, "joined": joined}
        return dataclasses.replace(batch, **texts), []

    def padding(self, batch: TextPairs) -> dict[str, tuple[int, int]]:
        """{kind of place: (used, capacity)}: word pieces."""
        return {"word pieces": (int(batch.joined_mask.sum()), batch.joined_mask.size)}
