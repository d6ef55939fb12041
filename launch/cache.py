r"""Computes what is frozen once: its outputs for every medium become a cache that training reads.

    xllm cache --config=stage2_speech[:tiny] --output=DIR \
        [--modality=speech,image] [--most_gib=16] [--batch=32] [--again]
    xllm train --config=stage2_speech[:tiny] --config.data.cache=DIR --workdir=RUN

What is cached follows from the stage: per modality, everything below the first thing that trains.
Says first how large the cache may get, and writes none above --most_gib. The same command continues
after an interruption and does nothing when all is done. Several hosts write one cache: start it on
each with the flags of launch/hosts.py, as for training; or, on machines that share nothing but
DIR, with --host_count=4 --host_index=0 and so on alone. Media that cannot be used are listed in
DIR/quarantine.jsonl, and training leaves them out as it does without a cache. Exit codes:
launch/cli.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from xllm_jax.launch import cli
from xllm_jax.launch import hosts as host_flags

if TYPE_CHECKING:
    from xllm_jax.core import hosts

CONFIG = config_flags.DEFINE_config_file("config", None, cli.STAGE_HELP)
flags.adopt_module_key_flags(host_flags)
OUTPUT = flags.DEFINE_string("output", None, "Folder in which the cache is written.")
MODALITY = flags.DEFINE_list(
    "modality",
    [],
    "Modalities to cache, with commas between them; without it, all that the stage freezes.",
)
MOST = flags.DEFINE_float(
    "most_gib", 16.0, "Largest size that the cache may get, in GiB; a larger one is not begun.", 0.0
)
BATCH = flags.DEFINE_integer(
    "batch", 32, "Number of files that this host computes at a time.", 1, 65536
)
SHARD = flags.DEFINE_integer("shard_records", 1024, "Number of files in a shard.", 1)
AGAIN = flags.DEFINE_bool("again", False, "Replace the cache that is in the folder.")
flags.declare_key_flag("allow_paths")


def main(_: list[str]) -> None:
    host, count = host_flags.share()
    from xllm_jax.core import hosts, watchdog  # takes seconds, which a mistake need not wait for

    store = hosts.store()
    # Finished shards stay: what SIGTERM or a lost host costs is the shards under way.
    with watchdog.Watch(Path(OUTPUT.value), 0, store):
        compute(host, count, store)


def compute(host: int, count: int, store: hosts.Store | None) -> None:
    """Writes this host's share, and says what became of the cache."""
    from xllm_jax.feature_cache import cache_plan, write

    config = cli.config_files(sys.argv)["config"]
    made = cache_plan.make(CONFIG.value, OUTPUT.value, config, SHARD.value, MODALITY.value)
    print(cache_plan.summary(made), flush=True)
    cache_plan.check_capacity(made, MOST.value)
    found = write.run(made, BATCH.value, host, count, AGAIN.value, store)
    if found is None:
        print(f"Host {host} has written its share; others are still at work")
        return
    kinds = found["modalities"].values()
    size, bad = sum(sum(kind["bytes"]) for kind in kinds), sum(kind["rejected"] for kind in kinds)
    print(f"{size:,} bytes, {bad:,} media could not be used")
    print(f"Train with it: --config.data.cache={OUTPUT.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "output"])
    cli.run(main, "Finished shards are kept, and the same command continues")
