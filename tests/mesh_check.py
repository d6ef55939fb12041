"""Run in a process with 8 virtual devices: losses, gradients and collectives on several meshes.

Prints one JSON line: {stage: {mesh: [loss difference, largest gradient difference]}} and the
collectives of the small LLM on 'fsdp'.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import small_stage

from configs import stage1_image, stage1_speech, stage2_image
from xllm_jax import build, train
from xllm_jax.core import mesh, rules
from xllm_jax.preflight import collectives, hlo, inputs

ROWS = 8
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 2, data 4": {"tensor": 2, "data": 4},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
SHALLOW = {
    "vit.VisionTransformer": {"depth": 1},
    "interfaces.QFormerInterface": {"depth": 2},
    "contrast.ContrastModel": {"depth": 2, "dropout": 0.0},
    "glm.ChatGLM": {"depth": 2},
    "conformer.SpeechEncoder": {"depth": 3, "pools": (1, 2), "dropout": 0.0},
}


def stages():
    """Shallow miniatures: media before an LLM, image-text pairs, speech recognition."""
    for made in (
        module.get_config("tiny") for module in (stage2_image, stage1_image, stage1_speech)
    ):
        made.unroll, made.compute = 1, "float32"
        for part in made.parts.values():
            part.fields |= SHALLOW.get(part.network, {})
        made.data = dataclasses.replace(made.data, examples=ROWS, rows=ROWS, frames=(128,))
        yield made


def fill(shapes, rng):
    """Arrays of these shapes that are a sensible batch: everything real, no padding."""

    def array(path, x):
        name = jax.tree_util.keystr(path)
        if x.dtype == jnp.float32:
            return (
                rng.normal(size=x.shape).astype(np.float32)
                if "weights" not in name
                else np.ones(x.shape, np.float32)
            )
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if name.endswith(("lengths", "lengths']")) and "token" not in name:
            return np.full(x.shape, 128, np.int32)
        if "token_lengths" in name:
            return np.full(x.shape, 4, np.int32)
        if "segments" in name or "counts" in name:
            return np.full(x.shape, 1, np.int32)
        if "index" in name and "media" in name:
            place = np.arange(x.shape[1])
            return np.broadcast_to(np.where(place < 8, place, -1), x.shape).astype(np.int32)
        return rng.integers(3, 30, x.shape).astype(np.int32)

    return jax.tree_util.tree_map_with_path(array, shapes)


def gradients(made, axes, batch):
    """Loss and gradients of the trainable half on one mesh, as NumPy."""
    count = int(np.prod(list(axes.values()))) if axes else 1
    device_mesh = mesh.make(axes, jax.devices()[:count])
    xllm = build.model(made)
    like, _, _ = train.abstract_state(made, xllm, device_mesh)
    loss, key = train.objective(made, xllm), jax.random.key(0)
    flat = rules.flatten(rules.join(like.trainable, like.frozen))
    params = {path: jax.device_put(values(path, x), x.sharding) for path, x in flat.items()}
    trainable, frozen = rules.split(made.trainable, rules.unflatten(params))

    def objective(trainable, frozen, batch):
        return loss(rules.join(trainable, frozen), batch, key)[0]

    with jax.set_mesh(device_mesh):
        found = jax.jit(jax.value_and_grad(objective))(
            trainable, frozen, mesh.to_global(device_mesh, batch)
        )
    return jax.tree.map(np.asarray, (found[0], rules.flatten(found[1])))


def values(path, x):
    """A leaf's values, the same on every mesh; scales and variances are near one."""
    rng = np.random.default_rng(len(path) * 1000 + sum(map(ord, path)))
    drawn = rng.normal(scale=0.05, size=x.shape).astype(np.float32)
    return drawn + 1 if path.endswith(("scale", "variance", "temperature")) else drawn


def difference(one, other):
    """(relative difference of losses, largest difference of gradients over their largest)."""
    top = max(np.abs(leaf).max() for leaf in one[1].values())
    far = max(np.abs(one[1][path] - other[1][path]).max() for path in one[1])
    return [float(abs(one[0] - other[0]) / abs(one[0])), float(far / top)]


def compiled_collectives(axes):
    """[kind, shape, times, in loop] of every collective of the small LLM's real step."""
    made = small_stage.stage(mesh=axes)
    device_mesh = mesh.make(axes)
    xllm = build.model(made)
    like, optimizer, _ = train.abstract_state(made, xllm, device_mesh)
    batch = inputs.sharded(made.data, device_mesh)
    made.unroll = 1
    xllm = build.model(made)
    with jax.set_mesh(device_mesh):
        compiled = train.jitted(made, xllm, optimizer, like).lower(like, batch).compile()
    found = collectives.find(hlo.parse(compiled.as_text()), 8)
    return [[one.kind, one.shape, one.times, one.in_loop] for one in found]


def main():
    jax.config.update("jax_default_matmul_precision", "highest")
    result = {}
    for made in stages():
        batch = fill(inputs.shapes(made.data), np.random.default_rng(0))
        alone = gradients(made, {}, batch)
        chosen = MESHES if made.name == "stage2_image" else dict(list(MESHES.items())[-1:])
        result[made.name] = {
            name: difference(alone, gradients(made, axes, batch)) for name, axes in chosen.items()
        }
    result["collectives"] = compiled_collectives({"fsdp": 8})
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
