"""Run in a process with 8 virtual devices: losses, gradients and collectives on several meshes.

Prints one JSON line: {'stages': {stage: {mesh: [loss difference, largest gradient difference]}},
'collectives': {mesh: [what the devices of the small LLM send each other]},
'gathered': {chunk of a ViT: [[shape, times]]}}.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import small_stage

from xllm_jax.assembly import adapters, networks
from xllm_jax.assembly.system import System
from xllm_jax.core import mesh, rules
from xllm_jax.data.batching import batch_format
from xllm_jax.models import vit
from xllm_jax.preflight import collectives, hlo, micro_batch, targets
from xllm_jax.training.trainer import Trainer, stage_loss

DEVICES = ROWS = 8
STAGES = (
    "stage1_speech",
    "stage1_image",
    "stage3_instruction",
    "stage_output_image",
    "stage_output_denoising",
)
# Their networks are those of stage 3 and their loss is its own: it trains here what they train.
WITHIN = {"stage3_instruction": ("stage2_image", "stage2_video", "stage2_speech")}
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 2, data 4": {"tensor": 2, "data": 4},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
# Of every kind of layer one or two: a pool between conformer blocks, a Q-Former layer with and one
# without cross-attention (which stage 1 leaves to the others: it runs each layer four times), a
# decoder block with a context and one without.
SHALLOW = {
    "vit.VisionTransformer": {"depth": 1, "chunk": 2},
    "interfaces.QFormerInterface": {"depth": 2},
    "blip2_pretraining.ContrastModel": {"depth": 1, "cross_attention_frequency": 1, "dropout": 0.0},
    "glm.ChatGLM": {"depth": 2},
    "conformer.SpeechEncoder": {"depth": 2, "pools": (1,), "dropout": 0.0},
    "speech_interface.SpeechInterface": {"depth": 1},
    "clip_text.ClipText": {"depth": 1},
    "asr.ASRDecoder": {"self_blocks": 1, "visual_blocks": 1, "linguistic_blocks": 0},
    "outputs.unet.UNet": {
        "channels": (16, 16),
        "transformers": (True, False),
        "heads": (2, 2),
        "depth": 1,
        "groups": 4,
    },
    "outputs.autoencoder.Autoencoder": {"channels": (8, 8), "depth": 1, "groups": 4},
}
SIDE = 8  # of the pictures that a denoising loss reads
# Every network's parameters and batches split in each way, and in all ways at once.
SPLIT = ("fsdp 8", "data 2, fsdp 2, tensor 2")
COMPARED = {stage: tuple(MESHES) if stage in WITHIN else SPLIT for stage in STAGES}
OFFLOADED = "stage3_instruction"  # also with its frozen parameters in the host's memory
# Compiling is most of the work here; none of these changes how arrays are split or moved.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):  # newer ones have no such option
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
COUNTED = {  # mesh, slices
    "fsdp 8": ({"fsdp": 8}, {}),
    "tensor 2": ({"tensor": 2}, {}),
    "data 2, fsdp 2, tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
    "data 2 over slices, fsdp 4": ({"fsdp": 4}, {"data": 2}),
}


def config(name):
    """Miniature of a config."""
    return importlib.import_module(f"xllm_jax.configs.{name}").get_config("tiny")


def stage(name):
    """Shallow miniature of a config."""
    made = config(name)
    made.trainable += tuple(path for one in WITHIN.get(name, ()) for path in config(one).trainable)
    made.unroll, made.compute = 1, "float32"
    for part in made.parts.values():
        part.fields |= SHALLOW.get(part.network, {})
    made.data = dataclasses.replace(made.data, examples=ROWS, rows=ROWS, frames=(128,))
    for signals in made.data.signals.values():
        signals.pixels = min(signals.pixels, SIDE)
    return made


def fill(shapes, rng, signals):
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
        return rng.integers(3, 30, x.shape).astype(x.dtype)

    batch = jax.tree_util.tree_map_with_path(array, shapes)
    for name, table in getattr(batch, "signals", {}).items():
        # One run behind the other, and the last of each row is padding.
        first, count, runs = signals[name].first, signals[name].count, signals[name].runs
        table.start[:] = 40 + count * np.arange(runs)
        table.weights[:, -1] = 0
        if table.shown is not None:
            table.shown[:] = table.weights
        batch.ids[:, 40 : 40 + count * runs] = np.tile(first + np.arange(count), runs)
    return batch


def compare(name):
    """{mesh: difference to one device} of one stage."""
    made = stage(name)
    shapes = networks.shapes(networks.model(made))
    params = {path: values(path, x) for path, x in rules.flatten(shapes).items()}
    batch = fill(batch_format.find(made.data).shapes(), np.random.default_rng(0), made.data.signals)
    alone = gradients(made, {}, params, batch)
    found = {
        mesh_name: difference(alone, gradients(made, MESHES[mesh_name], params, batch))
        for mesh_name in COMPARED[name]
    }
    if name == OFFLOADED:
        made.offload = (r"(vision_encoder|speech_encoder|llm)/.*",)
        axes = MESHES["data 2, fsdp 2, tensor 2"]
        found["offloaded"] = difference(alone, gradients(made, axes, params, batch))
    return found


def gradients(made, axes, params, batch):
    """Loss and gradients of the trainable half on one mesh, as NumPy."""
    device_mesh = mesh.make(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    system = System.build(made, device_mesh)
    placed = {p: jax.device_put(x, system.parameters[p].sharding) for p, x in params.items()}
    trainable, frozen = adapters.split(made, rules.unflatten(placed))
    loss, key = stage_loss(system), jax.random.key(0)

    def objective(trainable, frozen, batch):
        return loss(rules.join(trainable, frozen), batch, key)[0]

    with jax.set_mesh(device_mesh):
        found = jax.jit(jax.value_and_grad(objective), compiler_options=QUICKLY)(
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
    top = np.max([np.abs(leaf).max() for leaf in one[1].values()])  # NaN wherever there is one
    far = np.max([np.abs(one[1][path] - other[1][path]).max() for path in one[1]])
    return [float(abs(one[0] - other[0]) / abs(one[0])), float(far / top)]


def compiled_collectives(axes, slices):
    """Every collective of the small LLM's real step."""
    count = int(np.prod([*axes.values(), *slices.values()]))
    made = small_stage.stage(mesh=axes, unroll=1)
    device_mesh = mesh.make(axes, jax.devices()[:count], slices)
    trainer = Trainer(System.build(made, device_mesh))
    batch = micro_batch.sharded(made.data, device_mesh)
    with jax.set_mesh(device_mesh):
        lowered = trainer.step.lower(trainer.abstract_state, batch)
    program = hlo.parse(lowered.compile(QUICKLY).as_text())
    found = collectives.find(program, count, targets.slices_of(device_mesh, slices))
    return [dataclasses.asdict(one) for one in found]


def gathered(chunk):
    """[shape, times] of all that a ViT gathers whose kernels are split, four images a device."""
    net = vit.VisionTransformer(**vit.SIZES["tiny"] | {"depth": 2, "chunk": chunk})
    device_mesh = mesh.make({"fsdp": DEVICES})
    shapes = jax.eval_shape(net.init, jax.random.key(0), *net.example())["params"]
    places = mesh.parameter_shardings(device_mesh, rules.assign(vit.SHARDING, shapes), shapes)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
    images = jax.ShapeDtypeStruct(
        (4 * DEVICES, net.image_size, net.image_size, 3),
        jnp.float32,
        sharding=jax.sharding.NamedSharding(device_mesh, mesh.batch_spec()),
    )
    with jax.set_mesh(device_mesh):
        lowered = jax.jit(lambda params, x: net.apply({"params": params}, x)[0]).lower(
            params, images
        )
    program = hlo.parse(lowered.compile(QUICKLY).as_text())
    found = collectives.find(program, DEVICES, targets.slices_of(device_mesh, {}))
    return sorted([one.shape, one.times] for one in found if one.kind == "all-gather")


def main():
    jax.config.update("jax_default_matmul_precision", "highest")
    result = {"stages": {name: compare(name) for name in STAGES}}
    result["collectives"] = {name: compiled_collectives(*row) for name, row in COUNTED.items()}
    result["gathered"] = {chunk: gathered(chunk) for chunk in (0, 1, 2)}
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
