"""Builds the synthetic world: a data set of real files whose ground truth is known exactly.

    xllm world --output=world [--quick] [--seed=1]

The full world has 4,000 training images, 3,200 utterances and 1,400 clips in 400 MB, and takes
about a minute of one core. The same command on a finished world does nothing.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from absl import flags

from xllm_jax.core.progress import Bar
from xllm_jax.data.synthetic_world import build
from xllm_jax.launch import cli

OUTPUT = flags.DEFINE_string(
    "output", "world", "Folder in which the world is written; it must not hold other files."
)
QUICK = flags.DEFINE_bool("quick", False, "Build a sixth of everything.")
IMAGES = flags.DEFINE_integer(
    "images",
    0,
    "Build only this many training images, to pre-train an encoder; 0 builds the whole world.",
    0,
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything that is drawn at random.", lower_bound=0)


def wanted_sizes() -> build.WorldSizes:
    """How many of everything the flags ask for."""
    if IMAGES.value:
        nothing = dict.fromkeys((f.name for f in dataclasses.fields(build.WorldSizes)), 0)
        few = {"val_images": 4, "test_images": 4}
        return build.WorldSizes(**{**nothing, **few, "train_images": IMAGES.value})
    return build.WorldSizes().scaled(1 / 6) if QUICK.value else build.WorldSizes()


def main(_: list[str]) -> None:
    sizes = wanted_sizes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A single core works in this process: a second one would only be started in vain.
    workers = cores if cores > 1 else 0
    with Bar(desc="world", unit="file") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        folder = build.build(Path(OUTPUT.value), sizes, SEED.value, workers, show)
    print(f"World in {folder}")


if __name__ == "__main__":
    cli.run(main, "Nothing was left behind")
