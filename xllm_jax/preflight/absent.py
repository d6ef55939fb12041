"""Compiling for chips that are not there: what JAX and the TPU compiler need to know before."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import jax


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets the TPU compiler start where there is no TPU, and beside another of its kind.

    To be called before anything is compiled. Without a chip jaxlib cannot read a program again that
    the persistent cache has kept, and says so at length: nothing is kept.

    Args:
      environment: of this process.
    """
    environment.setdefault("TPU_SKIP_MDS_QUERY", "1")
    environment.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
