"""Output projections: hidden states at signal tokens become a caption's embeddings.

NExT-GPT (arXiv 2309.05519, section 3.2): what a diffusion model's text encoder would have said of
the caption, read off the LLM's states at the n signal tokens of a run. Several layers of the LLM
have a head each, and the heads' outputs are summed.

Letters: N runs, K layers of the LLM, n signal tokens of a run, D the LLM's width, q queries.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from xllm_jax.models import bert, layers, qformer

Array = jax.Array

LAST = -1  # the LLM's states behind its final norm


class Encoder(nn.Module):
    """One pre-norm layer over the signal tokens."""

    heads: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, None]:
        """Maps `[N, n, width]`."""
        y = layers.LayerNorm(dtype=self.dtype, name="attention_norm")(x)
        x = x + bert.Attention(self.heads, dtype=self.dtype, name="attention")(y, y, None)[0]
        return x + _feed_forward(self, x), None


class Decoder(nn.Module):
    """One pre-norm layer over the queries, which also read the signal tokens."""

    heads: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, memory: Array) -> tuple[Array, None]:
        """Maps `[N, q, width]`; `memory` is `[N, n, width]`."""
        y = layers.LayerNorm(dtype=self.dtype, name="attention_norm")(x)
        x = x + bert.Attention(self.heads, dtype=self.dtype, name="attention")(y, y, None)[0]
        y = layers.LayerNorm(dtype=self.dtype, name="cross_attention_norm")(x)
        cross = bert.Attention(self.heads, dtype=self.dtype, name="cross_attention")
        x = x + cross(y, memory, None)[0]
        return x + _feed_forward(self, x), None


def _feed_forward(layer: Encoder | Decoder, x: Array) -> Array:
    y = layers.LayerNorm(dtype=layer.dtype, name="feed_forward_norm")(x)
    activation = layers.ACTIVATIONS["relu"]
    network = layers.FeedForward(layer.hidden, activation, dtype=layer.dtype, name="feed_forward")
    return network(y)


class OutputProjection(nn.Module):
    """What all projections share; a subclass says how one head works.

    Attributes:
      llm_layers: layers of the LLM whose states are read: 0 are its input embeddings, i the states
        behind layer i, -1 those behind the final norm.
      llm_width: D.
      tokens: n; a projection that is linear or in order has a weight for each, the others take any
        number.
      queries: q, embeddings of a caption.
      width: of the head inside.
      output_width: of a caption's embedding.
      heads: of the attention inside.
      zero_queries: the learned queries start at zero, as those of NExT-GPT's second version do, and
        not at random. All q outputs are then equal at first.
    """

    llm_layers: tuple[int, ...] = (LAST,)
    llm_width: int = 4096
    tokens: int = 4
    queries: int = 77
    width: int = 512
    output_width: int = 768
    heads: int = 4
    zero_queries: bool = False
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    unroll: int = 1

    HEAD: ClassVar[type[nn.Module]]

    @nn.compact
    def __call__(self, states: Array, embeddings: Array) -> Array:
        """Projects the states of some runs.

        Args:
          states: `[N, K, n, D]`, hidden states at the signal tokens' own positions, one for each of
            `llm_layers`.
          embeddings: `[N, n, D]`, what the LLM reads there: without positions inside, they tell the
            tokens of a run apart.

        Returns:
          `[N, q, output_width]` float32.
        """
        names = ("queries", "width", "output_width", "heads", "zero_queries", "dtype", "remat")
        fields = {name: getattr(self, name) for name in (*names, "unroll")}
        made = [
            self.HEAD(**fields, name=f"head_{number}")(
                states[:, number].astype(jnp.float32) + embeddings.astype(jnp.float32)
            )
            for number in range(len(self.llm_layers))
        ]
        return functools.reduce(jnp.add, made).astype(jnp.float32)

    def example(self) -> tuple[Array, Array]:
        """Arguments for `init`."""
        shape = (1, len(self.llm_layers), self.tokens, self.llm_width)
        return jnp.zeros(shape), jnp.zeros((1, self.tokens, self.llm_width))


class Head(nn.Module):
    """Fields of the heads, see `OutputProjection`."""

    queries: int
    width: int
    output_width: int
    heads: int
    zero_queries: bool
    dtype: DTypeLike
    remat: str
    unroll: int

    def inputs(self, x: Array) -> Array:
        """`[N, n, D]` to `[N, n, width]`."""
        return layers.Dense(self.width, dtype=self.dtype, name="inputs")(x)

    def learned_queries(self) -> Array:
        """`[q, width]` in the compute dtype."""
        zeros, normal = nn.initializers.zeros_init(), nn.initializers.normal(1.0)
        shape = (self.queries, self.width)
        drawn = self.param("queries", zeros if self.zero_queries else normal, shape, jnp.float32)
        return drawn.astype(self.dtype)

    def outputs(self, x: Array) -> Array:
        """`[N, q, width]` to `[N, q, output_width]`."""
        return layers.Dense(self.output_width, dtype=self.dtype, name="outputs")(x)

    def mixed(self, x: Array, initial: nn.initializers.Initializer) -> Array:
        """The learned queries with a weighted sum of all tokens each, `[N, n, width]` to `[N, q,
        width]`."""
        mixing = self.param("mixing", initial, (x.shape[1], self.queries), jnp.float32)
        return jnp.einsum("bnd,nq->bqd", x, mixing.astype(self.dtype)) + self.learned_queries()

    def layers_of(
        self, layer: type[nn.Module], depth: int, name: str, x: Array, *memory: Array
    ) -> Array:
        """A stack of layers and its final norm."""
        options = {"remat": self.remat, "unroll": self.unroll}
        stack = layers.stack(layer, depth, broadcast=len(memory), **options)
        x, _ = stack(self.heads, 4 * self.width, self.dtype, name=name)(x, *memory)
        return layers.LayerNorm(dtype=self.dtype, name=f"{name}_norm")(x)


def in_order(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """`[n, q]`: query i + 1 takes token i alone; tokens behind the last query go to none."""
    return jnp.eye(*shape, k=1, dtype=dtype)


class TransformerHead(Head):
    """A transformer without positions: four layers read the tokens, four the queries."""

    depth: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[N, n, D]` to `[N, q, output_width]`."""
        memory = self.layers_of(Encoder, self.depth, "encoder", self.inputs(x))
        queries = jnp.broadcast_to(self.learned_queries(), (x.shape[0], self.queries, self.width))
        return self.outputs(self.layers_of(Decoder, self.depth, "decoder", queries, memory))


class InOrderHead(Head):
    """A transformer over queries that begin with the tokens, in their order.

    The first query stands for a caption's begin of text and the next for its words: where the
    signal tokens tell a caption word by word, a query need not find its own among them.
    """

    depth: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[N, n, D]` to `[N, q, output_width]`."""
        mixed = self.mixed(self.inputs(x), in_order)
        return self.outputs(self.layers_of(Encoder, self.depth, "encoder", mixed))


class LinearHead(Head):
    """Each output is a linear map of all tokens; a query is its bias."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[N, n, D]` to `[N, q, output_width]`."""
        initial = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        return self.outputs(self.mixed(self.inputs(x), initial))


class QFormerHead(Head):
    """Queries of a two-layer Q-Former, which read the tokens in both layers."""

    depth: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[N, n, D]` to `[N, q, output_width]`."""
        queries = jnp.broadcast_to(self.learned_queries(), (x.shape[0], self.queries, self.width))
        network = qformer.QFormer(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            hidden=4 * self.width,
            dropout=0.0,
            cross_attention_frequency=1,
            dtype=self.dtype,
            remat=self.remat,
            unroll=self.unroll,
            name="qformer",
        )
        return self.outputs(network(queries, self.inputs(x))[0])


class TransformerProjection(OutputProjection):
    """The paper's: an encoder-decoder transformer."""

    HEAD = TransformerHead


class InOrderProjection(OutputProjection):
    """For captions that the signal tokens tell word by word; not the paper's."""

    HEAD = InOrderHead


class LinearProjection(OutputProjection):
    """Linear maps alone."""

    HEAD = LinearHead


class QFormerProjection(OutputProjection):
    """A small Q-Former, without self-attention among the signal tokens."""

    HEAD = QFormerHead


SIZES = {
    # Beside an LLM of width 4096: for Stable Diffusion 1.x, 2.x and AudioLDM.
    "stable_diffusion_1": dict(queries=77, output_width=768),
    "stable_diffusion_2": dict(queries=77, output_width=1024),
    "audioldm": dict(queries=1, output_width=512),
    "tiny": dict(llm_width=128, queries=32, width=96, output_width=96),
}

_STACK = r"head_\d+/(en|de)coder/"
SHARDING = (
    (r"head_\d+/queries|head_\d+/mixing", P()),
    (r"head_\d+/(inputs|outputs)/kernel", P("fsdp", "tensor")),
    (_STACK + r"(cross_)?attention/(query|key|value)/kernel", P(None, "fsdp", "tensor")),
    (_STACK + r"(cross_)?attention/(query|key|value)/bias", P(None, "tensor")),
    (_STACK + r"(cross_)?attention/out/kernel", P(None, "tensor", None, "fsdp")),
    (_STACK + r"feed_forward/up/kernel", P(None, "fsdp", "tensor")),
    (_STACK + r"feed_forward/up/bias", P(None, "tensor")),
    (_STACK + r"feed_forward/down/kernel", P(None, "tensor", "fsdp")),
    *qformer.SHARDING,
    (r"head_\d+/.*(norm/(scale|bias)|(inputs|outputs|out|down)/bias)", P()),
)
