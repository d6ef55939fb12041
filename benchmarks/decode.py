"""Greedy decoding of ChatGLM on one accelerator: tokens/s, and the share of the memory's bandwidth.

PYTHONPATH=. python benchmarks/decode.py [--size=real] [--batches=1,8,32] [--prompt=64]
    [--tokens=128] [--rounds=3] [--output=FILE.json]

Random weights in bfloat16, one program with its loop on the device. A token's time is that of a
whole answer less that of an answer of one token, over the tokens between. Every token reads all
weights once, and the cache as far as it goes: these bytes over the time are the bandwidth that
decoding reaches.

`--size=tiny` runs in float32 on any CPU, and fails unless every token is the best one by a forward
pass over the whole answer, without a cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.core import chips
from xllm_jax.inference import decoding
from xllm_jax.models import glm

STEP = (0, 1)  # of ChatGLM's positions
SIZES = {"real": "chatglm_6b", "tiny": "tiny"}
SPREAD = {"real": 0.02, "tiny": 0.2}  # of the weights; the miniature's tokens shall not be ties


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="real")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=64, help="tokens that are read")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that are written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="")
    found = parser.parse_args(argv)
    if found.tokens < 2 or found.prompt < 1 or found.rounds < 1:
        parser.error("--tokens is 2 or more, --prompt and --rounds are 1 or more")
    return found


def network(size: str) -> tuple[glm.ChatGLM, Any]:
    """The LLM and random weights, drawn on the device leaf by leaf."""
    dtype = jnp.float32 if size == "tiny" else jnp.bfloat16
    model = glm.ChatGLM(**glm.SIZES[SIZES[size]], dtype=dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    leaves, tree = jax.tree.flatten_with_path(shapes)
    drawn = []
    for number, (path, leaf) in enumerate(leaves):
        key, name = jax.random.key(number), jax.tree_util.keystr(path, simple=True, separator="/")
        values = SPREAD[size] * jax.random.normal(key, leaf.shape, dtype)
        drawn.append(jnp.ones(leaf.shape, dtype) if name.endswith("scale") else values)
    return model, jax.tree.unflatten(tree, drawn)


def layout(rows: int, length: int, prompt: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Segments, context `[rows, length]` and positions `[rows, length, 2]` of full rows."""
    place = jnp.arange(length)
    positions = jnp.stack(
        [jnp.minimum(place, prompt - 1), jnp.maximum(place - prompt + 1, 0)], axis=-1
    )
    ones = jnp.ones((rows, length), jnp.int32)
    return ones, ones * (place < prompt) > 0, jnp.tile(positions, (rows, 1, 1))


@functools.partial(jax.jit, static_argnames=("model", "count"))
def answer(model: glm.ChatGLM, params: Any, ids: jax.Array, count: int) -> jax.Array:
    """`count` greedy tokens for each prompt `[rows, prompt]`."""
    llm = functools.partial(model.apply, {"params": params})
    how = decoding.Decoding(ends=(-1,), pad=0, position_step=STEP, max_new_tokens=count)
    given = layout(*ids.shape, ids.shape[1])
    state = decoding.prefill(llm, llm(ids, method="embed"), *given, count)
    return decoding.decode(llm, state, how, None).tokens


def check(model: glm.ChatGLM, params: Any, ids: jax.Array, tokens: jax.Array) -> None:
    """Raises `SystemExit` where a token is not the best one by a pass over all of them."""
    llm = functools.partial(model.apply, {"params": params})
    whole = jnp.concatenate([ids, tokens], axis=1)
    states, _ = llm(llm(whole, method="embed"), *layout(*whole.shape, ids.shape[1]))
    best = llm(states[:, ids.shape[1] - 1 : -1], method="logits").argmax(-1)
    wrong = int((best != tokens).sum())
    if wrong:
        raise SystemExit(f"{wrong} of {tokens.size} tokens are not those of a pass without a cache")


def measure(choice: argparse.Namespace, model: glm.ChatGLM, params: Any, rows: int) -> dict:
    """One batch: seconds a token, tokens/s, bytes read a token."""
    rng = np.random.default_rng(rows)
    ids = jnp.asarray(rng.integers(3, model.vocab, (rows, choice.prompt)), jnp.int32)
    if choice.size == "tiny":
        check(model, params, ids, answer(model, params, ids, choice.tokens))
    best = {count: seconds(choice, model, params, ids, count) for count in (1, choice.tokens)}
    token = (best[choice.tokens] - best[1]) / (choice.tokens - 1)
    item = jnp.dtype(model.dtype).itemsize
    seen = choice.prompt + choice.tokens / 2  # of the cache, on average
    cache = 2 * model.depth * model.width * item * seen * rows
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "rows": rows,
        "first_token_seconds": best[1],
        "token_seconds": token,
        "tokens_per_second": rows / token if token > 0 else None,
        "bytes_a_token": weights + cache,
    }


def seconds(
    choice: argparse.Namespace, model: glm.ChatGLM, params: Any, ids: jax.Array, count: int
) -> float:
    """The best round of an answer."""
    jax.block_until_ready(answer(model, params, ids, count))  # compiles
    found = []
    for _ in range(choice.rounds):
        started = time.perf_counter()
        jax.block_until_ready(answer(model, params, ids, count))
        found.append(time.perf_counter() - started)
    return min(found)


def line(row: dict[str, Any], bandwidth: float) -> str:
    """A row in words."""
    if row["tokens_per_second"] is None:
        return f"{row['rows']} rows: too short to be timed; give more --tokens"
    reached = row["bytes_a_token"] / row["token_seconds"]
    share = f"{reached / bandwidth:.0%} of the bandwidth" if bandwidth else "no bandwidth is known"
    return (
        f"{row['rows']} rows: {row['tokens_per_second']:.0f} tokens/s, "
        f"{row['token_seconds'] * 1e3:.2f} ms a token, first token after "
        f"{row['first_token_seconds'] * 1e3:.1f} ms, {reached / 1e9:.1f} GB/s ({share})"
    )


def main(argv: list[str] | None = None) -> None:
    """Prints a line a batch."""
    choice = options(argv)
    device = jax.devices()[0]
    chip = chips.chip_of(device.device_kind)
    model, params = network(choice.size)
    print(f"{device.device_kind}, jax {jax.__version__}, ChatGLM {SIZES[choice.size]}")
    rows = []
    for batch in map(int, choice.batches.split(",")):
        rows.append(measure(choice, model, params, batch))
        print(line(rows[-1], chip.bandwidth if chip else 0.0), flush=True)
    if choice.output:
        record = {"device": device.device_kind, "version": jax.__version__, "rows": rows}
        Path(choice.output).write_text(json.dumps(record | {"choice": vars(choice)}, indent=1))


if __name__ == "__main__":
    main()
