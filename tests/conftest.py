"""Shared fixtures. Matrix products run in true float32, since recordings need the last digits.

Compiling programs that run for a few steps takes most of the time, so they are compiled quickly, in
processes that tests start as well.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# What a host remembers of sets, here of sets that are soon gone.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="xllm_cache_")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # before JAX reads it

import jax
import pytest

from xllm_jax.core import memory_allocator

memory_allocator.keep_freed_memory()
jax.config.update("jax_default_matmul_precision", "highest")

# Folder of the PyTorch recordings; XLLM_GOLDEN chooses another one of the same form.
GOLDEN = Path(os.environ.get("XLLM_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the PyTorch recordings."""
    return GOLDEN
