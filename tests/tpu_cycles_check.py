"""The compiler's cycles of a small frozen ChatGLM on one v5e chip, and of a plain product: JSON.

Run by test_preflight_cycles.py in a process of its own: the TPU compiler reads the environment.
"""

from __future__ import annotations

import importlib.metadata
import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from xllm_jax.core import mesh
from xllm_jax.models import glm
from xllm_jax.preflight import cycles, hlo, targets


def counted(target: targets.Target) -> cycles.Cycles | None:
    """Of forward and gradient to the inputs, 4 rows of 64 tokens."""
    chip = mesh.make({}, list(targets.devices(target)[:1]))
    place = NamedSharding(chip, PartitionSpec())
    model = glm.ChatGLM(**glm.SIZES["tiny"], dtype=jnp.bfloat16)

    def value(x, params, segments, context, positions):
        y, _ = model.apply(params, x, segments, context, positions)
        return y.astype(jnp.float32).sum()

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())
    params = jax.tree.map(lambda x: shaped(x.shape, jnp.bfloat16), shapes)
    row = shaped((4, 64), jnp.int32)
    arguments = (
        shaped((4, 64, model.width), jnp.bfloat16),
        params,
        row,
        shaped((4, 64), jnp.bool_),
        shaped((4, 64, 2), jnp.int32),
    )
    with jax.set_mesh(chip):
        compiled = jax.jit(jax.grad(value)).lower(*arguments).compile()
    return cycles.count(hlo.parse(compiled.as_text() or ""))


if __name__ == "__main__":
    chip = targets.parse("v5e-1")
    found = counted(chip)
    print(
        json.dumps(
            {
                "libtpu": importlib.metadata.version("libtpu"),
                "cycles": found.core if found else 0,
                "places": found.places if found else {},
                "plain": cycles.plain(chip),
            }
        )
    )
