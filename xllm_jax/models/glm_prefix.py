"""A learned prefix of ChatGLM (P-Tuning v2, arXiv 2110.07602): keys and values before every prompt.

The module holds parameters alone. `ChatGLM.init_cache` takes what it returns, and generation does
so for the part named 'llm_prefix'.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from xllm_jax.models import layers

Array = jax.Array


class Prefix(nn.Module):
    """Keys and values of P virtual tokens in every layer.

    Attributes:
      length: P, number of virtual tokens.
      depth, width, heads: layers, width and heads of the LLM.
    """

    length: int
    depth: int
    width: int
    heads: int

    @nn.compact
    def __call__(self) -> Array:
        """Returns `[depth, 2, length, heads, head_dim]` float32, keys before values."""
        shape = (self.depth, 2, self.length, self.heads, self.width // self.heads)
        return self.param("states", layers.truncated_normal(), shape, jnp.float32)

    def example(self) -> tuple[()]:
        """Arguments for `init`."""
        return ()


SIZES = {
    # 128 virtual tokens are what the published training script takes.
    "chatglm_6b": dict(length=128, depth=28, width=4096, heads=32),
    "tiny": dict(length=6, depth=5, width=128, heads=4),
}

SHARDING = ((r"states", P(None, None, None, "tensor", None)),)
