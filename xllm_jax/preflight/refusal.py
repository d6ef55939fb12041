"""Why the TPU compiler refused a program: how much memory it wanted, and what its list blames.

Two messages are known. A program whose arrays cannot fit is refused before it is compiled, with the
total alone ('CompileTimeHbmOom'). One whose buffers could not be placed at the end comes with the
largest of them ('Largest program allocations in hbm').
"""

from __future__ import annotations

import dataclasses
import re

from xllm_jax.preflight import memory

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)B?"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What the compiler said.

    Attributes:
      total: bytes that one chip would need, arguments included.
      limit: bytes that the compiler may use of a chip; it keeps some for the runtime.
      tensors: (name, bytes) of the largest, where it lists them.
    """

    total: int
    limit: int
    tensors: tuple[tuple[str, int], ...] = ()


def read(message: str) -> Refusal | None:
    """Reads an error of compiling; None where it is about something else.

    Args:
      message: of the `JaxRuntimeError`. Its units are powers of 1024.
    """
    early = re.search(rf"temporaries \({SIZE}\) exceeds available HBM \({SIZE}\)", message)
    late = re.search(rf"Used {SIZE} of {SIZE} hbm", message)
    found = early or late
    if found is None:
        return None
    total, limit = _bytes(*found.groups()[:2]), _bytes(*found.groups()[2:])
    return Refusal(total, limit, tuple(_listed(message)))


def _listed(message: str) -> list[tuple[str, int]]:
    """The entries of 'Largest program allocations in hbm', numbered from 1."""
    _, _, behind = message.partition("Largest program allocations in hbm")
    return [(_name(entry), size) for entry, size in _entries(behind)]


def _entries(text: str) -> list[tuple[str, int]]:
    parts = re.split(rf"^\s*\d+\. Size: {SIZE}\s*$", text, flags=re.MULTILINE)
    return [
        (parts[place + 2], _bytes(parts[place], parts[place + 1]))
        for place in range(1, len(parts) - 2, 3)
    ]


def _name(entry: str) -> str:
    """'bf16[8,96,4096] llm/layers/attention', as `memory.largest_temporaries` writes it."""
    shape = re.search(r"Shape: (\w+\[[\d,]*\])", entry)
    source = re.search(r'op_name="([^"]*)"', entry)
    padding = re.search(r"\(([\d.]+)x expansion\)", entry)
    words = [shape[1] if shape else "", memory.short(source[1]) if source else ""]
    return " ".join(filter(None, [*words, f"({padding[1]} times by padding)" if padding else ""]))


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])
