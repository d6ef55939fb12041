"""A trained X-LLM that answers: files and a question become text.

Files are encoded once, by modality and in batches, and remembered; a question about them costs the
LLM alone. The number of embeddings of a spoken file is what CIF fired, so that the prompt has the
very form it has in training. Shapes come from few buckets: nothing compiles again after the first
answers.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xllm_jax.core.batch import Batch, Media
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.record import Record
from xllm_jax.data.text import glm_layout, prompt
from xllm_jax.data.text.chatglm_tokenizer import ChatGLMTokenizer
from xllm_jax.inference.decoding import (
    Decoding,
    Generated,
    beam_search,
    decode,
    prefill,
    process_response,
)
from xllm_jax.inference.decoding import texts as texts_of
from xllm_jax.inference.load_run import Restored
from xllm_jax.models.xllm import LLM, XLLM, splice

Array = Any

LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
ITEMS = 32  # media items encoded at a time


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One file as the LLM reads it: embeddings `[items * stride, D]` and valid ones per item."""

    embeddings: np.ndarray
    size: int


class Assistant:
    """Answers questions about files with one set of parameters.

    Args:
      restored: networks and parameters.
      rows: questions answered at a time; what is missing is padding.
      max_tokens: tokens of an answer, the end token included.
    """

    def __init__(self, restored: Restored, rows: int = 1, max_tokens: int = 64):
        self.model, self.params = restored.model, restored.params
        self.data = restored.stage.data
        self.rows, self.max_tokens = rows, max_tokens
        self.tokenizer = ChatGLMTokenizer(self.data.tokenizer)
        self.style = prompt.template(self.data.template)
        self._encoded: dict[tuple[str, str], Encoded] = {}

    def decoding(self, **options: Any) -> Decoding:
        """How to decode; greedy unless `options` (fields of `generate.Decoding`) say otherwise."""
        specials = self.tokenizer.specials
        options = {"max_new_tokens": self.max_tokens} | options
        return Decoding(eos=specials.eop, pad=specials.pad, **options)

    def answers(
        self, examples: Sequence[Example], decoding: Decoding | None = None, seed: int = 0
    ) -> list[str]:
        """Answers of all examples, in their order; what they hold as answer is not looked at.

        Raises:
          UserError: a file cannot be read, a modality is unknown to the model, or a prompt is
            longer than the longest bucket.
        """
        examples = [modalities.rename_cif_media(example, self.data) for example in examples]
        self.encode(examples)
        prompts = [self.prompt(example) for example in examples]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        key = jax.random.key(seed)
        found: dict[int, str] = {}
        for start in range(0, len(order), self.rows):
            group = order[start : start + self.rows]
            key, used = jax.random.split(key)
            texts = self._respond([prompts[i] for i in group], decoding or self.decoding(), used)
            found |= dict(zip(group, texts))
        return [found[i] for i in range(len(examples))]

    def prompt(self, example: Example) -> prompt.Prompt:
        """The open prompt of one example whose files are encoded.

        An example without instruction gets one of its task's, always the same one.
        """

        def slot(modality: str, path: str) -> prompt.Slot:
            stride = self.data.embeddings[modality]
            items = modalities.find(modality, self.data).items(self.data)
            size = self._encoded[modality, path].size
            return prompt.Slot(modality, path, items, size, stride)

        limits = prompt.Limits(LENGTHS[-1], self.max_tokens, strict=True)
        generator = np.random.default_rng(zlib.crc32(example.key.encode()))
        return prompt.build(
            example, self.tokenizer, self.style, slot, limits, generator, answer=False
        )

    def encode(self, examples: Sequence[Example]) -> None:
        """Encodes the files of all examples that have not been met before."""
        wanted: dict[str, dict[str, Example]] = {}
        for example in examples:
            for modality, path in example.media:
                if modality.startswith(prompt.WRITTEN) or (modality, path) in self._encoded:
                    continue
                self.model.parts(modality)
                wanted.setdefault(modality, {})[path] = example
        for modality, files in wanted.items():
            items = modalities.find(modality, self.data).items(self.data)
            each = max(1, min(ITEMS, self.rows) // items)
            paths = list(files)
            for start in range(0, len(paths), each):
                self._encode_batch(modality, paths[start : start + each], each)

    def _encode_batch(self, modality: str, paths: Sequence[str], rows: int) -> None:
        found = modalities.find(modality, self.data)
        items = found.items(self.data)
        values = np.zeros((rows, items, *found.shape(self.data)), np.float32)
        lengths = np.zeros((rows, items), np.int32)
        for row, path in enumerate(paths):
            record = Record(Example(path))
            values[row], lengths[row] = modalities.load(modality, path, self.data, record, 0, False)
        item = Media(values, lengths, None, np.zeros((rows, 0), np.int32))
        made = _encode(self.model, modality, self.params, item)
        embeddings, counts = map(np.asarray, made)
        stride = self.data.embeddings[modality]
        for row, path in enumerate(paths):
            size = min(int(counts[row, 0]), stride) if found.spoken else stride
            self._encoded[modality, path] = Encoded(embeddings[row], size)

    def _respond(
        self, prompts: Sequence[prompt.Prompt], decoding: Decoding, key: Array
    ) -> list[str]:
        batch = self._batch(prompts)
        embeddings, index = self._places(prompts, batch.ids.shape[1])
        made = _respond(self.model, decoding, self.params[LLM], batch, embeddings, index, key)
        tokens = np.asarray(made.tokens)
        tokens = tokens[:, 0] if decoding.beams > 1 else tokens
        texts = texts_of(tokens[: len(prompts)], self.tokenizer)
        return [process_response(text) for text in texts]

    def _batch(self, prompts: Sequence[prompt.Prompt]) -> Batch:
        longest = max(len(one.ids) for one in prompts)
        length = next((size for size in LENGTHS if size >= longest), LENGTHS[-1])
        # Rows without a prompt hold a bare [gMASK] <sop>, so that they end like any other.
        specials = self.tokenizer.specials
        empty = glm_layout.sequence([specials.gmask, specials.sop], specials)
        batch = glm_layout.pack([[empty]] * self.rows, length, 1, specials.pad)
        for row, one in enumerate(prompts):
            here = slice(0, len(one.ids))
            batch.ids[row, here], batch.positions[row, here] = one.ids, one.positions
            batch.context[row, here], batch.segments[row, here] = one.context, 1
        return batch

    def _places(self, prompts: Sequence[prompt.Prompt], length: int) -> tuple[Array, Array]:
        """Embeddings of each row, modalities one behind the other, and where they stand."""
        tables, index = [], np.full((self.rows, length), -1, np.int32)
        for row, one in enumerate(prompts):
            table: list[np.ndarray] = []
            for modality, places in one.index.items():
                start = sum(map(len, table))
                index[row, : len(places)] = np.where(
                    places >= 0, places + start, index[row, : len(places)]
                )
                table += [
                    self._encoded[modality, slot.path].embeddings
                    for slot in one.slots
                    if slot.modality == modality
                ]
            tables.append(table)
        most = max((sum(map(len, table)) for table in tables), default=0)
        width = next((e.embeddings.shape[-1] for e in self._encoded.values()), 1)
        # Rounded up, so that few sizes occur.
        padded = np.zeros((self.rows, -(-most // 32) * 32, width), np.float32)
        for row, table in enumerate(tables):
            if table:
                joined = np.concatenate(table)
                padded[row, : len(joined)] = joined
        return padded, index


@functools.partial(jax.jit, static_argnames=("model", "modality"))
def _encode(
    model: XLLM, modality: str, params: Mapping[str, Any], items: Media
) -> tuple[Array, Array]:
    return model.encode(params, modality, items)


@functools.partial(jax.jit, static_argnames=("model", "decoding"))
def _respond(
    model: XLLM,
    decoding: Decoding,
    params: Mapping[str, Any],
    batch: Batch,
    embeddings: Array,
    index: Array,
    key: Array,
) -> Generated:
    """Answers prompts whose media are encoded: `[B, N, D]` embeddings at `[B, T]` places."""
    llm = functools.partial(model.networks[LLM].apply, {"params": params})
    x = llm(batch.ids, method="embed")
    if embeddings.shape[1]:
        x = splice(x, embeddings, index)
    room = decoding.max_new_tokens
    state = prefill(llm, x, batch.segments, batch.context, batch.positions, room)
    if decoding.beams > 1:
        return beam_search(llm, state, decoding, x.shape[1])
    return decode(llm, state, decoding, key)
