"""A trained X-LLM that answers: files and a question become text, and what is to be drawn in it.

Files are encoded once, by modality and in batches, and remembered by their content; a question
about them costs the LLM alone. The number of embeddings of a spoken file is what CIF fired, so that
the prompt has the very form it has in training. Shapes come from few buckets: nothing compiles
again after the first answers.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xllm_jax.core.batch import ConversationBatch, Media
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.text import llm_family, prompt, templates
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.inference import decoding, replies
from xllm_jax.inference.decoding import Decoding
from xllm_jax.inference.file_encoder import FileEncoder
from xllm_jax.inference.load_run import Restored
from xllm_jax.inference.media_cache import Encoded
from xllm_jax.inference.replies import Reply

Files = Mapping[tuple[str, str], Encoded]  # by (modality, path)


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
        self.style = templates.template_of(self.data.template, self.family)
        self.encoder = FileEncoder(restored, rows, cache_bytes)

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

        length = decoding.BUCKETS[-1]
        return open_prompt(example, files, self.family, self.style, length)

    def encode(self, examples: Sequence[Example]) -> dict[tuple[str, str], Encoded]:
        """All files of the examples; those that are not remembered by their content are encoded."""
        return self.encoder.files(examples)

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


def open_prompt(
    example: Example, files: Files, family: LLMFamily, style: templates.Template, length: int
) -> prompt.Prompt:
    """The prompt of one example, ready to be answered.

    An example without instruction gets one of its task's, always the same one.

    Args:
      example: its answer is not looked at.
      files: encoded, by (modality, path).
      family: of the LLM.
      style: the words around the question.
      length: tokens that the prompt may take.

    Raises:
      UserError: it is longer, or cannot be a prompt.
    """

    def slot(modality: str, path: str) -> prompt.Slot:
        encoded = files[modality, path]
        items, stride, _ = encoded.embeddings.shape
        return prompt.Slot(modality, path, items, encoded.size, stride)

    limits = prompt.Limits(length, 0, strict=True)
    generator = np.random.default_rng(zlib.crc32(example.key.encode()))
    return prompt.build(example, family, style, slot, limits, generator, answer=False)
