"""Frozen kernels in 8 or 4 bits: they stay packed in memory, and a product unpacks its own.

Instead of `PATH/kernel` `[*layers, *inputs, *outputs]` stand `PATH/kernel_KIND` and
`PATH/kernel_scale` (float32). The scale has the kernel's axes; each of its input axes divides the
kernel's, and stands for as many equal blocks. A weight is code * scale:

- int8: codes -127 to 127, one scale for each output (LLM.int8's "vector-wise", arXiv 2208.07339);
- int4: codes -7 to 7, one scale for each block of 64 inputs of an output;
- int4_channel: the same with one scale for each output, as the INT4 release of ChatGLM-6B has it;
- nf4: 16 quantiles of a normal distribution, in blocks of 64 (QLoRA, arXiv 2305.14314, appendix E).

Two codes of 4 bits share a byte, neighbors along the last input axis, the first in the high half,
as ChatGLM's and bitsandbytes' files have them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from xllm_jax.core import mesh

Array = jax.Array

BLOCK = 64
KERNEL, SCALE = "kernel", "kernel_scale"

# QLoRA, appendix E: the codes that bitsandbytes uses, zero among them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
MIDDLES = tuple((low + high) / 2 for low, high in itertools.pairwise(NF4))


@dataclasses.dataclass(frozen=True)
class Kind:
    """How kernels are packed.

    Attributes:
      codes: of a code: 'int8', 'int4' or 'nf4'; the leaf is called after it.
      block: inputs that share a scale; 0 = all.
    """

    codes: str
    block: int

    @property
    def leaf(self) -> str:
        """Name of the packed leaf."""
        return f"{KERNEL}_{self.codes}"

    @property
    def dtype(self) -> DTypeLike:
        """Of the packed leaf."""
        return jnp.uint8 if self.codes == "nf4" else jnp.int8


KINDS = {
    "int8": Kind("int8", 0),
    "int4": Kind("int4", BLOCK),
    "int4_channel": Kind("int4", 0),
    "nf4": Kind("nf4", BLOCK),
}
LIMITS = {"int8": 127, "int4": 7, "nf4": 1}
CODES = tuple(LIMITS)
LEAVES = (SCALE, *(f"{KERNEL}_{codes}" for codes in CODES))


def is_packed(path: str) -> bool:
    """Whether a parameter is one of a packed kernel, by its path."""
    return path.rpartition("/")[2] in LEAVES


def shapes(
    kind: Kind, kernel: tuple[int, ...], layers: int, inputs: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the two leaves.

    Args:
      kind: of the packing.
      kernel: shape `[*layers, *inputs, *outputs]`.
      layers, inputs: how many axes of either.

    Raises:
      ValueError: 4 bits, and an odd last input axis.
    """
    last = layers + inputs - 1
    packed, scale = list(kernel), list(kernel)
    if kind.codes != "int8":
        if kernel[last] % 2:
            raise ValueError(f"an odd number of inputs, {kernel[last]}")
        packed[last] //= 2
    if kind.block:
        scale[last] //= math.gcd(kind.block, kernel[last])
    else:
        scale[layers : last + 1] = [1] * inputs
    return {kind.leaf: tuple(packed), SCALE: tuple(scale)}


def _blocks(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Shapes in which a kernel and its scale multiply: every axis parted into blocks."""
    parted = [size for n, blocks in zip(shape, scale) for size in (blocks, n // blocks)]
    return parted, [size for blocks in scale for size in (blocks, 1)]


def pack(
    kernel: Any, kind: Kind, layers: int, inputs: int, numpy: ModuleType = np
) -> dict[str, Any]:
    """A kernel as its two leaves.

    Args:
      kernel: `[*layers, *inputs, *outputs]` of floats.
      kind: of the packing.
      layers, inputs: how many axes of either.
      numpy: `numpy` or `jax.numpy`, that computes it, in float32.
    """
    wanted = shapes(kind, kernel.shape, layers, inputs)
    parted, _ = _blocks(kernel.shape, wanted[SCALE])
    apart = kernel.astype(numpy.float32).reshape(parted)
    largest = numpy.abs(apart).max(tuple(range(1, len(parted), 2)), keepdims=True)
    scale = largest / np.float32(LIMITS[kind.codes])
    relative = apart / numpy.where(scale > 0, scale, 1)
    if kind.codes == "nf4":
        codes = numpy.searchsorted(numpy.asarray(MIDDLES, numpy.float32), relative)
    else:
        codes = numpy.rint(relative)
    codes = codes.astype(kind.dtype).reshape(kernel.shape)
    if kind.codes != "int8":
        codes = _paired(codes, layers + inputs - 1, numpy)
    return {kind.leaf: codes, SCALE: scale.reshape(wanted[SCALE])}


def _paired(codes: Any, axis: int, numpy: ModuleType) -> Any:
    shape = codes.shape
    pairs = codes.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
    high, low = numpy.take(pairs, 0, axis + 1), numpy.take(pairs, 1, axis + 1)
    return (high << 4) | (low & 15)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """One layer's packed kernel, while a layer is computed.

    Attributes:
      values, scale: the leaves.
      codes: of CODES.
      inputs: how many input axes it has.
      dtype: in which it is unpacked.
    """

    values: Array
    scale: Array
    codes: str
    inputs: int
    dtype: DTypeLike

    def unpacked(self) -> Array:
        """The kernel `[*inputs, *outputs]`, computed in float32."""
        return unpack(self.values, self.scale, self.codes, self.inputs).astype(self.dtype)


def unpack(values: Array, scale: Array, codes: str, inputs: int, layers: int = 0) -> Array:
    """`[*layers, *inputs, *outputs]` float32.

    Args:
      values, scale: the leaves.
      codes: of CODES.
      inputs, layers: how many axes of either.
    """
    if codes != "int8":
        axis = layers + inputs - 1
        high = values >> 4  # keeps the sign of int8
        low = values & 15 if codes == "nf4" else (values << 4) >> 4
        shape = list(values.shape)
        shape[axis] *= 2
        values = jnp.stack([high, low], axis + 1).reshape(shape)
    exact = _quantiles(values) if codes == "nf4" else values.astype(jnp.float32)
    parted, wide = _blocks(values.shape, scale.shape)
    return (exact.reshape(parted) * scale.reshape(wide)).reshape(values.shape)


def _quantiles(codes: Array) -> Array:
    """NF4[codes] by choices between numbers, which fuse with what follows; a gather does not."""
    values: list[Array] = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        odd = (codes >> bit) & 1 > 0
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]


def product(x: Array, kernel: Array | Quantized, inputs: int) -> Array:
    """`[..., *inputs]` times `[*inputs, *outputs]`.

    The product runs on flattened matrices, which XLA's CPU backend needs to be fast, unless the
    mesh splits heads: a flattened axis would have to be gathered first. Of a packed kernel the
    backward pass keeps the packed one.

    Args:
      x, kernel: as above, of one dtype.
      inputs: how many axes are summed.
    """
    if isinstance(kernel, Quantized):
        rest = (kernel.codes, inputs, jnp.dtype(kernel.dtype))
        return _packed_product(x, kernel.values, kernel.scale, *rest)
    if mesh.tensor_parallel():
        return jnp.tensordot(x, kernel, axes=inputs)
    lead, axes = x.shape[: x.ndim - inputs], kernel.shape[:inputs]
    fan_in = math.prod(axes)
    y = x.reshape(-1, fan_in) @ kernel.reshape(fan_in, -1)
    return y.reshape(*lead, *kernel.shape[inputs:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _packed_product(
    x: Array, values: Array, scale: Array, codes: str, inputs: int, dtype: DTypeLike
) -> Array:
    return product(x, Quantized(values, scale, codes, inputs, dtype).unpacked(), inputs)


def _forward(
    x: Array, values: Array, scale: Array, codes: str, inputs: int, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    return _packed_product(x, values, scale, codes, inputs, dtype), (values, scale)


def _backward(
    codes: str, inputs: int, dtype: DTypeLike, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, np.ndarray, Array]:
    """The gradient of `x` alone: nothing of a packed kernel trains."""
    values, scale = kept
    kernel = Quantized(values, scale, codes, inputs, dtype).unpacked()
    outputs = tuple(range(inputs, kernel.ndim))
    turned = kernel.transpose(*outputs, *range(inputs))
    back = product(gradient.astype(dtype), turned, len(outputs))
    return back, np.zeros(values.shape, jax.dtypes.float0), jnp.zeros_like(scale)


_packed_product.defvjp(_forward, _backward)
