"""What the threads of a pipeline are reading just now: the first question when it hangs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from xllm_jax.core.stage import Data
from xllm_jax.data.example import Example
from xllm_jax.data.media.modalities import Load
from xllm_jax.data.record import Record


class Activity:
    """Notes what each thread reads, while it reads it."""

    def __init__(self) -> None:
        self._now: dict[int, str] = {}

    def now(self) -> list[str]:
        """What is being read, in words: 'captions[17]' or 'KEY (image FILE)'."""
        return sorted(self._now.copy().values())

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Notes `what` for this thread until the end of the block."""
        thread = threading.get_ident()
        self._now[thread] = what
        try:
            yield
        finally:
            self._now.pop(thread, None)

    def watched(self, name: str, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples of a source, noted while they are read."""
        return Watched(name, examples, self)

    def loading(self, load: Load) -> Load:
        """`media.load` or its like, noted while it works."""

        def loaded(
            modality: str, path: str, data: Data, record: Record, part: int, train: bool
        ) -> tuple[np.ndarray, np.ndarray]:
            with self.of(f"{record.example.key} ({modality} {path})"):
                return load(modality, path, data, record, part, train)

        return loaded


class Watched(Sequence):
    """A source that tells an `Activity` which record is being read."""

    def __init__(self, name: str, examples: Sequence[Example], activity: Activity):
        self._name, self._examples, self._activity = name, examples, activity

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        with self._activity.of(f"{self._name}[{index}]"):
            return self._examples[index]
