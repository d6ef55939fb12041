"""The format of image-text pairs, for stage 1 of the Q-Former (ITC, ITM, ITG)."""

from __future__ import annotations

import dataclasses

import numpy as np

from xllm_jax.core.batch import ImageTextPairs
from xllm_jax.core.errors import UserError
from xllm_jax.data.batching.batch_format import BatchPlan, Entry, RowPerRecord
from xllm_jax.data.media import modalities
from xllm_jax.data.record import Mode, Record, Skipped
from xllm_jax.data.text import blip_captions
from xllm_jax.data.text.wordpiece import WordPiece

IMAGE = "image"


@dataclasses.dataclass(frozen=True)
class Pair(Entry):
    """A record, its image and its caption."""

    path: str
    caption: str


class Format(RowPerRecord[Pair, ImageTextPairs, WordPiece]):
    """Images and captions."""

    @property
    def media(self) -> tuple[str, ...]:
        """Modalities whose files a batch may hold."""
        return (IMAGE,)

    def load_resources(self) -> WordPiece:
        """Loads the WordPiece vocabulary that the data names."""
        return WordPiece(self.data.vocabulary)

    @property
    def row_tokens(self) -> int:
        """Word pieces of a caption."""
        return self.data.text_length

    def zeros(self, rows: int, bucket: int = -1) -> ImageTextPairs:
        """An empty batch, see `BatchFormat.zeros`."""
        length = self.data.text_length
        shape = modalities.find(IMAGE, self.data).shape(self.data)
        return ImageTextPairs(
            images=np.zeros((rows, *shape), np.float32),
            ids=np.zeros((rows, length), np.int32),
            mask=np.zeros((rows, length), bool),
            weights=np.zeros(rows, np.float32),
        )

    def entry(self, record: Record, mode: Mode) -> Pair:
        """The row of one record.

        Raises:
          UserError: not one image, or no caption.
        """
        example = record.example
        paths = [path for modality, path in example.media if modality == IMAGE]
        caption = example.answer or next(iter(example.references), "")
        caption = blip_captions.caption(caption)
        if len(paths) != 1 or not caption:
            what = f"has {len(paths)} images and {'a' if caption else 'no'} caption"
            raise UserError(what, field=example.key)
        return Pair(record, paths[0], caption)

    def fill(
        self,
        plan: BatchPlan[Pair],
        rows: slice,
        mode: Mode,
        load: modalities.Load = modalities.load,
    ) -> tuple[ImageTextPairs, list[Skipped]]:
        """Opens the images of some rows, see `BatchFormat.fill`.

        Returns:
          ({'images': `[B, H, W, 3]` float32, 'ids': `[B, L]` int32 as [CLS] … [SEP] [PAD]*, 'mask':
          `[B, L]` bool, 'weights': `[B]` float32, 0 for a row without a pair, which is a gray image
          and an empty caption}, the records that could not be read).
        """
        mine = plan.rows[rows]
        batch, captions = self.zeros(len(mine)), [""] * len(mine)
        skipped: list[Skipped] = []
        for number, pair in ((n, entry) for n, row in enumerate(mine) for entry in row):
            try:
                values, _ = load(IMAGE, pair.path, self.data, pair.record, 0, mode.train)
            except UserError as error:
                skipped.append(Skipped(pair.record.example.key, error.what, True, error.field))
                continue
            batch.images[number], batch.weights[number] = values[0], 1
            captions[number] = pair.caption
        ids, mask = self.resources.rows(captions, self.data.text_length)
        return dataclasses.replace(batch, ids=ids, mask=mask), skipped

    def padding(self, batch: ImageTextPairs) -> dict[str, tuple[int, int]]:
        """{kind of place: (used, capacity)}: images and word pieces."""
        return {
            IMAGE: (int(batch.weights.sum()), len(batch.weights)),
            "word pieces": (int(batch.mask[batch.weights > 0].sum()), batch.mask.size),
        }
