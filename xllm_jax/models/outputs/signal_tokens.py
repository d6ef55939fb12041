"""Signal tokens: what the LLM says where a picture stands in its answer (arXiv 2309.05519).

They stand on spare rows of the LLM's vocabulary, which nothing else uses. Their rows of the word
embedding and of the head live here, apart from the LLM's tables, which so stay as they are: frozen,
in half precision and never copied, while these few rows train in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.core import mesh
from xllm_jax.models import layers

Array = jax.Array


class SignalTokens(nn.Module):
    """Embedding and head of all signal tokens.

    Attributes:
      registry: (modality, id of its first token, tokens of a run), from `Data.signals`.
      width: of the LLM.
      initial: 'normal' draws the rows, as NExT-GPT's released checkpoint began; 'mean' takes the
        mean of the LLM's other rows, as its second version does.
      deviation: standard deviation of drawn rows. The projection adds a token's row to the LLM's
        state there, and tells the tokens of a run apart by nothing else.
      dtype: compute dtype.
    """

    registry: tuple[tuple[str, int, int], ...]
    width: int = 4096
    initial: str = "normal"
    deviation: float = 0.02
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        normal = layers.truncated_normal(self.deviation)

        def table(name: str, count: int) -> Array:
            return self.param(name, normal, (count, self.width), jnp.float32)

        self.embeddings = {
            name: table(f"{name}_embedding", count) for name, _, count in self.registry
        }
        self.heads = {name: table(f"{name}_head", count) for name, _, count in self.registry}

    def __call__(self, words: Array, ids: Array) -> Array:
        """Puts the embeddings of signal tokens into their places.

        Args:
          words: `[..., D]`, the LLM's own embeddings.
          ids: `[...]` int32.
        """
        for name, first, count in self.registry:
            inside = (ids >= first) & (ids < first + count)
            rows = jnp.take(self.embeddings[name], jnp.clip(ids - first, 0, count - 1), axis=0)
            words = jnp.where(inside[..., None], rows.astype(words.dtype), words)
        return words

    def logits(self, scores: Array, states: Array) -> Array:
        """Puts the scores of signal tokens into their places.

        Args:
          scores: `[..., V]` float32, the LLM's own.
          states: `[..., D]`.
        """
        column = jnp.arange(scores.shape[-1])
        rows = ("data", *(None,) * (states.ndim - 1))  # as the LLM's own head has them
        states = mesh.constrain(states.astype(self.dtype), *rows)
        for name, first, count in self.registry:
            head = self.heads[name].astype(self.dtype)
            own = jnp.einsum("...d,nd->...n", states, head, preferred_element_type=jnp.float32)
            own = mesh.constrain(own, *rows)
            # Padded and chosen, not written: a device may hold a part of the vocabulary only.
            around = [(0, 0)] * (own.ndim - 1) + [(first, scores.shape[-1] - first - count)]
            inside = (column >= first) & (column < first + count)
            scores = jnp.where(inside, jnp.pad(own, around), scores)
        return scores

    def example(self) -> tuple[Array, Array]:
        """Arguments for `init`."""
        return jnp.zeros((1, 2, self.width)), jnp.zeros((1, 2), jnp.int32)


SIZES = {"chatglm_6b": dict(width=4096), "tiny": dict(width=128, deviation=0.25)}

SHARDING = ((r".*_(embedding|head)", PartitionSpec()),)
