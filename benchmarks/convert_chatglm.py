"""Time and peak memory of converting a full-size ChatGLM-6B, in files of random numbers.

PYTHONPATH=. python benchmarks/convert_chatglm.py --folder=/tmp/chatglm [--form=bin|safetensors]

Writes 12.3 GB of float16 in eight shards with their index below the folder, converts them in a
process of its own, prints what that took, compares samples of the base with the files, and removes
everything again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from xllm_jax.convert import files, header, run_export
from xllm_jax.convert.sources import chatglm
from xllm_jax.core import checkpoint

SHARDS = 8
WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 4096, 16384, 28, 32, 130528
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "inner_hidden_size": INNER,
}
MEASURED = """
import resource, sys, time
from xllm_jax.convert import run_import
start = time.monotonic()
print(run_import.run_import("chatglm", sys.argv[1], sys.argv[2]).line())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"{time.monotonic() - start:.0f} s, peak resident memory {peak / 1e9:.2f} GB")
"""


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor but the tied head, which would repeat the words."""
    yield chatglm.WORDS, (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        start = f"transformer.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{start}.{norm}.weight", (WIDTH,)
            yield f"{start}.{norm}.bias", (WIDTH,)
        for name, rows, columns in (
            ("attention.query_key_value", 3 * WIDTH, WIDTH),
            ("attention.dense", WIDTH, WIDTH),
            ("mlp.dense_h_to_4h", INNER, WIDTH),
            ("mlp.dense_4h_to_h", WIDTH, INNER),
        ):
            yield f"{start}.{name}.weight", (rows, columns)
            yield f"{start}.{name}.bias", (rows,)
    yield "transformer.final_layernorm.weight", (WIDTH,)
    yield "transformer.final_layernorm.bias", (WIDTH,)


def generate(folder: Path, form: str) -> None:
    """Writes the published form, one shard in memory at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = np.random.default_rng(0)
    listed = list(shapes())
    limit = sum(2 * int(np.prod(shape)) for _, shape in listed) // SHARDS + 1
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in listed:
        if size >= limit:
            groups.append([])
            size = 0
        groups[-1].append((name, shape))
        size += 2 * int(np.prod(shape))
    places = {}
    for number, group in enumerate(groups, 1):
        end = "safetensors" if form == "safetensors" else "bin"
        file = f"model-{number:05d}-of-{len(groups):05d}.{end}"
        write({name: draw(generator, shape) for name, shape in group}, folder / file)
        places |= {name: file for name, _ in group}
    index = {"metadata": {}, "weight_map": places}
    (folder / f"model.{end}.index.json").write_text(json.dumps(index))


def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Finite float16 numbers with random signs and mantissas, of sizes as weights have."""
    bits = np.frombuffer(generator.bytes(2 * int(np.prod(shape))), np.uint16).copy()
    bits &= 0x87FF
    bits |= 0x2000
    return bits.view(np.float16).reshape(shape)


def write(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes one shard."""
    if path.suffix == ".bin":
        import torch

        torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, path)
        return
    headers = {name: header.Header(x.shape, x.dtype) for name, x in tensors.items()}
    run_export.write_file(tensors, headers, path)


def check(source: Path, base: Path) -> None:
    """Compares one tensor of the first, middle and last layer with the file's, and the words."""
    opened, leaves = files.open_checkpoint(source), checkpoint.open_leaves(base)
    for layer in (0, LAYERS // 2, LAYERS - 1):
        name = f"transformer.layers.{layer}.mlp.dense_h_to_4h.weight"
        ours = leaves["llm/layers/feed_forward/up/kernel"][layer].read().result()
        np.testing.assert_array_equal(ours.view(np.uint16), opened[name].T.view(np.uint16))
        name = f"transformer.layers.{layer}.attention.query_key_value.weight"
        ours = leaves["llm/layers/attention/qkv/kernel"][layer].read().result()
        theirs = opened[name].reshape(HEADS, 3, WIDTH // HEADS, WIDTH).transpose(3, 1, 0, 2)
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(leaves["llm/embedding"].read().result(), opened[chatglm.WORDS])


def main() -> None:
    """Generates, converts, measures, compares, removes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--form", choices=("bin", "safetensors"), default="bin")
    flags = parser.parse_args()
    source, base = flags.folder / "source", flags.folder / "base"
    if flags.folder.exists():
        raise SystemExit(f"{flags.folder} is there already")
    try:
        start = time.monotonic()
        generate(source, flags.form)
        written = sum(file.stat().st_size for file in source.iterdir())
        print(f"{written / 1e9:.1f} GB generated in {time.monotonic() - start:.0f} s", flush=True)
        subprocess.run([sys.executable, "-c", MEASURED, str(source), str(base)], check=True)
        check(source, base)
        print("the base equals the files")
    finally:
        shutil.rmtree(flags.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
