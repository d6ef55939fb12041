"""Computes a micro-batch again that a run stopped at or skipped, and says where it goes wrong.

    python launch/replay.py --file=WORKDIR/replay/1234.npz

Prints the loss, the gradient norm of every part, and the first value that is no number: in the
batch (with its samples), in the parameters, or the operation that makes it.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from launch import command

FILE = flags.DEFINE_string("file", None, "Recording of the micro-batch: WORKDIR/replay/STEP.npz.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; two folders above the file.")


def main(_: list[str]) -> None:
    from xllm_jax import replay

    recording = replay.read(FILE.value)
    workdir = WORKDIR.value or Path(FILE.value).absolute().parents[1]
    print(f"Micro-batch {recording.step} of {recording.stage.name}: {', '.join(recording.keys)}")
    if not recording.exact:
        print(
            f"With the parameters of checkpoint {recording.checkpoint}, the nearest that was kept"
            if recording.checkpoint is not None
            else "With fresh parameters: the run had no checkpoint yet"
        )
    result = replay.run(recording, workdir)
    print(f"loss {result.loss:.6g}, in the run {recording.values['loss']:.6g}")
    for name, value in sorted(result.norms.items()):
        print(f"{name} {value:.6g}")
    for path, index in result.batch.items():
        told = replay.samples(recording, index[0]) if index else "all"
        print(f"no number in batch{path} at {list(index)}: samples {told}")
    for path, index in result.parameters.items():
        print(f"no number in parameter {path} at {list(index)}")
    if result.first:
        print(f"first in {result.first}")
    if result.finite:
        print("All is finite here")


if __name__ == "__main__":
    flags.mark_flags_as_required(["file"])
    command.run(main)
