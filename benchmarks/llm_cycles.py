"""What the TPU compiler expects of the frozen ChatGLM-6B, forward and back to its input.

    PYTHONPATH=. python benchmarks/llm_cycles.py [--topology=v5e:4x4] [--rows=8,16,32] \
        [--tokens=128]

The layers are compiled as a stage has them, frozen, in bfloat16, their parameters split over a
slice, for chips that need not be there (`pip install -e '.[preflight]'`). A line tells cycles a
layer, and the share of the peak on needed FLOPs: those of the products, once forward and once back.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from xllm_jax.configs import networks
from xllm_jax.core import mesh, rules
from xllm_jax.core.types import Params
from xllm_jax.models import glm
from xllm_jax.preflight import cycles, hlo, targets


def measure(topology: str, rows: int, tokens: int) -> tuple[float, float]:
    """(million cycles a layer, share of the chip's peak).

    Args:
      topology: of the slice.
      rows: of each chip.
      tokens: of a row.
    """
    net = glm.ChatGLM(**glm.SIZES["chatglm_6b"], dtype=jnp.bfloat16)
    target = targets.parse(topology)
    chips = list(targets.devices(target))
    slice_ = mesh.make({"fsdp": len(chips)}, chips)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *net.example())["params"]
    places = mesh.parameter_shardings(slice_, rules.assign(glm.SHARDING, shapes), shapes)
    batch = NamedSharding(slice_, mesh.batch_spec())

    def like(shape: tuple[int, ...], place: NamedSharding, kind: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    def loss(x: jax.Array, params: Params, *places: jax.Array) -> jax.Array:
        states = net.apply({"params": params}, x, *places)[0]
        return jnp.square(states.astype(jnp.float32)).sum()

    shape = (rows * len(chips), tokens)
    given = (
        like((*shape, net.width), batch, jnp.bfloat16),
        jax.tree.map(lambda leaf, place: like(leaf.shape, place, jnp.bfloat16), shapes, places),
        like(shape, batch, jnp.int32),
        like(shape, batch, jnp.bool_),
        like((*shape, net.position_axes), batch, jnp.int32),
    )
    with jax.set_mesh(slice_):
        compiled = jax.jit(jax.grad(loss)).lower(*given).compile(networks.whole_products()["tpu"])
    found = cycles.count(hlo.parse(compiled.as_text()))
    if found is None:
        raise SystemExit(f"{topology} states no cycles")
    products = 4 * net.width + 2 * net.hidden + 2 * tokens
    needed = 2 * 2 * rows * tokens * products * net.width
    spent = found.core / net.depth
    return spent / 1e6, needed / (spent / target.chip.clock * target.chip.flops)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rows", type=numbers, default=[8, 16, 32])
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args()
    print("| rows a chip | M cycles a layer | of peak |\n| --- | --- | --- |")
    for rows in given.rows:
        spent, share = measure(given.topology, rows, given.tokens)
        print(f"| {rows} | {spent:.1f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
