"""Freed memory stays with the process where XLA computes on CPU cores.

XLA's CPU client asks the C library for its buffers at every step. By default glibc returns blocks
of that size to the kernel at once, and the kernel clears their pages again at the next step: a
fifth of the CPU time of a small training run.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

# Parameters of glibc's malloc.h and their values. One arena, since a thread's own holds no blocks
# above 64 MiB; blocks of every size come from it; nothing is given back; it grows by 256 MiB.
PARAMETERS = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, -1),
    "M_TOP_PAD": (-2, 256 << 20),
}
ACCELERATORS = ("nvidiactl", "kfd", "accel0", "vfio")  # device files of NVIDIA, AMD, TPU


def computes_on_cpu(environment: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether JAX will choose the CPU, judged without starting it.

    Args:
      environment: variables of the process; `JAX_PLATFORMS` decides where it is set.
      devices: the folder of device files.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any((devices / name).exists() for name in ACCELERATORS)


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Sets `PARAMETERS` for this process; has to run before threads allocate.

    Nothing is set where an accelerator computes, where the user chose values with MALLOC_* or
    GLIBC_TUNABLES, or where the C library is not glibc. Another allocator that was preloaded, such
    as jemalloc, is not touched.

    Args:
      environment: variables of the process.

    Returns:
      Whether every parameter was accepted.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environment)
    if chosen or not computes_on_cpu(environment):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(*parameter) for parameter in PARAMETERS.values()])
