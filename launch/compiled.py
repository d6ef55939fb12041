"""Programs that one command compiled are found again by the next: JAX's persistent cache.

Compiling the real steps takes minutes, and a run that is continued, evaluated or served compiles
the same programs again. `JAX_COMPILATION_CACHE_DIR=DIR` chooses another folder, an empty one
(`JAX_COMPILATION_CACHE_DIR=`) none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
from collections.abc import MutableMapping
from pathlib import Path

from xllm_jax.core import host_cache
from xllm_jax.core.text_lines import split_lines

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MOST = 20 * 2**30  # bytes of a folder


def keep(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Says to JAX where compiled programs are kept, unless the user has.

    Args:
      environment: of this process and of those that it starts.

    Returns:
      The folder; None where the user has chosen, or where it cannot be written.
    """
    if VARIABLE in environment:
        return None
    folder = host_cache.folder("compiled") / processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that is read-only or full: nothing is kept
        return None
    if not os.access(folder, os.W_OK):
        return None
    trim(folder)
    environment[VARIABLE] = str(folder)
    if "jax" in sys.modules:  # which has looked at the environment already
        sys.modules["jax"].config.update("jax_compilation_cache_dir", str(folder))
    return folder


def processor(information: Path = Path("/proc/cpuinfo")) -> str:
    """A name for kinds of processors: a program for one kind may not run on another.

    A home may be shared by machines of several kinds.

    Args:
      information: where Linux describes the processor.
    """
    lines = []
    with contextlib.suppress(OSError):
        lines = split_lines(information.read_text("utf-8", "replace"))
    told = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()[:12]


def trim(folder: Path, most: int = MOST) -> None:
    """Removes the programs that were longest not written or read, until the rest is small enough.

    Args:
      folder: of the cache.
      most: bytes that may stay.
    """
    with contextlib.suppress(OSError):  # another process may remove the same file
        known = [(file, file.stat()) for file in folder.iterdir() if file.is_file()]
        total = sum(state.st_size for _, state in known)
        for file, state in sorted(known, key=lambda row: max(row[1].st_atime, row[1].st_mtime)):
            if total <= most:
                return
            file.unlink(missing_ok=True)
            total -= state.st_size
