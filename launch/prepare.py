r"""Prepares a data set: writes any source as ArrayRecord shards with the media inside.

    xllm prepare --source=READER --input=PATH --output=DIR [--split=train] \
        [--options='{"kind": "regions"}'] [--name=NAME] [--workers=4] \
        [--beam=--runner=FlinkRunner --beam=--flink_master=HOST:8081]

READER is a file of xllm_jax/data/sources. Every medium is decoded once; what cannot be used is left
out, with its reason, in DIR/manifest.json. The same command continues after an interruption and
does nothing when all is done. Train on it with the readers 'prepared' or 'tfds'.
Needs: pip install -e '.[prepare]'
"""

from __future__ import annotations

from absl import flags

from xllm_jax.core.stage import Source
from xllm_jax.launch import cli
from xllm_jax.prepare import engine, preparation

SOURCE = flags.DEFINE_string(
    "source", None, "Reader of the data set: the name of a file in xllm_jax/data/sources."
)
INPUT = flags.DEFINE_string(
    "input", None, "File or folder of the data set, as its reader expects it."
)
OUTPUT = flags.DEFINE_string("output", None, "Folder in which the prepared set is written.")
SPLIT = flags.DEFINE_string("split", "train", "Split of the data set to read.")
OPTIONS = flags.DEFINE_string("options", "{}", "Options of the reader, as a JSON object.")
NAME = flags.DEFINE_string(
    "name", "", "Name of the prepared set; without it, the name of the reader."
)
SHARD = flags.DEFINE_integer(
    "shard_records", preparation.PER_SHARD, "Number of records in a shard.", 1
)
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Number of worker processes; 0 works in this process.", 0, 1024
)
CHECK = flags.DEFINE_bool(
    "check", True, "Decode every file before it is stored, and leave out what cannot be decoded."
)
DEADLINE = flags.DEFINE_float(
    "deadline",
    preparation.DEADLINE,
    "Time that decoding one file may take, in seconds; then it is left out. 0 decodes in the "
    "writing process, without a deadline or a limit of memory.",
    0.0,
)
MEMORY = flags.DEFINE_float(
    "memory", preparation.MEMORY, "Memory that decoding one file may take, in gigabytes.", 0.1
)
BEAM = flags.DEFINE_multi_string("beam", [], "Pipeline option for Apache Beam")
flags.declare_key_flag("allow_paths")


def main(_: list[str]) -> None:
    allowed = tuple(cli.ALLOW_PATHS.value)
    source = Source(
        SOURCE.value,
        INPUT.value,
        SPLIT.value,
        cli.json_object(OPTIONS.value, "--options", '{"kind": "asr"}'),
        allowed,
    )
    name = NAME.value or SOURCE.value
    made = preparation.make(
        name,
        source,
        OUTPUT.value,
        SHARD.value,
        CHECK.value,
        deadline=DEADLINE.value,
        memory=MEMORY.value,
    )
    found = engine.run(made, BEAM.value, WORKERS.value)["splits"][SPLIT.value]
    print(
        f"{found['records']:,} records in {len(found['shards'])} shards, {found['bytes']:,} bytes; "
        f"{found['rejected']:,} rejected (see {OUTPUT.value}/manifest.json)"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["source", "input", "output"])
    cli.run(main, "Finished shards are kept, and the same command continues")
