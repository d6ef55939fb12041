"""Shapes of a stage's batch, from its settings alone: no data, no tokenizer, no file."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from xllm_jax.core import batch, mesh
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Stage
from xllm_jax.data.batching import conversation
from xllm_jax.data.cached_features import Features
from xllm_jax.data.media import modalities


def shapes(data: Data) -> Any:
    """What `Pipeline` yields, as `jax.ShapeDtypeStruct`; spoken forms at their last length bucket.

    Raises:
      UserError: a form whose batch is not known here.
    """
    makers = {
        "conversation": _conversation,
        "text": _conversation,
        "transcription": _transcription,
        "pairs": _pairs,
    }
    if data.form not in makers:
        raise UserError(f"no preflight for {data.form!r}", field="data.form")
    return makers[data.form](data)


def _conversation(data: Data) -> batch.Batch:
    items = conversation.shapes(data, Features(data.cache) if data.cache else None)
    return jax.eval_shape(lambda: batch.zeros(data.rows, data.length, data.answers, items))


def _transcription(data: Data) -> dict[str, jax.ShapeDtypeStruct]:
    rows, made = data.examples, jax.ShapeDtypeStruct
    return {
        "features": made((rows, *modalities.find("speech", data).shape(data)), jnp.float32),
        "lengths": made((rows,), jnp.int32),
        "tokens": made((rows, data.characters_length), jnp.int32),
        "token_lengths": made((rows,), jnp.int32),
    }


def _pairs(data: Data) -> dict[str, jax.ShapeDtypeStruct]:
    rows, made = data.examples, jax.ShapeDtypeStruct
    return {
        "images": made((rows, *modalities.find("image", data).shape(data)), jnp.float32),
        "ids": made((rows, data.text_length), jnp.int32),
        "mask": made((rows, data.text_length), bool),
        "weights": made((rows,), jnp.float32),
    }


def sharded(data: Data, device_mesh: Any) -> Any:
    """`shapes` with the shardings that `core.mesh.to_global` gives.

    Raises:
      UserError: the rows do not split over the mesh.
    """
    count = device_mesh.shape["data"] * device_mesh.shape["fsdp"]
    rows = rows_of(data)
    if rows % count:
        raise UserError(
            f"{rows} rows do not split over {count} devices",
            field=f"data.{'rows' if packs(data) else 'examples'}",
            hint="Choose a multiple of the data and fsdp axes' product",
        )
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(device_mesh, mesh.batch_spec() if x.ndim else PartitionSpec()),
        ),
        shapes(data),
    )


def packs(data: Data) -> bool:
    """Whether several examples may share a row."""
    return data.form in ("conversation", "text")


def rows_of(data: Data) -> int:
    """Rows of a micro-batch."""
    return data.rows if packs(data) else data.examples


def tokens_of(data: Data) -> int:
    """Positions of a micro-batch: of the LLM, of transcripts, or of captions."""
    lengths = {"transcription": data.characters_length, "pairs": data.text_length}
    return rows_of(data) * lengths.get(data.form, data.length)


def with_rows(stage: Stage, rows: int) -> Stage:
    """The stage with another micro-batch and the same update: accumulation takes the rest.

    Args:
      stage: whose rows times accumulation `rows` divides.
      rows: rows of the new micro-batch.
    """
    data, old = stage.data, rows_of(stage.data)
    update = old * stage.optimizer.accumulation
    changed = {"examples": data.examples * rows // old}
    if packs(data):
        changed["rows"] = rows
    return dataclasses.replace(
        stage,
        data=dataclasses.replace(data, **changed),
        optimizer=dataclasses.replace(stage.optimizer, accumulation=update // rows),
    )
