"""Batches: every array that a training step, an evaluation step or a prefill may see.

Letters: B rows, T tokens of a row, P numbers to a position (as many as the LLM's family needs), A
supervised tokens of a row, M media items of a row. A row may hold several packed examples;
`segments` keeps them apart. All arrays are row-local, so a batch is
sharded along B and nothing in it refers to another row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike

Array = Any  # NumPy on the host, jax.Array on the device, ShapeDtypeStruct when compiling ahead
Shape = tuple[int, ...]


class Batch(Protocol):
    """The batch of any format: a dataclass of arrays that JAX knows as a pytree."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]


B = TypeVar("B", bound=Batch)
"""The batch of one format."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Media:
    """The items of one modality, and where their embeddings stand in the rows.

    Attributes:
      values: `[B, M, ...]` float32, items as the encoder reads them (images, video frames,
        filterbanks), or what frozen networks made of them (`data/cached_features.py`) in its
        own dtype. M may differ between modalities, and may be 0.
      lengths: `[B, M]` int32, valid steps of each item; 0 marks an empty slot.
      counts: `[B, M]` int32, embeddings wanted from each item (the token count of a speech slot);
        None lets the interface predict them.
      index: `[B, T]` int32, -1 where the row has a word, else the flat position
        `item * embeddings_per_item + j` in the row's interface outputs.
    """

    values: Array
    lengths: Array
    counts: Array | None
    index: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SignalRuns:
    """The runs of one modality's signal tokens in the rows, R places for them in each.

    Attributes:
      start: `[B, R]` int32, position of a run's first token; 0 where there is none.
      captions: `[B, R, C]` int32, ids of what a run stands for, for a text encoder.
      weights: `[B, R]` float32, 0 where there is none.
      pictures: `[B, R, side, side, 3]` uint8, what a run stands for, where the stage reads it; else
        None.
      shown: `[B, R]` float32, 0 where there is no picture; None as `pictures`.
      targets: `[B, R, q, width]`, what the frozen text encoder makes of the captions, where a cache
        holds it; else None.
    """

    start: Array
    captions: Array
    weights: Array
    pictures: Array | None = None
    shown: Array | None = None
    targets: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConversationBatch:
    """Rows for the LLM.

    Attributes:
      ids: `[B, T]` int32 token ids; whatever stands under a media embedding is ignored.
      positions: `[B, T, P]` int32, counted as the LLM's family does.
      segments: `[B, T]` int32, 0 = padding; tokens of different segments do not see each other.
      context: `[B, T]` bool, the token belongs to the bidirectional context of its segment.
      answer_index: `[B, A]` int32, positions whose hidden state predicts a supervised token.
      targets: `[B, A]` int32, the token to be predicted there.
      weights: `[B, A]` float32, 0 where the entry is padding.
      media: {modality: Media}; a modality that is absent has no entry, or M = 0.
      signals: {modality: SignalRuns}, of modalities that answers may be in.
    """

    ids: Array
    positions: Array
    segments: Array
    context: Array
    answer_index: Array
    targets: Array
    weights: Array
    media: dict[str, Media] = dataclasses.field(default_factory=dict)
    signals: dict[str, SignalRuns] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TranscriptionBatch:
    """Utterances and their characters.

    Letters: U filterbank frames of the length bucket, F bins, S characters.

    Attributes:
      features: `[B, U, F]` float32 filterbanks.
      lengths: `[B]` int32, valid frames; 0 where the row holds no utterance.
      token_lengths: `[B]` int32, valid characters; 0 where the row holds no utterance.
      tokens: `[B, S]` int32 character ids, the end token included, then padding.
    """

    features: Array
    lengths: Array
    token_lengths: Array
    tokens: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageTextPairs:
    """Images and captions.

    Attributes:
      ids: `[B, T]` int32 word pieces, `[CLS] … [SEP] [PAD]*`.
      images: `[B, height, width, 3]` float32, normalized.
      mask: `[B, T]` bool, False where `ids` is padding.
      weights: `[B]` float32, 0 for a row without a pair: a gray image and an empty caption.
    """

    ids: Array
    images: Array
    mask: Array
    weights: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextPairs:
    """Two texts that belong together, apart and joined.

    Attributes:
      first: `[B, T]` int32 word pieces, `[CLS] … [SEP] [PAD]*`; `first_mask` `[B, T]` bool.
      hidden: `[B, 2T]` float32, 1 where a piece of `joined` was hidden.
      joined: `[B, 2T]` int32, the first and then the second without its [CLS], pieces hidden;
        `joined_mask` `[B, 2T]` bool.
      second: as `first`; `second_mask` `[B, T]` bool.
      targets: `[B, 2T]` int32, `joined` before pieces were hidden.
    """

    first: Array
    first_mask: Array
    hidden: Array
    joined: Array
    joined_mask: Array
    second: Array
    second_mask: Array
    targets: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SceneAttributes:
    """Drawn scenes and what stands on them; the classes are of shape, color and size.

    Attributes:
      cells: `[B, 9, 3]` int32, classes of the object in each place.
      colors: `[B, N, 3]` float32, RGB of the object that covers each patch, from 0 to 1.
      images: `[B, height, width, 3]` float32, normalized.
      patches: `[B, N, 4]` int32, the same of the object that covers each patch, and its place.
    """

    cells: Array
    colors: Array
    images: Array
    patches: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DescribedPictures:
    """Pictures and the words for them, as a text-to-image model is trained.

    Attributes:
      ids: `[B, T]` int32, token ids of the text encoder, start, end and padding included.
      images: `[B, height, width, 3]` float32 from -1 to 1.
    """

    ids: Array
    images: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DescribedLatents:
    """Latents of pictures and the words for them, see `DescribedPictures`.

    Attributes:
      ids: as of `DescribedPictures`.
      means, deviations: `[B, height, width, channels]` float32 of the autoencoder's posterior,
        times its scaling.
    """

    ids: Array
    means: Array
    deviations: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DescribedScenes:
    """Descriptions of pictures, and what the pictures show.

    Attributes:
      ids: as of `DescribedPictures`.
      places: `[B, 9]` int32, the class of what stands in each place, see
        `data/batching/scene_descriptions.py`.
    """

    ids: Array
    places: Array


def zeros(
    rows: int,
    length: int,
    answers: int,
    axes: int,
    media: Mapping[str, tuple[Any, ...]] | None = None,
    signals: Mapping[str, tuple[int, ...]] | None = None,
    targets: Mapping[str, tuple[Shape, DTypeLike]] | None = None,
) -> ConversationBatch:
    """An all-padding batch of the given sizes, for init, tests and ahead-of-time compilation.

    Args:
      rows, length, answers, axes: B, T, A and P.
      media: {modality: (items per row M, shape of one item[, its dtype])}.
      signals: {modality: (runs per row R, tokens of a caption C[, side of a picture])}.
      targets: {modality: (shape, dtype) of what a cache holds of a caption}.
    """

    def integers(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    def empty(items: int, shape: Shape, dtype: DTypeLike = np.float32) -> Media:
        return Media(
            values=np.zeros((rows, items, *shape), dtype),
            lengths=integers(rows, items),
            counts=integers(rows, items),
            index=integers(rows, length) - 1,
        )

    def runs(name: str, count: int, tokens: int, side: int = 0) -> SignalRuns:
        pictures = np.zeros((rows, count, side, side, 3), np.uint8) if side else None
        shape, dtype = (targets or {}).get(name, (None, None))
        return SignalRuns(
            start=integers(rows, count),
            captions=integers(rows, count, tokens),
            weights=np.zeros((rows, count), np.float32),
            pictures=pictures,
            shown=np.zeros((rows, count), np.float32) if side else None,
            targets=None if shape is None else np.zeros((rows, count, *shape), dtype),
        )

    return ConversationBatch(
        ids=integers(rows, length),
        positions=integers(rows, length, axes),
        segments=integers(rows, length),
        context=np.zeros((rows, length), bool),
        answer_index=integers(rows, answers),
        targets=integers(rows, answers),
        weights=np.zeros((rows, answers), np.float32),
        media={name: empty(*size) for name, size in (media or {}).items()},
        signals={name: runs(name, *size) for name, size in (signals or {}).items()},
    )
