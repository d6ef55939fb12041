"""Shared fixtures. Matrix products run in true float32, since recordings need the last digits.

Compiling programs that run for a few steps takes most of the time. So they are compiled quickly,
and each one once: what one process compiled, the others of the same run of tests find in a folder,
those that tests start as well.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

# What a host remembers of sets, here of sets that are soon gone.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="xllm_cache_")
# Before JAX reads them. Workers of pytest-xdist have these variables from the process above them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if metadata.version("jaxlib").startswith("0.10."):  # newer ones have no such options
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", quick)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="xllm_compiled_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Who was killed or kept from writing leaves half a program there. The next process compiles it
# again, which is nothing to read in its output; pyproject.toml says so for this one.
os.environ["PYTHONWARNINGS"] = ",".join(
    f"ignore:Error {doing} persistent compilation cache entry" for doing in ("reading", "writing")
)

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from xllm_jax.conformance import plugin
from xllm_jax.core import memory_allocator

gc.disable()  # until tests are imported, since modules stay
memory_allocator.keep_freed_memory()
jax.config.update("jax_default_matmul_precision", "highest")

# Folder of the PyTorch recordings; XLLM_GOLDEN chooses another one of the same form.
GOLDEN = Path(os.environ.get("XLLM_GOLDEN", Path(__file__).parent / "golden"))


def pytest_configure(config):
    """Also where the package was installed before it had a plugin."""
    if not config.pluginmanager.has_plugin("xllm_conformance"):
        config.pluginmanager.register(plugin, "xllm_conformance")


def pytest_collection_finish():
    """Looks through what all tests keep, such as modules and compiled programs, less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


def pytest_unconfigure(config):
    """Removes the folders that were made above."""
    made = {"XDG_CACHE_HOME": "xllm_cache_"}
    if not hasattr(config, "workerinput"):  # who made it, when all workers are done
        made["JAX_COMPILATION_CACHE_DIR"] = "xllm_compiled_"
    for name, start in made.items():
        if Path(os.environ[name]).name.startswith(start):
            shutil.rmtree(os.environ[name], ignore_errors=True)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the PyTorch recordings."""
    return GOLDEN


@pytest.fixture
def parsed_flags():
    """Flags as a command has them that was given none."""
    before = flags.FLAGS.is_parsed()
    with flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        yield
    if not before:
        flags.FLAGS.unparse_flags()
