"""Runs of several processes on this machine, each a host with one CPU device."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import forked
import small_stage

from xllm_jax.core.stage import Source, Stage, Validation

ROOT = small_stage.ROOT
SECONDS = 300  # bound on one process, far above what it takes
PRELUDE = """
import os, signal, sys
sys.path[:0] = ['tests', '.']
import jax
jax.config.update('jax_default_matmul_precision', 'highest')
import host_runs
from xllm_jax.training import loop
from xllm_jax.core import errors, hosts, watchdog
INDEX, COUNT = {index}, {count}
"""
JOIN = "hosts.join({address!r}, {count}, {index}, seconds=60)\n"
END = """
try:
    main()
except errors.UserError as error:
    print(error)
    sys.exit(2)
"""


def stage(**changes) -> Stage:
    """One layer on four short rows: what a process compiles in a few seconds."""
    made = small_stage.stage(unroll=1, stall=60.0)
    made.parts["llm"].fields |= {"depth": 1, "width": 16, "hidden": 32}
    made.data.examples, made.data.rows, made.data.length = 8, 4, 64
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def validation() -> Validation:
    """Three batches of other text, the last one of few examples, after every third step."""
    source = Source("world_text", split="val", options={"count": 50})
    return Validation({"text": source}, examples=19, every=3)


def start(count: int, code: str, folder: Path) -> list[subprocess.Popen]:
    """Starts `count` hosts that run `code`, which defines `main()`; output goes to `host-I.txt`.

    With one host nothing is joined.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    return [_start(address, count, index, code, folder) for index in range(count)]


def _start(address: str, count: int, index: int, code: str, folder: Path) -> subprocess.Popen:
    named = {"address": address, "count": count, "index": index}
    join = JOIN.format(**named) if count > 1 else ""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    with (folder / f"host-{index}.txt").open("w") as output:
        return forked.Popen(
            [sys.executable, "-u", "-c", PRELUDE.format(**named) + join + code + END],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def codes(processes: list[subprocess.Popen]) -> list[int]:
    """Exit codes, once all have ended."""
    try:
        return [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(folder: Path, count: int) -> str:
    """What all hosts printed."""
    return "\n".join((folder / f"host-{index}.txt").read_text() for index in range(count))


def instructions(path: str) -> Source:
    """A source of text conversations."""
    return Source("instructions", path)
