"""Shards through Apache Beam: in local processes, or on any runner with the same command."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from xllm_jax.core.errors import UserError
from xllm_jax.prepare import manifest, shard
from xllm_jax.prepare import plan as planning
from xllm_jax.prepare.plan import Plan

EVERY_SECONDS = 1.0  # between two looks at what is finished


class WriteShards:
    """What a worker does with numbers of shards; it opens the source once."""

    def __init__(self, plan: Plan):
        self._plan, self._found = plan, None

    def __call__(self, number: int) -> dict[str, Any]:
        """Writes one shard and returns its note."""
        if self._found is None:
            self._found = planning.examples(self._plan)
        return shard.write(self._plan, number, self._found)

    def __getstate__(self) -> dict[str, Any]:
        return {"_plan": self._plan, "_found": None}


def run(plan: Plan, arguments: Sequence[str] = (), workers: int = 0) -> dict[str, Any]:
    """Writes what is missing of a set, and describes it.

    Args:
      plan: what to do.
      arguments: Beam's pipeline options, such as '--runner=FlinkRunner'; none runs locally. The
        workers need this package, and the input and output folders under the same paths.
      workers: local processes; 0 works in this one.

    Returns:
      The manifest.

    Raises:
      UserError: Beam is not installed, or what `manifest.finish` raises.
    """
    todo = plan.todo()
    if todo:
        with Progress(plan, len(todo)):
            _through_beam(plan, todo, _options(arguments, workers))
    return manifest.finish(plan)


def _options(arguments: Sequence[str], workers: int) -> list[str]:
    chosen = list(arguments)
    if not any(one.startswith("--runner") for one in chosen):
        chosen.append("--runner=DirectRunner")
        if workers:
            mode = "--direct_running_mode=multi_processing"
            chosen += [mode, f"--direct_num_workers={workers}"]
    return chosen


def _through_beam(plan: Plan, todo: Sequence[int], options: Sequence[str]) -> None:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        mend = "pip install 'xllm_jax[prepare]'"
        raise UserError("Apache Beam is not installed", field="prepare", mend=mend) from error
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        numbers = pipeline | "shards" >> beam.Create(list(todo)) | beam.Reshuffle()
        _ = numbers | "write" >> beam.Map(WriteShards(plan))


class Progress:
    """A bar of records with rate and time left, from the notes that finished shards leave."""

    def __init__(self, plan: Plan, todo: int):
        self._plan, self._ended = plan, threading.Event()
        done = plan.shards - todo
        self._bar = tqdm(
            total=plan.records,
            initial=min(done * plan.per_shard, plan.records),
            desc=plan.name,
            unit="items",
            dynamic_ncols=True,
        )
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        self._bar.close()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            self._look()

    def _look(self) -> None:
        plan = self._plan
        done = sum(len(plan.places(s)) for s in range(plan.shards) if planning.finished(plan, s))
        self._bar.update(done - self._bar.n)
