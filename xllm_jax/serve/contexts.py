"""Prompts that have been read are kept for a while: the same one again costs no prefill.

A context may be bidirectional, so that each of its keys and values depends on all of it: what is
kept serves the whole same context alone, media included, and never a beginning of it.
"""

from __future__ import annotations

import collections
import dataclasses

import jax

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a prefill has read.

    Attributes:
      cache: of one row, see `models/decoder_cache.py`.
      logits: `[1, V]` float32, of the first token behind it.
    """

    cache: dict[str, Array]
    logits: Array

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


class Contexts:
    """Contexts by key; where they take more than `capacity` bytes, the least recently used go.

    For one thread.

    Args:
      capacity: bytes, at most; a context that is larger alone is not kept.

    Attributes:
      bytes: that are kept now.
      hits, misses: how often `get` found something, and nothing.
    """

    def __init__(self, capacity: int):
        self.capacity, self.bytes = capacity, 0
        self.hits = self.misses = 0
        self._kept: collections.OrderedDict[str, Context] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Context | None:
        """What is kept under a key, now the most recently used."""
        found = self._kept.get(key)
        self.hits += found is not None
        self.misses += found is None
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: str, context: Context) -> None:
        """Keeps a context that is not kept yet."""
        if context.bytes > self.capacity:
            return
        self._kept[key] = context
        self.bytes += context.bytes
        while self.bytes > self.capacity:
            _, gone = self._kept.popitem(last=False)
            self.bytes -= gone.bytes

    def clear(self) -> None:
        """Forgets all."""
        self._kept.clear()
        self.bytes = 0
