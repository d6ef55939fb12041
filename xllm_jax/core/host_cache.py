"""Where this host keeps what it can make again: `$XDG_CACHE_HOME/xllm_jax`, else `~/.cache`."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path:
    """The folder of one kind of notes or programs; it need not be there.

    Args:
      name: of the kind, such as 'verified'.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "xllm_jax" / name
