"""Run in a process with 8 virtual devices: networks of the output side on several meshes.

Prints one JSON line: {network: {mesh: [largest difference of outputs, of gradients' ratio]}}.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
from mesh_check import values

from xllm_jax.assembly.networks import shapes_of
from xllm_jax.core import mesh, rules
from xllm_jax.models.outputs import autoencoder, projection, unet

MESHES = {
    "fsdp 8": {"fsdp": 8},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
SMALL = dict(channels=(16, 32), depth=1, groups=4)
READING = dict(llm_width=24, queries=6, width=16, output_width=8, llm_layers=(-1, 1))
PROJECTIONS = {  # {name: network}; the paper's is the first
    "transformer": projection.TransformerProjection(**READING),
    "in order": projection.InOrderProjection(**READING),
    "linear": projection.LinearProjection(**READING),
    "q-former": projection.QFormerProjection(**READING),
}
NETWORKS = {
    "unet": (unet, unet.UNet(**SMALL, transformers=(True, True), heads=(2, 4), text_width=24)),
    "autoencoder": (autoencoder, autoencoder.Autoencoder(**SMALL)),
    **{name: (projection, network) for name, network in PROJECTIONS.items()},
}


def inputs(name: str) -> tuple[jax.Array, ...]:
    """Eight rows for a network; odd sides for the UNet."""
    keys = jax.random.split(jax.random.key(1), 3)
    if name in PROJECTIONS:
        states, embeddings = PROJECTIONS[name].example()
        return tuple(
            jax.random.normal(key, (8, *x.shape[1:])) for key, x in zip(keys, (states, embeddings))
        )
    if name == "autoencoder":
        return (jax.random.normal(keys[0], (8, 8, 12, 3)),)
    latents = jax.random.normal(keys[0], (8, 5, 6, 4))
    return latents, 999 * jax.random.uniform(keys[1], (8,)), jax.random.normal(keys[2], (8, 3, 24))


def differences(name: str) -> dict[str, list[float]]:
    """{mesh: [distance of outputs, of gradients]} from one device, relative to the largest."""
    file, network = NETWORKS[name]
    shapes = rules.flatten(shapes_of(network))
    params = rules.unflatten({path: values(path, x) for path, x in shapes.items()})
    batch = inputs(name)
    specs = rules.assign(file.SHARDING, params, what=f"{name} SHARDING", total=False)

    def run(params, batch):
        def loss(params):
            out = network.apply({"params": params}, *batch)
            return jnp.square(out).mean(), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, alone), gradients = jax.jit(run)(params, batch)
    found = {}
    for title, axes in MESHES.items():
        made = mesh.make(axes)
        with jax.set_mesh(made):
            placed = jax.device_put(params, mesh.parameter_shardings(made, specs, params))
            (_, out), others = jax.jit(run)(placed, mesh.to_global(made, batch))
        found[title] = [
            apart(alone, out),
            max(jax.tree.leaves(jax.tree.map(apart, gradients, others))),
        ]
    return found


def apart(one: jax.Array, other: jax.Array) -> float:
    """Largest difference, relative to the largest value (gradients of nothing are all rounding)."""
    one, other = np.asarray(one), np.asarray(other)
    return float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-3))


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    print(json.dumps({name: differences(name) for name in NETWORKS}))
