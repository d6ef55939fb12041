"""Run in a process with 8 virtual devices: pictures of a small decoder on several meshes.

Prints one JSON line: {mesh: [largest difference of latents, of pictures in 255ths]} from one
device, and under "sharded" the share of parameters' bytes that one device of 'fsdp 8' holds.
"""

from __future__ import annotations

import json

import jax
import numpy as np
from mesh_check import values

from xllm_jax.assembly.networks import shapes_of
from xllm_jax.core import mesh, rules
from xllm_jax.inference import decoder_base
from xllm_jax.inference.render import Renderer
from xllm_jax.models.outputs import schedulers
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.outputs.unet import UNet

MESHES = {
    "fsdp 8": ({"fsdp": 8}, 8),
    "data 2, fsdp 2, tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, 4),
    "one picture": ({"fsdp": 4, "tensor": 2}, 1),
}
SIZE, STEPS = (16, 24), 3
NETWORKS = {
    "unet": UNet((16,), (True,), (2,), depth=1, groups=4, text_width=24),
    "vae": Autoencoder((16, 16), depth=1, groups=4),
}


def renderer(params, batch, device_mesh=None) -> Renderer:
    """On one device, or with parameters split as a decoder's base has them."""
    if device_mesh is not None:
        places = {
            part: decoder_base.shardings(part, rules.flatten({part: params[part]}), device_mesh)
            for part in params
        }
        flat = rules.flatten(params)
        held = {path: at for part in places.values() for path, at in part.items()}
        params = rules.unflatten({p: jax.device_put(x, held[p]) for p, x in flat.items()})
    without = np.zeros((3, 24), np.float32)
    return Renderer(*NETWORKS.values(), params, schedulers.Ddim(), without, batch, device_mesh)


def main() -> dict:
    """All differences."""
    shapes = {name: shapes_of(network) for name, network in NETWORKS.items()}
    drawn = {path: values(path, x) for path, x in rules.flatten(shapes).items()}
    params = rules.unflatten(drawn)
    rng = np.random.default_rng(0)
    conditions = rng.normal(size=(5, 3, 24)).astype(np.float32)
    seeds = [3, 4, 3, 5, 6]
    table = schedulers.Ddim().table(STEPS)

    def made(one: Renderer) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(one.batch) % len(seeds)
        noise = one.noise([seeds[int(row)] for row in rows], SIZE)
        latents, _ = one.latents(noise, conditions[rows], table, 7.5)
        pictures = one(conditions, seeds, size=SIZE, steps=STEPS)
        return np.asarray(latents)[:1], pictures.astype(int)

    alone = made(renderer(params, 2))
    found = {}
    for name, (axes, batch) in MESHES.items():
        one = renderer(params, batch, mesh.make(axes))
        other = made(one)
        found[name] = [float(np.abs(a - b).max()) for a, b in zip(alone, other)]
        if name == "fsdp 8":
            leaves = jax.tree.leaves(one.params)
            held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
            found["sharded"] = held / sum(x.nbytes for x in leaves)
    return found


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    print(json.dumps(main()))
