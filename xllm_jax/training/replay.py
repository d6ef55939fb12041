"""A micro-batch that a run stopped at or skipped, computed again: see `divergence.Held.save`."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xllm_jax.assembly.system import System
from xllm_jax.core import checkpoint, mesh, rules
from xllm_jax.core.batch import Batch
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.stage_record import parse_stage
from xllm_jax.core.types import Params
from xllm_jax.data.batching import batch_format
from xllm_jax.training import divergence, nonfinite, startup
from xllm_jax.training.step import TrainState, gradient_norms, step_key
from xllm_jax.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a run wrote about one micro-batch.

    Attributes:
      step: number of the micro-batch.
      stage: of the run.
      batch: its arrays, of all hosts.
      values: the loss and the gradient norm that the run saw.
      keys: its samples.
      rows: {row: samples in it}.
      checkpoint: number of the run's checkpoint to take the parameters from; None = fresh ones.
    """

    step: int
    stage: Stage
    batch: Batch
    values: Mapping[str, float]
    keys: tuple[str, ...]
    rows: Mapping[int, tuple[str, ...]]
    checkpoint: int | None

    @property
    def exact(self) -> bool:
        """Whether the checkpoint is the very state that the micro-batch met."""
        return (self.checkpoint or 0) == self.step - 1


def read(file: str | Path) -> Recording:
    """Reads a replay file; of several hosts' files, name any: the rows of all are joined.

    Raises:
      UserError: no such file, none that a run has written, or another host's is not there.
    """
    file = Path(file)
    if not file.exists():
        known = ", ".join(sorted(path.name for path in file.parent.glob("*.npz"))) or "none"
        raise UserError("no such file", field=str(file), hint=f"There are: {known}")
    shares = _shares(file)
    abouts, parts = [about for about, _ in shares], [arrays for _, arrays in shares]
    joined = {
        name.removeprefix("batch/"): np.concatenate([part[name] for part in parts])
        if parts[0][name].ndim
        else parts[0][name]
        for name in parts[0]
    }
    rows: dict[int, tuple[str, ...]] = {}
    before = 0  # a host counts its own rows
    for about, arrays in shares:
        for row, key in about["rows"]:
            rows[before + row] = (*rows.get(before + row, ()), key)
        before += _height(arrays)
    stage = parse_stage(abouts[0]["stage"])
    # A batch of cached features has the structure of one of media; the cache may be elsewhere.
    like = batch_format.find(dataclasses.replace(stage.data, cache="")).shapes()
    return Recording(
        step=abouts[0]["step"],
        stage=stage,
        batch=divergence.unflat(joined, like),
        values=abouts[0]["values"],
        keys=tuple(key for about in abouts for key in about["keys"]),
        rows=rows,
        checkpoint=abouts[0]["checkpoint"],
    )


def _height(arrays: Mapping[str, np.ndarray]) -> int:
    """Rows of a batch."""
    return next(leaf.shape[0] for leaf in arrays.values() if leaf.ndim)


def _shares(file: Path) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """What every host wrote about the micro-batch: each part of its rows once, in order."""
    own = _arrays(file)
    count = own[0]["hosts"]
    names = [re.sub(r"host\d+\.npz$", f"host{host}.npz", file.name) for host in range(count)]
    found: dict[int, tuple[dict[str, Any], dict[str, np.ndarray]]] = {}
    for path in map(file.with_name, names):
        about, arrays = own if path == file else _arrays(path)
        if about["hosts"] != count:
            what = f"is of a run on {about['hosts']} hosts, {file.name} of one on {count}"
            raise UserError(what, field=str(path))
        found.setdefault(about["share"], (about, arrays))  # hosts may have had the same rows
    return [found[share] for share in sorted(found)]


def _arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(what a file says about its micro-batch, its arrays)."""
    try:
        with np.load(path) as stored:
            arrays = dict(stored)
    except Exception as error:  # what NumPy raises on damaged files has no bounds
        raise UserError(f"cannot be read: {error}", field=str(path)) from error
    if divergence.ABOUT not in arrays:
        raise UserError("is not the recording of a micro-batch", field=str(path))
    return json.loads(str(arrays.pop(divergence.ABOUT))), arrays


@dataclasses.dataclass(frozen=True)
class Result:
    """A micro-batch computed again.

    Attributes:
      loss: its value.
      norms: `gradient_norm` of everything and of each part.
      batch: {array of the batch: index of its first value that is no finite number}.
      parameters: the same of the parameters.
      first: the first operation that makes such a value, in words; '' = none does.
    """

    loss: float
    norms: Mapping[str, float]
    batch: Mapping[str, tuple[int, ...]]
    parameters: Mapping[str, tuple[int, ...]]
    first: str

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are numbers."""
        return bool(np.isfinite([self.loss, *self.norms.values()]).all())


def run(recording: Recording, workdir: str | Path) -> Result:
    """Computes loss and gradients of a recorded micro-batch with the run's parameters.

    On the run's mesh where there are as many devices; otherwise on as many as split the rows.

    Args:
      recording: of `read`.
      workdir: the run's folder.

    Raises:
      UserError: the checkpoint is gone, or the stage's bases are.
    """
    stage = recording.stage
    device_mesh = _mesh(recording)
    trainer = Trainer(System.build(stage, device_mesh))
    state = trainer.initial_state()
    if recording.checkpoint is not None:
        state = load(state, Path(workdir), recording.checkpoint)
    loss = trainer.loss
    key = step_key(stage.seed, recording.step - 1)

    def both(
        trainable: Params, frozen: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Params]:
        def objective(trainable: Params) -> jax.Array:
            return loss(rules.join(trainable, frozen), batch, key)[0]

        return jax.value_and_grad(objective)(trainable)

    with jax.set_mesh(device_mesh):
        batch = mesh.to_global(device_mesh, recording.batch)
        arguments = (state.trainable, state.frozen, batch, key)
        value, gradients = jax.jit(both)(*arguments)
        norms = {n: float(v) for n, v in gradient_norms(gradients).items()}
        wrong = not np.isfinite([float(value), *norms.values()]).all()
        parameters = nonfinite.values((state.trainable, state.frozen))
        inputs = nonfinite.values(batch)
        first = nonfinite.first(both, *arguments) if wrong and not (inputs or parameters) else ""
    return Result(float(value), norms, inputs, parameters, first)


def _mesh(recording: Recording) -> Mesh:
    try:
        return mesh.make(recording.stage.mesh, slices=recording.stage.slices)
    except UserError:  # a pod's batch on a workstation
        rows = _height(divergence.flat(recording.batch))
        return mesh.make({"fsdp": -1}, jax.devices()[: math.gcd(rows, jax.device_count())])


def load(state: TrainState, workdir: Path, number: int) -> TrainState:
    """The state with a checkpoint's parameters.

    Args:
      state: whose frozen parameters stay.
      workdir: the run's folder.
      number: of the checkpoint.

    Raises:
      UserError: the checkpoint is not there any more.
    """
    if not (workdir / "checkpoints" / str(number)).exists():
        raise UserError(
            f"checkpoint {number} is gone: the run has kept later ones only",
            field=str(workdir / "checkpoints"),
        )
    checkpoints = checkpoint.Checkpoints(workdir)
    state = startup.restored(checkpoints, number, state)
    checkpoints.close()
    return state


def format_message(recording: Recording, result: Result) -> Iterator[str]:
    """The result of a replay, line by line."""
    yield f"Micro-batch {recording.step} of {recording.stage.name}: {', '.join(recording.keys)}"
    if recording.checkpoint is None:
        yield "With the parameters that the run started from: it had no checkpoint yet"
    elif not recording.exact:
        yield f"With the parameters of checkpoint {recording.checkpoint}, the nearest before it"
    yield f"loss {result.loss:.6g}, in the run {recording.values['loss']:.6g}"
    for name, value in sorted(result.norms.items()):
        yield f"{name} {value:.6g}"
    for path, index in result.batch.items():
        samples = ", ".join(recording.rows.get(index[0], ())) if index else ""
        yield f"No number in batch{path} at {list(index)}: samples {samples or 'none'}"
    for path, index in result.parameters.items():
        yield f"No number in parameters{path} at {list(index)}"
    if result.first:
        yield f"First: {result.first}"
    if result.finite:
        yield "All is finite here"
