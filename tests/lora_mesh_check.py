"""Run in a process with 4 virtual devices: gradients of adapters on a mesh and on one device.

Prints one JSON line: {case: [loss difference, largest gradient difference]}.
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import small_stage
from mesh_check import difference, fill, gradients, values

from xllm_jax.assembly.system import System
from xllm_jax.core import mesh
from xllm_jax.core.lora_settings import Lora
from xllm_jax.data.batching import batch_format

AXES = {"fsdp": 2, "tensor": 2}
FAR = (r"llm/(embedding|layers/.*kernel.*)",)  # in the hosts' memory


def compare(**changes):
    """One case: of adapters on every kernel."""
    settings = Lora(rank=4, targets="llm/layers/.*", dora=True)
    made = small_stage.stage(trainable=(), lora=settings, unroll=1, **changes)
    system = System.build(made, mesh.make({}, jax.devices()[:1]))
    params = {path: values(path, x) for path, x in system.parameters.items()}
    batch = fill(batch_format.find(made.data).shapes(), np.random.default_rng(0), {})
    alone = gradients(made, {}, params, batch)
    made.offload = FAR
    return difference(alone, gradients(made, AXES, params, batch))


def main():
    jax.config.update("jax_default_matmul_precision", "highest")
    print(json.dumps({"bfloat16": compare()}))


if __name__ == "__main__":
    sys.exit(main())
