"""Shared fixtures. Matrix products run in true float32, since recordings need the last digits."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

# Folder of the PyTorch recordings; XLLM_GOLDEN chooses another one of the same form.
GOLDEN = Path(os.environ.get("XLLM_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the PyTorch recordings."""
    return GOLDEN
