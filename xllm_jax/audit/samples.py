"""Rows of finished batches, taken apart into what a person can look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xllm_jax.core.batch import (
    Batch,
    ConversationBatch,
    DescribedLatents,
    DescribedPictures,
    DescribedScenes,
    ImageTextPairs,
    SceneAttributes,
    TextPairs,
    TranscriptionBatch,
)
from xllm_jax.core.stage import Data
from xllm_jax.data.example import Example
from xllm_jax.data.media import image, modalities
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.text.llm_family import LLMFamily, Tokenizer

WORDS, SLOT, SPECIAL, LEARNT = "words", "slot", "special", "learnt"
PIXELS = ("picture", "frames")  # views of images


@dataclasses.dataclass(frozen=True)
class Medium:
    """One item that an encoder reads: pixels `[H, W, 3]` uint8, or `[steps, channels]` float32 of
    anything else; `kind` says how a page shows it."""

    modality: str
    values: np.ndarray
    path: str
    kind: Modality


@dataclasses.dataclass(frozen=True)
class Sample:
    """One example as the model meets it.

    Attributes:
      key, source, task: of the example.
      media: its items, in the order of the batch.
      pieces: (kind, text) of the prompt, in order, and then of every supervised token.
      tokens: {'tokens', 'supervised' and each modality: how many}.
    """

    key: str
    source: str
    task: str
    media: tuple[Medium, ...]
    pieces: tuple[tuple[str, str], ...]
    tokens: Mapping[str, int]


def taken_apart(batch: Any, info: Mapping[str, Any], resources: Any, data: Data) -> list[Sample]:
    """The samples of a batch of any format, in the order of its rows.

    Args:
      batch, info: what `Pipeline.iterate` gives.
      resources: of the batch format.
      data: of the stage.
    """
    read: Callable[..., Sample] = _packed if isinstance(batch, ConversationBatch) else _row
    return [
        read(batch, row, segment, example, source, resources, data)
        for (row, segment, example), source in zip(info["members"], info["sources"])
    ]


def _packed(
    batch: ConversationBatch,
    row: int,
    segment: int,
    example: Example,
    source: str,
    resources: Any,
    data: Data,
) -> Sample:
    """An example of a packed row."""
    places = np.flatnonzero(batch.segments[row] == segment)
    family, owners, media = resources.family, np.full(len(places), "", object), []
    tokens = {"tokens": len(places)}
    for name, entry in batch.media.items():
        index = entry.index[row, places]
        owners[index >= 0] = name
        tokens[name] = int((index >= 0).sum())
        items = np.unique(index[index >= 0] // data.embeddings[name])
        paths = [path for modality, path in example.media if modality == name]
        kind = modalities.find(name, data)
        values, lengths = entry.values[row, items], entry.lengths[row, items]
        media += _items(name, kind, values, lengths, paths, _kind(name, data))
    learnt = (batch.weights[row] > 0) & np.isin(batch.answer_index[row], places)
    targets = batch.targets[row, learnt]
    context = batch.context[row, places]
    # The context of a causal LLM is empty; its prompt is what nothing is learnt of.
    shown = context if context.any() else ~np.isin(places, batch.answer_index[row, learnt] + 1)
    pieces = _runs(batch.ids[row, places][shown], owners[shown], family)
    pieces += [(LEARNT, _token(family.tokenizer, int(token))) for token in targets]
    tokens["supervised"] = len(targets)
    return Sample(example.key, source, example.task, tuple(media), tuple(pieces), tokens)


def _kind(name: str, data: Data) -> str:
    """How the pictures of a modality are normalized."""
    return image.normalization(data.image | (data.video if name == "video" else {}))


def _items(
    name: str,
    kind: Modality,
    values: np.ndarray,
    lengths: np.ndarray,
    paths: Sequence[str],
    normalized: str,
) -> list[Medium]:
    """Items of one modality; several frames of a video share its path."""
    each = max(len(values) // max(len(paths), 1), 1)
    named = [paths[min(number // each, len(paths) - 1)] for number in range(len(values))]
    return [
        Medium(name, pixels(one, normalized) if kind.view in PIXELS else one[:length], path, kind)
        for one, length, path in zip(values, lengths, named)
    ]


def pixels(values: np.ndarray, kind: str = "clip") -> np.ndarray:
    """`[H, W, 3]` float32, normalized by a row of `image.NORMALIZATIONS`, back to uint8."""
    mean, deviation = image.NORMALIZATIONS[kind]
    return np.clip((values * deviation + mean) * 255 + 0.5, 0, 255).astype(np.uint8)


def _runs(ids: np.ndarray, owners: np.ndarray, family: LLMFamily) -> list[tuple[str, str]]:
    """Neighboring tokens of one kind as one piece each; a slot tells how many it takes."""
    pieces: list[tuple[str, str]] = []
    tokenizer, specials = family.tokenizer, family.specials
    start = 0
    while start < len(ids):
        end = start + 1
        special = int(ids[start]) in specials and not owners[start]
        while not special and end < len(ids) and owners[end] == owners[start]:
            if not owners[end] and int(ids[end]) in specials:
                break
            end += 1
        if owners[start]:
            pieces.append((SLOT, f"{owners[start]} × {end - start}"))
        elif special:
            pieces.append((SPECIAL, tokenizer.piece(int(ids[start]))))
        else:
            pieces.append((WORDS, tokenizer.decode(ids[start:end])))
        start = end
    return pieces


def _token(tokenizer: Tokenizer, token: int) -> str:
    """One supervised token: its text, or its name where it has none."""
    return tokenizer.decode([token]) or tokenizer.piece(token).replace("▁", " ")


def _row(
    batch: Batch,
    row: int,
    segment: int,
    example: Example,
    source: str,
    resources: Any,
    data: Data,
) -> Sample:
    """A row of the formats that hold one example each."""
    paths = [path for _, path in example.media] or [example.key]
    media: tuple[Medium, ...] = ()
    ids = np.zeros(0, np.int32)
    tokens: dict[str, int] = {}
    if isinstance(batch, TranscriptionBatch):
        features = batch.features[row, : batch.lengths[row]]
        media = (Medium("speech", features, paths[0], modalities.find("speech", data)),)
        ids = batch.tokens[row, : batch.token_lengths[row]]
        tokens["speech"] = len(features)
    if isinstance(batch, ImageTextPairs | SceneAttributes | DescribedPictures):
        found, shown = modalities.find("image", data), batch.images[row]
        signed = isinstance(batch, DescribedPictures)
        shown = image.from_signed(shown) if signed else pixels(shown, _kind("image", data))
        media = (Medium("image", shown, paths[0], found),)
        tokens["image"] = 1
    if isinstance(batch, DescribedPictures | DescribedLatents | DescribedScenes):
        ids = resources.words(batch.ids[row])
    if isinstance(batch, ImageTextPairs):
        ids = batch.ids[row][batch.mask[row]]
    if isinstance(batch, TextPairs):
        ids = batch.targets[row][batch.joined_mask[row]]
    if isinstance(batch, TranscriptionBatch):
        pieces = [(LEARNT, resources.decode([token]) or "⏎") for token in ids]
    else:
        pieces = [(LEARNT, resources.piece(int(token))) for token in ids]
    tokens["supervised"] = total = len(ids) or 1
    counted = {"tokens": total, **tokens}
    return Sample(example.key, source, example.task, media, tuple(pieces), counted)
