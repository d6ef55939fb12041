"""Building blocks that every network here shares: dense, norm, attention, feed-forward, stacks.

Parameters are created in float32. `dtype` is the compute dtype; norms, softmax and everything that
sums over many elements run in float32 whatever the compute dtype is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from xllm_jax.core import mesh
from xllm_jax.models import gradients, lora, quantized
from xllm_jax.models.dropout import Dropout

Array = jax.Array
Initializer = Callable[..., Array]
Kernel = Literal["xla", "cudnn"]

# The least float32: added to a score it takes its place, and leaves a row without any visible key
# uniform. PyTorch's masks are added too, so such a row has their gradient.
MASKED = -3.4028234663852886e38


def truncated_normal(stddev: float = 0.02) -> Initializer:
    """Normal initializer cut at two standard deviations, as BERT and ViT use it."""
    return nn.initializers.truncated_normal(stddev)


class Dense(nn.Module):
    """Linear map over the last `inputs` axes to `features` (one or several output axes).

    The kernel keeps its axes, `[*inputs, *features]`, so that heads can be sharded by name. It may
    be packed (`models/quantized.py`), and an adapter may stand beside it (`models/lora.py`).

    Attributes:
      tensor_axis: which of `features` the mesh's 'tensor' axis splits; None = none.
    """

    features: int | Sequence[int]
    inputs: int = 1
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    tensor_axis: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., *inputs]` to `[..., *features]`."""
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        lead, axes = x.shape[: x.ndim - self.inputs], x.shape[x.ndim - self.inputs :]
        kernel, x = self._kernel((*axes, *features)), x.astype(self.dtype)
        y = quantized.product(x, kernel, self.inputs)
        if self.has_variable("params", lora.A):
            y = self._adapted(x, kernel, y)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, features, jnp.float32)
            y = y + bias.astype(self.dtype)
        if len(lead) < 2:
            return y
        return mesh.constrain_rows(
            y, None if self.tensor_axis is None else len(lead) + self.tensor_axis
        )

    def _kernel(self, shape: tuple[int, ...]) -> Array | quantized.Quantized:
        """The kernel in the compute dtype; of a stack, one layer's: the chip never holds all."""
        for codes in quantized.CODES:
            name = f"{quantized.KERNEL}_{codes}"
            if self.has_variable("params", name):
                values, scale = (
                    mesh.on_device(self.get_variable("params", n)) for n in (name, quantized.SCALE)
                )
                return quantized.Quantized(values, scale, codes, self.inputs, self.dtype)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        return mesh.on_device(kernel).astype(self.dtype)

    def _adapted(self, x: Array, kernel: Array | quantized.Quantized, y: Array) -> Array:
        """The product with what an adapter beside the kernel adds."""
        found = [name for name in lora.LEAVES if self.has_variable("params", name)]
        leaves = {name: self.get_variable("params", name) for name in found}
        drops = lora.DROPOUT in leaves and self.has_rng("dropout")
        return lora.adapted(x, kernel, y, leaves, self.make_rng("dropout") if drops else None)


class LayerNorm(nn.Module):
    """Layer normalization over the last axis, computed in float32, returned in `dtype`."""

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        y = gradients.normalized(x, self.epsilon) * scale.astype(jnp.float32)
        return (y + bias.astype(jnp.float32)).astype(self.dtype)


def attention_weights(
    query: Array, key: Array, mask: Array | None = None, scale: float | None = None
) -> Array:
    """Softmax attention probabilities in float32.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, heads, head_dim]`.
      mask: bool, broadcastable to `[batch, heads, queries, keys]`; True = visible. A row without a
        visible key becomes uniform over all keys.
      scale: factor on the scores, 1/sqrt(head_dim) when None.

    Returns:
      `[batch, heads, queries, keys]` float32.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * factor, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores += jnp.where(mask, 0.0, MASKED)
    return jax.nn.softmax(scores, axis=-1)


def attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    scale: float | None = None,
    implementation: Kernel | None = None,
) -> Array:
    """Attention output `[batch, queries, heads, head_dim]` in the dtype of `value`.

    Args:
      query, key, value, mask, scale: as in `attention_weights`.
      implementation: None for plain XLA einsums, 'cudnn' for the fused kernel of
        `jax.nn.dot_product_attention` (half precision on NVIDIA GPUs).
    """
    if implementation is not None:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, implementation=implementation
        )
    weights = attention_weights(query, key, mask, scale).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class FeedForward(nn.Module):
    """Dense, activation, dense: `[..., width]` to `[..., width]`."""

    hidden: int
    activation: Callable[[Array], Array]
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        width = x.shape[-1]
        y = Dense(self.hidden, dtype=self.dtype, tensor_axis=0, name="up")(x)
        y = self.activation(gradients.apart(y))
        y = Dropout(self.dropout)(y, train)
        return Dense(width, dtype=self.dtype, name="down")(y)


def gelu_exact(x: Array) -> Array:
    """GELU by the error function (BERT, EVA)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """GELU by the tanh formula (GLM)."""
    return jax.nn.gelu(x, approximate=True)


def gelu_quick(x: Array) -> Array:
    """GELU by one sigmoid (CLIP)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_clipped(x: Array) -> Array:
    """Exact GELU between -10 and 10."""
    return jnp.clip(gelu_exact(x), -10, 10)


ACTIVATIONS = {
    "gelu": gelu_exact,
    "gelu_python": gelu_exact,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "gelu_10": gelu_clipped,
    "quick_gelu": gelu_quick,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "hardswish": jax.nn.hard_swish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}
"""Activations by the names that transformers' `hidden_act` has for them."""


def narrow_products(primitive: object, *operands: Array, **parameters: Any) -> bool:
    """Whether an operation is a product with parameters whose result is no wider than its input.

    A feed-forward's first product makes the largest activation of a layer by a third of its work.
    """
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *operands, **parameters
    ):
        return False
    (_, summed), _ = parameters["dimension_numbers"]
    kernel = operands[1].shape
    inputs = math.prod(kernel[axis] for axis in summed)
    return math.prod(kernel) <= inputs * inputs


REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "products": narrow_products,
    "all": jax.checkpoint_policies.nothing_saveable,
}


def recomputed(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """A block that computes activations again in the backward pass instead of keeping them.

    Args:
      block: module class.
      remat: row of REMAT: 'none' keeps what autodiff keeps; 'products' keeps `narrow_products` and
        runs cheap operations, attention and widening products twice; 'all' keeps nothing but the
        block's inputs and runs the whole forward pass twice.
    """
    return block if remat == "none" else nn.remat(block, prevent_cse=False, policy=REMAT[remat])


def stack(
    block: type[nn.Module],
    length: int,
    *,
    broadcast: int,
    scanned: int = 0,
    remat: str = "none",
    unroll: int = 1,
) -> Callable[..., nn.Module]:
    """Turns a block class into a constructor of `length` scanned blocks with stacked parameters.

    Args:
      block: module whose `__call__(x, *inputs)` returns `(x, None)` or `(x, per-layer output)`.
        A static argument such as `train` belongs in the block's fields.
      length: number of layers, the leading axis of every parameter.
      broadcast: how many of the inputs after `x` every layer receives whole.
      scanned: how many inputs after those hold one entry per layer on their leading axis.
      remat: what the backward pass computes again, see `recomputed`.
      unroll: scan iterations unrolled per loop step (a CPU likes all of them).
    """
    return nn.scan(
        recomputed(block, remat),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=cast(int, (nn.broadcast,) * broadcast + (0,) * scanned),  # or a tuple
        length=length,
        unroll=unroll,
    )
