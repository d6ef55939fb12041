"""Encoded files that are kept: found by their content, bounded in bytes, the least used goes."""

from __future__ import annotations

import collections
import dataclasses
import threading

import numpy as np


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One file as the LLM reads it.

    Attributes:
      embeddings: `[items, n, D]`, what the interface made of each of its items.
      size: how many of the n embeddings of an item are valid.
    """

    embeddings: np.ndarray
    size: int


class MediaCache:
    """Encoded files by key; where they take more than `capacity` bytes, the least recently used go.

    Threads may share it.

    Args:
      capacity: bytes of embeddings, at most; a file that is larger alone is not kept.

    Attributes:
      bytes: that are kept now.
      hits, misses: how often `get` found something, and nothing.
    """

    def __init__(self, capacity: int):
        self.capacity, self.bytes = capacity, 0
        self.hits = self.misses = 0
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[str, Encoded] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Encoded | None:
        """What is kept under a key, now the most recently used."""
        with self._lock:
            found = self._kept.get(key)
            self.hits += found is not None
            self.misses += found is None
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: str, encoded: Encoded) -> None:
        """Keeps a file; one of the same key gives way."""
        with self._lock:
            before = self._kept.pop(key, None)
            self.bytes -= before.embeddings.nbytes if before else 0
            self._kept[key] = encoded
            self.bytes += encoded.embeddings.nbytes
            while self.bytes > self.capacity:
                _, gone = self._kept.popitem(last=False)
                self.bytes -= gone.embeddings.nbytes
