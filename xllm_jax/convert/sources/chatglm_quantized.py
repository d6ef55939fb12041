"""The INT8 and INT4 releases of ChatGLM-6B: integer weights with one scale per row.

`x.weight` is int8 `[rows, columns]` beside `x.weight_scale` `[rows]`, and a weight is integer times
scale, rounded to the scale's dtype, as the release's CUDA kernels compute it. INT4 packs two signed
nibbles into a byte: the even column in the high one, the odd column in the low one (the kernels of
THUDM/chatglm-6b-int4, `quantization_kernels.c`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from xllm_jax.convert.files import Checkpoint, Derived, View
from xllm_jax.core.errors import UserError

WEIGHT, SCALE = ".weight", ".weight_scale"
INNER = "mlp.dense_4h_to_h.weight"
LIMITS = {8: 127, 4: 7}
BLOCK = 512  # rows at a time on the way back, for which several float32 copies are made


def view(checkpoint: Checkpoint, width: int, hidden: int) -> Mapping:
    """A quantized checkpoint under the names and shapes of the ordinary release.

    Each weight is dequantized when it is read; the scales have no entry of their own. A checkpoint
    without scales is returned as it is.

    Args:
      checkpoint: the opened files.
      width: the model's width, the columns of every weight but one.
      hidden: the feed-forward's inner width, the columns of `mlp.dense_4h_to_h`.

    Raises:
      UserError: a scale without its weight, a weight of another dtype or shape; reading raises it
        for scales that are not finite.
    """
    derived = {}
    for scale in filter(lambda name: name.endswith(SCALE), checkpoint):
        name = scale.removesuffix(SCALE) + WEIGHT
        columns = _columns(name, width, hidden)
        rows, dtype = _check(checkpoint, name, scale, columns)
        make = functools.partial(_dequantize, checkpoint.where(scale), columns)
        derived[name] = Derived((name, scale), (rows, columns), dtype, make)
    return View(checkpoint, derived) if derived else checkpoint


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
