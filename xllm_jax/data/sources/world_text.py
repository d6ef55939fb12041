"""The embedded world's text stream (`data/synthetic_world/text_stream.py`).

There are no files, and any number of examples.

Examples are made when they are read, so a long stream costs no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.synthetic_world.text_stream import MAKERS, SHARES, text_example


class Stream(Sequence):
    """Examples 0 to count - 1 of the stream of a seed."""

    def __init__(self, count: int, seed: int, **options: Any):
        self._count, self._seed, self._options = count, seed, options

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return text_example(self._seed, index, **self._options)


def examples(
    path: str,
    split: str = "train",
    count: int = 100_000,
    seed: int = 0,
    shares: Mapping[str, float] = SHARES,
    spelled: float = 0.0,
    unnamed: float = 0.0,
    shuffled: float = 0.0,
) -> Stream:
    """Returns the stream; `path` is not read, and each split has a stream of its own.

    `shares` and the further ones are those of `text_example`.

    Raises:
      UserError: `shares` names a kind that the stream does not have.
    """
    unknown = sorted(shares.keys() - MAKERS.keys())
    if unknown:
        raise UserError(
            f"the text stream has no kind {unknown[0]!r}",
            field="options.shares",
            hint=f"Choices: {', '.join(MAKERS)}",
        )
    seed = {"train": 1, "val": 2, "test": 3}[split] + 10 * seed
    options = {"spelled": spelled, "unnamed": unnamed, "shuffled": shuffled}
    return Stream(count, seed, shares=dict(shares), **options)
