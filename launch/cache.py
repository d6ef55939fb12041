"""Computes what is frozen once: its outputs for every medium become a cache that training reads.

    python launch/cache.py --config=configs/stage2_speech.py[:tiny] --output=DIR \
        [--modality=speech,image] [--most_gib=16] [--batch=32] [--again]
    python launch/train.py --config=configs/stage2_speech.py[:tiny] --config.data.cache=DIR \
        --workdir=RUN

What is cached follows from the stage: per modality, everything below the first thing that trains.
Says first how large the cache may get, and writes none above --most_gib. The same command continues
after an interruption and does nothing when all is done. Several hosts write one cache: start it on
each with --host=0 --hosts=4 and so on, and the same --output. Media that cannot be used are listed
in DIR/quarantine.jsonl, and training leaves them out as it does without a cache.
"""

from __future__ import annotations

import sys

import jax
from absl import flags
from ml_collections import config_flags

from launch import command
from xllm_jax.cache import plan, write

CONFIG = config_flags.DEFINE_config_file("config", None, "Stage file: configs/NAME.py[:tiny].")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the cache.")
MODALITY = flags.DEFINE_list("modality", [], "Modalities to cache; all that can be by default.")
MOST = flags.DEFINE_float("most_gib", 16.0, "GiB that the cache may take.", 0.0)
BATCH = flags.DEFINE_integer("batch", 32, "Media computed at a time on this host.", 1)
SHARD = flags.DEFINE_integer("shard_records", 1024, "Media per shard.", 1)
AGAIN = flags.DEFINE_bool("again", False, "Replace another cache in the folder.")
HOST = flags.DEFINE_integer("host", None, "Number of this host; JAX's by default.", 0)
HOSTS = flags.DEFINE_integer("hosts", None, "How many hosts write this cache.", 1)


def main(_: list[str]) -> None:
    config = command.config_files(sys.argv)["config"]
    made = plan.make(CONFIG.value, OUTPUT.value, config, SHARD.value, MODALITY.value)
    print(plan.told(made), flush=True)
    plan.room(made, MOST.value)
    host = jax.process_index() if HOST.value is None else HOST.value
    hosts = jax.process_count() if HOSTS.value is None else HOSTS.value
    found = write.run(made, BATCH.value, host, hosts, AGAIN.value)
    if found is None:
        print(f"Host {host} has written its share; others are still at work")
        return
    kinds = found["modalities"].values()
    size, bad = sum(sum(kind["bytes"]) for kind in kinds), sum(kind["rejected"] for kind in kinds)
    print(f"{size:,} bytes, {bad:,} media could not be used")
    print(f"Train with it: --config.data.cache={OUTPUT.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "output"])
    command.run(main)
