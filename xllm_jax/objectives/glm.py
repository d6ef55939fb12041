"""GLM's blank infilling (arXiv 2103.10360, section 2.1): text pre-training of the LLM.

The data side (`data/text/blank_infilling.py`) cuts the spans and writes them behind the context, so
the loss is the answer loss, and differs only in what is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import Batch
from xllm_jax.objectives import answer


def counts(batch: Batch, metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
    """As in `objectives.answer`; a perplexity is no mean."""
    return answer.counts(batch, metrics)


def loss(
    model: Any,
    params: Mapping[str, Any],
    batch: Batch,
    key: jax.Array | None = None,
    *,
    train: bool = False,
    chunk: int = 64,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log likelihood of the masked spans; adds `perplexity` to the metrics.

    Arguments and results as in `objectives.answer.loss`.
    """
    value, metrics = answer.loss(model, params, batch, key, train=train, chunk=chunk)
    return value, metrics | {"perplexity": jnp.exp(value)}
