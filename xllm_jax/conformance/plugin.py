"""A pytest plugin: the fixture `conformance` runs the kit on a network of yours.

    def test_my_encoder(conformance):
        conformance("my_package.encoder:network")

pytest loads this file in every session of an environment with this package, so it imports nothing
but pytest. The checks run in a process of their own, which has 8 virtual devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

LINES = 40  # of what a process says that did not come to a table


@pytest.fixture
def conformance() -> Callable[..., str]:
    """A function that checks a network and returns the table.

    Its arguments are the network's name as for `xllm conformance`, or a function or class of a
    module that can be imported, and `checks`, names of the checks to run (all by default). The test
    fails with the table where a check does.
    """

    def run(network: str | Callable, checks: tuple[str, ...] = ()) -> str:
        name = network
        if not isinstance(network, str):
            name = f"{network.__module__}:{network.__qualname__}"
        command = [sys.executable, "-m", "xllm_jax.launch.commands", "conformance", name]
        command += [f"--checks={','.join(checks)}"] if checks else []
        found = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = os.environ | {"PYTHONPATH": found, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            told = done.stdout or "\n".join(done.stderr.split("\n")[-LINES:])
            pytest.fail(f"xllm conformance {name}\n{told}", pytrace=False)
        return done.stdout

    return run
