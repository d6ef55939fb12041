"""Builds the embedded data set: real files whose ground truth is known exactly.

    python launch/world.py --output=world [--quick] [--seed=1]

The full world has 2400 training images, 4000 utterances and 700 clips in 300 MB; two free cores
need less than a minute. The same command on a finished world does nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from absl import flags
from tqdm import tqdm

from launch import command
from xllm_jax.data.world import build

OUTPUT = flags.DEFINE_string("output", "world", "Folder of the world; must not hold other files.")
QUICK = flags.DEFINE_bool("quick", False, "A sixth of everything.")
SEED = flags.DEFINE_integer("seed", 0, "All randomness hangs on it.", lower_bound=0)


def main(_: list[str]) -> None:
    sizes = build.WorldSizes().scaled(1 / 6) if QUICK.value else build.WorldSizes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A single core works in this process: a second one would only be started in vain.
    workers = cores if cores > 1 else 0
    with tqdm(desc="world", unit="file", dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        folder = build.build(Path(OUTPUT.value), sizes, SEED.value, workers, show)
    print(f"World in {folder}")


if __name__ == "__main__":
    command.run(main)
