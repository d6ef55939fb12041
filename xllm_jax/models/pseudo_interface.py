"""Pseudo interfaces: linear maps that stand in for interfaces while the mini LLM is pre-trained.

An interface learns from transcription alone (paper section 3.3, stage 2), and finds embeddings that
the frozen LLM repeats. That it understands them as well does not follow: a small LLM copies along
directions that it does not read questions from. So it meets such embeddings in its pre-training:
a number of maps, each with a beginning of its own, learns beside it from repetition alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

Array = jax.Array


class PseudoInterfaces(nn.Module):
    """Linear maps of word embeddings, drawn without any likeness to the identity.

    Attributes:
      count: number of maps.
      width: of the LLM.
      gain: factor of the parameters; a larger one learns faster at the same rate.
      shift: length of what a map adds to every embedding at the beginning.
      dtype: compute dtype.
    """

    count: int = 24
    width: int = 128
    gain: float = 8.0
    shift: float = 2.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, words: Array, which: Array) -> Array:
        """What the maps make of words.

        Args:
          words: `[B, T, D]` embeddings.
          which: `[B]` int32, the map of each row.
        """
        scale = self.width**-0.5 / self.gain
        kernel = self.param(
            "kernel",
            nn.initializers.normal(scale),
            (self.count, self.width, self.width),
            jnp.float32,
        )
        bias = self.param(
            "bias", nn.initializers.normal(scale * self.shift), (self.count, self.width)
        )
        kernel, bias = (self.gain * x.astype(self.dtype)[which] for x in (kernel, bias))
        return jnp.einsum("btd,bde->bte", words, kernel) + bias[:, None]

    def example(self) -> tuple[Array, Array]:
        """Arguments for `init`."""
        return jnp.zeros((1, 2, self.width)), jnp.zeros((1,), jnp.int32)


SIZES = {"tiny": dict(count=24, width=128)}

SHARDING = ((r"kernel|bias", PartitionSpec()),)
