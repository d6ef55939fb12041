"""What stands for a search in a process of its own (`preflight/apart.py`)."""

from __future__ import annotations

import os

import jax

from xllm_jax.core.errors import UserError


def tells(stage, target, rows):
    """How the process was prepared, as a mistake of the user."""
    cache = jax.config.jax_enable_compilation_cache
    what = f"{stage.name} on {target.title}, {rows} rows, cache {cache}, {jax.default_backend()}"
    raise UserError(what, field=os.environ["TPU_SKIP_MDS_QUERY"], hint="so it is")


def dies(stage, target, rows):
    """Ends as a compiler that crashes does."""
    os._exit(7)
