"""Meshes change nothing but rounding, and devices gather one layer at a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from mesh_check import MESHES
from small_stage import GLM, ROOT


@pytest.fixture(scope="module")
def found():
    """What `mesh_check.py` printed on 8 virtual devices."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {
        "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "tests/mesh_check.py"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MESHES)
def test_losses_and_gradients_equal_those_of_one_device(found, name):
    loss, gradient = found["stage2_image"][name]
    assert loss < 1e-5 and gradient < 1e-4


@pytest.mark.parametrize("stage", ["stage1_image", "stage1_speech"])
def test_stage_1_equals_one_device(found, stage):
    ((loss, gradient),) = found[stage].values()
    assert loss < 1e-5 and gradient < 1e-4


def test_no_weight_stack_is_gathered_whole(found):
    gathered = [row for row in found["collectives"] if row[0] == "all-gather"]
    stack = re.compile(rf"\w+\[{GLM['depth']},\d+,\d+.*\]")
    assert [row for row in gathered if stack.fullmatch(row[1])] == []


def test_every_layer_is_gathered_once_forward_and_once_back(found):
    width, hidden, depth = (GLM[name] for name in ("width", "hidden", "depth"))
    kernels = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
    wanted = Counter((f"f32[{rows},{columns}]", depth) for rows, columns in kernels * 2)
    rows = found["collectives"]
    gathered = [(shape, times) for kind, shape, times, loop in rows if loop and "gather" in kind]
    assert Counter(gathered) == wanted
