"""What stands in each place of a described picture: pre-trains the mini text encoder.

Words leave things open, and then the best answer is a distribution: what a UNet must know of them
while there is still much noise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import DescribedScenes
from xllm_jax.core.types import Metrics, Params
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives.answer import cross_entropy

Array = jax.Array


def loss(
    model: XLLM,
    params: Params,
    batch: DescribedScenes,
    key: Array | None = None,
    *,
    train: bool = False,
) -> tuple[Array, Metrics]:
    """Mean cross-entropy of what stands in each place.

    Args:
      model: `models.xllm.XLLM` with the parts 'text_encoder' and 'scene_head'.
      params: {part: parameters}.
      batch: words, and a scene that fulfills them.
      key, train: are not asked for here.

    Returns:
      (scalar float32, metrics `place_accuracy` and `object_accuracy`: the share of places, and of
      those where an object stands, whose likeliest class is right).
    """
    states = model.apply(params, "text_encoder", batch.ids, method="states")
    scores = model.apply(params, "scene_head", states)
    right = scores.argmax(-1) == batch.places
    there = batch.places > 0
    metrics: Metrics = {
        "place_accuracy": right.mean(dtype=jnp.float32),
        "object_accuracy": (right & there).sum() / jnp.maximum(there.sum(), 1),
    }
    return cross_entropy(scores, batch.places).mean(), metrics
