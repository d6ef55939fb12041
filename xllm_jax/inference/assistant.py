"""A trained X-LLM that answers: files and a question become text, and what is to be drawn in it.

Files are encoded once, by modality and in batches, and remembered by their content; a question
about them costs the LLM alone. The number of embeddings of a spoken file is what CIF fired, so that
the prompt has the very form it has in training. Shapes come from few buckets: nothing compiles
again after the first answers.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xllm_jax.core import checksum
from xllm_jax.core.batch import ConversationBatch, Media
from xllm_jax.core.types import Params
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities, paths
from xllm_jax.data.record import Record
from xllm_jax.data.text import llm_family, prompt
from xllm_jax.inference import decoding, replies
from xllm_jax.inference.decoding import Decoding
from xllm_jax.inference.load_run import Restored
from xllm_jax.inference.media_cache import Encoded, MediaCache
from xllm_jax.inference.replies import Reply
from xllm_jax.models.xllm import XLLM

Files = Mapping[tuple[str, str], Encoded]  # by (modality, path)

ITEMS = 32  # media items encoded at a time


class Assistant:
    """Answers questions about files with one set of parameters.

    Args:
      restored: networks and parameters.
      rows: questions answered at a time; what is missing is padding.
      max_tokens: tokens of an answer, the end token included.
      cache_bytes: bytes of embeddings that are remembered of files.
    """

    def __init__(
        self, restored: Restored, rows: int = 1, max_tokens: int = 64, cache_bytes: int = 2**30
    ):
        self.model, self.params = restored.model, restored.params
        self.data = restored.stage.data
        self.rows, self.max_tokens = rows, max_tokens
        self.family = llm_family.load(self.data)
        self.style = prompt.template_of(self.data.template, self.family)
        self.cache = MediaCache(cache_bytes)

    def decoding(self, **options: Any) -> Decoding:
        """How to decode; greedy unless `options` (fields of `Decoding`) say otherwise."""
        signals = tuple((one.first, one.count, one.between) for one in self.data.signals.values())
        usual = {"max_new_tokens": self.max_tokens, "signals": signals}
        return Decoding.of(self.family, **usual | options)

    def answers(
        self, examples: Sequence[Example], how: Decoding | None = None, seed: int = 0
    ) -> list[str]:
        """The words of the answers to all examples; arguments and errors as of `replies`."""
        found = self._answered(examples, how or self.decoding(), seed, pictures=False)
        return [reply.text(self.family) for reply in found]

    def replies(
        self, examples: Sequence[Example], how: Decoding | None = None, seed: int = 0
    ) -> list[Reply]:
        """Answers all examples, with what the pictures in the answers are to be drawn from.

        Args:
          examples: questions with their files; what they hold as answer is not looked at.
          how: to decode; greedily by default.
          seed: of sampling.

        Returns:
          The answers in the examples' order.

        Raises:
          UserError: a file cannot be read, a modality is unknown to the model, or a prompt is
            longer than the longest bucket.
        """
        return self._answered(examples, how or self.decoding(), seed, pictures=True)

    def _answered(
        self, examples: Sequence[Example], how: Decoding, seed: int, pictures: bool
    ) -> list[Reply]:
        examples = [modalities.rename_cif_media(example, self.data) for example in examples]
        files = self.encode(examples)
        prompts = [self.prompt(example, files) for example in examples]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        key = jax.random.key(seed)
        found: dict[int, Reply] = {}
        for start in range(0, len(order), self.rows):
            group = order[start : start + self.rows]
            key, used = jax.random.split(key)
            batch = self.batch([prompts[i] for i in group], files)
            found |= dict(zip(group, self._replies(batch, how, used, pictures)))
        return [found[i] for i in range(len(examples))]

    def prompt(self, example: Example, files: Files) -> prompt.Prompt:
        """The open prompt of one example, given its encoded files.

        An example without instruction gets one of its task's, always the same one.
        """

        def slot(modality: str, path: str) -> prompt.Slot:
            encoded = files[modality, path]
            items, stride, _ = encoded.embeddings.shape
            return prompt.Slot(modality, path, items, encoded.size, stride)

        limits = prompt.Limits(decoding.BUCKETS[-1], self.max_tokens, strict=True)
        generator = np.random.default_rng(zlib.crc32(example.key.encode()))
        return prompt.build(example, self.family, self.style, slot, limits, generator, answer=False)

    def encode(self, examples: Sequence[Example]) -> dict[tuple[str, str], Encoded]:
        """All files of the examples; those that are not remembered by their content are encoded."""
        keys = {
            (modality, path): self._key(modality, path)
            for example in examples
            for modality, path in example.media
            if not prompt.is_written(modality)
        }
        known: dict[str, Encoded] = {}
        wanted: dict[str, dict[str, str]] = {}
        for (modality, path), key in keys.items():
            found = self.cache.get(key)
            if found is None:
                wanted.setdefault(modality, {})[key] = path
            else:
                known[key] = found
        for modality, files in wanted.items():
            made = self._encode_files(modality, list(files.values()))
            for key, encoded in zip(files, made):
                known[key] = encoded
                self.cache.put(key, encoded)
        return {medium: known[key] for medium, key in keys.items()}

    def _key(self, modality: str, path: str) -> str:
        """Of a file's content and all that turns it into media items."""
        self.model.parts(modality)
        options = modalities.find(modality, self.data).values(self.data)
        stride = self.data.embeddings[modality]
        return checksum.of_json([modality, paths.sha256(path, modality), stride, options])

    def _encode_files(self, modality: str, files: Sequence[str]) -> list[Encoded]:
        found, stride = modalities.find(modality, self.data), self.data.embeddings[modality]
        items = found.items(self.data)
        rows = max(1, min(ITEMS, self.rows) // items)
        made: list[Encoded] = []
        for start in range(0, len(files), rows):
            group = files[start : start + rows]
            values = np.zeros((rows, items, *found.shape(self.data)), np.float32)
            lengths = np.zeros((rows, items), np.int32)
            for row, path in enumerate(group):
                record = Record(Example(path))
                loaded = modalities.load(modality, path, self.data, record, 0, False)
                values[row], lengths[row] = loaded
            media = Media(values, lengths, None, np.zeros((rows, 0), np.int32))
            embeddings, counts = map(np.asarray, _encode(self.model, modality, self.params, media))
            embeddings = embeddings.reshape(rows, items, stride, -1)
            for row in range(len(group)):
                size = min(int(counts[row, 0]), stride) if found.spoken else stride
                made.append(Encoded(embeddings[row].copy(), size))
        return made

    def batch(self, prompts: Sequence[prompt.Prompt], files: Files) -> ConversationBatch:
        """Prompts and the finished embeddings of their media, as `XLLM.encoded` reads them."""
        # Rows without a prompt hold an empty one, so that they end like any other.
        empty = [self.family.row(())] * (self.rows - len(prompts))
        batch = decoding.prompt_batch([*prompts, *empty], self.family.pad)
        names = sorted({slot.modality for one in prompts for slot in one.slots})
        media = {name: self._media(name, prompts, files, batch.ids.shape[1]) for name in names}
        return dataclasses.replace(batch, media=media)

    def _media(
        self, modality: str, prompts: Sequence[prompt.Prompt], files: Files, length: int
    ) -> Media:
        """The embeddings of one modality's files, and where they stand."""
        index = np.full((self.rows, length), -1, np.int32)
        tables: list[list[np.ndarray]] = []
        for row, one in enumerate(prompts):
            places = one.index.get(modality, index[row, :0])
            index[row, : len(places)] = places
            slots = (slot for slot in one.slots if slot.modality == modality)
            tables.append([files[modality, slot.path].embeddings for slot in slots])
        shape = next(table[0].shape[1:] for table in tables if table)
        most = max(sum(map(len, table)) for table in tables)
        # Rounded up, so that few sizes occur.
        values = np.zeros((self.rows, 2 ** (most - 1).bit_length(), *shape), np.float32)
        for row, table in enumerate(tables):
            if table:
                joined = np.concatenate(table)
                values[row, : len(joined)] = joined
        return Media(values, np.ones(values.shape[:2], np.int32), None, index)

    def _replies(
        self, batch: ConversationBatch, how: Decoding, key: jax.Array, pictures: bool
    ) -> list[Reply]:
        made = decoding.generate(self.model.encoded, self.params, batch, how, key)
        tokens = np.asarray(made.tokens)
        rows = (tokens[:, 0] if how.beams > 1 else tokens).tolist()
        rows = [replies.answer_tokens(row, self.family) for row in rows]
        signals, model = self.data.signals, self.model.encoded
        drawn = replies.read(model, self.params, batch, rows, signals, how) if pictures else {}
        return [
            replies.assemble(row, signals, {n: of[number] for n, of in drawn.items()}, self.family)
            for number, row in enumerate(rows)
        ]


@functools.partial(jax.jit, static_argnames=("model", "modality"))
def _encode(
    model: XLLM, modality: str, params: Params, items: Media
) -> tuple[jax.Array, jax.Array]:
    return model.encode(params, modality, items)
