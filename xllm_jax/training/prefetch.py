"""The next global batch is put on the devices while the step before it runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from xllm_jax.core.batch import Batch
from xllm_jax.data.pipeline import Batches


class Prefetched:
    """Batches that a thread draws and places one ahead of their use: two are alive at most.

    Without it the devices wait for a batch's way to them whenever the loop waits for the devices,
    as it does at every log line.

    Args:
      batches: of this host.
      place: from this host's arrays to global arrays on the devices, `mesh.to_global`. Nothing in
        it may wait for other hosts.
    """

    def __init__(self, batches: Batches, place: Callable[[Batch], Batch]):
        self._batches, self._place = batches, place
        self._position = batches.position()
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._next = self._thread.submit(self._draw)

    def __iter__(self) -> Prefetched:
        return self

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        """(global batch, info), this host's arrays among it as 'arrays'.

        What drawing it raised is raised here, at its turn.
        """
        batch, info, self._position = self._next.result()
        self._next = self._thread.submit(self._draw)
        return batch, info

    def position(self) -> dict[str, int]:
        """Where the batch after the last one that was handed out is, whatever was drawn since."""
        return self._position

    def close(self) -> None:
        """Waits for the batch that is being drawn, and drops it."""
        self._thread.shutdown(cancel_futures=True)

    def _draw(self) -> tuple[Batch, dict[str, Any], dict[str, int]]:
        batch, info = next(self._batches)
        return self._place(batch), info | {"arrays": batch}, self._batches.position()
