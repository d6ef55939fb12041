"""Shards through Apache Beam: in local processes, or on any runner with the same command."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core.progress import Bar
from xllm_jax.prepare import manifest, runner, shard
from xllm_jax.prepare.preparation import PreparationPlan

EVERY_SECONDS = 1.0  # between two looks at what is finished


class WriteShards:
    """What a worker does with numbers of shards; it opens the source once."""

    def __init__(self, plan: PreparationPlan):
        self._plan, self._found = plan, None

    def __call__(self, number: int) -> dict[str, Any]:
        """Writes one shard and returns its note."""
        if self._found is None:
            self._found = self._plan.examples()
        return shard.write(self._plan, number, self._found)

    def __getstate__(self) -> dict[str, Any]:
        return {"_plan": self._plan, "_found": None}


def run(plan: PreparationPlan, arguments: Sequence[str] = (), workers: int = 0) -> dict[str, Any]:
    """Writes what is missing of a set, and describes it.

    Args:
      plan: what to do.
      arguments, workers: as of `runner.options`.

    Returns:
      The manifest.

    Raises:
      UserError: Beam is not installed, or what `manifest.finish` raises.
      CannotWrite: the disk does not let a shard be written.
    """
    for number in plan.shards.drop_damaged():
        Bar.write(f"{plan.shards.file(number)}: has another checksum, and is written again")
    todo = plan.shards.todo()
    if todo:
        bar = Progress(plan.name, plan.records, Records(plan))
        with bar, runner.pipeline(arguments, workers) as pipeline:
            import apache_beam as beam

            numbers = pipeline | "shards" >> beam.Create(todo) | beam.Reshuffle()
            _ = numbers | "write" >> beam.Map(runner.Guarded(WriteShards(plan)))
    again = WriteShards(plan)
    for number in plan.shards.todo(todo):  # what kept a worker from it is told here, in a line
        again(number)
    return manifest.finish(plan)


class Progress:
    """A bar with rate and time left, for work that leaves a trace of each finished item.

    Args:
      name: of the work.
      total: items in all.
      done: how many are done; asked every second.
      unit: what the items are.
    """

    def __init__(self, name: str, total: int, done: Callable[[], int], unit: str = "items"):
        self._done, self._ended = done, threading.Event()
        self._bar = Bar(total=total, initial=done(), desc=name, unit=unit)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        self._bar.close()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            self._look()

    def _look(self) -> None:
        self._bar.update(self._done() - self._bar.n)


class Finished:
    """How much is done of work that leaves files; a file that is there is not looked at again.

    Args:
      files: {file: what it counts for}.
    """

    def __init__(self, files: Mapping[Path, int]):
        self._rest, self._done = dict(files), 0

    def __call__(self) -> int:
        for file in [file for file in self._rest if file.is_file()]:
            self._done += self._rest.pop(file)
        return self._done


class Records:
    """How many records of a plan are in finished shards; a finished one is not looked at again."""

    def __init__(self, plan: PreparationPlan):
        self._shards, self._rest = plan.shards, list(range(plan.shards.count))

    def __call__(self) -> int:
        self._rest = self._shards.todo(self._rest)
        return self._shards.total - self._shards.rows_in(self._rest)
