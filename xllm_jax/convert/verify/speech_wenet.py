"""Another toolkit's conformer layer, put together from our parts.

Its conventions differ (absolute positions, biases everywhere, a masked convolution, either norm),
so that it holds our parts to one more arrangement of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert.verify.recording import Replay
from xllm_jax.models import conformer, depthwise
from xllm_jax.models.layers import LayerNorm

Array = jax.Array
NORMS = {"feed_forward_macaron": "norm_ff_macaron", "feed_forward": "norm_ff"}
BATCH_NORM = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "variance",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """The layer's weights by the toolkit's names."""

    weights: Mapping[str, np.ndarray]
    heads: int

    def linear(self, name: str, x: Array) -> Array:
        """A linear layer, or a convolution of width 1."""
        kernel = self.weights[f"{name}.weight"]
        y = x @ kernel.reshape(kernel.shape[0], -1).T
        return y + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: Array) -> Array:
        """A layer norm."""
        params = {"scale": self.weights[f"{name}.weight"], "bias": self.weights[f"{name}.bias"]}
        return LayerNorm(1e-5).apply({"params": params}, x)

    def __call__(self, x: Array, positions: Array, valid: Array) -> Array:
        """`[B, T, D]` frames, `[T, D]` absolute positions and valid frames `[B, T]` to frames."""
        x = x + self._half("feed_forward_macaron", x)
        x = x + self._attention(self.norm("norm_mha", x), positions, valid)
        x = x + self._convolution(self.norm("norm_conv", x), valid)
        return self.norm("norm_final", x + self._half("feed_forward", x))

    def _half(self, name: str, x: Array) -> Array:
        up = jax.nn.silu(self.linear(f"{name}.w_1", self.norm(NORMS[name], x)))
        return 0.5 * self.linear(f"{name}.w_2", up)

    def _attention(self, x: Array, positions: Array, valid: Array) -> Array:
        def split(x: Array) -> Array:
            return x.reshape(*x.shape[:-1], self.heads, -1)

        names = ("linear_q", "linear_k", "linear_v")
        query, key, value = (split(self.linear(f"self_attn.{name}", x)) for name in names)
        place = split(self.linear("self_attn.linear_pos", positions))
        first, second = (self.weights[f"self_attn.pos_bias_{letter}"] for letter in "uv")
        content = jnp.einsum("bqhd,bkhd->bhqk", query + first, key)
        by_place = jnp.einsum("bqhd,khd->bhqk", query + second, place)
        scores = (content + by_place) / key.shape[-1] ** 0.5
        shares = jax.nn.softmax(jnp.where(valid[:, None, None], scores, -1e9), axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", shares, value)
        return self.linear("self_attn.linear_out", y.reshape(x.shape))

    def _convolution(self, x: Array, valid: Array) -> Array:
        inside = jnp.where(valid[..., None], x, 0)
        x = jax.nn.glu(self.linear("conv_module.pointwise_conv1", inside))
        kernel = self.weights["conv_module.depthwise_conv.weight"][:, 0].T
        x = depthwise.depthwise_by_shifts(x, kernel)
        x = x + self.weights["conv_module.depthwise_conv.bias"]
        if "conv_module.norm.running_mean" in self.weights:
            names = BATCH_NORM.items()
            params = {ours: self.weights[f"conv_module.norm.{theirs}"] for theirs, ours in names}
            x, _ = conformer.BatchNorm().apply({"params": params}, x)
        else:
            x = self.norm("conv_module.norm", x)
        x = self.linear("conv_module.pointwise_conv2", jax.nn.silu(x))
        return jnp.where(valid[..., None], x, 0)


def layer(replay: Replay, variant: str) -> None:
    """One variant of the layer: its output."""
    heads = replay.about()["sizes"]["heads"]
    weights = {k: v for k, v in replay.weights(f"{variant}/layer/").items() if v.ndim}
    positions = replay.input(f"{variant}/pos_emb")[0]
    run = jax.jit(lambda weights, *inputs: Layer(weights, heads)(*inputs))
    out = run(weights, replay.input("x"), positions, ~replay.input("pad_mask"))
    replay.compare(f"{variant}/out", out)
