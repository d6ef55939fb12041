"""Attribute classification on patches and cells: pre-trains the embedded world's vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import SceneAttributes
from xllm_jax.core.types import Params
from xllm_jax.models.attribute_head import AttributeHead
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives.answer import cross_entropy

Array = jax.Array


def loss(
    model: XLLM,
    params: Params,
    batch: SceneAttributes,
    key: Array | None = None,
    *,
    train: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of all attributes over patches, plus the same over cells.

    Args:
      model: `models.xllm.XLLM` with the parts 'vision_encoder' and 'attribute_head'.
      params: {part: parameters}.
      batch: drawn scenes and their labels.
      key, train: of the encoder's drop path.

    Returns:
      (scalar, metrics `patch_accuracy` and `cell_accuracy`: every attribute right).
    """
    rngs = None if key is None else {"dropout": key}
    features, _ = model.apply(params, "vision_encoder", batch.images, None, train=train, rngs=rngs)
    patches, cells = model.apply(params, "attribute_head", features)
    classes = cast(AttributeHead, model.networks["attribute_head"]).classes
    patch_loss, patch_accuracy = classification(patches, batch.patches, classes)
    cell_loss, cell_accuracy = classification(cells, batch.cells, classes)
    metrics = {"patch_accuracy": patch_accuracy, "cell_accuracy": cell_accuracy}
    return patch_loss + cell_loss, metrics | {"cell_loss": cell_loss}


def classification(scores: Array, labels: Array, classes: Sequence[int]) -> tuple[Array, Array]:
    """Cross-entropy summed over attributes, and the share where all of them are right.

    Args:
      scores: `[..., sum(classes)]`.
      labels: `[..., attributes]` int32.
      classes: classes of each attribute.
    """
    starts = [sum(classes[:i]) for i in range(len(classes))]
    parts = [scores[..., s : s + n] for s, n in zip(starts, classes)]
    losses = [cross_entropy(part, labels[..., i]).mean() for i, part in enumerate(parts)]
    right = [part.argmax(-1) == labels[..., i] for i, part in enumerate(parts)]
    return jnp.asarray(sum(losses)), jnp.stack(right).all(0).mean(dtype=jnp.float32)
