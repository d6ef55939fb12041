"""Pictures of the embedded world drawn when they are read: scenes without end, and no files.

An example's key names its scene, and the batch formats `scene_*` know what it shows: they draw it,
or say in words what stands where.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_jax.data.example import Example


class Stream(Sequence):
    """Examples 0 to count - 1 of the stream of a seed."""

    def __init__(self, count: int, seed: int, task: str):
        self._count, self._seed, self._task = count, seed, task

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return Example(f"{self._seed}-{index}", task=self._task)


def examples(
    path: str,
    split: str = "train",
    count: int = 100_000,
    seed: int = 1000,
    task: str = "attributes",
) -> Stream:
    """Returns the stream; `path` is not read, and each split has a stream of its own.

    Args:
      path: is not read.
      split: train, val or test; each has a stream of its own.
      count: of examples.
      seed: of the streams.
      task: of all examples.
    """
    return Stream(count, {"train": 1, "val": 2, "test": 3}[split] + 10 * seed, task)
