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
    """Mean cross-entropy of all attributes over patches and over cells, plus colors' error.

    Args:
      model: `models.xllm.XLLM` with the parts 'vision_encoder' and 'attribute_head'.
      params: {part: parameters}.
      batch: drawn scenes and their labels.
      key, train: of the encoder's drop path.

    Returns:
      (scalar, metrics `patch_accuracy` and `cell_accuracy`: every attribute right; `color_error`:
      squared, of objects' patches).
    """
    rngs = None if key is None else {"dropout": key}
    features, _ = model.apply(params, "vision_encoder", batch.images, None, train=train, rngs=rngs)
    patches, cells, colors = model.apply(params, "attribute_head", features)
    head = cast(AttributeHead, model.networks["attribute_head"])
    patch_loss, patch_accuracy = classification(patches, batch.patches, head.patch_classes)
    cell_loss, cell_accuracy = classification(cells, batch.cells, head.classes)
    there = batch.patches[..., 0] > 0
    errors = jnp.square(colors.astype(jnp.float32) - batch.colors).sum(-1)
    color_error = jnp.where(there, errors, 0).sum() / jnp.maximum(there.sum(), 1)
    metrics = {"patch_accuracy": patch_accuracy, "cell_accuracy": cell_accuracy}
    metrics |= {"cell_loss": cell_loss, "color_error": color_error}
    return patch_loss + cell_loss + color_error, metrics


def classification(scores: Array, labels: Array, classes: Sequence[int]) -> tuple[Array, Array]:
    """Cross-entropy summed over attributes, and the share where all of them are right.

    Args:
      scores: `[..., sum(classes)]`.
      labels: `[..., attributes]` int32; a negative one has no loss and counts as right.
      classes: classes of each attribute.
    """
    starts = [sum(classes[:i]) for i in range(len(classes))]
    parts = [scores[..., s : s + n] for s, n in zip(starts, classes)]
    asked = [labels[..., i] >= 0 for i in range(len(classes))]
    # A target that no entry has would leave the whole of the normalizer as its loss.
    losses = [
        jnp.where(asked[i], cross_entropy(part, jnp.maximum(labels[..., i], 0)), 0).mean()
        for i, part in enumerate(parts)
    ]
    right = [(part.argmax(-1) == labels[..., i]) | ~asked[i] for i, part in enumerate(parts)]
    return jnp.asarray(sum(losses)), jnp.stack(right).all(0).mean(dtype=jnp.float32)
