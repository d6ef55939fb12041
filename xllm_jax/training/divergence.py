"""What a run does when a loss or a gradient is not a number or leaps: `Stage.divergence`.

The verdict is part of the step, so that a bad update is never applied and nothing waits for the
device. A stop freezes the state in front of the bad micro-batch; the loop learns of it at its next
look (every `log_every` micro-batches), saves that state and the micro-batch, and raises `Diverged`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.core import atomic
from xllm_jax.core.batch import B, Batch
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Divergence, Stage
from xllm_jax.core.types import Metrics

Array = jax.Array
Guard = dict[str, Array]

# Between two looks the micro-batches stay in host memory, so that the one to blame can be saved: at
# most HELD of them, and that much memory (32 rows of 224 x 224 pixels in float32 are 19 MB, so 0.6
# GB with a log_every of 32 or more). Where `log_every` is larger the loop looks every HELD.
HELD = 32
WRONG, HALTED, SKIPPED = "divergence/wrong", "divergence/halted", "skipped_updates"
ABOUT = "about"  # entry of a replay file that holds its JSON
NAMED = 4  # sample keys in the line that a stop prints


def check(policy: Divergence) -> None:
    """Raises `UserError` for a policy that does not exist."""
    choices = {"nonfinite": ("stop", "skip"), "spike": ("ignore", "stop", "skip")}
    for name, known in choices.items():
        value = getattr(policy, name)
        if value not in known:
            raise UserError(
                f"unknown policy {value!r}",
                field=f"divergence.{name}",
                hint=f"Choices: {', '.join(known)}",
            )
    if policy.spike != "ignore" and (policy.window < 1 or policy.factor <= 1):
        raise UserError("a spike needs a factor above 1 and a window", field="divergence")


def initial_guard(policy: Divergence) -> Guard:
    """What the verdict remembers: 'halted' bool, 'skipped' int32 and, where spikes are looked for,
    'applied' int32 and 'recent' `[2, window]` float32 (losses, gradient norms; NaN = none yet)."""
    guard = {"halted": jnp.zeros((), bool), "skipped": jnp.zeros((), jnp.int32)}
    if policy.spike == "ignore":
        return guard
    recent = jnp.full((2, policy.window), jnp.nan, jnp.float32)
    return guard | {"applied": jnp.zeros((), jnp.int32), "recent": recent}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What becomes of one micro-batch.

    Attributes:
      applied: whether its update is applied.
      halted: whether the run stands still from here on; then its step does not count either.
      guard: the next guard.
      metrics: WRONG and HALTED of this step, and SKIPPED so far.
    """

    applied: Array
    halted: Array
    guard: Guard
    metrics: dict[str, Array]


def judge(policy: Divergence, guard: Guard, loss: Array, norm: Array) -> Verdict:
    """The policy's verdict on a micro-batch's loss and global gradient norm (scalars).

    Args:
      policy: of the stage.
      guard: what was remembered of earlier micro-batches.
      loss, norm: scalars, the norm over all gradients.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    values = jnp.stack([loss, norm]).astype(jnp.float32)
    spike = finite & _spikes(policy, guard, values)
    wrong = (~finite | spike) & ~guard["halted"]
    stops = (~finite & (policy.nonfinite == "stop")) | (spike & (policy.spike == "stop"))
    stops |= guard["skipped"] >= policy.most_skipped
    halted = guard["halted"] | (wrong & stops)
    applied = finite & ~spike & ~halted
    skipped = guard["skipped"] + (wrong & ~halted)
    metrics = {WRONG: wrong, HALTED: halted, SKIPPED: skipped}
    following = _remember(guard, values, applied) | {"halted": halted, "skipped": skipped}
    return Verdict(applied, halted, following, metrics)


def _spikes(policy: Divergence, guard: Guard, values: Array) -> Array:
    if policy.spike == "ignore":
        return jnp.zeros((), bool)
    middle = jnp.median(guard["recent"], axis=1)  # NaN until the window is full: no spike
    return (values > policy.factor * middle).any()


def _remember(guard: Guard, values: Array, applied: Array) -> Guard:
    if "recent" not in guard:
        return guard
    place = guard["applied"] % guard["recent"].shape[1]
    recent = jnp.where(applied, guard["recent"].at[:, place].set(values), guard["recent"])
    return guard | {"recent": recent, "applied": guard["applied"] + applied}


def reopened(guard: Guard) -> Guard:
    """The guard with which a stopped run may be continued."""
    return guard | {"halted": jnp.zeros_like(guard["halted"])}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One micro-batch on the host: its number, arrays, `info`, and the data position before it."""

    number: int
    batch: Batch
    info: Mapping[str, Any]
    position: Mapping[str, Any]


class Held:
    """The micro-batches since the last look, and where the one to blame is saved.

    Args:
      stage: of the run.
      directory: the run's folder; files go to `replay/` below it.
      share: which part of every batch this host fills; hosts may fill the same.
    """

    def __init__(self, stage: Stage, directory: Path, share: int = 0):
        self._stage, self._directory, self._share = stage, directory / "replay", share
        self._entries: dict[int, Entry] = {}

    @property
    def full(self) -> bool:
        """Whether the loop must look before it holds another."""
        return len(self._entries) >= HELD

    def add(self, entry: Entry) -> None:
        """Holds one more."""
        self._entries[entry.number] = entry

    def clear(self) -> None:
        """Forgets the micro-batches."""
        self._entries.clear()

    def find(self, rows: Mapping[int, Metrics]) -> list[tuple[Entry, bool]]:
        """(micro-batch, whether it stopped the run) of each that was wrong.

        Args:
          rows: {number: its fetched metrics}.
        """
        wrong = [number for number, row in rows.items() if row[WRONG]]
        return [(self._entries[number], bool(rows[number][HALTED])) for number in wrong]

    def save(self, entry: Entry, values: Mapping[str, float], checkpoint: int | None) -> Path:
        """Writes a micro-batch for `launch/replay.py`; every host writes its own rows.

        Args:
          entry: the micro-batch.
          values: its metrics.
          checkpoint: number of the checkpoint whose parameters it met, or the nearest before.
        """
        host, hosts = jax.process_index(), jax.process_count()
        name = f"{entry.number}.npz" if hosts == 1 else f"{entry.number}.host{host}.npz"
        about = {
            "step": entry.number,
            "seed": self._stage.seed,
            "values": {name: float(value) for name, value in values.items()},
            "keys": list(map(str, entry.info["keys"])),
            "rows": [[int(row), str(example.key)] for row, _, example in entry.info["members"]],
            "checkpoint": checkpoint,
            "hosts": hosts,
            "share": self._share,
            "stage": dataclasses.asdict(self._stage),
        }
        with atomic.whole(self._directory / name) as partial, partial.open("wb") as file:
            arrays = {ABOUT: np.asarray(json.dumps(about))}
            arrays |= {f"batch/{path}": leaf for path, leaf in flat(entry.batch).items()}
            np.savez(file, allow_pickle=True, **arrays)
        return self._directory / name


def format_message(entry: Entry, values: Mapping[str, float], file: Path) -> str:
    """The line about a micro-batch that was wrong.

    Args:
      entry: the micro-batch.
      values: its loss and gradient norm.
      file: where it was saved.
    """
    keys = list(map(str, entry.info["keys"]))
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return (
        f"loss {float(values['loss']):.4g}, gradient norm {float(values['gradient_norm']):.4g} at "
        f"micro-batch {entry.number}; samples {', '.join(keys[:NAMED])}{more}; see "
        f"xllm replay --file={file}"
    )


def flat(batch: Batch) -> dict[str, np.ndarray]:
    """{path: array} of a batch, such as 'media/image/values'."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def unflat(arrays: Mapping[str, np.ndarray], like: B) -> B:
    """Inverse of `flat`.

    Args:
      arrays: {path: array}.
      like: a batch of the same structure, whatever its leaves are.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    return structure.unflatten([arrays[_name(path)] for path, _ in leaves])


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
