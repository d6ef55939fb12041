"""The micro-batch of a stage as the compiler sees it, and the same update by another one."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from xllm_jax.core import mesh
from xllm_jax.core.batch import Batch
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Stage
from xllm_jax.data.batching import batch_format


def sharded(data: Data, device_mesh: Mesh | AbstractMesh) -> Batch:
    """Shapes of a micro-batch with the shardings that `core.mesh.to_global` gives.

    Raises:
      UserError: the rows do not split over the mesh.
    """
    form = batch_format.find(data)
    count = device_mesh.shape["data"] * device_mesh.shape["fsdp"]
    if form.rows % count:
        raise UserError(
            f"{form.rows} rows do not split over {count} devices",
            field=f"data.{form.rows_field}",
            hint="Choose a multiple of the data and fsdp axes' product",
        )
    sharding = NamedSharding(device_mesh, mesh.batch_spec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), form.shapes()
    )


def form(stage: Stage) -> batch_format.BatchFormat:
    """The batch format of a stage's data."""
    return batch_format.find(stage.data)


def rows(stage: Stage) -> int:
    """Rows of a stage's micro-batch."""
    return batch_format.find(stage.data).rows


def tokens(stage: Stage) -> int:
    """Positions of a stage's micro-batch: of the LLM, of transcripts, of captions or of patches."""
    form = batch_format.find(stage.data)
    return form.rows * form.row_tokens


def with_rows(stage: Stage, rows: int) -> Stage:
    """The stage with another micro-batch and the same update: accumulation takes the rest.

    Args:
      stage: whose rows times accumulation `rows` divides.
      rows: rows of the new micro-batch.
    """
    data, form = stage.data, batch_format.find(stage.data)
    update = form.rows * stage.optimizer.accumulation
    changed = {"examples": data.examples * rows // form.rows, form.rows_field: rows}
    return dataclasses.replace(
        stage,
        data=dataclasses.replace(data, **changed),
        optimizer=dataclasses.replace(stage.optimizer, accumulation=update // rows),
    )
