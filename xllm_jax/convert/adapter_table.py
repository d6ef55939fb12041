"""One published layer's adapter as ours and back, by the row of its base's table.

A kernel's row tells how its outputs and inputs are arranged; `lora_A` has the inputs, `lora_B` and
the magnitude have the outputs. Where several kernels of ours are one published layer (GLM-4's gate
and up), all take its `lora_A`; on the way back their different ones stand side by side, in a larger
rank.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from einops import EinopsError, rearrange

from xllm_jax.convert.base_table import Matrix
from xllm_jax.core.errors import UserError
from xllm_jax.models import lora


@dataclasses.dataclass(frozen=True)
class Published:
    """The adapter of one published layer, float32.

    Attributes:
      a: `[rank, inputs]`.
      b: `[outputs, rank]`.
      scale: factor of their product.
      magnitude: `[outputs]`; None = LoRA.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    def padded(self, rank: int) -> Published:
        """The same in a larger rank: what is added is zero, and its gradients are, too."""
        more = rank - self.a.shape[0]
        a, b = np.pad(self.a, ((0, more), (0, 0))), np.pad(self.b, ((0, 0), (0, more)))
        return dataclasses.replace(self, a=a, b=b)


def _arranged(one: Matrix, tensor: np.ndarray, left: str, right: str) -> np.ndarray:
    names = set(re.findall(r"\w+", left))
    sizes = {name: length for name, length in one.row.sizes if name in names}
    return rearrange(tensor, f"{left} -> {right}", **sizes)


def _patterns(one: Matrix) -> dict[str, tuple[str, str]]:
    return {
        lora.A: (f"rank {one.left[1]}", f"{one.right[0]} rank"),
        lora.B: (f"{one.left[0]} rank", f"rank {one.right[1]}"),
        lora.MAGNITUDE: (one.left[0], one.right[1]),
    }


def ours(one: Matrix, given: Published, kernel: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Leaves of one layer's adapter.

    Args:
      one: the kernel's row.
      given: of the published layer.
      kernel: the kernel's shape in one layer, `[*inputs, *outputs]`.

    Raises:
      UserError: it is of another base, by its shapes.
    """
    tensors = {lora.A: given.a, lora.B: given.b}
    if given.magnitude is not None:
        tensors[lora.MAGNITUDE] = given.magnitude
    number, count = one.row.piece or (0, 1)
    made = {}
    for name, tensor in tensors.items():
        left, right = _patterns(one)[name]
        try:
            if name != lora.A:
                tensor = np.split(tensor, count)[number]
            made[name] = _arranged(one, tensor, left, right)
        except (EinopsError, ValueError):
            made = {}
            break
    ins, outs = kernel[: one.inputs], kernel[one.inputs :]
    wanted = {lora.A: (*ins, given.a.shape[0]), lora.B: (given.a.shape[0], *outs)}
    wanted[lora.MAGNITUDE] = outs
    if not made or any(x.shape != wanted[name] for name, x in made.items()):
        shapes = f"{given.b.shape[0]} outputs of {given.a.shape[1]} inputs"
        what = f"is of another base: it has {shapes}, and {one.row.target} is {kernel}"
        raise UserError(what, field=one.module, hint="Give the base that it was trained on")
    return made | {lora.SCALE: np.float32(given.scale)}


def published(
    pieces: Sequence[Matrix], found: Sequence[Mapping[str, np.ndarray] | None]
) -> Published:
    """The adapter of one published layer from ours.

    Args:
      pieces: the kernels that are this layer, in order.
      found: leaves of each one's adapter in one layer; None where it has none.

    Raises:
      UserError: magnitudes of some kernels of the layer only.
    """
    made = [_single(one, leaves) for one, leaves in zip(pieces, found) if leaves is not None]
    if len(pieces) == 1:
        return made[0]
    if len(made) < len(pieces):
        names = ", ".join(one.place for one, leaves in zip(pieces, found) if leaves is None)
        what = f"is one layer in PEFT, and {names} has no adapter"
        raise UserError(what, field=pieces[0].module, hint="Adapt all of it")
    shared = all(
        np.array_equal(one.a, made[0].a) and one.scale == made[0].scale for one in made[1:]
    )
    a = made[0].a if shared else np.concatenate([one.a for one in made])
    rows = [one.b * (one.scale / made[0].scale) for one in made]
    b = np.concatenate(rows) if shared else _diagonal(rows)
    magnitude = None
    if made[0].magnitude is not None:
        magnitude = np.concatenate([one.magnitude for one in made])
    return Published(a, b, made[0].scale, magnitude)


def _single(one: Matrix, leaves: Mapping[str, np.ndarray]) -> Published:
    back = {
        name: np.asarray(_arranged(one, np.float32(leaves[name]), right, left), order="C")
        for name, (left, right) in _patterns(one).items()
        if name in leaves
    }
    scale = float(leaves[lora.SCALE])
    return Published(back[lora.A], back[lora.B], scale, back.get(lora.MAGNITUDE))


def _diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Matrices along a diagonal, zeros elsewhere."""
    made = np.zeros(tuple(sum(sizes) for sizes in zip(*(x.shape for x in blocks))), np.float32)
    row = column = 0
    for block in blocks:
        made[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return made
