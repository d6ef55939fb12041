"""Freed memory stays with the process on a CPU, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from xllm_jax.core import memory_allocator

# Page faults while a thread allocates, fills and frees 64 blocks of 100 MB, one after the other.
FAULTS = textwrap.dedent("""
    import resource, threading
    import numpy as np
    from xllm_jax.core import memory_allocator

    print(memory_allocator.keep_freed_memory())

    def work(blocks):
        for _ in range(blocks):
            np.ones(100 << 20, np.uint8)

    def faults(blocks):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        thread = threading.Thread(target=work, args=(blocks,))
        thread.start()
        thread.join()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(2)
    print(faults(64))
""")


def page_faults(**environment: str) -> tuple[bool, int]:
    """What `keep_freed_memory` returned in a fresh process, and the faults after it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    answer, count = done.stdout.split()
    return answer == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="the parameters are glibc's")
def test_blocks_are_mapped_once():
    set_here, kept = page_faults(JAX_PLATFORMS="cpu")
    set_there, returned = page_faults(JAX_PLATFORMS="cuda")
    assert (set_here, set_there) == (True, False)
    assert kept * 10 < returned


def test_values_of_the_user_stand():
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        assert not memory_allocator.keep_freed_memory({"JAX_PLATFORMS": "cpu", name: "4"})


def test_an_accelerator_is_seen_without_starting_jax(tmp_path: Path):
    assert memory_allocator.computes_on_cpu({}, tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not memory_allocator.computes_on_cpu({}, tmp_path)
    assert memory_allocator.computes_on_cpu({"JAX_PLATFORMS": "cpu"}, tmp_path)
    assert not memory_allocator.computes_on_cpu({"JAX_PLATFORMS": "tpu,cpu"}, Path("/nowhere"))
