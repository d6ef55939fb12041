"""A base of floats becomes one with packed kernels, layer by layer: `xllm quantize`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from xllm_jax.convert import base_table, rewrite
from xllm_jax.convert.base_table import Matrix
from xllm_jax.convert.rewrite import Layer
from xllm_jax.core import base_description, checkpoint, kernel_fingerprint
from xllm_jax.core.errors import UserError
from xllm_jax.core.streamed_leaf import Blocks
from xllm_jax.models import lora, quantized

# Kernels of the layers, as STREAMED of the networks' files; word tables and heads stay as they are.
PACKED = r"[^/]+/layers/.*/kernel"


def run(
    path: str | Path, output: str | Path, weights: str, part: str = "llm", source: str = ""
) -> tuple[int, int]:
    """Writes a base with the kernels of a part's layers packed, and everything else as it is.

    Args:
      path: folder of the base.
      output: folder to write.
      weights: of `quantized.KINDS`.
      part: whose kernels.
      source: name of the source that the base was converted from; '' finds it out.

    Returns:
      (bytes of the base before, after).

    Raises:
      UserError: it is packed already, has adapters, or has no kernels to pack.
    """
    path, kind = Path(path), quantized.KINDS[weights]
    leaves, about = checkpoint.open_leaves(path), base_description.base_about(path)
    for name in leaves:
        if quantized.is_packed(name):
            raise UserError(f"{name} is packed already", field=str(path), hint="Give floats")
        if lora.is_adapter(name):
            hint = "Write a base without: xllm adapter --action=merge"
            raise UserError("has adapters", field=str(path), hint=hint)
    known = base_table.matrices(path, _shapes(leaves), source, part)
    chosen = {name: one for name, one in known.items() if re.fullmatch(PACKED, name)}
    if not chosen:
        hint = "Only kernels of stacked layers can be packed"
        raise UserError(f"{part} has no layers to pack", field=str(path), hint=hint)
    made: dict[str, Blocks] = {}
    for name, store in leaves.items():
        if name in chosen:
            made |= packed(chosen[name], store, kind)
        else:
            made[name] = rewrite.copied(name, store)
    places = {one.place for one in chosen.values()}
    told = {
        "source": f"{weights} of {path.name}",
        "weights": {**about.get("weights", {}), part: weights},
        kernel_fingerprint.FIELD: kernel_fingerprint.of_leaves(leaves, about, places),
    }
    rewrite.write(output, path, made, told)
    before = sum(rewrite.copied(name, store).nbytes for name, store in leaves.items())
    return before, sum(leaf.nbytes for leaf in made.values())


def _shapes(leaves: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(store.shape) for name, store in leaves.items()}


def packed(one: Matrix, store: tensorstore.TensorStore, kind: quantized.Kind) -> dict[str, Blocks]:
    """The two leaves that stand for a kernel.

    Args:
      one: what the base's table says of it.
      store: of the kernel.
      kind: of the packing.

    Raises:
      UserError: an odd number of inputs, in 4 bits.
    """
    shape = tuple(store.shape)
    try:
        shapes = quantized.shapes(kind, shape, one.layers, one.inputs)
    except ValueError as error:
        what = f"{one.row.target} has {error}"
        raise UserError(what, field="--weights", hint="Take int8") from None
    dtypes = {kind.leaf: np.dtype(kind.dtype), quantized.SCALE: np.dtype(np.float32)}

    def make(leaf: str) -> Callable[[Layer], np.ndarray]:
        def layer(index: Layer) -> np.ndarray:
            kernel = np.asarray(store[index].read().result(), np.float32)
            return quantized.pack(kernel, kind, 0, one.inputs)[leaf]

        return layer

    return {
        f"{one.place}/{leaf}": rewrite.computed(
            f"{one.place}/{leaf}", shapes[leaf], dtypes[leaf], one.layers, make(leaf)
        )
        for leaf in shapes
    }
