"""What a row of a table says of a kernel: which of its axes are inputs and which are outputs."""

from __future__ import annotations

import dataclasses
import re

from xllm_jax.convert import Row
from xllm_jax.models import quantized

KERNEL = f"/{quantized.KERNEL}"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A row of a table that fills a kernel from a matrix `[outputs, inputs]`.

    Attributes:
      row: of the table.
      left: its outputs and inputs in the source, such as '(h c k)' and 'd'.
      right: its inputs and outputs in our kernel, such as 'd' and 'c h k'.
    """

    row: Row
    left: tuple[str, str]
    right: tuple[str, str]

    @property
    def place(self) -> str:
        """Path of the layer that holds the kernel."""
        return self.row.target.removesuffix(KERNEL)

    @property
    def module(self) -> str:
        """Name of the published layer, `{layer}` in it."""
        return self.row.source.removesuffix(".weight")

    @property
    def layers(self) -> int:
        """How many axes of the kernel stack layers."""
        return int(self.row.layers is not None)

    @property
    def inputs(self) -> int:
        """How many axes of the kernel are inputs."""
        return len(_tokens(self.right[0]))


def _tokens(side: str) -> list[str]:
    """Axes of one side of a pattern; axes in brackets are one."""
    return re.findall(r"\([^)]*\)|\S+", side)


def matrix(row: Row) -> Matrix | None:
    """What a row says of a kernel; None where it fills something else, such as a convolution's."""
    if not row.target.endswith(KERNEL) or "->" not in row.pattern:
        return None
    left, right = (_tokens(side) for side in row.pattern.split("->"))
    if len(left) != 2:
        return None
    names = set(re.findall(r"\w+", left[1]))
    first = [token for token in right if names & set(re.findall(r"\w+", token))]
    if right[: len(first)] != first:
        return None
    sides = " ".join(first), " ".join(right[len(first) :])
    return Matrix(row, (left[0], left[1]), sides)
