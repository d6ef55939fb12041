"""Cached features: what frozen networks make of every medium, computed once, kept as ArrayRecord.

    DIR/cache.json                  what was computed, by which networks, of which sources
    DIR/MODALITY.npy                digests of the media in ascending order, and each one's record
    DIR/MODALITY.array_record-00000-of-00012

`launch/cache.py` writes them. A medium is known by its modality, its path below `data.root` and the
embeddings that are wanted of it, so that sources may be mixed and shuffled as ever, and a file that
many examples share is kept once. A record is the bytes of the arrays without the zeros at their
end, or the reason why the medium could not be used.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError
from xllm_jax.core.media_names import captions_of
from xllm_jax.core.stage import Data
from xllm_jax.data.media import modalities
from xllm_jax.data.record import DoesNotFit, Record

MANIFEST = "cache.json"
FORMAT = 1
TABLE = np.dtype([("digest", "<u8"), ("record", "<i8")])
HEAD = struct.Struct("<BII")  # kind, items, steps kept
ARRAYS, BAD, TOO_LONG = range(3)


def manifest(directory: str | Path) -> dict[str, Any]:
    """The description of a finished cache.

    Raises:
      UserError: no finished cache there, or of another version.
    """
    file = Path(directory) / MANIFEST
    if not file.is_file():
        hint = f"Write it: xllm cache --config=FILE --output={directory}"
        raise UserError(f"no finished cache in {directory}", field="data.cache", hint=hint)
    found = bounded.read_json(file)
    if found["format"] != FORMAT:
        what = f"{directory} is of format {found['format']}, this version reads {FORMAT}"
        raise UserError(what, field="data.cache", hint=again(directory, found["config"]))
    return found


def steps(directory: str | Path) -> dict[str, int]:
    """{modality: how many steps of its chain a cache holds the outcome of}."""
    return {name: kind["steps"] for name, kind in manifest(directory)["modalities"].items()}


def again(directory: str | Path, config: str) -> str:
    """The command that writes a cache anew."""
    return f"Write it again: xllm cache --config={config} --output={directory} --again"


def shard_name(modality: str, number: int, count: int) -> str:
    """File of a shard."""
    return f"{modality}.array_record-{number:05d}-of-{count:05d}"


def wanted(modality: str, record: Record, data: Data) -> int:
    """Embeddings that are wanted of a medium; 0 where the network alone decides.

    Raises:
      UserError: speech without a transcript.
    """
    if not modalities.find(modality, data).spoken:
        return 0
    return min(modalities.spoken_tokens(record.example), data.embeddings[modality])


def digest(modality: str, path: str, count: int, root: str) -> int:
    """The 64 bits by which a medium is known."""
    inside = os.path.relpath(path, root) if root and path.startswith(root) else str(path)
    text = f"{modality}\n{count}\n{inside}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def packed(values: np.ndarray, lengths: np.ndarray) -> bytes:
    """A record of one medium: values `[items, steps, ...]`, lengths `[items]` int32."""
    used = np.flatnonzero(np.any(values != 0, axis=(0, *range(2, values.ndim))))
    kept = int(used[-1]) + 1 if len(used) else 0
    head = HEAD.pack(ARRAYS, len(values), kept)
    return head + lengths.astype("<i4").tobytes() + values[:, :kept].tobytes()


def rejected(error: UserError) -> bytes:
    """A record of a medium that cannot be used."""
    kind = TOO_LONG if isinstance(error, DoesNotFit) else BAD
    about = {"what": error.what, "field": str(error.field), "line": str(error)}
    return HEAD.pack(kind, 0, 0) + json.dumps(about).encode()


def unpacked(
    content: bytes, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of a record.

    Args:
      content: of `packed` or `rejected`.
      shape, dtype: of one item.

    Returns:
      (values `[items, *shape]`, lengths `[items]` int32).

    Raises:
      UserError: the one that reading the medium met.
    """
    kind, items, kept = HEAD.unpack_from(content)
    if kind != ARRAYS:
        about = json.loads(content[HEAD.size :])
        error = (DoesNotFit if kind == TOO_LONG else UserError)(about["what"], field=about["field"])
        error.args = (about["line"],)
        raise error
    lengths = np.frombuffer(content, "<i4", items, HEAD.size)
    values = np.zeros((items, *shape), dtype)
    stored = np.frombuffer(content, dtype, offset=HEAD.size + lengths.nbytes)
    values[:, :kept] = stored.reshape(items, kept, *shape[1:])
    return values, lengths.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Kind:
    """The records of one modality.

    Attributes:
      table: TABLE entries by digest, on disk.
      records: the encoded media; read by any thread.
      shape, dtype: of one item.
    """

    table: np.ndarray
    records: Any
    shape: tuple[int, ...]
    dtype: np.dtype

    def content(self, digest: int) -> bytes | None:
        """The record of a medium, None where there is none."""
        place = int(np.searchsorted(self.table["digest"], np.uint64(digest)))
        if place == len(self.table) or int(self.table["digest"][place]) != digest:
            return None
        return self.records[int(self.table["record"][place])]


class Features:
    """A finished cache, read record by record.

    Args:
      directory: of launch/cache.py.

    Raises:
      UserError: no finished cache there.
    """

    def __init__(self, directory: str | Path):
        about = manifest(directory)
        self.directory, self._config = Path(directory), about["config"]
        self._kinds = {
            name: _kind(self.directory, name, kind) for name, kind in about["modalities"].items()
        }

    def item(self, modality: str) -> tuple[tuple[int, ...], np.dtype] | None:
        """(shape, dtype) of an item of a modality, None where it is not cached."""
        kind = self._kinds.get(modality)
        return (kind.shape, kind.dtype) if kind else None

    def target(self, modality: str, caption: str, data: Data) -> np.ndarray | None:
        """What a text encoder made of a caption; None where captions are not cached.

        Args:
          modality: of the output.
          caption: what is to be drawn.
          data: of the stage.

        Raises:
          UserError: the cache lacks it.
        """
        name = captions_of(modality)
        kind = self._kinds.get(name)
        if kind is None:
            return None
        content = kind.content(digest(name, caption, 0, data.root))
        if content is None:
            what = f"the caption {caption[:40]!r} is not in the cache {self.directory}"
            raise UserError(what, field="data.cache", hint=again(self.directory, self._config))
        return unpacked(content, kind.shape, kind.dtype)[0][0]

    def loader(self, otherwise: modalities.Load) -> modalities.Load:
        """What takes cached media from here, and the others from `otherwise`."""
        return functools.partial(self._load, otherwise)

    def _load(
        self,
        otherwise: modalities.Load,
        modality: str,
        path: str,
        data: Data,
        record: Record,
        part: int,
        train: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        kind = self._kinds.get(modality)
        if kind is None:
            return otherwise(modality, path, data, record, part, train)
        content = kind.content(digest(modality, path, wanted(modality, record, data), data.root))
        if content is None:
            what = f"is not in the cache {self.directory}"
            raise UserError(what, field=path, hint=again(self.directory, self._config))
        return unpacked(content, kind.shape, kind.dtype)


def _kind(directory: Path, name: str, about: Mapping[str, Any]) -> Kind:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    count = about["shards"]
    files = [str(directory / shard_name(name, number, count)) for number in range(count)]
    table = np.load(directory / f"{name}.npy", mmap_mode="r")
    dtype = np.dtype(getattr(ml_dtypes, about["dtype"], about["dtype"]))
    return Kind(table, ArrayRecordDataSource(files), tuple(about["shape"]), dtype)
