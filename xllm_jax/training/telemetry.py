"""What a run measures about itself: speeds, MFU, memory, compilations, traces (docs/telemetry.md).

Nothing here waits for the device between two log lines.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from xllm_jax.core import chips, flops
from xllm_jax.core.batch import B, Batch
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Device, Metrics
from xllm_jax.core.weighted_mean import Terms, WeightedMean
from xllm_jax.data.batching import batch_format
from xllm_jax.training import divergence
from xllm_jax.training.step import Loss, TrainState

S = TypeVar("S")
R = TypeVar("R")

COMPILED = "/jax/core/compile/backend_compile_duration"
TOKENS = ("tokens", "characters", "word pieces")  # of `padding`, whichever a form has
TERMS = "terms"  # of the loss
INTERNAL = (divergence.WRONG, divergence.HALTED)
LAST = (divergence.SKIPPED,)  # counters: the newest value counts
GIB = 2**30

Signature = tuple[tuple[str, tuple[int, ...], str], ...]


def signature(batch: Batch) -> Signature:
    """(path, shape, dtype) of every array of a batch: what the step is compiled for."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return tuple((jax.tree_util.keystr(path), x.shape, str(x.dtype)) for path, x in leaves)


class Interval:
    """What happened since the last log line.

    Args:
      useful: (state, global batch) -> FLOPs that the step cannot do without, None where the chip's
        peak is not known.
      peak: FLOP/s of all devices together.
    """

    def __init__(
        self, useful: Callable[[TrainState, Batch], float] | None = None, peak: float = 0.0
    ):
        self._useful, self._peak = useful, peak
        self._rows: dict[int, Metrics] = {}  # fetched
        self._pending: dict[int, Metrics] = {}
        self._samples = self._tokens = 0
        self._flops, self._waited, self._since = 0.0, 0.0, time.monotonic()

    def wait(self, seconds: float) -> None:
        """Notes time that passed until the data side handed a batch over."""
        self._waited += seconds

    def leave_out(self, seconds: float) -> None:
        """Takes time that went by for something else than training out of the speeds."""
        self._since += seconds

    def add(self, number: int, metrics: Metrics, info: Mapping[str, Any]) -> None:
        """Notes one step; its metrics stay on the device.

        Args:
          number: of the micro-batch.
          metrics: of its step, on the device.
          info: of its batch.
        """
        self._pending[number] = metrics
        self._samples += info["examples"]
        used = next((info["padding"][name][0] for name in TOKENS if name in info["padding"]), 0)
        self._tokens += used * jax.process_count()

    def work(self, state: TrainState, batch: Batch) -> None:
        """Notes the work that a step is about to do."""
        if self._useful is not None:
            self._flops += self._useful(state, batch)

    def fetch(self) -> dict[int, Metrics]:
        """{number: metrics} of the steps since the last fetch, in one transfer; waits for them."""
        fetched = jax.device_get(self._pending)
        self._pending = {}
        self._rows |= fetched
        return fetched

    def scalars(self) -> dict[str, float]:
        """Means over the steps, and speeds; waits for the steps: the clock tells the truth."""
        self.fetch()
        seconds, steps = time.monotonic() - self._since, max(len(self._rows), 1)
        found = means(list(self._rows.values())) | {
            "samples_per_second": self._samples / seconds,
            "tokens_per_second": self._tokens / seconds,
            "step_seconds": seconds / steps,
            "input_wait": self._waited / seconds,
        }
        return found | ({"mfu": self._flops / seconds / self._peak} if self._flops else {})


def means(rows: Sequence[Metrics]) -> dict[str, float]:
    """Means over steps, of a `WeightedMean` by what it counts; counters as they are last.

    The loss is the sum of its terms' means, where it has them, as in an update and in validation. A
    skipped micro-batch's values that are NaN are left out, and so is a scalar without any.
    """
    found = {}
    for name in sorted(rows[0], key=TERMS.__eq__):  # terms last
        values = [row[name] for row in rows]
        if name in LAST:
            found[name] = float(values[-1])
        elif name == TERMS:
            found["loss"] = mean(values)
        elif name not in INTERNAL:
            found[name] = mean(values)
    return {name: value for name, value in found.items() if np.isfinite(value)}


def score(metrics: Metrics, name: str) -> jax.Array | WeightedMean | Terms:
    """A metric of a step in the form that `mean` averages as the log does."""
    return metrics[TERMS] if name == "loss" and TERMS in metrics else metrics[name]


def mean(values: Sequence[float | WeightedMean | Terms]) -> float:
    """Mean of fetched scalars that are numbers; of `WeightedMean`, the total over the count; of a
    loss's terms, the sum of that."""
    terms = [value for value in values if isinstance(value, dict)]
    if terms:
        kept = [row for row in terms if np.isfinite([float(t.total) for t in row.values()]).all()]
        sums = ([row[name] for row in kept] for name in terms[0])
        return sum(mean(s) for s in sums if any(t.count for t in s)) if kept else float("nan")
    parts = [value for value in values if isinstance(value, WeightedMean)]
    if parts:
        parts = [part for part in parts if np.isfinite(part.total)]
        count = sum(float(part.count) for part in parts)
        return sum(float(part.total) for part in parts) / count if count else float("nan")
    numbers = [float(v) for v in values if not isinstance(v, (dict, WeightedMean))]
    kept = [number for number in numbers if np.isfinite(number)]
    return float(np.mean(kept)) if kept else float("nan")


class Compilations(Generic[S, B, R]):
    """The step, watched: counts how often XLA compiles it and says when it does so once too often.

    Args:
      step: the jitted step, (state, batch) -> result.
      expected: programs that the stage needs, one for every length bucket.
      say: where a warning goes.
      name: of the step there.

    Attributes:
      count: compilations so far.
    """

    def __init__(
        self,
        step: Callable[[S, B], R],
        expected: int,
        say: Callable[[str], None] = print,
        name: str = "The step",
    ):
        self._step, self._expected, self._say, self._name = step, expected, say, name
        self._known: list[Signature] = []
        self._calling: int | None = None
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def close(self) -> None:
        """Stops listening."""
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def __enter__(self) -> Compilations[S, B, R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, state: S, batch: B) -> R:
        """Runs the step."""
        before, self._calling = self.count, threading.get_ident()
        try:
            result = self._step(state, batch)
        finally:
            self._calling = None
        if self.count > before:
            self._note(signature(batch))
        return result

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED and self._calling == threading.get_ident():
            self.count += 1

    def _note(self, new: Signature) -> None:
        if new in self._known or len(self._known) >= self._expected:
            self._say(
                f"{self._name} was compiled again ({self.count} times so far, {self._expected} "
                f"needed): {self._reason(new)}"
            )
        self._known.append(new)

    def _reason(self, new: Signature) -> str:
        if new in self._known:
            return "the batch's shapes are known; the state's layout or a jax setting has changed"
        old = min(self._known, key=lambda known: len(set(new) - set(known)))
        shapes = {path: (shape, kind) for path, shape, kind in old}
        changed = [
            f"{path} {_array(*shapes[path]) if path in shapes else 'absent'} -> {_array(shape, k)}"
            for path, shape, k in new
            if shapes.get(path) != (shape, k)
        ]
        gone = [path for path in shapes if path not in {row[0] for row in new}]
        return "; ".join(changed + [f"{path} gone" for path in gone])


def _array(shape: tuple[int, ...], kind: str) -> str:
    return f"{kind}{list(shape)}"


def programs(stage: Stage) -> int:
    """How many different steps a stage compiles: one for every length bucket."""
    return batch_format.find(stage.data).programs


def useful(loss: Loss[B]) -> Callable[[TrainState, B], float]:
    """(state, batch) -> FLOPs that a stage's step cannot do without, traced once for each shape."""
    known: dict[Signature, float] = {}

    def count(state: TrainState, batch: B) -> float:
        name = signature(batch)
        if name not in known:
            arguments = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                (state.trainable, state.frozen, batch),
            )
            known[name] = flops.useful(loss, *arguments)
        return known[name]

    return count


def peak(devices: Sequence[Device]) -> float:
    """bfloat16 FLOP/s of all devices together; 0 where a kind is not in the table."""
    known = [chips.chip_of(device.device_kind) for device in devices]
    return sum(chip.flops for chip in known if chip) if all(known) else 0.0


def memory() -> dict[str, float]:
    """GiB in use: of the fullest device of this host now and at most, and of this process."""
    found = {}
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s]
    for name, key in (("device", "bytes_in_use"), ("device_peak", "peak_bytes_in_use")):
        used = [s[key] for s in stats if key in s]
        if used:
            found[f"memory/{name}_gib"] = max(used) / GIB
    pages = Path("/proc/self/statm")
    if pages.exists():
        size = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found["memory/host_gib"] = size / GIB
    return found


class Profile:
    """Traces the micro-batches `first` to `last` (both traced) into a folder.

    Args:
      steps: () or (first, last).
      directory: where the trace goes; every host writes its own file.

    Raises:
      UserError: not two numbers in order.
    """

    def __init__(self, steps: Sequence[int], directory: Path):
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise UserError(
                f"{tuple(steps)} is no range of micro-batches",
                field="profile",
                hint="Write --config.profile='(10,12)'",
            )
        self._first, self._last = steps or (0, 0)
        self._directory, self._running = directory, False

    def before(self, number: int, state: TrainState) -> None:
        """Starts at the first micro-batch, once those before it are done."""
        if self._first and self._first <= number <= self._last and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, number: int, state: TrainState) -> str:
        """Stops behind the last one; returns a line that says where the trace lies, or ''."""
        if not self._running or number < self._last:
            return ""
        jax.block_until_ready(state)
        self.close()
        return f"Trace of micro-batches {self._first} to {self._last}: {self._directory}"

    def close(self) -> None:
        """Ends a trace that is still under way."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
