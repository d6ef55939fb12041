"""Computes a micro-batch again that a run stopped at or skipped, and says where it goes wrong.

    xllm replay --file=WORKDIR/replay/1234.npz

Prints the loss, the gradient norm of every part, and the first value that is NaN or infinite: in
the batch (with its samples), in the parameters, or the operation that makes it.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from xllm_jax.launch import cli

FILE = flags.DEFINE_string("file", None, "Recording of the micro-batch: WORKDIR/replay/STEP.npz.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; without it, the folder two levels above the file."
)


def main(_: list[str]) -> None:
    from xllm_jax.training import replay

    recording = replay.read(FILE.value)
    workdir = WORKDIR.value or Path(FILE.value).absolute().parents[1]
    for line in replay.format_message(recording, replay.run(recording, workdir)):
        print(line)


if __name__ == "__main__":
    flags.mark_flags_as_required(["file"])
    cli.run(main)
