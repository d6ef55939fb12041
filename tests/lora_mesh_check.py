"""Run in a process with 4 virtual devices: gradients of adapters on a mesh and on one device.

Prints one JSON line: {how the base is packed: [loss difference, largest gradient difference]}.
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


def compare(weights):
    """One case: adapters on every kernel."""
    settings = Lora(rank=4, targets="llm/layers/.*", dora=True)
    made = small_stage.stage(trainable=(), lora=settings, unroll=1)
    made.parts["llm"].weights = weights
    system = System.build(made, mesh.make({}, jax.devices()[:1]))
    params = {path: packed_values(path, x) for path, x in system.parameters.items()}
    batch = fill(batch_format.find(made.data).shapes(), np.random.default_rng(0), {})
    alone = gradients(made, {}, params, batch)
    made.offload = FAR
    return difference(alone, gradients(made, AXES, params, batch))


def packed_values(path, x):
    """Floats as for every stage, codes of any kind."""
    if np.issubdtype(x.dtype, np.floating):
        return values(path, x) / (1 if "kernel_scale" not in path else 50)
    return np.random.default_rng(len(path)).integers(0, 127, x.shape).astype(x.dtype)


def main():
    jax.config.update("jax_default_matmul_precision", "highest")
    print(json.dumps({weights: compare(weights) for weights in ("", "nf4")}))


if __name__ == "__main__":
    sys.exit(main())
