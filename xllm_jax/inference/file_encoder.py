"""Files become embeddings: read, encoded in batches of a modality, remembered by their content."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from xllm_jax.core import checksum, media_names
from xllm_jax.core.batch import Media
from xllm_jax.core.types import Params
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities, paths
from xllm_jax.data.record import Record
from xllm_jax.inference.load_run import Restored
from xllm_jax.inference.media_cache import Encoded, MediaCache
from xllm_jax.models.xllm import XLLM

ITEMS = 32  # media items encoded at a time


@dataclasses.dataclass(frozen=True)
class Read:
    """A file that has been read and is to be encoded.

    Attributes:
      modality: its.
      key: of its content and of all that turns it into media items.
      values, lengths: `[items, *shape]` float32 and `[items]` int32, see `modalities.load`.
    """

    modality: str
    key: str
    values: np.ndarray
    lengths: np.ndarray


class FileEncoder:
    """Turns files into embeddings with one set of parameters.

    `find` may be called from several threads at a time, also beside one that calls `encode`.

    Args:
      restored: networks and parameters.
      rows: questions answered at a time, for how many files are encoded together.
      cache_bytes: bytes of embeddings that are remembered.
      load: opens a file.
    """

    def __init__(
        self,
        restored: Restored,
        rows: int,
        cache_bytes: int,
        load: modalities.Load = modalities.load,
    ):
        self.model, self.params = restored.model, restored.params
        self.data, self.rows = restored.stage.data, rows
        self.cache = MediaCache(cache_bytes)
        self._load = load

    def files(self, examples: Sequence[Example]) -> dict[tuple[str, str], Encoded]:
        """All files of the examples by (modality, path).

        Raises:
          UserError: a file cannot be read, or the model does not know a modality.
        """
        media = dict.fromkeys(medium for example in examples for medium in files_of(example))
        keys = {medium: self.key(*medium) for medium in media}
        found = {keys[medium]: self.find(*medium, keys[medium]) for medium in media}
        made = self.encode([one for one in found.values() if isinstance(one, Read)])
        known = made | {key: one for key, one in found.items() if isinstance(one, Encoded)}
        return {medium: known[key] for medium, key in keys.items()}

    def key(self, modality: str, path: str) -> str:
        """Of a file's content and all that turns it into media items.

        Raises:
          UserError: no such file, or the model does not know the modality.
        """
        self.model.parts(modality)
        options = modalities.find(modality, self.data).values(self.data)
        stride = self.data.embeddings[modality]
        return checksum.of_json([modality, paths.sha256(path, modality), stride, options])

    def find(self, modality: str, path: str, key: str) -> Encoded | Read:
        """A file that is remembered, or else what is in it.

        Raises:
          UserError: it cannot be read.
        """
        known = self.cache.get(key)
        if known is not None:
            return known
        record = Record(Example(path))
        return Read(modality, key, *self._load(modality, path, self.data, record, 0, False))

    def encode(self, files: Sequence[Read]) -> dict[str, Encoded]:
        """Embeddings of some files by their keys, which are remembered from now on."""
        made: dict[str, Encoded] = {}
        for modality in dict.fromkeys(one.modality for one in files):
            # Of files with the same content one is enough.
            group = {one.key: one for one in files if one.modality == modality}
            made |= self._encode(modality, list(group.values()))
        for key, encoded in made.items():
            self.cache.put(key, encoded)
        return made

    def warm_up(self) -> None:
        """Compiles the encoders of all modalities."""
        for modality, _, _ in self.model.modalities:
            found = modalities.find(modality, self.data)
            items = found.items(self.data)
            values = np.zeros((items, *found.shape(self.data)), np.float32)
            self._encode(modality, [Read(modality, "", values, np.ones(items, np.int32))])

    def _encode(self, modality: str, files: Sequence[Read]) -> dict[str, Encoded]:
        found, stride = modalities.find(modality, self.data), self.data.embeddings[modality]
        items = found.items(self.data)
        rows = max(1, min(ITEMS, self.rows) // items)
        made: dict[str, Encoded] = {}
        for start in range(0, len(files), rows):
            group = files[start : start + rows]
            values = np.zeros((rows, items, *found.shape(self.data)), np.float32)
            lengths = np.zeros((rows, items), np.int32)
            for row, one in enumerate(group):
                values[row], lengths[row] = one.values, one.lengths
            media = Media(values, lengths, None, np.zeros((rows, 0), np.int32))
            embeddings, counts = map(np.asarray, _encode(self.model, modality, self.params, media))
            embeddings = embeddings.reshape(rows, items, stride, -1)
            for row, one in enumerate(group):
                size = min(int(counts[row, 0]), stride) if found.spoken else stride
                made[one.key] = Encoded(embeddings[row].copy(), size)
        return made


def files_of(example: Example) -> list[tuple[str, str]]:
    """(modality, path) of an example's media that are not written out."""
    return [medium for medium in example.media if not media_names.is_written(medium[0])]


@functools.partial(jax.jit, static_argnames=("model", "modality"))
def _encode(
    model: XLLM, modality: str, params: Params, items: Media
) -> tuple[jax.Array, jax.Array]:
    return model.encode(params, modality, items)
