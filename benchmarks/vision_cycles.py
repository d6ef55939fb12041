"""What the TPU compiler expects of the ViT-g's forward pass, images chunk by chunk.

    PYTHONPATH=. python benchmarks/vision_cycles.py [--images=32,144,145] [--chunks=0,8]

The tower is compiled as a stage has it, frozen, its parameters split over a slice and something
behind it that trains, for chips that need not be there (`pip install -e '.[preflight]'`). A row
tells cycles a layer, and the share of the peak on needed FLOPs.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from xllm_jax.configs import networks
from xllm_jax.core import mesh, rules
from xllm_jax.core.types import Params
from xllm_jax.models import vit
from xllm_jax.preflight import cycles, hlo, targets


def measure(topology: str, images: int, chunk: int) -> tuple[float, float]:
    """(million cycles a layer, share of the chip's peak).

    Args:
      topology: of the slice.
      images: of each chip.
      chunk: of `vit.VisionTransformer`.
    """
    sizes = vit.SIZES["eva_vit_g"] | {"chunk": chunk, "remat": "products"}
    net = vit.VisionTransformer(**sizes, dtype=jnp.bfloat16)
    target = targets.parse(topology)
    chips = list(targets.devices(target))
    slice_ = mesh.make({"fsdp": len(chips)}, chips)
    side, whole = net.image_size, NamedSharding(slice_, PartitionSpec())
    shapes = jax.eval_shape(net.init, jax.random.key(0), *net.example())["params"]
    places = mesh.parameter_shardings(slice_, rules.assign(vit.SHARDING, shapes), shapes)

    def like(shape: tuple[int, ...], place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    def loss(probe: jax.Array, params: Params, x: jax.Array) -> jax.Array:
        return (net.apply({"params": params}, x)[0] @ probe).astype(jnp.float32).mean()

    rows = NamedSharding(slice_, mesh.batch_spec())
    given = (
        like((net.width,), whole),
        jax.tree.map(lambda leaf, place: like(leaf.shape, place), shapes, places),
        like((images * len(chips), side, side, 3), rows),
    )
    with jax.set_mesh(slice_):
        compiled = jax.jit(jax.grad(loss)).lower(*given).compile(networks.whole_products()["tpu"])
    found = cycles.count(hlo.parse(compiled.as_text()))
    if found is None:
        raise SystemExit(f"{topology} states no cycles")
    tokens = net.features_of(side)
    needed = 2 * images * tokens * (4 * net.width + 2 * net.hidden + 2 * tokens) * net.width
    spent = found.core / net.depth
    return spent / 1e6, needed / (spent / target.chip.clock * target.chip.flops)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--images", type=numbers, default=[32, 144, 145])
    parser.add_argument("--chunks", type=numbers, default=[0, 8])
    given = parser.parse_args()
    print("| images | chunk | M cycles a layer | of peak |\n| --- | --- | --- | --- |")
    for images in given.images:
        for chunk in given.chunks:
            spent, share = measure(given.topology, images, chunk)
            print(f"| {images} | {chunk} | {spent:.1f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
