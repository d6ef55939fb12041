"""Why the TPU compiler refused a program: how much memory it wanted of one chip.

Two messages are known: of a program whose arrays cannot fit, refused before it is compiled
('CompileTimeHbmOom'), and of one whose buffers could not be placed in the end ('Used 17.50G of
15.75G hbm').
"""

from __future__ import annotations

import dataclasses
import re

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)B?"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What the compiler said.

    Attributes:
      total: bytes that one chip would need, arguments included.
      limit: bytes that the compiler may use of a chip; it keeps some for the runtime.
    """

    total: int
    limit: int


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
    return Refusal(_bytes(*found.groups()[:2]), _bytes(*found.groups()[2:]))


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])
