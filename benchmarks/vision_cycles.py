"""What the TPU compiler expects of the ViT-g's forward pass, images chunk by chunk.

    PYTHONPATH=. python benchmarks/vision_cycles.py [--images=32,144,145] [--chunks=0,8]

A stack of a few layers is compiled for one chip that need not be there (`pip install -e
'.[preflight]'`); a row tells cycles a layer, and the share of the peak on needed FLOPs.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xllm_jax.models import vit
from xllm_jax.preflight import cycles, hlo, targets

LAYERS = 4


def measure(topology: str, images: int, chunk: int) -> tuple[float, float]:
    """(million cycles a layer, share of the chip's peak).

    Args:
      topology: of one chip.
      images: of a batch.
      chunk: of `vit.VisionTransformer`.
    """
    sizes = vit.SIZES["eva_vit_g"] | {"depth": LAYERS, "chunk": chunk}
    net = vit.VisionTransformer(**sizes, dtype=jnp.bfloat16)
    target = targets.parse(topology)
    chip = Mesh(np.array(targets.devices(target)[:1]), ("chip",))
    whole = NamedSharding(chip, PartitionSpec())

    def like(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)

    shapes = jax.eval_shape(net.init, jax.random.key(0), *net.example())
    params = jax.tree.map(lambda leaf: like(leaf.shape), shapes)
    side = net.image_size
    lowered = jax.jit(net.apply).lower(params, like((images, side, side, 3)))
    found = cycles.count(hlo.parse(lowered.compile().as_text()))
    if found is None:
        raise SystemExit(f"{topology} states no cycles")
    tokens = net.features_of(side)
    needed = 2 * images * tokens * (4 * net.width + 2 * net.hidden + 2 * tokens) * net.width
    spent = found.core / LAYERS
    return spent / 1e6, needed / (spent / target.chip.clock * target.chip.flops)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:1x1")
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
