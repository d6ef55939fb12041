"""Which checkpoints of a run are kept, and what to say about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from xllm_jax.core.stage_record import metric_names


def options(keep: int, metric: str, lowest: bool) -> ocp.CheckpointManagerOptions:
    """Orbax's: asynchronous saves; the last ones stay, and the best one where there is a metric.

    Args:
      keep: how many of the last.
      metric, lowest: as of `checkpoint.Checkpoints`.
    """
    best = policy.BestN(
        get_metric_fn=value_of(metric, lowest),
        reverse=lowest,  # orbax sorts ascending and keeps the end of the list
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    policies = [policy.LatestN(keep), best] if metric else [policy.LatestN(keep)]
    return ocp.CheckpointManagerOptions(
        create=True,
        enable_async_checkpointing=True,
        preservation_policy=policy.AnyPreservationPolicy(policies),
        best_fn=value_of(metric, lowest) if metric else None,  # else no metric reaches the disk
    )


def value_of(metric: str, lowest: bool) -> Callable[[Mapping[str, float]], float]:
    """The metric of a checkpoint; the worst one where it has none, or it is NaN."""
    worst = math.inf if lowest else -math.inf

    def value(found: Mapping[str, float]) -> float:
        names = [name for name in metric_names(metric) if name in found]
        known = float(found[names[0]]) if names else worst
        return worst if math.isnan(known) else known

    return value


def sentence(workdir: str | Path) -> str:
    """Says from where the same command continues a run, in a sentence."""
    found = steps(workdir)
    if not found:
        return "No checkpoint is written yet"
    return f"Checkpoint {max(found)} is whole, from which the same command continues"


def steps(workdir: str | Path) -> list[int]:
    """Numbers of the checkpoints of a run's folder, in any order."""
    folders = (Path(workdir) / "checkpoints").glob("*")
    return [int(folder.name) for folder in folders if folder.name.isdecimal()]
