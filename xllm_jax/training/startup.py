"""Before the first step: hosts are compared, a checkpoint is found, what trains is printed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh

from xllm_jax.assembly.system import System
from xllm_jax.core import checkpoint, checksum, fingerprint, hosts, lock, mesh, optim, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Stage
from xllm_jax.core.types import Record
from xllm_jax.data import manifest
from xllm_jax.data.media import preprocessing
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.training.step import TrainState

OLDER_AVERAGE = (
    "This run was begun when an update was the mean of its micro-batches' means. From here on it "
    "is what optimizer.averaging says; --config.optimizer.averaging=micro_batches goes on as before"
)


def open_pipeline(stage: Stage, device_mesh: Mesh, workdir: Path) -> Pipeline:
    """The data that this host reads; its bad records go to a file of its own.

    Args:
      stage: with the data.
      device_mesh: over which the hosts share a batch.
      workdir: the run's folder.
    """
    share, shares = mesh.host_share(device_mesh)
    host = jax.process_index()  # hosts with the same rows would write one file
    name = "quarantine.jsonl" if share == host else f"quarantine-{host}.jsonl"
    return Pipeline(stage.data, stage.seed, share, shares, quarantine=workdir / name)


def hold(workdir: Path) -> contextlib.AbstractContextManager[object]:
    """Keeps other processes from training in the run's folder, which is made; host 0 does.

    Args:
      workdir: the run's folder.
    """
    if jax.process_index():
        return contextlib.nullcontext()
    hint = "Wait for it, stop it, or choose another --workdir"
    return lock.Lock(workdir / lock.NAME, str(workdir), hint)


def compare(system: System, pipeline: Pipeline, store: hosts.Store | None) -> None:
    """Stops hosts that would not run the same program on the same data; does nothing with one.

    Args:
      system: of this host.
      pipeline: the data that this host reads.
      store: of the hosts; None with one.

    Raises:
      UserError: names the host, and the field, file, source or parameter that differs.
    """
    if store is None:
        return
    stage = system.stage
    hosts.agree(store, "configuration", fingerprint.configuration(stage))
    hosts.agree(store, "code", fingerprint.code())
    hosts.agree(store, "data", manifest.manifest(stage.data, pipeline.sources))
    hosts.agree(store, "parameter tree", fingerprint.tree(rules.unflatten(system.parameters)))


def share_of(position: Mapping[str, Any] | None, device_mesh: Mesh) -> dict[str, Any] | None:
    """This host's share of a saved data position: the counts of records are of all hosts."""
    if position is None:
        return None
    share, shares = mesh.host_share(device_mesh)
    counts = {
        name: position[name] // shares + (share < position[name] % shares)
        for name in ("seen", "bad")
    }
    return {**position, **counts}


def newest(checkpoints: checkpoint.Checkpoints) -> int | None:
    """Number of the newest checkpoint that is whole; damaged ones are named and set aside.

    Raises:
      UserError: there are checkpoints, but none is whole.
    """
    steps = checkpoints.steps()
    for step in reversed(steps):
        damage = checkpoints.damage(step)
        if not damage:
            return step
        what = f"Checkpoint {step} is damaged and not used ({damage})"
        aside = checkpoints.set_aside(step)
        print(f"{what}. It is now {aside}", file=sys.stderr, flush=True)
    if steps:
        raise UserError(
            "no checkpoint is whole",
            field=str(checkpoints.directory),
            hint="Bring one back from a copy, or start anew with another --workdir",
        )
    return None


def saved_arrays(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state: everything but the frozen base."""
    names = ("step", "trainable", "optimizer", "guard")
    return {name: getattr(state, name) for name in names}


def resume(
    state: TrainState,
    checkpoints: checkpoint.Checkpoints,
    base: Mapping[str, str],
    data: Data,
    store: hosts.Store | None = None,
    older: Callable[[], Mapping[str, str]] | None = None,
) -> tuple[TrainState, Record | None]:
    """Loads the newest checkpoint that is whole, if there is one.

    Args:
      state: the initial one; its frozen half stays.
      checkpoints: of the run.
      base: {part: identity of its frozen parameters}.
      data: of the stage.
      store: of the hosts; None with one.
      older: the base in the checksums of older runs, see `checksum.identity`.

    Returns:
      (state, data position or None).

    Raises:
      UserError: the checkpoint belongs to another frozen base, or media were read otherwise; names
        the part, or the setting or library.
    """
    latest = hosts.share(store, "checkpoint", lambda: newest(checkpoints))
    checkpoints.steps()  # every host takes notice of what was set aside
    if latest is None:
        return state, None
    about = checkpoints.about(latest)
    if older and any(map(checksum.is_older, about["base"].values())):
        base = older()
    for part in sorted(base.keys() | about["base"].keys()):
        if base.get(part) != about["base"].get(part):
            raise UserError(
                f"the checkpoint was trained on another {part} (frozen parameters differ)",
                field=str(checkpoints.directory),
                hint=f"Give init.{part} the base it was trained on, or choose a new --workdir",
            )
    if any(map(checksum.is_older, about["base"].values())):
        checksum.warn(f"Checkpoint {latest}")
    then, now = about.get("media", {}), manifest.media_settings(data)
    preprocessing.compare(then, now, f"at checkpoint {latest}", data.libraries)
    state = restored(checkpoints, latest, state)
    print(f"Resumes at micro-batch {latest}", flush=True)
    return state, about["data"]


def restored(checkpoints: checkpoint.Checkpoints, number: int, state: TrainState) -> TrainState:
    """The state with everything that a checkpoint holds.

    Args:
      checkpoints: of the run.
      number: of the checkpoint.
      state: an initial one; its frozen half stays.
    """
    arrays, optimizer = saved_arrays(state), state.optimizer
    if "averaging" not in checkpoints.about(number)["stage"]["optimizer"]:
        arrays["optimizer"] = optim.older(optimizer)
    found = checkpoints.restore(number, arrays)
    if arrays["optimizer"] is not optimizer:
        print(OLDER_AVERAGE, file=sys.stderr, flush=True)
        found["optimizer"] = optim.continued(found["optimizer"], optimizer)
    return TrainState(**found, frozen=state.frozen)


def describe(state: TrainState) -> None:
    """Prints what trains, leaf by leaf, and how much is frozen."""
    if jax.process_index():
        return
    print("What trains:")
    print(parameter_overview.get_parameter_overview(state.trainable, include_stats="sharding"))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(state.frozen))
    trains = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    print(f"{trains:,} parameters train, {frozen:,} are frozen", flush=True)
