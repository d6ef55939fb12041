"""The embedded world's text stream (`data/world/text_stream.py`): no files, any number of examples.

Examples are made when they are read, so a long stream costs no memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_jax.data.example import Example
from xllm_jax.data.world.text_stream import text_example


class Stream(Sequence):
    """Examples 0 to count - 1 of the stream of a seed."""

    def __init__(self, count: int, seed: int):
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return text_example(self._seed, index)


def examples(path: str, split: str = "train", count: int = 100_000, seed: int = 0) -> Stream:
    """Returns the stream; `path` is not read, and each split has a stream of its own."""
    return Stream(count, {"train": 1, "val": 2, "test": 3}[split] + 10 * seed)
