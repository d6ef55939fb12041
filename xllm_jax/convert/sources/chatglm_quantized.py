"""The INT8 and INT4 releases of ChatGLM-6B: integer weights with one scale per row.

`x.weight` is int8 `[rows, columns]` beside `x.weight_scale` `[rows]`, and a weight is integer times
scale, rounded to the scale's dtype, as the release's CUDA kernels compute it. INT4 packs two signed
nibbles into a byte: the even column in the high one, the odd column in the low one (the kernels of
THUDM/chatglm-6b-int4, `quantization_kernels.c`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from xllm_jax.convert import Row
from xllm_jax.convert.files import Checkpoint, Derived, View
from xllm_jax.convert.matrix import KERNEL, matrix
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import quantized

WEIGHT, SCALE = ".weight", ".weight_scale"
KINDS = {8: quantized.KINDS["int8"], 4: quantized.KINDS["int4_channel"]}
INNER = "mlp.dense_4h_to_h.weight"
LIMITS = {8: 127, 4: 7}
BLOCK = 512  # rows at a time on the way back, for which several float32 copies are made


def view(
    checkpoint: Checkpoint, width: int, hidden: int, kept: frozenset[str] = frozenset()
) -> Mapping:
    """A quantized checkpoint under the names and shapes of the ordinary release.

    Each weight is dequantized when it is read; the scales have no entry of their own. A checkpoint
    without scales is returned as it is.

    Args:
      checkpoint: the opened files.
      width: the model's width, the columns of every weight but one.
      hidden: the feed-forward's inner width, the columns of `mlp.dense_4h_to_h`.
      kept: weights that stay as they are, as their scales do.

    Raises:
      UserError: a scale without its weight, a weight of another dtype or shape; reading raises it
        for scales that are not finite.
    """
    derived = {}
    for scale in filter(lambda name: name.endswith(SCALE), checkpoint):
        name = scale.removesuffix(SCALE) + WEIGHT
        columns = _columns(name, width, hidden)
        rows, dtype = _check(checkpoint, name, scale, columns)
        if name in kept:
            continue
        make = functools.partial(_dequantize, checkpoint.where(scale), columns)
        derived[name] = Derived((name, scale), (rows, columns), dtype, make)
    return View(checkpoint, derived) if derived else checkpoint


def packed_rows(table: Iterable[Row], bits: Mapping[str, int]) -> tuple[Row, ...] | None:
    """The table with the layers' kernels as packed ones (`models/quantized.py`).

    Two codes share a byte as ours do, so that integers stay as they are.

    Args:
      table: of the ordinary release.
      bits: {weight: 8 or 4} of those that are quantized.

    Returns:
      the table; None unless every layer's kernels have as many bits.
    """
    made, counts = [], set()
    for row in table:
        one = matrix(row)
        if one is None:
            made.append(row)
            continue
        counts |= {bits.get(name, 0) for name in row.names()}
        leaf = f"{KERNEL}_int{max(counts)}"
        ones, names = " ".join(["1"] * one.inputs), set(re.findall(r"\w+", one.left[0]))
        scale = dataclasses.replace(
            row,
            source=row.source.removesuffix(WEIGHT) + SCALE,
            target=f"{one.place}/{quantized.SCALE}",
            pattern=f"{one.left[0]} -> {ones} {one.right[1]}",
            sizes=tuple(size for size in row.sizes if size[0] in names),
        )
        made += [dataclasses.replace(row, target=one.place + leaf), scale]
    return tuple(made) if counts in ({8}, {4}) else None


def integers(table: Iterable[Row]) -> frozenset[str]:
    """Names of the integer tensors of `packed_rows`."""
    rows = [row for row in table if quantized.is_packed(row.target)]
    return frozenset(name for row in rows for name in row.names() if name.endswith(WEIGHT))


def packed_shapes(
    table: Iterable[Row], bits: Mapping[str, int], plain: Mapping[str, Any]
) -> dict[str, Any]:
    """Shapes of the parameters that `packed_rows` fills.

    Args:
      table, bits: as of `packed_rows`.
      plain: tree of shapes with kernels.
    """
    flat = rules.flatten(plain)
    for one in filter(None, map(matrix, table)):
        kind = KINDS[bits[one.row.names()[0]]]
        found = quantized.shapes(kind, flat.pop(one.row.target).shape, one.layers, one.inputs)
        for leaf, shape in found.items():
            dtype = np.float32 if leaf == quantized.SCALE else np.int8
            flat[f"{one.place}/{leaf}"] = jax.ShapeDtypeStruct(shape, dtype)
    return rules.unflatten(flat)


def _columns(name: str, width: int, hidden: int) -> int:
    return hidden if name.endswith(INNER) else width


def _check(checkpoint: Checkpoint, name: str, scale: str, columns: int) -> tuple[int, np.dtype]:
    """Rows and dtype of a dequantized weight."""
    if name not in checkpoint:
        raise UserError(
            f"the scales have no {name}", field=checkpoint.where(scale), hint="Download it again"
        )
    header, scales = checkpoint.header(name), checkpoint.header(scale)
    shape, dtype = header.shape, header.dtype
    if dtype != np.int8 or len(shape) != 2:
        raise UserError(
            f"is {dtype} with {len(shape)} axes beside scales, not an int8 matrix",
            field=checkpoint.where(name),
            hint="Give an INT4 or INT8 release of ChatGLM-6B",
        )
    if scales.shape != shape[:1] or shape[1] not in (columns, columns // 2):
        raise UserError(
            f"shape {shape} with {scales.shape} scales is neither INT8 nor INT4 of "
            f"{columns} columns",
            field=checkpoint.where(name),
            hint="The checkpoint is of another size; choose the size that fits it",
        )
    return shape[0], scales.dtype


def _dequantize(where: str, columns: int, tensor: np.ndarray, scale: np.ndarray) -> np.ndarray:
    if not np.isfinite(scale.astype(np.float32)).all():
        raise UserError("holds a scale that is not finite", field=where, hint="Download it again")
    integers = tensor if tensor.shape[1] == columns else unpack(tensor)
    return integers.astype(scale.dtype) * scale[:, None]


def unpack(packed: np.ndarray) -> np.ndarray:
    """Splits int8 `[rows, n]` into int8 `[rows, 2 n]` of -8 to 7, the high nibble first."""
    high, low = packed >> 4, (packed << 4) >> 4  # both shifts keep the sign
    return np.stack([high, low], axis=-1).reshape(packed.shape[0], -1)


def pack(integers: np.ndarray) -> np.ndarray:
    """The inverse of `unpack`."""
    return (integers[:, 0::2] << 4) | (integers[:, 1::2] & 15)


def bits_of(checkpoint: Checkpoint, width: int, hidden: int) -> dict[str, int]:
    """{weight: 8 or 4} of the quantized weights; empty for the ordinary release."""
    scales = [name for name in checkpoint if name.endswith(SCALE)]
    weights = sorted(name.removesuffix(SCALE) + WEIGHT for name in scales)
    return {
        name: 8 if checkpoint.header(name).shape[-1:] == (_columns(name, width, hidden),) else 4
        for name in weights
        if name in checkpoint
    }


def restore(tensors: Mapping[str, np.ndarray], bits: Mapping[str, int]) -> Mapping:
    """Puts dequantized weights back into integers and scales, the inverse of `view`.

    Args:
      tensors: a ChatGLM checkpoint under the published names, in the scales' dtype.
      bits: {weight: 8 or 4} of the weights that were quantized.

    Returns:
      the tensors, with integers and scales that are computed when they are read. Reading raises
      UserError for a weight that did not come from that many bits; it names the weight.
    """
    derived = {}
    for name, count in bits.items():
        header = getattr(tensors, "header", tensors.__getitem__)(name)  # an array has both, too
        (rows, columns), last = header.shape, _Last(name, count)
        packed = (rows, columns * count // 8)
        derived[name] = Derived((name,), packed, np.dtype(np.int8), last.integers)
        scale = name.removesuffix(WEIGHT) + SCALE
        derived[scale] = Derived((name,), (rows,), header.dtype, last.scales)
    return View(tensors, derived)


class _Last:
    """Integers and scales of one weight; what is found for the one is kept for the other."""

    def __init__(self, name: str, bits: int):
        self._name, self._bits, self._scales = name, bits, None

    def integers(self, weight: np.ndarray) -> np.ndarray:
        starts = range(0, len(weight), BLOCK)
        blocks = [
            _recover(self._name, weight[i : i + BLOCK], i, LIMITS[self._bits]) for i in starts
        ]
        integers, self._scales = (np.concatenate(parts) for parts in zip(*blocks))
        return integers if self._bits == 8 else pack(integers)

    def scales(self, weight: np.ndarray) -> np.ndarray:
        if self._scales is None:
            self.integers(weight)
        return self._scales


def _recover(
    name: str, weight: np.ndarray, start: int, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales whose rounded products are `weight` (rows from `start`), bit by bit.

    The largest integer of a row is `limit`, or somewhat less where rounding moved a tiny scale;
    the scale is then its weight divided by it, give or take a few roundings.
    """
    integers, scale = np.zeros(weight.shape, np.int8), np.zeros(len(weight), weight.dtype)
    left = np.flatnonzero(np.any(weight, axis=1))
    if not left.size:
        return integers, scale
    for largest in range(limit, limit // 2, -1):
        for step in (0, 1, -1, 2, -2):
            found, guess, made = _try_scale(weight[left], largest, step, limit)
            integers[left[found]], scale[left[found]] = made[found], guess[found]
            left = left[~found]
            if not left.size:
                return integers, scale
    raise UserError(
        f"row {start + left[0]} is no row of integers up to {limit} times one scale",
        field=name,
        hint="Only weights that nobody changed since they were integers go back into them",
    )


def _try_scale(
    weight: np.ndarray, largest: int, step: int, limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows that a scale reproduces exactly, scales, integers) for one guess of the scale."""
    exact = np.abs(weight).max(axis=1).astype(np.float32) / largest
    guess = exact.astype(weight.dtype)
    whole = np.dtype(f"i{weight.dtype.itemsize}")
    guess = (guess.view(whole) + whole.type(step)).view(weight.dtype)  # the next number up or down
    with np.errstate(divide="ignore", invalid="ignore"):
        made = np.rint(weight.astype(np.float32) / guess.astype(np.float32)[:, None])
        made = np.nan_to_num(np.clip(made, -limit, limit)).astype(np.int8)
        again = made.astype(weight.dtype) * guess[:, None]
    return (again == weight).all(axis=1), guess, made
